"""Memory and messages of a rank with DeepSpeed ZeRO, stages 0 to 3.

Follows DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/fp16/unfused_optimizer.py,
runtime/bf16_optimizer.py and runtime/engine.py. Surprising behaviour that this plan counts:

- stages 1 and 2 all-reduce whole buckets of gradients instead of reduce-scattering them
  (`use_multi_rank_bucket_allreduce`), and copy a bucket that belongs to several ranks (`flatten`);
- a bucket is allocated in full, even for a small model;
- a rank keeps the gradient of every parameter that it owns at least partly (`grads_in_partition`); stage 2 with
  accumulation keeps two copies at once;
- stage 3 keeps fp32 copies of the weights, in fp32 training too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mols_ds.apps.plan.live import Gathered, gathered
from mols_ds.apps.plan.model import Activations
from mols_ds.apps.plan.optimizers import Weight, state_of_shard
from mols_ds.apps.plan.partitions import Partition, buckets, numel_of, partitions
from mols_ds.apps.plan.parts import Bytes, Footprint, Message, Operation, up
from mols_ds.core.json_types import JsonMapping
from mols_ds.core.validation import validation_message
from mols_ds.engines.deepspeed.compat import module
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

SECTION = "zero_optimization"
REFUSED = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zenflow": None,
}
"""Unsupported keys of "zero_optimization", with the value that turns them off."""
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
STAGE0_BUCKET = 500_000_000
"""Elements per all-reduce at stage 0 (runtime/engine.py)."""
LOW_PRECISION = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")


@dataclass(frozen=True)
class ZeroPlan:
    """Settings of a DeepSpeed config that determine memory and messages. Sizes in elements, unless named bytes."""

    stage: int
    weight_bytes: int
    accumulation_bytes: int
    message_bytes: int
    micro_batch: int
    accumulation: int
    optimizer: str
    optimizer_settings: JsonMapping
    reduce_bucket: int
    double_bucket: bool
    contiguous: bool
    section: DeepSpeedZeroConfig
    offload_optimizer: str
    offload_param: str
    checkpointing: bool

    @classmethod
    def of(cls, config: JsonMapping, *, checkpointing: bool, hidden: int = 0) -> ZeroPlan:
        """Read a resolved config. hidden: width of the model, from which some optimizers compute a rank.

        Raises MolsConfigError if DeepSpeed refuses the config, MolsUnsupportedError for unsupported options.
        """
        section = dict(config.get(SECTION) or {})
        for key, off in REFUSED.items():
            if section.get(key, off) not in (off, None):
                raise MolsUnsupportedError(f'plan: "{SECTION}.{key}" is not supported by the plan; leave it out')
        precision = next((name for name in ("bf16", "fp16") if (config.get(name) or {}).get("enabled")), "fp32")
        for key in LOW_PRECISION:
            if (config.get(precision) or {}).get(key):
                raise MolsUnsupportedError(f'plan: "{precision}.{key}" is not supported by the plan; leave it out')
        zero_config = module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
        try:
            zero = zero_config(**section)
        except ValidationError as error:
            raise MolsConfigError(f"DeepSpeed refuses {validation_message(error, zero_config, SECTION)}") from error
        except ValueError as error:
            raise MolsConfigError(f'"{SECTION}": DeepSpeed refuses it: {one_line(error)}') from error
        accumulated = (config.get("data_types") or {}).get("grad_accum_dtype") or precision
        sent = config.get("communication_data_type") or precision
        optimizer = config.get("optimizer") or {"type": "AdamW"}
        stage = int(zero.stage)
        return cls(
            stage=stage,
            weight_bytes=SIZES[precision],
            accumulation_bytes=_size(accumulated),
            message_bytes=_size(sent),
            micro_batch=int(config["train_micro_batch_size_per_gpu"]),
            accumulation=int(config["gradient_accumulation_steps"]),
            optimizer=str(optimizer["type"]),
            optimizer_settings={**(optimizer.get("params") or {}), "hidden": hidden},
            reduce_bucket=int(zero.reduce_bucket_size),
            double_bucket=bool(zero.overlap_comm) and stage in (1, 2),
            contiguous=bool(zero.contiguous_gradients),
            section=zero,
            offload_optimizer=_device(zero.offload_optimizer),
            offload_param=_device(zero.offload_param),
            checkpointing=checkpointing,
        )


def _size(name: str) -> int:
    key = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(name, name)
    if key not in SIZES:
        raise MolsUnsupportedError(f'plan: data type "{name}" is unknown; known are {", ".join(SIZES)}')
    return SIZES[key]


def _device(section: object) -> str:
    device = getattr(section, "device", None)
    name = str(getattr(device, "value", device) or "none")
    return "none" if name in ("none", "None") else name


# ------------------------------------------------------------------ memory


def footprint(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, activations: Activations) -> Footprint:
    """Compute the memory of the heaviest of `ranks` data-parallel ranks, in bytes."""
    passing: Bytes = {"activations": activations.kept(zero.checkpointing), "workspace": activations.logits}
    if zero.stage == 0:
        return _replicated(zero, weights, ranks, passing)
    if zero.stage == 3:
        return _stage3(zero, weights, ranks, passing)
    if zero.stage == 1 and zero.weight_bytes == 2 and zero.accumulation_bytes == 4 and zero.offload_optimizer == "none":
        return _bf16_optimizer(zero, weights, ranks, passing)
    return _stage12(zero, weights, ranks, passing)


def _state(zero: ZeroPlan, weights: Sequence[Weight], elements: int) -> int:
    return state_of_shard(zero.optimizer, zero.optimizer_settings, weights, elements)


def _work(zero: ZeroPlan, elements: int) -> int:
    """Return the temporary bytes of the optimizer's step. torch's Adam works on all tensors of a list at a time and
    needs one fp32 array (roots of the second moments); DeepSpeed's fused optimizers need none."""
    return 4 * elements if zero.optimizer_settings.get("torch_adam") else 0


