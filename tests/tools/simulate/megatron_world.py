"""The ranges of every rank under Megatron-core: its own model, buffers and DistributedOptimizer on the meta device.

From Megatron: the process grid (`parallel_state.initialize_model_parallel` over a fake world, `RankGenerator` for each
rank), the `GPTModel` of each pipeline stage, `DistributedDataParallel` with its padded buckets, and
`get_megatron_optimizer` for each data-parallel rank. From this package, for every rank: `local_parameters`,
`MegatronShards` and the logical table.

One build serves several ranks. The tensor-parallel ranks of a stage have equal shapes, and so have the expert-parallel
ones, so Megatron's ranges are the same for them. `local_parameters` finds the part of the logical parameter from the
position of each rank. `MegatronWorld.built` builds another rank separately, for a comparison.

Without Transformer Engine, Megatron's local modules are built: norms are separate modules and experts are not grouped.
The elements are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from megatron_patches.param_map import LocalParameter, ProcessGrid, shape_of
from mols_ds.apps.plan.local import fake_world
from mols_ds.core.groups import GroupTable
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsUnsupportedError
from tests.tools.simulate.meta import on_meta

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from mols_ds.training.megatron_settings import Settings

ORDER = "tp-cp-ep-dp-pp"  # of parallel_state.initialize_model_parallel


class Stage(NamedTuple):
    """One rank's wrapped model chunks and its grid."""

    chunks: list[Any]
    config: Any
    settings: Settings

    def optimizer(self) -> MegatronOptimizer:
        """Megatron's chained optimizer over the chunks' buffers."""
        from megatron.core.optimizer import get_megatron_optimizer

        from mols_ds.training.megatron_config import optimizer_config

        with on_meta():
            return get_megatron_optimizer(optimizer_config(self.settings), self.chunks, use_gloo_process_groups=False)

    def move(self, data_rank: int, expert_data_rank: int) -> None:
        """Let the buffers lie on another data-parallel rank: where DistributedOptimizer asks for it."""
        for chunk in self.chunks:
            for buffers, rank in ((chunk.buffers, data_rank), (chunk.expert_parallel_buffers, expert_data_rank)):
                for buffer in buffers:
                    size = int(buffer.data_parallel_world_size)
                    buffer.data_parallel_group = SimpleNamespace(rank=lambda r=rank: r, size=lambda n=size: n)


class RankRanges(NamedTuple):
    """What one rank owns; `tiles` as in `Count.add`, `stage`: of the pipeline."""

    ranges: list[ShardRange]
    tiles: dict[str, int]
    stage: int


