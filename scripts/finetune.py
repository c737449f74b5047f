"""`linformer-hf finetune` as a file, for launchers that start a program in several processes:

    torchrun --nproc_per_node 2 scripts/finetune.py RECIPE.yaml [section.key=value ...] [--resume]
    accelerate launch scripts/finetune.py RECIPE.yaml [section.key=value ...] [--resume]

It is the same as `torchrun --nproc_per_node 2 -m linformer_hf finetune ...`.
"""

import runpy
import sys


if __name__ == "__main__":
    sys.argv[:1] = ["linformer-hf", "finetune"]
    runpy.run_module("linformer_hf", run_name="__main__")
