"""Export a report's alphas as configuration of other frameworks: `mols-ds report REPORT --to FRAMEWORK`.

Formats as of August 2026: torchtitan's `ParamGroupConfig` (torchtitan/components/optimizer/optimizer.py), NeMo
Automodel's `param_group_overrides` (components/optim/optimizer.py), Megatron-core's `config_overrides`
(megatron/core/optimizer/__init__.py, 0.16 and 0.19), torch's parameter groups, and our own "fixed_alphas".

All of them scale whole parameters. A fused parameter whose ranges have different alphas keeps the base rate; a comment
names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mols_ds.core.layout import base_group, is_scaled
from mols_ds.core.schema import Report
from mols_ds.errors import MolsConfigError
from mols_ds.report.fixed_alphas import fixed_alphas, granularity_of

FRAMEWORKS = ("torchtitan", "automodel", "megatron", "deepspeed", "torch")

Kinds = Mapping[str, list[str]]
"""Parameter names without layer numbers -> their groups; see `core.groups.parameter_kinds`."""

_TITAN_LAYER = {
    **{f"attention.{q}.weight": ["qk"] for q in ("wq", "wk", "wq_a", "wq_b", "qkv_linear.wq", "qkv_linear.wk")},
    **{f"attention.{v}.weight": ["vo"] for v in ("wv", "qkv_linear.wv", "wo")},
    "attention.qkv_linear.wqkv.weight": ["qk", "vo"],
    "attention.wkv_a.weight": ["vo", "qk"],
    "attention.wkv_b.weight": ["qk", "vo"],
    **{f"{mlp}.w{n}.weight": ["mlp"] for mlp in ("feed_forward", "moe.shared_experts") for n in (1, 2, 3)},
    **{f"moe.experts.w{n}": ["mlp"] for n in (1, 2, 3)},
    **{f"moe.routed_experts.inner_experts.{w}": ["mlp"] for w in ("w1_EFD", "w2_EDF", "w3_EFD")},
    **{f"moe.routed_experts.inner_experts.mlp{n}_weight": ["mlp"] for n in (1, 2)},
}
TORCHTITAN: Kinds = {
    "tok_embeddings.weight": ["embedding"],
    "lm_head.weight": ["head"],
    "output.weight": ["head"],
    **{f"layers.{{layer}}.{name}": groups for name, groups in _TITAN_LAYER.items()},
}
"""Parameter names of torchtitan's decoders (llama3, qwen3, deepseek_v3, gpt_oss), old and new."""

MEGATRON: dict[str, list[str]] = {
    "embedding.*_embeddings.weight": ["embedding"],
    "output_layer.weight": ["head"],
    **{f"*.linear_{q}.weight": ["qk"] for q in ("q", "q_proj", "q_down_proj", "q_up_proj")},
    "*.linear_proj.weight": ["vo"],
    "*.linear_fc1.weight*": ["mlp"],
    "*.linear_fc2.weight*": ["mlp"],
    "*.experts.weight[12]": ["mlp"],
    **{f"*.linear_{fused}.weight": ["qk", "vo"] for fused in ("qkv", "kv", "kv_down_proj", "kv_up_proj")},
    "*.linear_qkv_down_proj.weight": ["qk", "vo"],
}
"""Parameter names of Megatron-core's decoders, as `fnmatch` patterns."""


class Rates(NamedTuple):
    """Exportable rates: group -> (alpha, pattern), and one line for each alpha that cannot be exported."""

    groups: dict[str, tuple[float, str]]
    missing: list[str]


def export(report: Report, framework: str, kinds: Kinds | None = None) -> str:
    """Return the alphas of `report` in the format of `framework`.

    Args:
        report: from `load_report`.
        framework: one of FRAMEWORKS.
        kinds: names of the model that will use the alphas, from `parameter_kinds`; None: those of the report.
            Ignored for megatron and torchtitan, which have their own models.

    Returns:
        YAML for automodel, JSON for deepspeed, Python for the others.

    Raises:
        MolsConfigError: the report has no alphas, or lacks names that the format needs.
    """
    section = fixed_alphas(report)
    if framework == "deepspeed":
        decay = {"weight_decay": "unscaled"} if _unscaled(report) else {}
        return json.dumps({"mols": {**section, **decay}}, indent=2)
    if framework == "megatron" and granularity_of(report) == "layer_type":
        raise MolsConfigError(
            "--to megatron: alphas of single layers cannot be exported, because names number the layers of one "
            'pipeline stage; measure with "granularity": "type"'
        )
    kinds = _names(report, framework, kinds)
    for text in (*section["fixed_alphas"], *kinds):
        if not text.isprintable() or not {"'", '"', "\\"}.isdisjoint(text):
            raise MolsConfigError(f"--to {framework}: {text!r} in the report is not a name of a group or a parameter")
    rates = _rates(section["fixed_alphas"], kinds, patterns=framework == "megatron")
    write = {"torchtitan": _torchtitan, "automodel": _automodel, "megatron": _megatron, "torch": _torch}[framework]
    return write(rates, report)


