"""`linformer-hf pretrain` as a file, for launchers that start a program in several processes:

    torchrun --nproc_per_node 2 scripts/pretrain.py RECIPE.yaml [section.key=value ...] [--resume]
    accelerate launch scripts/pretrain.py RECIPE.yaml [section.key=value ...] [--resume]

It is the same as `torchrun --nproc_per_node 2 -m linformer_hf pretrain ...`.
"""

import runpy
import sys


if __name__ == "__main__":
    sys.argv[:1] = ["linformer-hf", "pretrain"]
    runpy.run_module("linformer_hf", run_name="__main__")
