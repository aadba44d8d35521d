"""Whose optimizer and whose groups: weights under module rates against plain torch with one group a parameter."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mols_ds.engines.deepspeed.shards import find_shards
from tests.engines.deepspeed.engines import CLIP, OFFLOAD, OFFLOAD_ALL, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import full_weights
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import GROUPS, masks
from tests.helpers.oracle.statistics import gradient_sample
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, STEPS = 2, 6
ALPHAS = {"embedding": 3.0, "head": 2.0, "qk": 0.5, "vo": 1.0, "mlp": 1.5, "other": 1.0}
FIXED = {"fixed_alphas": {g: a for g, a in ALPHAS.items() if g != "other"}, "start": 0, "ramp_end": 0}
LR, WEIGHT_DECAY = 2e-3, 0.1
EPS = 1e-4  # far above the float noise of the gradients, which Adam would blow up to full steps
ATOL = 2e-6

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=5e-3, eps=EPS),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR, eps=EPS),
}
SECTION = {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": WEIGHT_DECAY, "torch_adam": True}}
NVME = {"offload_optimizer": {"device": "nvme", "nvme_path": "./nvme", "pin_memory": False, "buffer_count": 5}}

# name: (optimizer, stage, further settings); "groups" are the user's own parameter groups.
SPECS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "config": ("AdamW", 2, {"way": "config"}),
    "config with groups": ("AdamW", 3, {"way": "config", "groups": True}),
    "callable": ("AdamW", 1, {"way": "callable"}),
    **{f"instance {s}": ("AdamW", s, {"groups": True}) for s in (0, 1, 2, 3)},
    "instance 2 offload": ("AdamW", 2, {"groups": True, "zero": OFFLOAD}),
    "instance 3 offload": ("AdamW", 3, {"groups": True, "zero": OFFLOAD_ALL}),
    "instance 2 round robin": ("AdamW", 2, {"groups": True, "zero": {"round_robin_gradients": True}}),
    **{f"SGD {s}": ("SGD", s, {}) for s in (0, 2, 3)},
    **{f"Adagrad {s}": ("Adagrad", s, {}) for s in (1, 3)},
    "NAdam 2": ("NAdam", 2, {}),
    **{f"empty group {s}": ("AdamW", s, {"groups": True, "empty": True}) for s in (2, 3)},
    "garbage padding 3": ("AdamW", 3, {"groups": True, "poison": True, "model": "plain"}),
}


def user_groups(model: nn.Module, spec: dict[str, Any]) -> list[Any]:
    """Matrices and vectors with different rates and weight decays; an empty group in front if asked for."""
    params = list(model.parameters())
    if not spec.get("groups"):
        return params
    groups: list[dict[str, Any]] = [{"params": [], "lr": 1.0, "weight_decay": 7.0}] if spec.get("empty") else []
    groups.append({"params": [p for p in params if p.ndim >= 2]})
    groups.append({"params": [p for p in params if p.ndim < 2], "lr": 3 * LR, "weight_decay": 0.0})
    return groups


def poison_padding(engine: Any) -> int:
    """NaN into what no parameter covers, as DeepSpeed's stage 3 was seen to leave there. Returns how many elements."""
    shards, poisoned = find_shards(engine), 0
    for tensor, pieces in zip(shards.tensors, shards.ranges, strict=True):
        mask = torch.ones(tensor.numel(), dtype=torch.bool)
        for piece in pieces:
            mask[piece.offset : piece.offset + piece.numel] = False
        with torch.no_grad():
            tensor.view(-1)[mask] = math.nan
        poisoned += int(mask.sum())
    return poisoned


def build_engine(spec: dict[str, Any], stage: int, optimizer: str, section: dict[str, Any], **more: Any) -> Any:
    way, model = spec.get("way", "instance"), model_of(spec.get("model", "llama"))
    if way == "config":
        more["optimizer"] = SECTION
    settings = config(stage, section, zero=spec.get("zero"), micros=1, **more)
    groups, make = user_groups(model, spec), OPTIMIZERS[optimizer]
    if way == "config":
        return engine_of(settings, model, model_parameters=groups)
    if way == "callable":
        return engine_of(settings, model, make, model_parameters=groups)
    return engine_of(settings, model, make(groups))


def train(name: str) -> dict[str, Any]:
    optimizer, stage, spec = SPECS[name]
    engine = build_engine(spec, stage, optimizer, FIXED)
    seen: dict[str, Any] = {"poisoned": poison_padding(engine) if spec.get("poison") else 0, "applied": []}
    seen["groups"] = len(find_shards(engine).inner.param_groups)
    for step in range(STEPS):
        iterate(engine, step, 1)
        seen["applied"].append(engine.mols.applied_lrs)
    seen |= {"weights": full_weights(engine), "elementwise": engine.mols.scaler.elementwise}
    engine.destroy()
    return seen


