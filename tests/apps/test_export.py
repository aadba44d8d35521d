"""`mols-ds report --to`: each output is applied, and every parameter has the rate of its group."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from mols_ds import cli
from mols_ds.core.config import MolsConfig
from mols_ds.core.groups import GroupTable, group_table, parameter_kinds
from mols_ds.core.layout import Granularity, base_group, is_scaled
from mols_ds.core.schema import NUMBERS, Report
from mols_ds.errors import MolsConfigError
from mols_ds.report.export import export
from mols_ds.training.models import meta_model
from tests.apps.command import ROOT

MODELS = ["llama_tiny", "gpt2_125m", "qwen_350m", "mixtral_8x7b"]
LR = 1e-3
# What torchtitan's llama3 calls its parameters (models/llama3/state_dict_adapter.py, August 2026), below the wrappers
# of activation checkpointing and torch.compile
TITAN = {
    "tok_embeddings.weight": "embedding",
    "lm_head.weight": "head",
    "norm.weight": "other",
    "layers.11._checkpoint_wrapped_module.attention.qkv_linear.wq.weight": "qk",
    "layers.0._orig_mod.attention.qkv_linear.wk.weight": "qk",
    "layers.0.attention.qkv_linear.wv.weight": "vo",
    "layers.0.attention.wo.weight": "vo",
    "layers.0.attention.qkv_linear.wqkv.weight": "other",
    "layers.0.attention.q_norm.weight": "other",
    "layers.0.attention_norm.weight": "other",
    **{f"layers.0.feed_forward.w{n}.weight": "mlp" for n in (1, 2, 3)},
    "layers.3.moe.routed_experts.inner_experts.w1_EFD": "mlp",
    "layers.3.moe.router.gate.weight": "other",
}


def table_of(model: str, granularity: Granularity = "type") -> GroupTable:
    return group_table(meta_model(str(ROOT / "configs/models" / f"{model}.json")), None, granularity)


def report_of(table: GroupTable, **changes: Any) -> Report:
    """A report in which every scaled group has a different alpha."""
    groups: dict[str, Any] = {
        row.group: {"elements": row.elements, "clamped": False} | dict.fromkeys(NUMBERS) | {"alpha": 1.0}
        for row in table
    }
    for number, group in enumerate(filter(is_scaled, groups)):
        groups[group]["alpha"] = 1.25 + number / 8
    words = {"schema": 1, "step": 3, "samples": 8, "mode": "probe", "estimator": "damping", "reference": "vo"}
    names = {"parameters": parameter_kinds(table.layouts)}
    return {**words, "groups": groups, "world": {}, "versions": {}, **names, **changes}  # type: ignore[typeddict-item]


def expected(table: GroupTable, report: Report) -> dict[str, float]:
    """Parameter -> alpha; 1 for those with ranges of several alphas."""
    alphas = {name: {report["groups"][g]["alpha"] for g in layout.groups} for name, layout in table.layouts.items()}
    return {name: found.pop() or 1.0 if len(found) == 1 else 1.0 for name, found in alphas.items()}


def run_python(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "exported", "exec"), names)
    return names


@pytest.mark.parametrize("granularity", ["type", "layer_type"])
@pytest.mark.parametrize("model", MODELS)
def test_torch_groups_have_the_rates(model: str, granularity: Granularity) -> None:
    table = table_of(model, granularity)
    report = report_of(table)
    net = meta_model(str(ROOT / "configs/models" / f"{model}.json"))
    groups = run_python(export(report, "torch"))["param_groups"](net, LR, 0.1)
    optimizer = torch.optim.AdamW(groups)  # refuses a parameter in two groups
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {name: LR * alpha for name, alpha in expected(table, report).items()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    unscaled = run_python(export({**report, "weight_decay": "unscaled"}, "torch"))["param_groups"](net, LR, 0.1)
    assert all(group["lr"] * group["weight_decay"] == pytest.approx(LR * 0.1) for group in unscaled)


@pytest.mark.parametrize("model", MODELS)
def test_automodel_matches_each_parameter_once(model: str) -> None:
    table = table_of(model)
    report = report_of(table, weight_decay="unscaled")
    rows = yaml.safe_load(export(report, "automodel"))["param_group_overrides"]
    for name, alpha in expected(table, report).items():
        found = [row for row in rows if re.search(row["pattern"], name)]
        assert [row["lr_mult"] for row in found] == ([alpha] if alpha != 1.0 else []), name
        assert all(row["wd_mult"] == 1 / alpha for row in found)


@pytest.mark.parametrize("granularity", ["type", "layer_type"])
def test_torchtitan_matches_its_own_names(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(kw_only=True, slots=True)
    class ParamGroupConfig:  # as in torchtitan/components/optimizer/optimizer.py
        pattern: str
        optimizer_name: str
        optimizer_kwargs: dict[str, Any] = field(default_factory=dict)

    module = ModuleType("torchtitan.components.optimizer")
    module.ParamGroupConfig = ParamGroupConfig  # type: ignore[attr-defined]
    for name in ("torchtitan", "torchtitan.components"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    report = report_of(table_of("llama_130m", granularity))
    configs = run_python(export(report, "torchtitan"))["param_groups"](lr=LR, weight_decay=0.1, betas=(0.9, 0.95))
    assert configs[-1].pattern == ".*" and configs[-1].optimizer_kwargs["lr"] == LR
    for name, group in TITAN.items():
        layer = re.search(r"layers\.(\d+)", name)
        key = f"{group}.{layer[1]}" if layer and granularity == "layer_type" else group
        alpha = report["groups"][key]["alpha"] if is_scaled(group) else 1.0
        first, *more = [config for config in configs if re.search(config.pattern, name)]
        assert first.optimizer_kwargs == {"lr": LR * (alpha or 0), "weight_decay": 0.1, "betas": (0.9, 0.95)}, name
        assert len(more) == (alpha != 1.0), name


def test_deepspeed_is_a_section() -> None:
    report = report_of(table_of("gpt2_125m", "layer_type"), weight_decay="unscaled")
    config = MolsConfig.parse(json.loads(export(report, "deepspeed"))["mols"])
    assert config.fixed_alphas == {g: row["alpha"] for g, row in report["groups"].items() if is_scaled(g)}
    assert (config.granularity, config.weight_decay) == ("layer_type", "unscaled")


@pytest.mark.parametrize("granularity", ["type", "layer_type"])
def test_a_fused_parameter_is_named_in_one_line(granularity: Granularity) -> None:
    for framework in ("torch", "automodel"):
        text = export(report_of(table_of("gpt2_125m", granularity)), framework)
        (line,) = [line for line in text.splitlines() if "NOT WRITTEN" in line]
        assert (
            line.startswith("# NOT WRITTEN: transformer.h.*.attn.c_attn.weight: qk") and "keeps the base rate" in line
        )
    same = report_of(table_of("gpt2_125m"))
    same["groups"]["qk"]["alpha"] = same["groups"]["vo"]["alpha"]
    assert "NOT WRITTEN" not in export(same, "torch")


def test_a_rule_s_own_group_is_written_or_named() -> None:
    rules = [[r"layers\.0\.mlp", "new:first_mlp"]]
    net = meta_model(str(ROOT / "configs/models/llama_tiny.json"))
    table = group_table(net, rules)
    report = report_of(table)
    groups = run_python(export(report, "torch"))["param_groups"](net, LR, 0.1)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates == {name: LR * alpha for name, alpha in expected(table, report).items()}
    for framework in ("megatron", "torchtitan"):
        assert "# NOT WRITTEN: group first_mlp (alpha" in export(report, framework)


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of("llama_tiny")
    report: Any = report_of(table)
    file, model = tmp_path / "mols_report.json", str(ROOT / "configs/models/llama_tiny.json")

    def said(*argv: str) -> str:
        status = cli.main(["report", str(tmp_path), *argv])
        out, err = capsys.readouterr()
        assert status == (2 if err else 0) and err.count("\n") <= 1
        return err or out

    for alpha in (0.0, -1.0, 1e999):
        groups = {**report["groups"], "qk": {**report["groups"]["qk"], "alpha": alpha}}
        file.write_text(json.dumps({**report, "groups": groups}), "utf-8")
        assert "'qk'" in said("--to", "torch")
    file.write_text(json.dumps({**report, "parameters": {"a\nimport os": ["qk"]}}), "utf-8")
    assert "is not a name of a group or a parameter" in said("--to", "torch")
    file.write_text(json.dumps({**report, "parameters": ["qk"]}), "utf-8")
    assert "'parameters' does not give" in said("--to", "torch")
    del report["parameters"]
    file.write_text(json.dumps(report), "utf-8")
    assert "--model FILE" in said("--to", "automodel")
    assert "param_group_overrides:" in said("--to", "automodel", "--model", model)
    assert "ParamKey" in said("--to", "megatron")
    assert "do not fit this model" in said("--to", "torch", "--model", str(ROOT / "configs/models/gpt2_125m.json"))
    towers = {**report, "groups": {**report["groups"], "vision.qk": report["groups"]["qk"]}}
    for framework in ("megatron", "torchtitan"):
        with pytest.raises(MolsConfigError, match=r"groups of towers \(vision.qk\)"):
            export(towers, framework)
    with pytest.raises(MolsConfigError, match="alphas of single layers cannot be exported"):
        export(report_of(table_of("llama_tiny", "layer_type")), "megatron")


def test_kinds_are_few_and_whole() -> None:
    table = table_of("mixtral_8x7b")
    kinds = parameter_kinds(table.layouts)
    assert len(kinds) == 12 and kinds["model.layers.{layer}.mlp.experts.down_proj"] == ["mlp"]
    assert {base_group(g) for groups in kinds.values() for g in groups} == set(table.elements)
