"""MoLS on DeepSpeed ZeRO."""

from mols_ds.engines.deepspeed.api import attach, initialize
from mols_ds.engines.deepspeed.engine import EngineMols

__all__ = ["EngineMols", "attach", "initialize"]
