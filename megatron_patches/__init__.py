"""MoLS on Megatron-core. Not in this release: the package is reserved and holds no code yet.

Version 0.1 supports DeepSpeed ZeRO stages 0 to 3 (see `mols_ds`). Importing this package changes nothing elsewhere.
"""
