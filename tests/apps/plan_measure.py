"""Measure the memory and messages of a rank, by kind, and compare with `mols-ds plan` for the same config.

    python -m tests.apps.plan_measure

prints the table of docs/evidence/planning.md: DeepSpeed on two gloo ranks, and Megatron-core on four.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.apps.plan_scale import Scale, storages, weighing

WORLD, BATCH, LENGTH, MICROS = 2, 4, 64, 2
BUCKET = 60_000  # elements: several buckets, which straddle the two partitions
MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 250, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 515, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "use_cache": False,
}  # fmt: skip
Case = tuple[int, str, str]
"""Stage, precision, variant of VARIANTS."""
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "overlap": {"overlap_comm": True},
    "release": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    "offload": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "fp32 sums": {},
    "checkpointing": {},
}
CASES: list[Case] = [
    *((stage, precision, "") for stage in range(3) for precision in ("fp32", "bf16")),
    (1, "bf16", "fp32 sums"),
    (1, "bf16", "checkpointing"),
    (2, "bf16", "overlap"),
    (2, "bf16", "offload"),
    (3, "fp32", ""),
    (3, "bf16", ""),
    (3, "bf16", "release"),
    (3, "bf16", "offload"),
    (3, "bf16", "fp32 sums"),
]
"""Stage 3 last: it leaves a linear function of its own in the process, whose backward pass holds activations in
Python's frames (runtime/zero/partition_parameters.py, `zero3_linear_wrap`), where they would be taken for buffers."""


def config(case: Case) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    stage, precision, variant = case
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": BUCKET}
    result: dict[str, Any] = {
        "train_batch_size": WORLD * BATCH * MICROS,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": MICROS,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero | VARIANTS[variant],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "mols": {"start": 1, "samples": 8, "ramp_end": 20, "mode": "online", "total_steps": 100},
    }
    if variant == "fp32 sums":
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def model_file() -> str:
    """Write MODEL to a file that only the system removes."""
    path = Path(tempfile.gettempdir()) / "mols_plan_model.json"
    if not path.exists():
        path.write_text(json.dumps(MODEL), "utf-8")
    return str(path)


# ------------------------------------------------------------------ measured, on each rank


