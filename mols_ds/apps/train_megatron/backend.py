"""Megatron-core backend of the training loop (`mols_ds.training.trainer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import megatron_patches
from megatron_patches.machine import Machine
from megatron_patches.rng_state import RandomState
from mols_ds.apps.train_megatron.checkpoint import TorchDistCheckpoint
from mols_ds.apps.train_megatron.dataset import Batch
from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import GuardedWriter
from mols_ds.errors import MolsError
from mols_ds.training.megatron_build import Built, build
from mols_ds.training.megatron_config import GridSizes, dtype_of, padded_vocabulary, transformer_config
from mols_ds.training.megatron_settings import Settings
from mols_ds.training.param_groups import group_options, restore_options
from mols_ds.training.speed import device_name, flops_per_token, peak_flops
from mols_ds.training.train_job import StepResult, TrainBackend, TrainJob
from mols_ds.training.writers import Writers

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

GIVE_UP_AFTER = 50
"""Number of consecutive iterations that Megatron may skip (non-finite gradients) before the run ends."""
LossOf = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Function that Megatron's schedules call with the model's output: (sum of losses, targets, result for the caller)."""


@dataclass(frozen=True)
class MegatronSetup:
    """Builds a Megatron engine. See `train_job.TrainSetup`.

    Attributes:
        held_out: held-out micro-batches of this data-parallel rank.
        vocab_size: of the tokenizer, before padding.
        engine: use Transformer Engine's layers.
        epochs: of the training samples (`IndexedBatches.epochs`).
    """

    settings: Settings
    machine: Machine
    grid: GridSizes
    held_out: list[Batch]
    vocab_size: int
    engine: bool
    epochs: int = 1

    @property
    def section(self) -> JsonObject | None:
        """See `TrainSetup`."""
        return self.settings.mols

    @property
    def optimizer(self) -> str:
        """See `TrainSetup`."""
        name = self.settings.optimizer.name
        return "Adam" if name == "adam" else name

    def with_section(self, section: JsonObject | None) -> MegatronSetup:
        """See `TrainSetup`."""
        return replace(self, settings=self.settings.with_mols(section))

    def build(self, job: TrainJob) -> MegatronBackend:
        """See `TrainSetup`."""
        settings = self.settings
        # A separate config for each arm: Megatron's schedules find functions of the optimizer on it
        config = transformer_config(settings, self.machine)
        built = build(settings, config, vocab_size=self.vocab_size, engine=self.engine)
        section = {"enabled": False} if settings.mols is None else settings.mols
        mols = megatron_patches.attach(
            built.chunks, built.optimizer, built.scheduler, section, samples_per_step=settings.batch.total
        )
        return MegatronBackend(job, self, built, mols)


