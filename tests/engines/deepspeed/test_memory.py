"""Memory that a sample takes on top of DeepSpeed's, with a shard of 67 million elements on one rank: at most 64 MiB
besides the accumulators, as the kernel counts what is resident (VmHWM) and as torch's operations count it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.engines import OFFLOAD, config, engine_of
from tests.helpers.harness import Results, run_cases
from tests.helpers.live_bytes import LiveBytes, forget_peak, resident
from tests.helpers.tiers import Cases

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

WIDTH = 8192
LIMIT = 64 * 2**20
# name: (stage, mode, precision, further settings of ZeRO)
SPECS: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    **{f"{stage} {mode} fp32": (stage, mode, "fp32", {}) for stage in range(4) for mode in ("probe", "online")},
    **{f"{stage} probe bf16": (stage, "probe", "bf16", {}) for stage in range(4)},
    "1 probe bf16 fp32 grads": (1, "probe", "bf16 fp32 grads", {}),
    "3 probe fp32 offload": (3, "probe", "fp32", OFFLOAD),
    "2 moments fp32": (2, "moments", "fp32", {}),
}
QUICKER = ("3 probe fp32",)
CASES = Cases([(name,) for name in SPECS], full=lambda case: case[0] not in QUICKER)


class Wide(torch.nn.Module):
    """One matrix, applied to a few vectors: next to no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = torch.nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.up_proj(x)).float().square().mean()


def measured(name: str) -> dict[str, Any]:
    """Bytes above what was there, in the step that takes the second sample: the first one makes the accumulators."""
    stage, mode, precision, zero = SPECS[name]
    section = {"mode": mode, "start": 1, "ramp_end": 9, "samples": 4, "noise_floor_correction": False}
    settings = config(stage, section, precision=precision, zero=zero, micros=1, gradient_clipping=0.0)
    settings["zero_optimization"] |= {"reduce_bucket_size": 1 << 16, "sub_group_size": 10**9}
    torch.manual_seed(0)
    model = Wide()
    kind = torch.optim.AdamW if mode == "moments" else torch.optim.SGD
    engine = engine_of(settings, model, kind(list(model.parameters()), lr=1e-9, foreach=False))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    seen: dict[str, int] = {}

    def weigh(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def weighed(*args: Any, **more: Any) -> Any:
            forget_peak()
            before = resident()
            with LiveBytes() as live:
                result = function(*args, **more)
            for key, value in {"resident": resident("VmHWM") - before, "live": live.peak}.items():
                seen[key] = max(value, seen.get(key, 0))
            return result

        setattr(owner, name, weighed)

    if mode == "probe":
        weigh(engine.mols, "_probe")
    elif mode == "online":
        weigh(engine.mols.shards, "finite")
        weigh(engine.mols.controller.elements, "add")
        weigh(engine.mols.controller.elements, "close")
    else:
        weigh(engine.mols, "_add_moments")
    rows = []
    for _step in range(5):
        seen.clear()
        engine.backward(engine(torch.randn(2, WIDTH, dtype=dtype)))
        engine.step()
        rows.append(dict(seen))
    report = engine.mols.report()
    engine.destroy()
    return {"rows": rows, "report": report}


@functools.cache
def results() -> Results:
    return run_cases(measured, 1, CASES.wanted, timeout=900)


@CASES.parametrize(("name",))
def test_a_sample_takes_no_more_than_64_mib(name: str) -> None:
    (result,) = results()[name,]
    assert "failed" not in result["report"] and result["report"]["groups"]["mlp"]["elements"] == WIDTH * WIDTH
    later = [row for row in result["rows"][2:] if row]
    assert later, "nothing was weighed"
    for row in later:
        assert row["resident"] <= LIMIT and row["live"] <= LIMIT, later
