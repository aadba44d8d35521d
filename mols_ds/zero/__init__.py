"""MoLS on DeepSpeed ZeRO."""

from mols_ds.zero.attach import DisabledMols, EngineMols, attach, initialize

__all__ = ["DisabledMols", "EngineMols", "attach", "initialize"]
