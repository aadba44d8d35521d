"""Checks of a Megatron setup before MoLS attaches. Each refusal names the setting and the fix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_patches import compat, precision
from megatron_patches.compat import TransformerConfig
from mols_ds.core.config import Mode, MolsConfig
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.optim.step_trial import class_refusal, decay_in_moments


def check_supported(optimizer: object, model_config: object, config: MolsConfig, *, fused: bool) -> None:
    """Check that MoLS can scale this optimizer.

    Args:
        optimizer: Megatron's ChainedOptimizer.
        model_config: TransformerConfig of the model.
        config: the "mols" section.
        fused: some parameter has elements of several groups.

    Raises:
        MolsUnsupportedError: a setting that would train wrong weights.
    """
    compat.check_optimizer(optimizer)
    precision.check(model_config, getattr(optimizer, "config", None))
    unscaled = config.weight_decay == "unscaled"
    refusals = precision.optimizer_refusals(optimizer, config.measures, fused=fused, unscaled=unscaled)
    for applies, what, way_out in [*refusals, decay_refusal(optimizer, config.measures)]:
        if applies:
            raise MolsUnsupportedError(f"MoLS does not support {what}: {way_out}")
    check_classes(optimizer)


def decay_refusal(optimizer: object, mode: Mode | None) -> precision.Refusal:
    """Return the refusal of L2 decay in mode "moments". Runs a trial step for an unknown class."""
    return precision.Refusal(
        mode == "moments" and any(decay_in_moments(one) for one in precision.inner_optimizers(optimizer)),
        "mode 'moments' with weight decay that is added to the gradient and so changes Adam's moments",
        'decoupled_weight_decay, weight_decay 0, or mode "probe" or "online"',
    )


def check_classes(optimizer: object) -> None:
    """Raise `MolsUnsupportedError` for an inner optimizer whose step is not proportional to lr."""
    for inner in precision.inner_optimizers(optimizer):
        if (refused := class_refusal(inner)) is not None:
            raise MolsUnsupportedError(f"MoLS does not support {refused[0]}: {refused[1]}")


def find_config(model_chunks: Sequence[nn.Module]) -> TransformerConfig:
    """Find the TransformerConfig of a model.

    Args:
        model_chunks: this rank's part of the model, as for the optimizer.

    Raises:
        MolsConfigError: no chunk, or no module has one.
    """
    if not model_chunks:
        raise MolsConfigError("no model chunk was given: pass the list of modules that the optimizer was built from")
    for module in model_chunks[0].modules():
        config = getattr(module, "config", None)
        if hasattr(config, "num_attention_heads") or hasattr(config, "hidden_size"):
            return config
    raise MolsConfigError(
        f"{type(model_chunks[0]).__name__} has no TransformerConfig as `.config`, which fused layouts need"
    )
