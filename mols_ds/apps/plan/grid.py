"""Memory and messages of a rank with Megatron-core's tensor, pipeline, expert and data parallelism.

Follows megatron-core 0.16.1: buffers and their padding are from core/distributed/param_and_grad_buffer.py, the
optimizer from core/optimizer/distrib_optimizer.py and core/optimizer/optimizer.py, the messages of a layer from
core/tensor_parallel/layers.py and mappings.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mols_ds.apps.plan import local
from mols_ds.apps.plan.gpt import Gpt
from mols_ds.apps.plan.optimizers import Weight, state_of_shard
from mols_ds.apps.plan.parts import Bytes, Footprint, Message, Operation, up
from mols_ds.apps.plan.scaling import held_of_tensor
from mols_ds.core.json_types import JsonObject
from mols_ds.core.layout import ElementLayout


@dataclass(frozen=True)
class MegatronPlan:
    """Settings of a Megatron config that determine memory and messages."""

    gpt: Gpt
    ranks: int
    weight_bytes: int
    gradient_bytes: int
    distributed: bool
    overlap: bool
    optimizer: str
    settings: JsonObject
    micro_batch: int
    micro_batches: int
    length: int
    gathers: int = 1
    """Gathers of the updated weights per step: with experts, each of the two chained DistributedOptimizers gathers all
    of them, unless that overlaps with the next forward pass."""

    @property
    def data(self) -> int:
        """Ranks that share the dense parameters, including context-parallel ranks."""
        return self.ranks // (self.gpt.tp * self.gpt.pp)

    @property
    def expert_data(self) -> int:
        return self.ranks // (self.gpt.etp * self.gpt.ep * self.gpt.pp)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, over all context-parallel ranks."""
        return self.micro_batch * self.length


def buffer_elements(weights: Sequence[Weight], ranks: int, *, distributed: bool, bucket: int | None) -> int:
    """Return the elements of a flat gradient buffer. With the distributed optimizer, parameters start at multiples of
    64, and buckets end at multiples of 128 and of the number of ranks."""
    at = begin = 0
    for weight in reversed(weights):
        at = (up(at, 64) if distributed else at) + weight.numel
        if bucket is not None and at - begin >= bucket:
            at = begin = up(at, math.lcm(ranks, 128)) if distributed else at
    return up(at, math.lcm(ranks, 128)) if distributed else at


