"""MoLS on DeepSpeed ZeRO."""

from mols_ds.zero.engine import EngineMols
from mols_ds.zero.entry import DisabledMols, attach, initialize

__all__ = ["DisabledMols", "EngineMols", "attach", "initialize"]
