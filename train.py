"""Pre-trains a decoder language model with DeepSpeed, with or without MoLS.

    deepspeed --config configs/ds_mols.json train.py                      (launch/ first on PATH)
    mols-ds launch --config configs/ds_mols.json train.py --compare adam
    deepspeed train.py --deepspeed_config configs/ds_mols.json            (the stock launcher)

Everything that DeepSpeed decides (batch size, precision, optimizer, ZeRO stage) and the "mols" section stand in the
config; everything else are the arguments below. A config without a "mols" section trains with stock DeepSpeed.
"""

import sys

from mols_ds.apps.train import main

if __name__ == "__main__":
    sys.exit(main())
