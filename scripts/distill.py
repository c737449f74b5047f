"""`linformer-hf distill` as a file, for launchers that start a program in several processes:

    torchrun --nproc_per_node 2 scripts/distill.py RECIPE.yaml [section.key=value ...] [--resume]
    accelerate launch scripts/distill.py RECIPE.yaml [section.key=value ...] [--resume]

It is the same as `torchrun --nproc_per_node 2 -m linformer_hf distill ...`.
"""

import runpy
import sys


if __name__ == "__main__":
    sys.argv[:1] = ["linformer-hf", "distill"]
    runpy.run_module("linformer_hf", run_name="__main__")
