"""MoLS on DeepSpeed ZeRO."""

from mols_ds.zero.engine import DisabledMols, EngineMols, attach, initialize

__all__ = ["DisabledMols", "EngineMols", "attach", "initialize"]