class MegatronBackend(TrainBackend):
    """See `TrainBackend`. An iteration that Megatron skips counts as an update, as in Megatron-LM. One that MoLS only
    measures does not count, and does not advance the schedule.

    Attributes:
        skipped: consecutive iterations that Megatron skipped so far.
    """

    option = "run.{}"

    def __init__(self, job: TrainJob, setup: MegatronSetup, built: Built, mols: Handle) -> None:
        self.job, self.setup, self.built, self.mols = job, setup, built, mols
        self.rank, self.world, self.device = job.rank, setup.grid.world, _device()
        if setup.epochs > 1:
            self.fixed_steps = (
                f"{job.steps} steps take {setup.epochs} passes over the text, which Megatron shuffles together, so the "
                "order of all samples depends on run.steps; keep this run's, or start a new run in another --out"
            )
        self.skipped = self._number = 0
        self._norm: float | None = None
        self._writers: Writers | None = None
        if job.rank == 0:
            GuardedWriter()("monitor", self._open_writers)
        self.checkpoint = TorchDistCheckpoint(built, mols, reshardable=setup.settings.run.reshardable_checkpoints)

    def _open_writers(self) -> None:
        settings = self.setup.settings
        self._writers = Writers(settings.run, self.job.out, settings.model_dump(mode="json", by_alias=True))

    # -- training

    def base_lr(self) -> float:
        """See `TrainBackend`."""
        return float(self.built.optimizer.param_groups[0]["lr"])

    def step(self, batches: Iterator[Batch], *, number: int, measures: bool) -> StepResult:
        """See `TrainBackend`. `losses`: see `_pass`.

        Raises:
            MolsError: Megatron skipped `GIVE_UP_AFTER` iterations in a row.
        """
        for chunk in self.built.chunks:
            chunk.zero_grad_buffer()
        self.built.optimizer.zero_grad()
        sums = self._pass(batches, self.job.shape.accumulation)
        successful, norm, _ = self.built.optimizer.step()
        self._norm = None if norm is None else float(norm)
        self._number = number
        if not measures:
            self._advance(bool(successful), number)
        return StepResult(sums, updated=not measures)

    def _advance(self, successful: bool, number: int) -> None:
        """Advance the schedule after iteration `number` if it updated the weights."""
        self.skipped = 0 if successful else self.skipped + 1
        if successful:
            self.built.scheduler.step(increment=self.setup.settings.batch.total)
        elif self.skipped >= GIVE_UP_AFTER:
            raise MolsError(
                f"{self.skipped} iterations in a row were skipped up to step {number}: the gradients are not finite; "
                "use a smaller optimizer.lr, or bf16 instead of fp16"
            )

    def _pass(self, batches: Iterator[Batch], number: int, *, forward_only: bool = False) -> Tensor:
        """Run forward (and backward) of `number` micro-batches with the schedule for the grid.

        Returns:
            [sum of losses, number of targets] of this rank, float64. Zero except on the last stage's first
            tensor-parallel rank.
        """
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        chunks, shape = self.built.chunks, self.job.shape
        # Every chunk of an interleaved stage asks for each micro-batch; only the first and last use it
        every = list(batches) if len(chunks) > 1 else None
        found = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches if every is None else [iter(every) for _ in chunks],
            model=chunks,
            num_microbatches=number,
            seq_length=shape.length,
            micro_batch_size=shape.micro,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, dtype=torch.float64)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for one in found or ():
                sums += one["sums"].to("cpu", torch.float64)
        return sums

    def grad_norm(self) -> float | None:
        """See `TrainBackend`."""
        return self._norm

    def flops_per_token(self) -> float | None:
        """See `TrainBackend`. None for experts, and with pipeline or tensor parallelism: this rank has a part."""
        config, shape = self.built.config, self.job.shape
        if config.num_moe_experts or config.tensor_model_parallel_size > 1 or config.pipeline_model_parallel_size > 1:
            return None
        model = self.setup.settings.model
        looked_up = 0 if model.tied_embeddings else padded_vocabulary(self.setup.vocab_size, self.setup.settings)
        weights = sum(parameter.numel() for parameter in self.parameters()) - looked_up * config.hidden_size
        width = config.num_attention_heads * config.kv_channels
        return flops_per_token(weights, config.num_layers, width, shape.length)

    def peak_flops(self) -> float | None:
        """See `TrainBackend`."""
        return peak_flops(device_name(self.device), dtype_of(self.setup.settings))

    def mean_loss(self, losses: Tensor) -> float:
        """See `TrainBackend`: the mean over targets."""
        total, count = self.total(losses).tolist()
        return float(total / count)

    def held_out_sums(self) -> Tensor:
        """See `TrainBackend`. Restores training's RNG state."""
        random = RandomState()
        random.remember()
        for chunk in self.built.chunks:
            chunk.eval()
        held_out = self.setup.held_out
        with torch.no_grad():
            sums = self._pass(iter(held_out), len(held_out), forward_only=True)
        for chunk in self.built.chunks:
            chunk.train()
        random.restore()
        return sums

    def tokens(self, steps: int) -> int:
        """See `TrainBackend`."""
        return steps * self.job.shape.tokens

    def parameters(self) -> Iterable[Tensor]:
        """See `TrainBackend`."""
        return (parameter for chunk in self.built.chunks for parameter in chunk.parameters())

    def write_events(self, values: Mapping[str, float]) -> None:
        """See `TrainBackend`. Writes to TensorBoard and W&B, by number of updates."""
        if self._writers is not None:
            self._writers(values, self._number)

    # -- checkpoints

    def checkpoint_writer(self, step: int, counted: JsonObject) -> Callable[[Path], None]:
        """See `TrainBackend`."""
        return self.checkpoint.writer({**counted, "step": step})

    def load_checkpoint(self, folder: Path, tag: str | None) -> JsonObject | None:
        """See `TrainBackend`."""
        assert tag is not None  # not `universal`
        self._options = group_options(self.built.optimizer.param_groups)
        return self.checkpoint.load(folder, tag)

    def use_settings(self) -> None:
        """See `TrainBackend`."""
        restore_options(self.built.optimizer.param_groups, self._options)
        self.built.scheduler.step(increment=0)

    def close(self) -> None:
        """See `TrainBackend`."""
        self.mols.detach()
        if self._writers is not None:
            GuardedWriter()("monitor", self._writers.close)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _forward_step(iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, LossOf]:
    """Run one micro-batch through one chunk, in the format of Megatron's schedules (pretrain_gpt.py)."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = next(iterator)
    if torch.cuda.is_available():
        batch = {key: value.to(_device(), non_blocking=True) for key, value in batch.items()}
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch)
    mask = batch["loss_mask"]
    more = {"loss_mask": mask} if getattr(model.config, "mtp_num_layers", None) else {}
    # Without an attention mask the causal layers make their own
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)

    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return sum of the masked losses and number of targets; losses: (micro, length), or flat."""
        summed = torch.sum(losses.reshape(-1).float() * mask.reshape(-1))
        count = mask.sum()
        return summed, count.to(torch.int), {"sums": torch.stack([summed.detach(), count])}

    return output, loss_of
