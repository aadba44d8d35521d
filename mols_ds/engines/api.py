"""`mols_ds.attach`: choose the adapter by what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.errors import MolsConfigError

if TYPE_CHECKING:
    from torch.amp import GradScaler


def attach(
    engine: Any,
    config: Mapping[str, object] | MolsConfig | nn.Module,
    section: Mapping[str, object] | MolsConfig | None = None,
    *,
    total_steps: int | None = None,
    grad_scaler: GradScaler | None = None,
) -> Handle:
    """Attach MoLS to a DeepSpeed engine, or to torch optimizers. Collective: every rank calls it at the same point.

        mols = mols_ds.attach(engine, section)
        mols = mols_ds.attach(optimizer, model, section, total_steps=N)

    Args:
        engine: result of `deepspeed.initialize`; or a torch optimizer, a list of them, or an object with
            `.optimizers` (torchtitan's container).
        config: of an engine: a "mols" section (dict) or a `MolsConfig`. Of optimizers: the model that they train, as
            the loop calls it: plain, in DDP, after `fully_shard` or `parallelize_module`, compiled.
        section: of optimizers: the "mols" section or `MolsConfig`.
        total_steps: of optimizers: updates of the whole run, for shares in "mols.start" and "mols.ramp_end".
        grad_scaler: of optimizers: the loop's `torch.amp.GradScaler`, if it has one.

    Returns:
        The handle, also at `engine.mols` or `optimizer.mols`. Its `detach()` makes the engine stock again.

    Raises:
        MolsConfigError: a wrong section, rule, argument or group name.
        MolsUnsupportedError: an unsupported engine, optimizer, model or setting; names it and what to do.
    """
    if section is not None or isinstance(config, nn.Module):
        from mols_ds.engines.torch.api import attach as attach_optimizer

        return attach_optimizer(engine, config, section, total_steps, grad_scaler)
    if isinstance(engine, Optimizer):
        raise MolsConfigError(
            "mols_ds.attach: an optimizer needs its model too: mols_ds.attach(optimizer, model, section, "
            "total_steps=N); under DeepSpeed pass the engine instead of its optimizer"
        )
    if total_steps is not None or grad_scaler is not None:
        raise MolsConfigError(
            "mols_ds.attach: total_steps and grad_scaler are for torch optimizers; leave them out for an engine, and "
            'put "total_steps" into its section'
        )
    from mols_ds.engines.deepspeed.api import attach as attach_engine

    return attach_engine(engine, config)
