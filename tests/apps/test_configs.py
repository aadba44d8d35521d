"""Every ready config, loaded through the project's own settings and by the engines' own config classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_patches.machine import RECIPES, Machine
from megatron_patches.precision import check
from mols_ds import cli
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import group_table, is_scaled
from mols_ds.core.phases import resolve_schedule
from mols_ds.core.protocols import Context
from mols_ds.errors import MolsUnsupportedError
from mols_ds.report.files import write_report
from mols_ds.training import ds_config as settings
from mols_ds.training.megatron_config import (
    GridSizes,
    ddp_config,
    micro_batches,
    optimizer_config,
    transformer_config,
)
from mols_ds.training.megatron_settings import Settings, read
from mols_ds.training.models import groups_of, load_model_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 10_000
LAPTOP = Machine(None, "the package transformer_engine is not installed", None)
GPU = Machine("2.9.0", "", (10, 0), wgrad_kernel=True, cuda=(12, 9))

DEEPSPEED = {  # file -> ranks that it is made for, data-parallel ranks among them, passes of a rank in one step
    "ds_mols": (1, 1, 2),
    "ds_mols_cpu": (2, 2, 1),
    "ds_mols_paper": (8, 8, 4),
    "ds_finetune": (1, 1, 1),
    "ds_7b_zero3": (8, 8, 16),
    "ds_7b_zero3_offload": (4, 4, 8),
    "ds_13b_zero3": (16, 16, 8),
    "ds_13b_zero3_offload": (8, 8, 8),
    "ds_70b_zero3": (512, 512, 1),
    "ds_70b_zero3_offload": (32, 32, 4),
    "ds_70b_zero1_megatron_tp8": (512, 64, 8),
}
MEGATRON = {  # file -> ranks, data-parallel ranks, passes of a rank in one step
    "tiny": (1, 1, 2),
    "tiny_tp2_pp2": (4, 1, 4),
    "llama_60m": (8, 8, 2),
    "llama_7b_tp2_pp2": (8, 2, 128),
    "llama_70b_tp8_pp8": (512, 8, 128),
    "llama_70b_tp8_pp8_fp8": (512, 8, 128),
    "llama_70b_tp8_pp8_fp8_delayed": (512, 8, 128),
    "llama_70b_tp4_pp8_mxfp8": (256, 8, 128),
    "mixtral_8x7b_tp2_pp4_ep8": (64, 8, 128),
    "mixtral_8x7b_tp2_pp4_ep8_fp8": (64, 8, 128),
}
WEIGHTS = {  # model file -> trainable elements, by hand: embedding and head, attention, MLP, norms (and routers)
    "llama_7b": 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 65 * 4096,
    "llama_13b": 2 * 32000 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824) + 81 * 5120,
    "llama_70b": 2 * 128256 * 8192 + 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672) + 161 * 8192,
    "mixtral_8x7b": 2 * 32000 * 4096
    + 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 8 * 3 * 4096 * 14336 + 8 * 4096)
    + 65 * 4096,
}


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("ds_*.json")} == set(DEEPSPEED)
    assert {path.stem for path in (CONFIGS / "megatron").glob("*.yaml")} == set(MEGATRON)


class Mpu:
    """What DeepSpeedConfig asks an `mpu` for."""

    def __init__(self, data: int) -> None:
        self.data = data

    def get_data_parallel_world_size(self) -> int:
        return self.data


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_reads_every_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    path = str(CONFIGS / f"{name}.json")
    world, data, passes = DEEPSPEED[name]
    config = settings.resolve(settings.read_config(path), world=data, steps=STEPS, out=tmp_path)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda group=None: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda group=None: world)
    assert config["gradient_accumulation_steps"] == passes
    assert config["train_micro_batch_size_per_gpu"] * passes * data == config["train_batch_size"]
    read_back = DeepSpeedConfig(json.loads(json.dumps(config)), mpu=Mpu(data))
    assert read_back.train_batch_size == config["train_batch_size"]
    assert read_back.gradient_accumulation_steps == passes
    assert read_back.bfloat16_config.enabled is bool(config["bf16"]["enabled"])
    known = type(read_back.zero_config).model_fields
    names = {field.alias or key for key, field in known.items()} | set(known)
    for key, value in config["zero_optimization"].items():
        assert key in names, f"DeepSpeed has no zero_optimization.{key}: it would be ignored"
        parsed = read_back.zero_config.model_dump(by_alias=True).get(key)
        if not isinstance(value, dict):
            assert parsed == value
    section = MolsConfig.parse(config["mols"])
    schedule = resolve_schedule(section, STEPS, STEPS // 10)
    assert 0 < schedule.start < schedule.ramp_end <= STEPS


def ranks_of(config: Settings) -> str:
    parallel = config.parallel
    return f"tp{parallel.tp} pp{parallel.pp} vp{parallel.vp} ep{parallel.ep}"


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_takes_every_yaml(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one thing that TransformerConfig asks of an installed Transformer Engine: its version
    monkeypatch.setattr("megatron.core.utils._te_version", Version(str(GPU.engine)))
    chosen = read(str(CONFIGS / "megatron" / f"{name}.yaml"))
    world, data, passes = MEGATRON[name]
    grid = GridSizes.of(chosen, world)
    assert (grid.data, micro_batches(chosen, grid)) == (data, passes)
    model, optimizer, ddp = transformer_config(chosen, GPU), optimizer_config(chosen), ddp_config(chosen)
    assert type(model).__name__ == "TransformerConfig"
    parallel, precision = chosen.parallel, chosen.precision
    parsed = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.expert_model_parallel_size,
        model.sequence_parallel,
    )
    assert parsed == (parallel.tp, parallel.pp, parallel.vp, parallel.ep, parallel.sp), ranks_of(chosen)
    assert model.num_layers % (parallel.pp * (parallel.vp or 1)) == 0
    assert (model.fp8, model.fp8_recipe) == (precision.fp8, precision.fp8_recipe)
    assert model.params_dtype == (torch.bfloat16 if precision.dtype == "bf16" else torch.float32)
    for key, value in chosen.model.further.items():
        assert getattr(model, key) == value
    assert optimizer.use_distributed_optimizer
    assert ddp.use_distributed_optimizer
    assert ddp.grad_reduce_in_fp32
    check(model, optimizer, machine=GPU)
    section = MolsConfig.parse(chosen.mols or {})
    steps = chosen.run.steps
    schedule = resolve_schedule(section, steps, round(chosen.scheduler.warmup * steps))
    assert 0 < schedule.start < schedule.ramp_end <= steps


@pytest.mark.parametrize("name", [name for name in MEGATRON if "fp8" in name])
def test_fp8_is_refused_where_it_cannot_run(name: str) -> None:
    chosen = read(str(CONFIGS / "megatron" / f"{name}.yaml"))
    recipe = chosen.precision.fp8_recipe
    with pytest.raises(MolsUnsupportedError, match=rf"fp8 \(recipe {recipe}\).*not installed.*train in bf16"):
        transformer_config(chosen, LAPTOP)
    major, minor = RECIPES[recipe].capability
    older = dataclasses.replace(GPU, capability=(major, minor - 1) if minor else (major - 1, 9))
    with pytest.raises(MolsUnsupportedError, match=rf"needs compute capability {major}\.{minor}"):
        transformer_config(chosen, older)
    with pytest.raises(MolsUnsupportedError, match=r"needs Transformer Engine"):
        transformer_config(chosen, dataclasses.replace(GPU, engine="0.9.0"))


def meta_model(name: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            load_model_config(str(CONFIGS / "models" / f"{name}.json"))
        )
    return model


@pytest.mark.parametrize("name", WEIGHTS)
def test_model_files_have_the_weights_they_are_named_for(name: str) -> None:
    table = group_table(meta_model(name))
    assert sum(table.elements.values()) == WEIGHTS[name]
    assert set(table.elements) == {"embedding", "head", "qk", "vo", "mlp", "other"}


# ------------------------------------------------------------------------------------- alphas of a small model at 7B


def report_of(model: str, path: Path, granularity: Any = "type") -> dict[str, float]:
    """A calibration's report of a model's own groups; returns the alphas of the scaled ones."""
    numbers = dict.fromkeys(
        ("snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high", "never_moved_share"), 0.5
    )
    groups = {
        name: {**numbers, "moved_once_share": 0.0, "elements": 10, "alpha": 1.0 + number / 8, "clamped": False}
        for number, name in enumerate(groups_of(str(CONFIGS / "models" / f"{model}.json"), granularity))
    }
    keys = {"schema": 1, "step": 100, "samples": 32, "mode": "probe", "estimator": "damping", "reference": "vo"}
    write_report({**keys, "groups": groups, "world": {"data": 1}, "versions": {}}, path)
    return {name: float(group["alpha"]) for name, group in groups.items() if is_scaled(name)}


def test_alphas_of_a_small_model_go_into_a_config_of_7b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphas = report_of("llama_tiny", tmp_path / "report")
    seven = str(CONFIGS / "models" / "llama_7b.json")
    assert cli.main(["report", str(tmp_path / "report"), "--fixed-alphas", "--model", seven]) == 0
    section = json.loads(capsys.readouterr().out)
    assert section == {"fixed_alphas": alphas}
    assert "other" not in alphas
    config = json.loads((CONFIGS / "ds_7b_zero3.json").read_text("utf-8"))
    config["mols"] |= section
    written = tmp_path / "ds_7b_fixed.json"
    written.write_text(json.dumps(config), "utf-8")
    parsed = MolsConfig.parse(settings.read_config(str(written))["mols"])
    # What an engine does with it: the controller over the 7B's real group table, which no rank owns a part of here
    table = group_table(meta_model("llama_7b"), parsed.rules, parsed.granularity)
    context = Context(lambda x: x, torch.device("cpu"), 0, {}, {}, lambda text: None)
    controller = Controller(parsed, table, [], resolve_schedule(parsed, 1000, None), context)
    assert parsed.fixed_alphas is not None
    controller.advance(10)
    assert controller.phase == "ramping"
    assert {group: controller.alphas[group] for group in alphas} == alphas
    assert controller.alphas.get("other", 1.0) == 1.0


def test_alphas_of_layers_fit_the_same_depth_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphas = report_of("llama_tiny", tmp_path / "report", "layer_type")
    models = CONFIGS / "models"
    assert cli.main(["report", str(tmp_path), "--fixed-alphas"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    given = ["report", str(tmp_path / "report"), "--fixed-alphas"]
    assert cli.main([*given, "--model", str(models / "llama_tiny.json")]) == 0
    assert json.loads(capsys.readouterr().out) == {"fixed_alphas": alphas, "granularity": "layer_type"}
    assert cli.main([*given, "--model", str(models / "llama_7b.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "only a model of the same depth" in line
    assert "the report lacks" in line and "more of the model" in line


def test_a_report_without_alphas_gives_no_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_of("llama_tiny", tmp_path)
    file = tmp_path / "mols_report.json"
    report = json.loads(file.read_text("utf-8"))
    report["groups"]["qk"]["alpha"] = None
    file.write_text(json.dumps(report), "utf-8")
    assert cli.main(["report", str(tmp_path), "--fixed-alphas"]) == 2
    assert "no alpha of qk" in capsys.readouterr().err
    file.write_text(json.dumps(report | {"failed": "no sample was finite"}), "utf-8")
    assert cli.main(["report", str(tmp_path), "--fixed-alphas"]) == 2
    assert "its calibration failed (no sample was finite)" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--model", "x"]) == 2
    assert "only with --to or --fixed-alphas" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--fixed-alphas", "--to", "torch"]) == 2
    assert "--to: not allowed with argument --fixed-alphas" in capsys.readouterr().err
