"""FP8 and BF16 training of a small model with Transformer Engine and MoLS: both calibrate, and their alphas are close.

Not run when it was written: there was no GPU. Run it with one by `python -m pytest tests/gpu`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patches.machine import RECIPES, probe_machine
from tests.apps.command import read_metrics, run
from tests.apps.megatron_job import TRAIN, write_job

pytestmark = [pytest.mark.jobs, pytest.mark.slow, pytest.mark.tier("all")]
STEPS = 40
ALPHA_RTOL = 0.25
"""Alphas of FP8 against those of BF16. Rounding to E5M2 (2 bits of mantissa: up to 12.5 % of a value) is noise of the
same order in every group; what differs between groups moves d by less than this. To be set from the first run."""
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,  # FP8 products need multiples of 16, blocks of 128
    "ffn_hidden_size": 768,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "vocab_multiple": 128,
}


def job(folder: Path, **precision: Any) -> dict[str, Any]:
    """Train STEPS steps on one GPU. Returns the report; checks that training went on."""
    folder.mkdir()
    path = write_job(
        folder,
        model=MODEL,
        precision={"dtype": "bf16", **precision},
        optimizer={"lr": 2e-3},
        batch={"micro": 8, "global": 16},
        run={"steps": STEPS, "seq_len": 128, "eval_sequences": 8},
        mols={"start": 4, "samples": 16, "mode": "probe", "ramp_end": 12},
    )
    out = folder / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", TRAIN]
    done = run(*launch, "--config", path, "--out", out, cwd=folder)
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    lines = read_metrics(out)
    assert all(math.isfinite(line["loss"]) for line in lines[:-1])
    assert lines[-2]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-2]["phase"] == "fixed"
    report: dict[str, Any] = json.loads((out / "mols_report" / "mols_report.json").read_text("utf-8"))
    return report


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the BF16 run with Transformer Engine."""
    report = job(tmp_path_factory.mktemp("bf16") / "run", transformer_engine=True)
    assert report["versions"]["low_precision"] == "none"
    assert report["versions"]["optimizer"] == "transformer_engine"
    return report


def usable(recipe: str) -> bool:
    """Whether this device has a recipe; the version of Transformer Engine is for `precision.check` to say."""
    capability = probe_machine().capability
    return capability is not None and capability >= RECIPES[recipe].capability


@pytest.mark.parametrize("primary", [False, True], ids=["bf16 weights", "fp8 weights"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_gives_the_alphas_of_bf16(bf16: dict[str, Any], tmp_path: Path, recipe: str, primary: bool) -> None:
    if not usable(recipe):
        pytest.skip(f"recipe {recipe} needs compute capability {RECIPES[recipe].capability}")
    report = job(tmp_path / "run", transformer_engine=True, fp8="hybrid", fp8_recipe=recipe, fp8_param=primary)
    versions = report["versions"]
    assert versions["low_precision"].startswith(f"fp8/{recipe}")
    assert versions["statistics"].startswith("float32 main_grad of " + ("fp8 primary" if primary else "bfloat16"))
    for group, row in report["groups"].items():
        assert row["elements"] == bf16["groups"][group]["elements"]
        print(f"{recipe} {group}: alpha {row['alpha']:.4f}, bf16 {bf16['groups'][group]['alpha']:.4f}")
    fp8 = {group: row["alpha"] for group, row in report["groups"].items()}
    assert fp8 == pytest.approx({group: row["alpha"] for group, row in bf16["groups"].items()}, rel=ALPHA_RTOL)


def test_fused_weight_gradients_are_the_same_samples(bf16: dict[str, Any], tmp_path: Path) -> None:
    """The product adds into main_grad itself: fp32 sums without a rounding to bf16 in between, so close, not equal."""
    report = job(tmp_path / "run", transformer_engine=True, gradient_accumulation_fusion=True)
    fused = {group: row["alpha"] for group, row in report["groups"].items()}
    assert fused == pytest.approx({group: row["alpha"] for group, row in bf16["groups"].items()}, rel=0.05)


def test_a_recipe_beyond_this_device_is_refused_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this device has every recipe")
    path = write_job(tmp_path, precision={"dtype": "bf16", "fp8": "e4m3", "fp8_recipe": "mxfp8"})
    done = run(sys.executable, TRAIN, "--config", path, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.status == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train_megatron.py: ")]
    assert "needs compute capability 10.0" in line