def _names(report: Report, framework: str, given: Kinds | None) -> Kinds:
    own = report.get("parameters")
    table = framework == "megatron" or (framework == "torchtitan" and not (own and "tok_embeddings.weight" in own))
    towers = [group for group in report["groups"] if "." in base_group(group)]
    if table and towers:
        raise MolsConfigError(
            f"--to {framework}: the report has groups of towers ({towers[0]}), whose names equal those of the language "
            "model there; use --to torch and write the patterns yourself"
        )
    if framework == "megatron":
        tied = "head" not in report["groups"]  # the copy of the embedding on the last stage needs the same rate
        return MEGATRON | ({"output_layer.weight": ["embedding"]} if tied else {})
    if table:
        return TORCHTITAN
    if framework == "torchtitan" and own:
        return own
    if given is None and own is None:
        raise MolsConfigError(
            f"--to {framework}: the report has no parameter names (an older release wrote it); name the model that "
            "will use the alphas: --model FILE"
        )
    return given or own or {}


def _rates(alphas: Mapping[str, float], kinds: Kinds, patterns: bool) -> Rates:
    """Find the alpha of each kind of parameter, per layer if the alphas differ by layer. Alpha 1 needs no entry.

    patterns: write `fnmatch` patterns; else regular expressions.
    """
    layers = sorted({int(group.rpartition(".")[2]) for group in alphas if "." in group})
    found: dict[str, list[tuple[str, int | None]]] = {}
    fused: dict[str, list[str]] = {}
    for kind, owners in kinds.items():
        for layer in layers if layers and "{layer}" in kind else [None]:
            keys = [owner if owner in alphas else f"{owner}.{layer}" for owner in owners]
            values = {key: alphas.get(key, 1.0) for key in keys if key in alphas or not is_scaled(key)}
            if len(set(values.values())) > 1:
                each = " and ".join(
                    owner if layers else f"{owner} (alpha {value:g})"
                    for owner, value in zip(owners, values.values(), strict=False)
                )
                fused.setdefault(each, []).append(kind.replace("{layer}", "*"))
            elif alphas.get(key := next(iter(values), "other"), 1.0) != 1.0:
                found.setdefault(key, []).append((kind, layer))
    missing = [
        f"{', '.join(dict.fromkeys(names))}: {each} are ranges of one parameter, which keeps the base rate"
        for each, names in fused.items()
    ]
    named = {owner for owners in kinds.values() for owner in owners}
    missing += [
        f"group {group} (alpha {alpha:g}): no parameter is known by name; it keeps the base rate"
        for group, alpha in alphas.items()
        if base_group(group) not in named
    ]
    write = _globs if patterns else _regex
    return Rates({key: (alphas[key], write(names)) for key, names in found.items()}, missing)


def _globs(names: Sequence[tuple[str, int | None]]) -> str:
    """Return source of a tuple of `fnmatch` patterns. Names start with `module.` after Megatron wraps the model."""
    return repr(tuple(kind if kind.startswith("*") else f"*{kind}" for kind, _ in names))


def _regex(names: Sequence[tuple[str, int | None]]) -> str:
    """Return a regular expression for parameters, also inside wrappers (`module.`, `layers.0._orig_mod.`)."""
    rests: dict[str, list[str]] = {}
    for kind, layer in names:
        before, mark, rest = (re.escape(part).replace(r"\*", r"\d+") for part in kind.partition("{layer}"))
        number = r"\d+" if layer is None else str(layer)
        start = rf"{before}{number}(?:\._\w+)*" if mark else ""
        rests.setdefault(start, []).append(rest if mark else before)
    parts = [start + (rest[0] if len(rest) == 1 else f"(?:{'|'.join(rest)})") for start, rest in rests.items()]
    return rf"(?:^|\.)(?:{'|'.join(parts)})$"


