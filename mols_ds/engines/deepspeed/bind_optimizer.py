"""Bind an optimizer that sums over ZeRO's shards (mols_ds.optim.sharded) to the shards of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, local_shape
from mols_ds.engines.deepspeed.parallel.find import find_grid
from mols_ds.engines.deepspeed.shards import Replicated, find_shards
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.param_shards import Reduce
from mols_ds.optim.sharded import ShardedOptimizer

Refusal = tuple[bool, str, str]
"""(whether it applies, what is not supported, what to do)."""


def bind_optimizer(engine: Engine, rules: Sequence[tuple[str, str]] | None = None) -> None:
    """Bind the engine's optimizer, if it is a `ShardedOptimizer`. Does nothing for others, and for one that is bound.

    Collective: every rank calls it, after `deepspeed.initialize` and before the first step.

    Args:
        engine: a DeepSpeed engine.
        rules: the user's group rules; None: those of the engine's config.

    Raises:
        MolsUnsupportedError: an engine or setting with which the optimizer would be wrong; named, with what to do.
        MolsConfigError: a parameter has no module group (see `mols_ds.group_table`), so no blocks for Adam-mini.
    """
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    if not isinstance(inner, ShardedOptimizer):
        return
    for refuse, what, way_out in _refusals(engine, inner):
        if refuse:
            raise MolsUnsupportedError(f"{type(inner).__name__} does not support {what}: {way_out}")
    shards = find_shards(engine)
    if [id(tensor) for tensor in inner.bound_to] == [id(tensor) for tensor in shards.tensors]:
        return
    named = {name: parameter for parameter, name in engine.param_names.items() if name in shards.param_group}
    shapes = {name: local_shape(parameter) for name, parameter in named.items()}
    if rules is None:
        section = engine.config.get("mols") if isinstance(engine.config, Mapping) else None
        rules = (section or {}).get("rules") or ()
    blocks = inner.model_blocks(engine.module, shapes, rules)
    reduce = None if isinstance(shards, Replicated) else _reduction(engine)
    inner.bind(shards.tensors, shards.ranges, shapes, blocks, reduce)


def _reduction(engine: Engine) -> Reduce:
    """Return a SUM over the data-parallel ranks; on the accelerator also for shards on the CPU."""

    def reduce(values: Tensor) -> Tensor:
        sums = values.to(get_accelerator().current_device_name())
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=engine.seq_data_parallel_group)
        return sums.to(values.device)

    return reduce


def _refusals(engine: Engine, inner: ShardedOptimizer) -> list[Refusal]:
    outer = engine.optimizer
    stays = not inner.moves
    partial = getattr(outer, "backup_optimizer", None) is not None or getattr(outer, "partial_offload", 1.0) != 1.0
    return [
        (
            type(find_grid(engine)) is not ParallelGrid or bool(getattr(engine, "has_moe_layers", False)),
            "tensor, pipeline or expert parallelism (a rank does not know the other parts of its parameters)",
            "use data parallelism with ZeRO, or AdamW",
        ),
        (
            bool(getattr(outer, "swap_optimizer", False)),
            "optimizer state on NVMe (its sums over the model need all of it)",
            'set "offload_optimizer.device": "cpu"',
        ),
        (partial, "offload_optimizer.ratio < 1 (a second optimizer steps the rest)", "remove it"),
        (
            stays and engine.load_universal_checkpoint(),
            "universal checkpoints, which carry Adam's two moments only",
            'remove "checkpoint.load_universal" and resume with the same number of ranks, or use AdamW',
        ),
        (
            bool(getattr(outer, "elastic_checkpoint", False)),
            '"zero_optimization.elastic_checkpoint" (it cuts all state as if it had the size of the weights)',
            "remove it",
        ),
    ]
