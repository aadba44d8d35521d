"""The slow, obvious single-process reference of the product: plain PyTorch, float64, one mask per parameter.

Nothing here imports mols_ds or DeepSpeed. Formulas are those of arXiv 2605.05794 (SNR_i = mu_i^2 / s_i^2) and of the
product's documentation, written down naively.
"""