class MegatronWorld:
    """A config file of train_megatron.py on `ranks` ranks.

    settings: `mols_ds.training.megatron_settings.Settings`.
    Raises MolsConfigError where the ranks do not divide, MolsUnsupportedError for several optimizer instances.
    """

    def __init__(self, settings: Settings, ranks: int) -> None:
        from mols_ds.training.megatron_config import GridSizes

        if settings.parallel.distributed_optimizer_instances > 1:
            raise MolsUnsupportedError(
                "parallel.distributed_optimizer_instances > 1 is not simulated; set it to 1 for the simulation"
            )
        GridSizes.of(settings, ranks)
        self.settings = _plain(settings)
        self.ranks = ranks

    def run(self) -> tuple[GroupTable, list[RankRanges]]:
        """The logical group table and what rank 0, 1, ... owns."""
        from megatron_patches.collective_checks import check_locals, merge_shapes
        from megatron_patches.param_map import LogicalModel, local_parameters
        from megatron_patches.shards import MegatronShards

        owned: dict[int, RankRanges] = {}
        gathered, found = [], []
        for stage, members in self._stages().items():
            first = min(members, key=lambda rank: (members[rank].data_rank, members[rank].tensor_rank, rank))
            with self._stage(first) as built:
                for ranks in _alike(members):
                    built.move(members[ranks[0]].data_rank, members[ranks[0]].expert_data_rank)
                    optimizer = built.optimizer()
                    for rank in ranks:
                        locals_ = local_parameters(built.chunks, members[rank])
                        gathered.append({local.name: local.shape for local in locals_ if local.names_it})
                        ranges = MegatronShards(optimizer, locals_, members[rank]).accumulated
                        owned[rank] = RankRanges(ranges, _tiles(locals_, members[rank]), stage)
                        found += locals_ if rank == ranks[0] else []
                config = built.config
        shapes = merge_shapes(gathered)
        check_locals(found, shapes)
        return LogicalModel(shapes).table(config, (), "type"), [owned[rank] for rank in range(self.ranks)]

    def built(self, rank: int) -> list[ShardRange]:
        """The owned ranges of one rank, for which everything is built in its own place."""
        from megatron_patches.param_map import current_grid, local_parameters
        from megatron_patches.shards import MegatronShards

        with self._stage(rank) as stage:
            grid = current_grid()
            return MegatronShards(stage.optimizer(), local_parameters(stage.chunks, grid), grid).accumulated

    # ------------------------------------------------------------------ the grid

    def places(self) -> list[ProcessGrid]:
        """The grid as rank 0, 1, ... has it, from Megatron's own order of ranks."""
        from megatron.core.parallel_state import RankGenerator

        parallel = self.settings.parallel
        tp, pp, cp, ep = parallel.tp, parallel.pp, parallel.cp, parallel.ep
        etp = parallel.etp or tp
        dense = RankGenerator(tp=tp, ep=1, dp=self.ranks // (tp * pp * cp), pp=pp, cp=cp, order=ORDER)
        expert = RankGenerator(tp=etp, ep=ep, dp=self.ranks // (etp * ep * pp), pp=pp, cp=1, order=ORDER)
        sources = {
            "tensor": (dense, "tp"),
            "pipeline": (dense, "pp"),
            "data": (dense, "dp-cp"),
            "expert": (expert, "ep"),
            "expert_tensor": (expert, "tp"),
            "expert_data": (expert, "dp"),
        }
        places: list[dict[str, int]] = [{} for _ in range(self.ranks)]
        for name, (generator, token) in sources.items():
            for group in generator.get_ranks(token):
                for number, rank in enumerate(group):
                    places[rank] |= {name: len(group), f"{name}_rank": number}
        return [ProcessGrid(**place) for place in places]

    def _stages(self) -> dict[int, dict[int, ProcessGrid]]:
        """Pipeline stage -> rank -> its place."""
        stages: dict[int, dict[int, ProcessGrid]] = {}
        for rank, place in enumerate(self.places()):
            stages.setdefault(place.pipeline_rank, {})[rank] = place
        return stages

    @contextlib.contextmanager
    def _stage(self, rank: int) -> Iterator[Stage]:
        """Model and buffers of `rank` in its own process grid."""
        from megatron_patches.cpu.emulation import cpu_megatron

        with fake_world(rank, self.ranks), cpu_megatron():
            from megatron.core import parallel_state

            from mols_ds.training import megatron_build as build
            from mols_ds.training.megatron_config import transformer_config

            with _no_agreement():
                parallel_state.initialize_model_parallel(
                    **build.grid_sizes(self.settings), create_gloo_process_groups=False
                )
                try:
                    config = transformer_config(self.settings)
                    with on_meta():
                        build.seed_all(self.settings)
                        chunks = build._chunks(self.settings, config, self.settings.model.vocab_size, engine=False)
                    yield Stage(chunks, config, self.settings)
                finally:
                    parallel_state.destroy_model_parallel()


def _plain(settings: Settings) -> Settings:
    """The same cut of the same elements, without what only Transformer Engine can build."""
    from mols_ds.training.megatron_settings import PrecisionSettings

    model = settings.model
    engine_only = {"moe_grouped_gemm": False, "moe_router_padding_for_quantization": False}
    changes = {key: value for key, value in engine_only.items() if model.further.get(key)}
    model = type(model).model_validate({**model.model_dump(), **changes})
    precision = PrecisionSettings(dtype="bf16" if settings.precision.fp8 else settings.precision.dtype)
    precision = precision.model_copy(update={"grad_reduce_in_fp32": settings.precision.grad_reduce_in_fp32})
    return settings.model_copy(update={"model": model, "precision": precision})


def _tiles(locals_: Sequence[LocalParameter], grid: ProcessGrid) -> dict[str, int]:
    """Elements before this rank's tile, of the weights that tensor parallelism cuts by columns (linear_proj, fc2)."""
    found = {}
    for local in locals_:
        if shape_of(local.parameter)[1:] != local.shape[1:]:
            rank = grid.expert_tensor_rank if ".experts." in local.name else grid.tensor_rank
            found[local.name] = rank * local.range.numel
    return found


def _alike(members: dict[int, ProcessGrid]) -> list[list[int]]:
    """The ranks of a stage, those together that hold the same ranges of their buffers."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank, place in members.items():
        found.setdefault((place.data_rank, place.expert_data_rank), []).append(rank)
    return list(found.values())


@contextlib.contextmanager
def _no_agreement() -> Iterator[None]:
    """Every rank answers like this one: Megatron asks the others for their kinds of parameter groups."""

    def gather(objects: list[object], mine: object, group: object = None) -> None:
        objects[:] = [mine] * len(objects)

    with mock.patch("torch.distributed.all_gather_object", gather):
        yield
