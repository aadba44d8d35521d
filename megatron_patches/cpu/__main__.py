"""`torchrun -m megatron_patches.cpu pretrain_gpt.py ...`: a training script of Megatron-LM on a CPU."""

import sys

from megatron_patches.cpu.language_model import main

if __name__ == "__main__":
    sys.exit(main())