def _chunks(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Split the parameters by model chunk. Each chunk has its own buffers."""
    of = itertools.groupby(weights, lambda w: w.name.split(".")[1] if w.name.startswith("chunk.") else "")
    return [list(chunk) for _, chunk in of]


def buffers(plan: MegatronPlan, stage: int) -> list[tuple[int, int, list[Weight]]]:
    """Return (elements, ranks that share it, parameters) of each flat buffer of a rank."""
    found = []
    for chunk in _chunks(plan.gpt.weights(stage)):
        # Parameters of routed experts have their own buffers and ranks.
        for experts, ranks in ((False, plan.data), (True, plan.expert_data)):
            if part := [weight for weight in chunk if (".experts." in weight.name) == experts]:
                bucket = max(40_000_000, 1_000_000 * ranks) if plan.overlap else None
                size = buffer_elements(part, ranks, distributed=plan.distributed, bucket=bucket)
                found.append((size, ranks, part))
    return found


def footprint(plan: MegatronPlan, stage: int) -> Footprint:
    """Compute the memory of a rank of one pipeline stage, in bytes."""
    gpt, half = plan.gpt, plan.weight_bytes == 2
    weight_bytes = gradient = optimizer = owned = measured = converted = 0
    for size, ranks, weights in buffers(plan, stage):
        numel = sum(weight.numel for weight in weights)
        mine = -(-size // ranks) if plan.distributed else numel
        mine = min(mine, numel)
        weight_bytes += (size if plan.distributed else numel) * plan.weight_bytes
        gradient += size * plan.gradient_bytes
        optimizer += 4 * mine if half else 0
        optimizer += state_of_shard(plan.optimizer, plan.settings, weights, mine)
        owned += mine
        measured += mine if plan.distributed else -(-numel // ranks)
        converted += 4 * mine if half and plan.gradient_bytes != 4 else 0
    resident: Bytes = {"weights": weight_bytes, "gradients": gradient, "optimizer": optimizer}
    if gpt.local is not None:
        activations = local.activation_bytes(gpt.local, gpt, stage, plan.tokens, plan.length, plan.micro_batches)
    else:
        activations = gpt.activation_bytes(stage, plan.tokens, plan.length, plan.weight_bytes, plan.micro_batches)
    moments = {
        "backward": {
            "activations": activations,
            "workspace": gpt.head_bytes(stage, plan.tokens, plan.weight_bytes),
            # Sequence parallelism gathers a layer's input (GlobalMemoryBuffer).
            "buffers": plan.tokens // gpt.cp * gpt.hidden * plan.weight_bytes if gpt.sp else 0,
        },
        "step": {"gradients": converted, "workspace": 0},
    }
    return Footprint(resident, moments, owned, measured, name=f"a rank of pipeline stage {stage}")


def held(plan: MegatronPlan, stage: int, reference: str) -> int:
    """Return the most elements that a scaled step copies: fused projections, whose rows belong to two groups.

    Transformer Engine's FusedAdam (on GPUs) and its stand-in on the CPU cannot step on views.
    """
    gpt = plan.gpt
    layout = ElementLayout(gpt.hidden, (((gpt.heads // gpt.kv + 1) * gpt.channels, "qk"), (gpt.channels, "vo")))
    total = 0
    for _, ranks, weights in buffers(plan, stage):
        for weight in weights:
            if weight.name.endswith("linear_qkv.weight"):
                whole = held_of_tensor(layout, weight.numel, reference, views=False)
                total += -(-whole // ranks) if plan.distributed else whole
    return total


# ------------------------------------------------------------------ messages


def messages(plan: MegatronPlan, stage: int, accelerators: int) -> list[Message]:
    """List the messages of a rank of a stage in one step, with embedding and loss. accelerators: per node."""
    found = [*_data(plan, stage, accelerators)]
    gpt = plan.gpt
    if gpt.tp > 1:
        found += _tensor(plan, stage, gpt.tp <= accelerators)
    if gpt.pp > 1:
        found += _pipeline(plan, stage, plan.ranks <= accelerators)
    if gpt.experts and gpt.ep > 1:
        routed = plan.tokens // gpt.cp // gpt.tp * gpt.topk * gpt.hidden * plan.weight_bytes
        calls = 4 * plan.micro_batches * gpt.chunk * gpt.vp
        inside = gpt.etp * gpt.ep <= accelerators
        total = calls * routed
        found.append(Message("tokens to experts and back", "all-to-all", "expert", gpt.ep, calls, total, inside, total))
    return found


def _data(plan: MegatronPlan, stage: int, accelerators: int) -> list[Message]:
    found = []
    for size, ranks, weights in buffers(plan, stage):
        if ranks == 1:
            continue
        of = "experts" if ".experts." in weights[0].name else "data"
        inside = plan.ranks <= accelerators or plan.gpt.tp * ranks <= accelerators
        gradients, updated = size * plan.gradient_bytes, size * plan.weight_bytes
        operation: Operation = "reduce-scatter" if plan.distributed else "all-reduce"
        found.append(Message("gradients", operation, of, ranks, 1, gradients, inside, gradients))
        if plan.distributed:
            times = plan.gathers
            found.append(Message("updated weights", "all-gather", of, ranks, times, times * updated, inside, 0))
    return found


def _tensor(plan: MegatronPlan, stage: int, inside: bool) -> list[Message]:
    """List the tensor-parallel messages. A layer without sequence parallelism: two all-reduces forward, two backward.
    With it: two gathers and two scatters each way, two gathers for weight gradients. Embedding and head: one more."""
    gpt, times = plan.gpt, plan.micro_batches
    whole = plan.tokens // gpt.cp * gpt.hidden * plan.weight_bytes
    layers = gpt.chunk * gpt.vp * (1 if gpt.experts else 2)
    first, last = stage == 0, stage == gpt.pp - 1
    found = []

    def message(what: str, operation: Operation, calls: int, size: int) -> None:
        found.append(Message(what, operation, "tensor", gpt.tp, calls, calls * size, inside, calls * size))

    if gpt.sp:
        message("activations", "all-gather", times * (3 * layers + (1 if first else 0) + (2 if last else 0)), whole)
        message("activations", "reduce-scatter", times * (2 * layers + (1 if first else 0) + (1 if last else 0)), whole)
    else:
        message("activations", "all-reduce", times * (2 * layers + (1 if first else 0) + (1 if last else 0)), whole)
    if gpt.sp:
        norms = sum(w.numel for w in gpt.weights(stage) if "norm" in w.name or "router" in w.name)
        message("gradients of norms", "all-reduce", 1, norms * plan.gradient_bytes)
    if last:
        message("loss", "all-reduce", 3 * times, plan.tokens // gpt.cp * 4)
    return found


def _pipeline(plan: MegatronPlan, stage: int, inside: bool) -> list[Message]:
    gpt = plan.gpt
    size = plan.tokens // gpt.cp * gpt.hidden * plan.weight_bytes // (gpt.tp if gpt.sp else 1)
    if gpt.vp > 1:
        calls = 2 * gpt.vp * plan.micro_batches - (plan.micro_batches if stage in (0, gpt.pp - 1) else 0)
    else:
        calls = plan.micro_batches * ((stage > 0) + (stage < gpt.pp - 1))
    total = calls * size
    return [Message("activations and gradients", "send and receive", "pipeline", gpt.pp, calls, total, inside, total)]