def saved_bytes(engine: Any, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward pass saves, parameters left out; with checkpointing, as autograd
    sees it: the layers' inputs and what lies outside of the layers."""
    seen: dict[int, torch.UntypedStorage] = {}
    own: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        own.update(address for address, _ in storages([p.data for p in engine.module.parameters()]))
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    inputs: list[torch.Tensor] = []
    hooks = []
    if getattr(engine.module, "is_gradient_checkpointing", False):
        layers = engine.module.model.layers
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    for tensor in inputs:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    result = sum(storage.nbytes() for storage in seen.values())
    engine.backward(loss)
    return result


def measure(stage: int, precision: str, variant: str) -> dict[str, Any]:
    """On each rank: bytes by kind while it calibrates, and payload of a step's collectives by operation."""
    from transformers import AutoModelForCausalLM

    import mols_ds
    from mols_ds.training.models import load_model_config
    from tests.helpers.recorder import Recorder

    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(load_model_config(model_file()), dtype=dtype)
    if variant == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine, *_ = mols_ds.initialize(
        model=model, model_parameters=list(model.parameters()), config=config((stage, precision, variant))
    )
    ids = torch.randint(0, MODEL["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def iterate(scale: Scale | None = None) -> None:
        for _ in range(MICROS):
            with torch.autograd.graph.saved_tensors_hooks(scale.save, _same) if scale else nullcontext():
                loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            if scale is not None:
                scale.weigh()
            engine.step()

    for _ in range(3):
        iterate()
    with Recorder() as recorder:
        iterate()
    gc.collect()
    gc.disable()
    scale = Scale(engine)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    hook = inner.register_step_pre_hook(lambda *_: scale.weigh())
    with weighing(scale):
        iterate(scale)
    gc.enable()
    hook.remove()
    assert engine.mols.phase == "calibrating", engine.mols.phase
    activations = saved_bytes(engine, ids)
    result = {
        "held": dict(scale.peak) | {"activations": activations},
        "sent": _payload(recorder.torch),
        "nbytes": engine.mols.accumulator_bytes,
        "rank": dist.get_rank(),
    }
    engine.destroy()
    return result


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _payload(recorded: Counter[tuple[str, int]]) -> dict[str, int]:
    """Operation -> bytes of the whole tensors: a gather's recorded bytes are its input, a part, and its output."""
    result: Counter[str] = Counter()
    for (name, size), count in recorded.items():
        plain = name.replace("_", "")
        if "gather" in plain:
            result["all-gather"] += count * size * WORLD // (WORLD + 1)
        elif "reducescatter" in plain:
            result["reduce-scatter"] += count * size * WORLD // (WORLD + 1)
        elif plain.startswith("allreduce"):
            result["all-reduce"] += count * size
        else:
            result[name] += count * size
    return dict(result)


# ------------------------------------------------------------------ planned


def planned(case: Case) -> dict[str, Any]:
    """Plan of a case: bytes by kind (device and host together), and payload by operation."""
    from mols_ds.apps.plan import model as plan_model
    from mols_ds.apps.plan import zero as plan_zero
    from mols_ds.apps.plan.calibration import accumulators

    decoder = plan_model.load(model_file())
    zero = plan_zero.ZeroPlan.of(config(case), checkpointing=case[2] == "checkpointing")
    dtype = torch.bfloat16 if case[1] == "bf16" else torch.float32
    activations = decoder.activations(BATCH, LENGTH, dtype)
    footprint = plan_zero.footprint(zero, decoder.weights, WORLD, activations)
    sent: Counter[str] = Counter()
    for message in plan_zero.messages(zero, decoder.weights, WORLD, True, MODEL["num_hidden_layers"]):
        sent[message.operation] += message.bytes
    held = {}
    for kind in ("weights", "gradients", "optimizer", "buffers"):
        moments = [part.get(kind, 0) for part in footprint.moments.values()]
        held[kind] = footprint.resident.get(kind, 0) + max(moments) + footprint.host.get(kind, 0)
    held["activations"] = activations.kept(zero.checkpointing)
    if zero.checkpointing:
        held["activations"] -= activations.layer  # of the layer that the backward pass recomputes
    own = accumulators(footprint.measured, "cpu")
    held["accumulators"] = own.kept + own.scratch  # tests/apps/test_plan.py has the kept samples
    return {"held": held, "sent": dict(sent)}


SHARE, TOLERANCE = 0.01, 0.05
"""Kinds below 1 % of the total memory (or messages) are not compared; the others agree within 5 %."""


def rows(plan: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """(part, kind, planned, measured) of every kind that is large enough to be compared."""
    for part in ("held", "sent"):
        total = sum(seen[part].values())
        for kind in sorted({*plan[part], *seen[part]}):
            said, found = plan[part].get(kind, 0), seen[part].get(kind, 0)
            if max(said, found) > SHARE * total:
                yield part, kind, said, found


def largest(outcomes: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Of each kind what the rank with most of it has: the plan is for the heaviest rank."""
    return {
        part: {kind: max(o[part].get(kind, 0) for o in outcomes) for o in outcomes for kind in o[part]}
        for part in ("held", "sent")
    }


COLUMNS = ("weights", "gradients", "optimizer", "accumulators", "activations", "buffers", "sent")


def table(results: Mapping[str, list[tuple[str, str, int, int]]]) -> str:
    """Markdown: what was measured, and by how much the plan differs; of several messages the one that differs most."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for label, found in results.items():
        cells = []
        for column in COLUMNS:
            mine = [(said, seen) for part, kind, said, seen in found if column in (kind, part)]
            worst = max(((said / max(1, seen) - 1) * 100 for said, seen in mine), key=abs, default=0.0)
            cells.append(f"{sum(seen for _, seen in mine):,} {round(worst, 1) + 0.0:+.1f} %" if mine else "-")
        lines.append(f"| {label.strip()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table."""
    from tests.apps import plan_measure_megatron as megatron
    from tests.apps.plan_measure import measure as work  # not of __main__, which a rank cannot import
    from tests.helpers.harness import run_cases

    engines = run_cases(work, WORLD, CASES, timeout=120)
    results = {
        f"ZeRO {case[0]} {case[1]} {case[2]}": list(rows(planned(case), largest(engines[case]))) for case in CASES
    }
    found = run_cases(megatron.measure, megatron.WORLD, [(name,) for name in megatron.GRIDS], timeout=120)
    for name, setup in megatron.GRIDS.items():
        for stage in range(setup.pp):
            outcomes = [outcome for outcome in found[name,] if outcome["stage"] == stage]
            where = f", stage {stage}" if setup.pp > 1 else ""
            plan = megatron.planned(name, stage)
            results[f"Megatron {name}{where}"] = list(rows(plan, largest(outcomes)))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
