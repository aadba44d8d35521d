"""MoLS on DeepSpeed ZeRO: `api.attach` and `api.initialize`, which `mols_ds` gives under its own name."""