def _replicated(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, passing: Bytes) -> Footprint:
    """Stage 0: every rank has everything. In 16 bits also fp32 weights, and fp32 gradients during the step."""
    numel, half = numel_of(weights), zero.weight_bytes == 2
    bucket = min(numel, STAGE0_BUCKET) * zero.message_bytes if ranks > 1 else 0
    masters = 4 * numel if half else 0
    stepping = {"gradients": 4 * numel if half else 0, "workspace": _work(zero, numel)}
    resident = {
        "weights": zero.weight_bytes * numel,
        "gradients": zero.weight_bytes * numel,
        "optimizer": masters + _state(zero, weights, numel),
    }
    moments = {"backward": passing, "reduce": {"buffers": bucket}, "step": stepping}
    return Footprint(resident, moments, numel, -(-numel // ranks))


def _straddling(weights: Sequence[Weight], size: int, partition: int) -> int:
    """Return the elements of the largest bucket that belongs to more than one rank and is therefore copied."""
    end, largest = numel_of(weights), 0
    for bucket in buckets(list(reversed(weights)), size):
        numel = numel_of(bucket)
        if (end - numel) // partition != (end - 1) // partition:
            largest = max(largest, numel)
        end -= numel
    return largest


def _stage1_peak(zero: ZeroPlan, weights: Sequence[Weight], part: Partition) -> int:
    """Return the elements of all gradients when this rank starts to keep its own. Earlier buckets are freed, in the
    order of the parameters (stage 1 reduces after the backward pass), and its part is complete."""
    left, at, begin = numel_of(weights), 0, part.rank * part.size
    for bucket in buckets(weights, zero.reduce_bucket):
        left -= numel_of(bucket)
        at += numel_of(bucket)
        if at > begin:
            break
    return left + part.whole


def _stage12(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, passing: Bytes) -> Footprint:
    every = partitions(weights, ranks)
    size, numel = zero.accumulation_bytes, numel_of(weights)
    largest = max(weight.numel for weight in weights)
    part = max(every, key=lambda p: (p.whole, p.owned))
    bucket = zero.reduce_bucket * size * (2 if zero.double_bucket else 1) if zero.contiguous else 0
    copy = _straddling(weights, zero.reduce_bucket, part.size) * zero.message_bytes if ranks > 1 else 0
    if zero.offload_optimizer != "none":
        return _offloaded12(zero, weights, part, passing, bucket + copy)
    compact = size == 4 and zero.weight_bytes == 2
    kept = size * (part.size if compact else part.whole)
    if zero.stage == 1:
        both = max(_stage1_peak(zero, weights, each) for each in every)
        moments = {
            "backward": {"gradients": numel * size, "buffers": bucket, **passing},
            "reduce": {"gradients": max(numel, both) * size, "buffers": bucket + copy},
        }
    else:
        twice = 2 if zero.accumulation > 1 and not compact else 1
        fresh = largest * zero.weight_bytes
        moments = {"backward": {"gradients": kept * twice + fresh, "buffers": bucket + copy, **passing}}
    moments |= _stepping(zero, kept, part.size)
    resident = {
        "weights": part.flat * zero.weight_bytes,
        "optimizer": 4 * part.size + _state(zero, weights, part.size),
    }
    return Footprint(resident, moments, part.owned, part.owned, name=f"rank {part.rank}")


def _stepping(zero: ZeroPlan, kept: int, elements: int) -> dict[str, Bytes]:
    """Return the moments of a step: gradients of `elements` elements (`kept` bytes) are flattened, in their own type
    first, and converted to fp32. Only the fp32 gradients remain."""
    flat = zero.accumulation_bytes * elements if zero.accumulation_bytes != 4 else 0
    return {
        "convert": {"gradients": kept, "buffers": 4 * elements, "workspace": flat},
        "step": {"gradients": 4 * elements, "workspace": _work(zero, elements)},
    }


def _offloaded12(zero: ZeroPlan, weights: Sequence[Weight], part: Partition, passing: Bytes, buffers: int) -> Footprint:
    """Offload at stages 1 and 2: masters, state, gradients in host memory; buffers of the largest parameter on both."""
    largest = max(weight.numel for weight in weights) * zero.weight_bytes
    whole = numel_of(weights) * zero.accumulation_bytes if zero.stage == 1 else 0
    held = part.whole * zero.accumulation_bytes if zero.accumulation > 1 else 0
    host = {
        "optimizer": 4 * part.size + _state(zero, weights, part.size),
        "gradients": 4 * part.size + held,
        "buffers": part.size * zero.weight_bytes + largest,
    }
    resident = {"weights": part.flat * zero.weight_bytes, "buffers": largest}
    fresh = largest if zero.stage == 2 else 0
    moments = {"backward": {"gradients": whole + fresh, "buffers": buffers, **passing}}
    return Footprint(resident, moments, part.owned, part.owned, host, name=f"rank {part.rank}")


def _bf16_optimizer(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, passing: Bytes) -> Footprint:
    """Stage 1 in bf16 with fp32 accumulation: every rank has a full fp32 gradient (runtime/bf16_optimizer.py)."""
    part = max(partitions(weights, ranks), key=lambda p: p.owned)
    resident = {
        "weights": part.flat * zero.weight_bytes,
        "gradients": 4 * part.flat + numel_of(weights) * zero.weight_bytes,
        "optimizer": 4 * part.size + _state(zero, weights, part.size),
    }
    bucket = min(part.flat, STAGE0_BUCKET) * zero.message_bytes if ranks > 1 else 0
    moments = {
        "backward": passing,
        "reduce": {"buffers": bucket},
        "step": {"workspace": _work(zero, part.size)},
    }
    return Footprint(resident, moments, part.owned, part.owned)


def split_persistent(zero: ZeroPlan, weights: Sequence[Weight]) -> tuple[list[Weight], list[Weight]]:
    """Split into (persistent, other) parameters. Every rank keeps those up to `param_persistence_threshold` in full."""
    small = [weight for weight in weights if weight.numel <= zero.section.param_persistence_threshold]
    return small, [weight for weight in weights if weight.numel > zero.section.param_persistence_threshold]


def gathers(zero: ZeroPlan, weights: Sequence[Weight], layers: int) -> Gathered:
    """Simulate the gathers of one micro-step at stage 3."""
    return gathered(
        split_persistent(zero, weights)[1],
        reuse=zero.section.max_reuse_distance,
        prefetch=zero.section.prefetch_bucket_size,
        most=zero.section.max_live_parameters,
        checkpointing=zero.checkpointing,
        layers=layers,
    )


def _stage3(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, passing: Bytes) -> Footprint:
    part = sum(-(-weight.numel // ranks) for weight in weights)
    owned = max(sum(max(0, min(-(-w.numel // ranks), w.numel)) for w in weights), 1)
    small, _ = split_persistent(zero, weights)
    layers = 1 + max((int(p) for w in weights for p in w.name.split(".") if p.isdigit()), default=0)
    live = gathers(zero, weights, layers).live
    bucket = zero.reduce_bucket * zero.message_bytes if zero.contiguous else 0
    # Parameters that were gathered together share one buffer, which is freed with the last of them. So the first bucket
    # is scattered before any is freed. The scatter input and its result are copies.
    copy = min(zero.reduce_bucket, numel_of(weights)) * zero.message_bytes * (ranks + 1) // ranks if ranks > 1 else 0
    passing = {**passing, "buffers": live * zero.weight_bytes + copy}
    passing["gradients"] = max(weight.numel for weight in weights) * zero.weight_bytes
    state = 4 * part + _state(zero, weights, part)
    gradient = part * zero.accumulation_bytes
    sub_group = min(part, zero.section.sub_group_size)
    resident: Bytes = {"buffers": bucket}
    host: Bytes = {}
    nvme = 0
    kept = {"weights": part * zero.weight_bytes}
    if zero.offload_param == "none":
        resident["weights"] = kept["weights"]
    else:
        host["weights"] = kept["weights"] if zero.offload_param == "cpu" else 0
        nvme += kept["weights"] if zero.offload_param == "nvme" else 0
    resident["weights"] = resident.get("weights", 0) + numel_of(small) * zero.weight_bytes
    if zero.offload_optimizer == "none":
        resident |= {"optimizer": state, "gradients": gradient}
        flat = zero.accumulation_bytes * sub_group if zero.accumulation_bytes != 4 else 0
        stepping = {"gradients": 4 * sub_group}  # flattened in their own type, then converted
        moments = {"convert": stepping | {"buffers": flat}, "step": stepping | {"workspace": _work(zero, sub_group)}}
    else:
        moments = {}
        host |= {"gradients": gradient + 4 * part, "optimizer": state if zero.offload_optimizer == "cpu" else 0}
        nvme += state + 4 * part if zero.offload_optimizer == "nvme" else 0
        if zero.offload_optimizer == "nvme":
            host |= {"gradients": gradient, "buffers": 4 * 4 * sub_group}  # buffer_count: 4 fp32 buffers
    return Footprint(resident, {"backward": passing, **moments}, owned, owned, host, nvme)


# ------------------------------------------------------------------ messages


def messages(zero: ZeroPlan, weights: Sequence[Weight], ranks: int, inside: bool, layers: int) -> list[Message]:
    """List the messages of a rank in one step; one that only measures skips those after the gradients. inside: all
    `ranks` are in one node; layers: decoder layers."""
    if ranks == 1:
        return []
    numel, size = numel_of(weights), zero.message_bytes

    def message(what: str, operation: Operation, calls: int, total: int, *, measuring: int | None = None) -> Message:
        return Message(what, operation, "data", ranks, calls, total, inside, total if measuring is None else measuring)

    if zero.stage == 0:
        return [message("gradients", "all-reduce", -(-numel // STAGE0_BUCKET), numel * size)]
    if zero.stage in (1, 2):
        flat = up(numel, 2 * ranks) * zero.weight_bytes
        times = 1 if zero.stage == 1 else zero.accumulation
        filled = buckets(weights, zero.reduce_bucket)
        return [
            message("gradients", "all-reduce", times * len(filled), times * numel * size),
            message("updated weights", "all-gather", 1, flat, measuring=0),
        ]
    small, large = split_persistent(zero, weights)
    found = gathers(zero, weights, layers)
    padded = sum(up(weight.numel, ranks) for weight in weights)
    share = sum(up(weight.numel, ranks) for weight in large) / max(1, numel_of(large))
    times, calls = zero.accumulation, len(buckets(weights, zero.reduce_bucket))
    return [
        message("weights, forward and backward", "all-gather", times * found.calls,
                round(times * found.elements * share) * zero.weight_bytes),
        message("gradients", "reduce-scatter", times * calls, times * padded * size),
        message("small weights after the step", "all-gather", len(small),
                sum(up(weight.numel, ranks) for weight in small) * zero.weight_bytes),
    ]  # fmt: skip
