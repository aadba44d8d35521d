"""MoLS on DeepSpeed ZeRO."""

from mols_ds.engines.deepspeed.api import DisabledMols, attach, initialize
from mols_ds.engines.deepspeed.engine import EngineMols

__all__ = ["DisabledMols", "EngineMols", "attach", "initialize"]
