"""Fine-tunes a language model on instructions and answers with DeepSpeed, with or without MoLS.

    deepspeed --config configs/ds_finetune.json finetune.py --model CHECKPOINT --data FILE   (launch/ first on PATH)
    mols-ds launch --config configs/ds_finetune.json finetune.py --model CHECKPOINT --data FILE --method dora
    deepspeed finetune.py --deepspeed_config configs/ds_finetune.json ...                    (the stock launcher)

--method full trains all weights, lora and dora peft's adapters. docs/finetuning.md has the data's forms and the rest.
"""

import sys

from mols_ds.apps.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
