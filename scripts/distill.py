"""`linformer-hf distill` as a file, for launchers that start a program in several processes:

    torchrun --nproc_per_node 2 scripts/distill.py RECIPE.yaml [section.key=value ...] [--resume]
    accelerate launch scripts/distill.py RECIPE.yaml [section.key=value ...] [--resume]

`--expect-processes N` stops the run unless the launcher started N processes.
"""

import sys

from launch import launch


if __name__ == "__main__":
    sys.exit(launch("distill"))