def measure_poisoned() -> dict[str, Any]:
    """A probe at stage 3 with NaN in every pad element."""
    section = {"start": 1, "samples": 8, "ramp_end": 20, "mode": "probe"}
    spec = {"groups": True, "model": "plain"}
    reports = []
    for poison in (False, True):
        engine = build_engine(spec, 3, "AdamW", section)
        poisoned = poison_padding(engine) if poison else 0
        for step in range(10):
            iterate(engine, step, 1)
        reports.append(engine.mols.report()["groups"])
        engine.destroy()
    return {"poisoned": poisoned, "reports": reports}


def flatten_rates(kind: str) -> dict[str, Any]:
    """A scheduler that writes one rate into all groups (WarmupLR with a scalar), or OneCycle, also flattening."""
    schedulers = {
        "WarmupLR": {"warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"},
        "WarmupDecayLR": {"warmup_max_lr": LR, "warmup_num_steps": 4, "total_num_steps": 20},
        "OneCycle": {"cycle_min_lr": LR / 10, "cycle_max_lr": LR, "cycle_first_step_size": 4},
    }
    more = {"scheduler": {"type": kind, "params": schedulers[kind]}}
    engine = build_engine({"groups": True}, 2, "AdamW", FIXED, **more)
    inner, rows = find_shards(engine).inner, []
    for step in range(STEPS):
        base = [group["lr"] for group in inner.param_groups]
        iterate(engine, step, 1)
        rows.append((base, engine.mols.applied_lrs))
    engine.destroy()
    return {"rows": rows}


def one(case: tuple[str, ...]) -> dict[str, Any]:
    kind, *rest = case
    return {"train": train, "poisoned": measure_poisoned, "flatten": flatten_rates}[kind](*rest)  # type: ignore[operator]


FLATTENING = ("WarmupLR", "WarmupDecayLR", "OneCycle")
QUICK = ("config", "callable", "instance 0", "instance 3", "SGD 2")
FULL = ("instance 1", "SGD 0", "Adagrad 1")
CASES: Cases[tuple[str, ...]] = Cases(
    [*(("train", name) for name in SPECS), ("poisoned",), *(("flatten", kind) for kind in FLATTENING)],
    quick=[("train", name) for name in QUICK],
    full=[("train", name) for name in FULL],
)


@functools.cache
def runs() -> Results:
    return run_cases(one, WORLD, [(case,) for case in CASES.wanted], timeout=60)


def results(*case: str) -> list[dict[str, Any]]:
    return runs()[case,]


@functools.cache
def reference(optimizer: str, grouped: bool, model: str = "llama") -> dict[str, Tensor]:
    """Plain torch: one group per parameter, with the user's rate times the alpha of its module group."""
    single = model_of(model)
    names = {name: GROUPS[int(mask.flatten()[0])] for name, mask in masks("llama", single).items()}
    inner = OPTIMIZERS[optimizer](list(single.parameters()))
    defaults, groups = inner.defaults, []
    for name, p in single.named_parameters():
        own = {"lr": 3 * LR, "weight_decay": 0.0} if grouped and p.ndim < 2 else {}
        lr = own.get("lr", defaults["lr"]) * ALPHAS[names[name]]
        groups.append({"params": [p], **own, "lr": lr})
    inner = OPTIMIZERS[optimizer](groups)
    for step in range(STEPS):
        gradients = gradient_sample(single, step, WORLD, 1)
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        assert norm > CLIP  # clipping acts
        for name, p in single.named_parameters():
            p.grad = gradients[name] * (CLIP / (norm + 1e-6))
        inner.step()
    return {name: p.detach().clone() for name, p in single.named_parameters()}


@CASES.parametrize("name", SPECS, reads=lambda name: [("train", name)])
def test_weights_are_those_of_plain_torch(name: str) -> None:
    optimizer, _, spec = SPECS[name]
    model = spec.get("model", "llama")
    truth, start = reference(optimizer, bool(spec.get("groups")), model), dict(model_of(model).named_parameters())
    for seen in results("train", name):
        assert seen["elementwise"]
        errors = {key: float((seen["weights"][key] - w).abs().max()) for key, w in truth.items()}
        assert max(errors.values()) <= ATOL, max(errors.items(), key=lambda item: item[1])
    moved = [float((start[key].detach() - w).abs().max()) for key, w in truth.items()]
    assert max(moved) > 1e-2 and min(moved) > 1e-4  # far more than the tolerance


