"""The ranges of every rank under ZeRO: DeepSpeed's own optimizer on the meta device, read by
`mols_ds.engines.deepspeed.shards`.

What is DeepSpeed's: the constructor of `DeepSpeedZeroOptimizer` (stages 1 and 2) or `DeepSpeedZeroOptimizer_Stage3`
with all its alignment, padding, sub-groups and partition tables, built as one rank of the simulated world. What is
this package's: `find_shards`, that is `Stage12` or `Stage3`, for each rank. What one constructor serves all ranks by:

- Stages 1 and 2: the tables of where a partition begins (`grad_start_offset`, `grad_partition_insertion_offset`) hold
  every partition; which parameters lie in a partition (`params_in_partition`) is asked of DeepSpeed's
  `get_partition_info` for each rank, as its constructor does for its own.
- Stage 3: a rank's place in the flat sub-groups (`grad_position`) is that of every rank, since each holds a share of
  ceil(numel / ranks) of every parameter.

`ZeroWorld.built` builds another rank whole, to be compared with what one constructor gave for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from mols_ds.apps.plan.local import fake_world
from mols_ds.core.groups import GroupTable, group_table
from mols_ds.training.models import meta_model
from tests.tools.simulate.meta import on_meta

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
from mols_ds.core.ranges import ShardRange

OPTIONS = ("sub_group_size", "round_robin_gradients", "parameter_alignment", "stage3_param_persistence_threshold")
"""Keys of "zero_optimization" that define the sharding."""


def build_model(source: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a file on the meta device. Raises MolsConfigError as `load_model_config`."""
    return meta_model(source, dtype)


def decay_groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices with weight decay and vectors without, as training scripts have it: two flat buffers to be cut.

    The one of the vectors is so small that most ranks of a large world own nothing in it.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    wide = [p for p in trainable if p.ndim >= 2]
    flat = [p for p in trainable if p.ndim < 2]
    groups: list[dict[str, object]] = [{"params": wide}, {"params": flat, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class _Still(torch.optim.SGD):
    """An optimizer without state whose steps do nothing: DeepSpeed takes some while it is built."""

    def step(self, closure: Any = None) -> Any:
        return None


@dataclass
class ZeroWorld:
    """One model under one ZeRO stage on `ranks` data-parallel ranks.

    model: makes the same model each time; stage 3 takes a model's parameters apart for good.
    groups: the parameter groups of a model's optimizer.
    options: of `OPTIONS`.
    """

    model: Any
    stage: int
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    groups: Any = decay_groups

    @functools.cached_property
    def table(self) -> GroupTable:
        return group_table(self.model())

    def ranges(self) -> Iterator[list[ShardRange]]:
        """The owned ranges of rank 0, 1, ..., by one constructor."""
        with self._engine(0) as engine:
            for rank in range(self.ranks):
                with _as_rank(rank):
                    if self.stage in (1, 2):
                        _enter_partition(engine.optimizer, rank)
                    yield _ranges_of(engine)

    def built(self, rank: int) -> list[ShardRange]:
        """The owned ranges of one rank, for which DeepSpeed's constructor is run."""
        with self._engine(rank) as engine:
            return _ranges_of(engine)

    @contextlib.contextmanager
    def _engine(self, rank: int) -> Iterator[SimpleNamespace]:
        """What `find_shards` asks of an engine, with DeepSpeed's optimizer of `rank`."""
        from deepspeed import comm

        model = self.model()
        names = {p: name for name, p in model.named_parameters()}
        with fake_world(rank, self.ranks), _deepspeed():
            optimizer = _Still(self.groups(model), lr=0.1)
            with on_meta():
                outer = self._wrap(model, optimizer, names)
            group = comm.get_world_group()
            yield SimpleNamespace(optimizer=outer, param_names=names, module=model, seq_data_parallel_group=group)

    def _wrap(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]
    ) -> torch.optim.Optimizer | ZeROOptimizer:
        from deepspeed import comm
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        common = {
            "dp_process_group": comm.get_world_group(),
            "contiguous_gradients": True,
            "communication_data_type": torch.bfloat16,
            "gradient_accumulation_dtype": torch.float32,
        }
        if self.stage == 0:
            return optimizer
        if self.stage == 3:
            names_here = {"stage3_param_persistence_threshold": "param_persistence_threshold"}
            allowed = ("sub_group_size", *names_here)
            more = {names_here.get(key, key): value for key, value in self.options.items() if key in allowed}
            config = {"train_batch_size": self.ranks, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
            more = {"sub_group_size": 1_000_000_000} | more
            return DeepSpeedZeroOptimizer_Stage3(model, optimizer, names, NoopTimer(), config, **common, **more)
        more = {key: self.options[key] for key in OPTIONS[1:3] if key in self.options}
        # Stage 1 with 16-bit gradients: with fp32 ones the engine takes BF16_Optimizer, which is cut in the same way
        return DeepSpeedZeroOptimizer(optimizer, names, None, {}, partition_grads=self.stage == 2, **common, **more)


def _ranges_of(engine: Any) -> list[ShardRange]:
    """As `EngineMols` takes them from the shards (mols_ds/engines/deepspeed/engine.py)."""
    from mols_ds.engines.deepspeed.shards import find_shards

    return find_shards(engine).accumulated


def _enter_partition(outer: ZeROOptimizer, rank: int) -> None:
    """What the constructor asks for its own rank (runtime/zero/stage_1_and_2.py, the loop over groups)."""
    groups = zip(outer.round_robin_bit16_groups, outer.partition_size, outer.round_robin_bit16_padding, strict=True)
    for i, (tensors, size, padding) in enumerate(groups):
        outer.params_in_partition[i] = outer.get_partition_info(tensors, size, rank, padding)[0]


@contextlib.contextmanager
def _as_rank(rank: int) -> Iterator[None]:
    """`deepspeed.comm.get_rank` returns `rank` for every group: all groups here are the whole world."""
    with mock.patch("deepspeed.comm.get_rank", lambda group=None: rank):
        yield


@contextlib.contextmanager
def _deepspeed() -> Iterator[None]:
    """DeepSpeed's communication on the fake world, and an accelerator that is the meta device with room for all."""
    import deepspeed
    from deepspeed.utils import logger

    comm, torch_comm = (importlib.import_module(f"deepspeed.comm.{name}") for name in ("comm", "torch"))
    accelerator = deepspeed.accelerator.get_accelerator()
    meta = {
        "current_device_name": lambda: "meta",
        "device_name": lambda index=None: "meta",
        "available_memory": lambda *a: 1 << 60,
        "on_accelerator": lambda tensor: True,
        "pin_memory": lambda tensor, *a, **k: tensor,
    }
    with contextlib.ExitStack() as stack:
        # Its shared-memory reductions are compiled where they are first used; nothing here reduces
        stack.enter_context(mock.patch.object(torch_comm, "build_shm_op", lambda: None))
        backend = torch_comm.TorchBackend("fake", None, None)
        stack.enter_context(mock.patch.object(comm, "cdb", backend))
        stack.enter_context(mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}))
        for name, value in meta.items():
            stack.enter_context(mock.patch.object(accelerator, name, value))
        level = logger.level
        stack.callback(logger.setLevel, level)
        logger.setLevel("ERROR")
        yield


def first_difference(left: Sequence[ShardRange], right: Sequence[ShardRange]) -> str:
    """What differs between two lists of ranges, or ""."""
    if len(left) != len(right):
        return f"{len(left)} ranges and {len(right)}"
    return next((f"{a} and {b}" for a, b in zip(left, right, strict=True) if a != b), "")