def _unscaled(report: Report) -> bool:
    return report.get("weight_decay") == "unscaled"


def _head(rates: Rates, report: Report, *lines: str) -> str:
    first = f"Learning-rate multipliers that MoLS measured at step {report['step']}. Apply them from the first step on."
    return "".join(f"# {line}\n" for line in (first, *lines, *(f"NOT WRITTEN: {line}" for line in rates.missing)))


def _table(rates: Rates) -> str:
    """Return Python source with one line per group."""
    return "\n".join(f'    ({alpha!r}, r"{pattern}"),  # {group}' for group, (alpha, pattern) in rates.groups.items())


def _torch(rates: Rates, report: Report) -> str:
    decay = '"weight_decay": weight_decay / alpha' if _unscaled(report) else '"weight_decay": weight_decay'
    return f'''{_head(rates, report, "optimizer = torch.optim.AdamW(param_groups(model, lr=3e-4, weight_decay=0.1))")}
import re

ALPHAS = [
{_table(rates)}
]


def param_groups(model, lr, weight_decay):
    """Return one parameter group at `lr`, then one per alpha."""
    found = [[] for _ in range(len(ALPHAS) + 1)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[next((i for i, (_, names) in enumerate(ALPHAS, 1) if re.search(names, name)), 0)].append(parameter)
    return [
        {{"params": parameters, "lr": lr * alpha, {decay}}}
        for parameters, alpha in zip(found, [1.0, *(alpha for alpha, _ in ALPHAS)], strict=True)
        if parameters
    ]'''


def _torchtitan(rates: Rates, report: Report) -> str:
    decay = "weight_decay / alpha" if _unscaled(report) else "weight_decay"
    use = "in a config: optimizer=OptimizersContainer.Config(param_groups=param_groups(lr=8e-4, weight_decay=0.1))"
    stages = "torchtitan refuses a pattern without a parameter: under pipeline parallelism leave out what a stage lacks"
    return f'''{_head(rates, report, use, stages)}
from torchtitan.components.optimizer import ParamGroupConfig

ALPHAS = [
{_table(rates)}
]


def param_groups(lr, weight_decay, **kwargs):
    """Return one group per alpha, and the last one for all other parameters."""
    return [
        ParamGroupConfig(
            pattern=pattern,
            optimizer_name="AdamW",
            optimizer_kwargs={{"lr": lr * alpha, "weight_decay": {decay}, **kwargs}},
        )
        for alpha, pattern in [*ALPHAS, (1.0, r".*")]
    ]'''


def _automodel(rates: Rates, report: Report) -> str:
    note = "Below `optimizer:` of a recipe. Its learning-rate scheduler applies them: without one they do nothing."
    rows = []
    for group, (alpha, pattern) in rates.groups.items():
        decay = f", wd_mult: {1 / alpha!r}" if _unscaled(report) else ""
        rows.append(f"  - {{pattern: '{pattern}', lr_mult: {alpha!r}{decay}}}  # {group}")
    return f"{_head(rates, report, note)}param_group_overrides:\n" + "\n".join(rows)


def _megatron(rates: Rates, report: Report) -> str:
    use = (
        "get_megatron_optimizer(config, model, config_overrides(config)), Megatron-core 0.16 or newer; text models only"
    )
    tied = "With tied embeddings give output_layer.weight the alpha of the embedding: stages hold copies of it."
    rows = "\n".join(f"    ({alpha!r}, {names}),  # {group}" for group, (alpha, names) in rates.groups.items())
    decay = ", wd_mult=1 / alpha" if _unscaled(report) else ""
    return f'''{_head(rates, report, use, tied)}
from megatron.core.optimizer import ParamKey, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

ALPHAS = [
{rows}
]


def config_overrides(config):
    """Return Megatron's own overrides and one per alpha. `lr_mult` only distinguishes the groups in a checkpoint."""
    overrides = get_standard_config_overrides(config)
    for alpha, names in ALPHAS:
        overrides[ParamKey(name=names)] = ParamGroupOverride(
            max_lr=config.lr * alpha, min_lr=(config.min_lr or 0.0) * alpha, lr_mult=alpha{decay}
        )
    return overrides'''
