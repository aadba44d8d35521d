"""Pre-trains a decoder language model with Megatron-core, with or without MoLS.

    torchrun --nproc_per_node 4 train_megatron.py --config configs/megatron/tiny_tp2_pp2.yaml --compare adam
    python train_megatron.py --config configs/megatron/tiny.yaml --set run.steps=50

All settings are in the config file, in sections; `--set section.key=value` changes a value. A config without a "mols"
section trains with stock Megatron-core. On the CPU and gloo where there is no GPU.
"""

import sys

from mols_ds.apps.train_megatron.main import main

if __name__ == "__main__":
    sys.exit(main())