@CASES.parametrize("stage", [2, 3], reads=lambda stage: [("train", f"empty group {stage}")])
def test_a_dropped_empty_group_shifts_nothing(stage: int) -> None:
    """DeepSpeed drops the user's empty first group: two are left, and no rate comes from it (its lr is 1)."""
    for seen in results("train", f"empty group {stage}"):
        assert seen["groups"] == 2
        assert seen["applied"][-1]["qk"] == pytest.approx(0.5 * LR)
        assert seen["applied"][-1]["other"] == pytest.approx(3 * LR)


@CASES.reads(("train", "garbage padding 3"), ("poisoned",))
def test_garbage_in_the_padding_does_not_leak() -> None:
    """Precondition: odd sizes leave padding on the last rank. The weights are checked above."""
    assert sum(seen["poisoned"] for seen in results("train", "garbage padding 3")) > 0
    seen = results("poisoned")
    assert sum(rank["poisoned"] for rank in seen) > 0
    for rank in seen:
        assert rank["reports"][0] == rank["reports"][1]
        assert all(row["snr"] is not None for row in rank["reports"][1].values())


@CASES.parametrize("kind", FLATTENING, reads=lambda kind: [("flatten", kind)])
def test_schedulers_that_flatten_groups(kind: str) -> None:
    """One rate for all groups is what these do; MoLS multiplies what they wrote, at every step, without compounding."""
    for seen in results("flatten", kind):
        flattened = 0
        for base, applied in seen["rows"]:
            flattened += len(set(base)) == 1
            for group, rate in applied.items():
                assert rate == pytest.approx(ALPHAS[group] * (base[1] if group == "other" else base[0]), rel=1e-12)
        assert flattened >= STEPS - 1


# ---------------------------------------------------------------------- what needs a compiler or a library


def built(name: str) -> bool:
    """Whether this operation of DeepSpeed's was compiled before: the first build takes minutes, and one that a time
    limit kills leaves a lock behind that the next one waits for."""
    builder = getattr(importlib.import_module("deepspeed.ops.op_builder"), name)()
    try:
        folder = importlib.import_module("torch.utils.cpp_extension")._get_build_directory(builder.name, False)
    except (RuntimeError, OSError):
        return False
    return any(Path(folder).glob(f"{builder.name}*.so"))


def train_with_cpu_adam() -> dict[str, Tensor]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = model_of()
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY, adamw_mode=True)
    engine = engine_of(config(2, FIXED, zero=OFFLOAD, micros=1), model, optimizer)
    for step in range(STEPS):
        iterate(engine, step, 1)
    assert engine.mols.scaler.elementwise
    weights = full_weights(engine)
    engine.destroy()
    return weights


def train_on_nvme(mode: str) -> dict[str, Any]:
    """Stage 3 with the optimizer on NVMe; sub-groups under 1 MiB would silently stay in memory."""
    swapping = importlib.import_module("deepspeed.runtime.swap_tensor.optimizer_utils")
    swapping.MIN_AIO_BYTES = 256
    aio = {"block_size": 1024, "queue_depth": 4, "single_submit": False, "overlap_events": False}
    section = FIXED if mode == "fixed" else {"start": 1, "samples": 8, "ramp_end": 20, "mode": mode}
    zero = {**NVME, "sub_group_size": 3000}
    settings = config(3, section, precision="bf16", zero=zero, micros=1, aio={**aio, "intra_op_parallelism": 1})
    model = model_of()
    engine = engine_of(settings, model, OPTIMIZERS["AdamW"](model.parameters()))
    swapped = sum(engine.optimizer._swappable_optimizer_subgroup(i) for i in range(len(engine.optimizer.fp16_groups)))
    for step in range(10):
        iterate(engine, step, 1)
    seen = {"swapped": swapped, "alphas": engine.mols.alphas, "report": engine.mols.report()}
    seen["finite"] = all(bool(torch.isfinite(w).all()) for w in full_weights(engine).values())
    engine.destroy()
    return seen


@pytest.mark.tier("all")
def test_deepspeed_cpu_adam() -> None:
    if not built("CPUAdamBuilder"):
        pytest.skip("DeepSpeed's CPU Adam is not compiled here, and compiling it takes minutes")
    for weights in run_cases(train_with_cpu_adam, WORLD, [()])[()]:
        for key, truth in reference("AdamW", False).items():
            assert float((weights[key] - truth).abs().max()) <= ATOL, key


@pytest.mark.tier("all")
def test_nvme_offload() -> None:
    if not built("AsyncIOBuilder"):
        pytest.skip("DeepSpeed's asynchronous I/O (needs libaio-dev) is not compiled here; compiling it takes minutes")
    modes = ("probe", "online", "moments", "fixed")
    seen = run_cases(train_on_nvme, WORLD, [(mode,) for mode in modes], timeout=400)
    for mode in modes:
        for rank in seen[mode,]:
            assert rank["swapped"] > 0 and rank["finite"] and rank["alphas"]
            assert "failed" not in rank["report"]
