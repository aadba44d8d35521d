"""MoLS on DeepSpeed ZeRO: `api.attach` and `api.initialize`; `mols_ds` exports both."""
