"""MoLS in Lightning: a callback. Lightning's DeepSpeedStrategy needs a GPU.

python examples/lightning_module.py
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny import SECTION, model, sequences, show
from transformers import get_linear_schedule_with_warmup

from mols_ds.integrations.lightning import MolsCallback

UPDATES = 24


class Module(pl.LightningModule):
    """The usual module."""

    def __init__(self):
        super().__init__()
        self.model = model()

    def training_step(self, batch, batch_idx):
        """Next-token loss."""
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """AdamW with a linear schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = get_linear_schedule_with_warmup(optimizer, 4, UPDATES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    pl.seed_everything(0)
    callback = MolsCallback(SECTION)  # <- MoLS
    trainer = pl.Trainer(
        accelerator="auto",
        strategy=DeepSpeedStrategy(stage=2),
        max_steps=UPDATES,
        callbacks=[callback],
        logger=CSVLogger("out/lightning"),
        log_every_n_steps=4,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(sequences(), batch_size=4))
    show(callback.mols)
    torch.distributed.barrier()  # without these two lines a thread of gloo may abort the exit
    torch.distributed.destroy_process_group()
