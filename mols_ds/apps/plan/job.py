"""A run to plan, on DeepSpeed or Megatron-core: its needs, and the changes that may make it fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from mols_ds.apps.plan import grid, timing, zero
from mols_ds.apps.plan.calibration import AGREEMENT, AccumulatorBytes, Device, accumulators, sums_bytes
from mols_ds.apps.plan.cluster import GB, Cluster
from mols_ds.apps.plan.model import Decoder
from mols_ds.apps.plan.parts import PHASES, Bytes, Footprint, Message, add, ring
from mols_ds.apps.plan.scaling import COPY_BYTES, held_of_shard, held_of_tensor, steps_on_views
from mols_ds.core.config import MIN_SAMPLES_CORRECTED, MolsConfig
from mols_ds.core.layout import base_group
from mols_ds.core.phases import resolve_schedule

THREADS = 8
"""Host threads of a rank. They determine the scratch of the accumulators (`mols_ds.core.accumulators`)."""


@dataclass(frozen=True)
class Change:
    """A change of a job. label: text for people; cost: order by slow-down (not seconds); apply: return the changed job,
    or None if the change is impossible."""

    label: str
    cost: int
    apply: Callable[[Any], Any]


class Phase(NamedTuple):
    """Memory of the heaviest rank in one phase of MoLS: kind -> bytes, at the peak moment of a step."""

    name: str
    moment: str
    device: Bytes
    host: Bytes


@dataclass(frozen=True)
class PlanJob(ABC):
    """A run to plan. mols: None without MoLS; steps: optimizer steps of the run; device: of the accumulators."""

    cluster: Cluster
    mols: MolsConfig | None
    groups: tuple[str, ...]
    steps: int
    batch: int
    length: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.cluster.ranks

    @abstractmethod
    def footprints(self) -> list[Footprint]:
        """Return the memory of each kind of rank."""

    @abstractmethod
    def messages_of(self, footprint: int) -> list[Message]:
        """List the messages of one step, for the rank with this index in `footprints`."""

    @abstractmethod
    def flops(self) -> float:
        """Return the operations of one rank in one step."""

    @abstractmethod
    def precision(self) -> str:
        """Return fp32, bf16 or fp8: selects the peak rate."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Rows of the word embedding, padding included."""

    @abstractmethod
    def axes(self) -> list[list[Change]]:
        """List alternative changes by kind. At most one of each kind is made."""

    @abstractmethod
    def summary(self) -> list[str]:
        """Describe the planned run in a few lines."""

    @property
    def mode(self) -> timing.Mode:
        return "fixed" if self.mols is None or self.mols.fixed_alphas is not None else self.mols.mode

    @property
    def samples(self) -> int:
        """Gradient samples of a calibration; the maximum for "auto"."""
        if self.mols is None or self.mode == "fixed":
            return 0
        return self.mols.max_samples if self.mols.samples == "auto" else int(self.mols.samples)

    def start(self) -> int | None:
        """Return the step at which the calibration starts; None without MoLS."""
        return None if self.mols is None else resolve_schedule(self.mols, self.steps, self.steps // 10).start

    def calibrations(self) -> int:
        """Count the calibrations of the run."""
        if self.mode == "fixed":
            return 0
        again = self.mols.recalibrate.every if self.mols is not None and self.mols.recalibrate else 0
        return 1 + (max(0, self.steps - 1 - (self.start() or 0)) // again if again else 0)

    def accumulators(self, footprint: Footprint) -> AccumulatorBytes:
        """Return the accumulator bytes; 0 if no gradient is accumulated."""
        if self.mode not in ("probe", "online"):
            return AccumulatorBytes(0, 0, 0)
        crosses = self.device == "cpu" and self.cluster.device == "cuda" and "gradients" not in footprint.host
        return accumulators(footprint.measured, self.device, self.samples, THREADS, crosses=crosses)

    def phases(self, footprint: Footprint) -> list[Phase]:
        """Return the memory in each phase of MoLS, or in the one phase "training" without it."""
        held = {"accumulators": self.accumulators(footprint).total}
        # A repeated calibration runs while the multipliers of the first one apply.
        again = self.mols is not None and self.mols.recalibrate is not None and self.mode in ("online", "moments")
        found = []
        for name in PHASES if self.mols is not None else ("training",):
            more: Bytes = held if name == "calibrating" else {}
            on_host = self.device == "cpu"
            scaled = name == "ramping" or (name == "calibrating" and again)
            moment, device = footprint.peak(scaled=scaled)
            copies = {"copies": footprint.copies} if scaled and not footprint.steps_on_device else {}
            host = add(footprint.host, more if on_host else {}, copies)
            found.append(Phase(name, moment, add(device, {} if on_host else more), host))
        return found

    @property
    def reference(self) -> str:
        """The group whose multiplier is 1; "" if it is unknown before the calibration."""
        known = self.mols is not None and self.mode != "fixed" and self.mols.reference != "max"
        return base_group(self.mols.reference) if known and self.mols is not None else ""

    def heaviest(self) -> int:
        """Return the index of the footprint with the largest accelerator memory."""
        every = self.footprints()
        return max(range(len(every)), key=lambda i: max(sum(p.device.values()) for p in self.phases(every[i])))

    def problems(self) -> list[str]:
        """Describe everything that does not fit, on any rank."""
        found = dict[str, None]()
        for footprint in self.footprints():
            for phase in self.phases(footprint):
                pairs = (
                    ("accelerator", sum(phase.device.values()), self.cluster.limit),
                    ("host", sum(phase.host.values()), self.cluster.host_limit),
                    ("NVMe", footprint.nvme, self.cluster.nvme_limit),
                )
                for where, needed, limit in pairs:
                    if needed > limit:
                        found[f"{phase.name}: {where} memory {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB"] = None
        return list(found)

    def sums(self) -> int:
        """Return the bytes of the all-reduce at the end of a calibration."""
        return sums_bytes(self.groups, max(self.samples, MIN_SAMPLES_CORRECTED)) if self.mode != "fixed" else 0

    def tokens(self) -> int:
        """Return the bytes of the all-reduces that find the tokens of a calibration: one per row."""
        looked_for = self.mols is not None and self.mode != "fixed" and self.mols.unseen_rows == "exclude"
        return self.vocabulary if looked_for else 0

    def times(self) -> timing.Times:
        """Compute the times of the run. Assumes that a probe step takes as long as a training step."""
        cluster, number = self.cluster, self.heaviest()
        footprint, messages = self.footprints()[number], self.messages_of(number)
        step = timing.step_seconds(cluster, self.flops(), self.precision())
        share = cluster.memory_gbs if self.device == "accelerator" else cluster.host_memory_gbs / cluster.accelerators
        sampled = self.samples if self.mode in ("probe", "online") else 0
        each = timing.UPDATE_BYTES[self.device] + timing.READ_BYTES.get(self.mode, 0)
        once = timing.MOMENTS_BYTES if self.mode == "moments" else timing.SUMS_BYTES if sampled else 0
        traffic = footprint.measured * (sampled * each + once)
        crosses = self.device == "cpu" and "gradients" not in footprint.host
        moved = sampled * footprint.measured * 4 if crosses else 0
        sent = 0 if self.mode == "fixed" else ring("all-reduce", self.sums() + self.tokens(), cluster.ranks)
        sent += self.samples * ring("all-reduce", AGREEMENT, cluster.ranks) if self.mode == "probe" else 0
        return timing.Times(
            step=step,
            # One after the other at nominal bandwidth, without any overlap.
            messages_of_a_step=sum(m.sent / (timing.bandwidth(cluster, m.inside) * GB) for m in messages),
            passes=self.samples * step if self.mode == "probe" else 0.0,
            updates=traffic / (share * GB),
            transfer=moved / (cluster.host_link_gbs * GB),
            reduction=sent / (timing.bandwidth(cluster, cluster.nodes == 1) * GB),
        )


ON_HOST = Change("accumulators on the host", 1, lambda job: replace(job, device="cpu"))


# ------------------------------------------------------------------ DeepSpeed


@dataclass(frozen=True)
class ZeroJob(PlanJob):
    """A run of train.py."""

    decoder: Decoder
    zero: zero.ZeroPlan

    def footprints(self) -> list[Footprint]:
        dtype = torch.float32 if self.zero.weight_bytes == 4 else torch.bfloat16
        activations = self.decoder.activations(self.zero.micro_batch, self.length, dtype)
        found = zero.footprint(self.zero, self.decoder.weights, self.ranks, activations)
        return [replace(found, copies=self._copies() if self.mols is not None else 0)]

    def _copies(self) -> int:
        """Compute the bytes of `Footprint.copies`."""
        z, weights, layouts = self.zero, self.decoder.weights, self.decoder.table.layouts
        views = steps_on_views(z.optimizer)
        if z.stage == 0:
            return COPY_BYTES * sum(
                held_of_tensor(layouts[w.name], w.numel, self.reference, views=views) for w in weights
            )
        share = -(-held_of_shard(weights, layouts, self.reference, views) // self.ranks)
        return COPY_BYTES * (min(share, z.section.sub_group_size) if z.stage == 3 else share)

    def messages_of(self, footprint: int) -> list[Message]:
        layers = self.decoder.config.num_hidden_layers
        return zero.messages(self.zero, self.decoder.weights, self.ranks, self.cluster.nodes == 1, layers)

    def flops(self) -> float:
        tokens = self.zero.micro_batch * self.zero.accumulation * self.length
        return self.decoder.flops(tokens, self.length, recompute=self.zero.checkpointing)

    def precision(self) -> str:
        return "fp32" if self.zero.weight_bytes == 4 else "bf16"

    @property
    def vocabulary(self) -> int:
        return int(self.decoder.config.vocab_size)

    def summary(self) -> list[str]:
        z = self.zero
        offload = [f"{what} on {where}" for what, where in
                   (("optimizer", z.offload_optimizer), ("weights", z.offload_param)) if where != "none"]  # fmt: skip
        more = ", ".join(["activation checkpointing"] * z.checkpointing + offload)
        return [
            f"{self.decoder.numel:,} weights, ZeRO {z.stage}, {self.precision()}, {z.optimizer}"
            + (f", {more}" if more else ""),
            f"{self.batch} sequences of {self.length} a step: {z.micro_batch} x {z.accumulation} on each of "
            f"{self.ranks} ranks",
        ]

    def changed(self, **values: Any) -> ZeroJob:
        return replace(self, zero=replace(self.zero, **values))

    def with_nodes(self, nodes: int) -> ZeroJob | None:
        """Use another number of nodes with the same batch. Keep the micro-batch, or reduce it until it divides."""
        cluster = self.cluster.model_copy(update={"nodes": nodes})
        if self.batch % cluster.ranks:
            return None
        share = self.batch // cluster.ranks
        micro = max(n for n in range(1, min(share, self.zero.micro_batch) + 1) if share % n == 0)
        moved = replace(self, cluster=cluster)
        return moved.changed(micro_batch=micro, accumulation=share // micro)

    def axes(self) -> list[list[Change]]:
        z = self.zero

        def to(stages: Sequence[int] = range(4), **values: Any) -> Callable[[ZeroJob], ZeroJob | None]:
            return lambda job: job.changed(**values) if job.zero.stage in stages else None

        share = self.batch // self.ranks
        micros = [n for n in range(z.micro_batch - 1, 0, -1) if self.batch % (n * self.ranks) == 0]
        return [
            [ON_HOST] * (self.device == "accelerator"),
            [Change(f"micro batch {n}, accumulation {share // n}", 2 + i, to(micro_batch=n, accumulation=share // n))
             for i, n in enumerate(micros)],
            # Only stage 3 overlaps messages by default.
            [Change(f"ZeRO stage {n}", 10 + 2 * n, to(stage=n, double_bucket=z.double_bucket and n in (1, 2)))
             for n in range(z.stage + 1, 4)],
            [Change("activation checkpointing", 20, to(checkpointing=True))] * (not z.checkpointing),
            [Change("optimizer offloaded to the host", 40, to((1, 2, 3), offload_optimizer="cpu"))]
            * (z.offload_optimizer == "none"),
            [Change("weights offloaded to the host", 60, to((3,), offload_param="cpu"))] * (z.offload_param == "none"),
        ]  # fmt: skip


# ------------------------------------------------------------------ Megatron-core


@dataclass(frozen=True)
class MegatronJob(PlanJob):
    """A run of train_megatron.py."""

    plan: grid.MegatronPlan
    fp8: bool

    def footprints(self) -> list[Footprint]:
        found = [grid.footprint(self.plan, stage) for stage in range(self.plan.gpt.pp)]
        if self.mols is None:
            return found
        return [
            replace(each, copies=COPY_BYTES * grid.held(self.plan, stage, self.reference))
            for stage, each in enumerate(found)
        ]

    def messages_of(self, footprint: int) -> list[Message]:
        return grid.messages(self.plan, footprint, self.cluster.accelerators)

    def flops(self) -> float:
        return self.plan.gpt.flops(self.batch, self.length) / self.ranks

    @property
    def vocabulary(self) -> int:
        return self.plan.gpt.vocab

    def precision(self) -> str:
        return "fp8" if self.fp8 else "fp32" if self.plan.weight_bytes == 4 else "bf16"

    def summary(self) -> list[str]:
        g, p = self.plan.gpt, self.plan
        sizes = {"tp": g.tp, "pp": g.pp, "vp": g.vp, "cp": g.cp, "ep": g.ep}
        axes = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        more = ["sequence parallelism"] * g.sp + ["distributed optimizer"] * p.distributed
        more += [f"{g.recompute} recomputation"] * bool(g.recompute)
        return [
            f"{g.total():,} weights, {', '.join([*axes, f'data {p.data // g.cp}'])}, {self.precision()}"
            + (f", {', '.join(more)}" if more else ""),
            f"{self.batch} sequences of {self.length} a step: {p.micro_batch} x {p.micro_batches} on each pipeline",
            f"layers: {'Transformer Engine, by formula' if g.local is None else 'Megatron-core, traced'}",
        ]

    def regrid(self, *, micro: int | None = None, **values: Any) -> MegatronJob | None:
        """Use another grid or micro-batch for the same ranks and batch. Return None if it does not divide."""
        gpt = replace(self.plan.gpt, **values)
        micro = micro or self.plan.micro_batch
        model = gpt.tp * gpt.pp * gpt.cp
        if self.ranks % model or self.ranks % (gpt.etp * gpt.ep * gpt.pp) or gpt.layers % (gpt.pp * gpt.vp):
            return None
        if gpt.heads % gpt.tp or gpt.kv % gpt.tp or gpt.ffn % gpt.tp or gpt.tp > self.cluster.accelerators:
            return None
        data = self.ranks // model
        if self.batch % (micro * data) or (gpt.vp > 1 and self.batch // (micro * data) % gpt.pp):
            return None
        passes = self.batch // (micro * data)
        plan = replace(self.plan, gpt=gpt, ranks=self.ranks, micro_batch=micro, micro_batches=passes)
        return replace(self, plan=plan)

    def with_nodes(self, nodes: int) -> MegatronJob | None:
        """Use another number of nodes: more data-parallel ranks."""
        return replace(self, cluster=self.cluster.model_copy(update={"nodes": nodes})).regrid()

    def axes(self) -> list[list[Change]]:
        g, p = self.plan.gpt, self.plan

        def to(**values: Any) -> Callable[[MegatronJob], MegatronJob | None]:
            return lambda job: job.regrid(**values)

        micros = [n for n in range(p.micro_batch - 1, 0, -1) if p.micro_batch % n == 0]
        recompute = [] if g.recompute == "full" else [Change("full recomputation", 20, to(recompute="full"))]
        if not g.recompute and not g.flash:
            recompute.insert(0, Change("selective recomputation", 8, to(recompute="selective")))
        distributed = Change(
            "distributed optimizer", 3, lambda job: replace(job, plan=replace(job.plan, distributed=True))
        )
        return [
            [ON_HOST] * (self.device == "accelerator"),
            [Change(f"micro batch {n}", 2 + i, to(micro=n)) for i, n in enumerate(micros)],
            [distributed] if not p.distributed else [],
            [Change("sequence parallelism", 4, lambda job: job.regrid(sp=True) if job.plan.gpt.tp > 1 else None)]
            if not g.sp else [],
            recompute,
            [Change(f"tp {n}", 10 + n, to(tp=n)) for n in (g.tp * 2, g.tp * 4, g.tp * 8)],
            [Change(f"pp {n}", 12 + n, to(pp=n)) for n in (g.pp * 2, g.pp * 4, g.pp * 8)],
        ]  # fmt: skip
