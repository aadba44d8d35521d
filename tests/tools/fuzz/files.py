"""Config sections and files, study files and reports: nothing but the documented error, and nothing half-right."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsConfigError, MolsError
from mols_ds.report.files import load_report
from mols_ds.report.table import format_report
from tests.tools.fuzz.common import ACCEPTED, REFUSED, Target, damaged, mutated, refused_by

FOLDER = tempfile.TemporaryDirectory(prefix="mols-fuzz-")

MOLS: dict[str, Any] = {
    "enabled": True, "preset": "robust", "start": 0.01, "samples": 32, "max_samples": 64, "alpha_rtol": 0.1,
    "mode": "probe", "estimator": "damping", "noise_floor_correction": True, "reference": "vo", "alpha_min": 0.1,
    "alpha_max": 10.0, "ramp": "cosine", "ramp_end": 0.1, "granularity": "type", "rules": [["a", "qk"]],
    "accumulators": {"device": "cpu", "dtype": "float32"}, "recalibrate": {"every": 100}, "fixed_alphas": None,
    "total_steps": 1000, "report_dir": "r",
}  # fmt: skip
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "optimizer": {"type": "AdamW", "source": "library", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
    "tensorboard": {"enabled": True, "output_path": ""}, "tensor_parallel": {"autotp_size": 1},
    "mols": {"start": 1, "samples": 8, "ramp_end": 9},
}  # fmt: skip
SCHEDULED: dict[str, Any] = {
    **{key: value for key, value in DEEPSPEED.items() if key != "tensorboard"},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}},
}
MEGATRON: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8},
    "parallel": {"tp": 2, "pp": 1, "vp": None, "ep": 1, "sp": False}, "precision": {"dtype": "fp32", "fp8": None},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "clip_grad": 1.0}, "scheduler": {"style": "cosine", "warmup": 0.1},
    "batch": {"micro": 2, "global": 8}, "data": {"source": "stdlib"}, "run": {"steps": 20, "seq_len": 32, "seed": 0},
    "mols": {"start": 1, "ramp_end": 9},
}  # fmt: skip
STUDY: dict[str, Any] = {
    "name": "s", "models": {"tiny": {"model_type": "llama"}}, "data": {"source": "stdlib", "eval_share": 0.1},
    "batch": {"sequences": 8, "length": 32, "micro": 4}, "budget": {"steps": 10}, "lr": [1e-3, 2e-3], "seeds": [1, 2],
    "tune_seeds": [0], "baseline": "adam", "pairs": [["mols", "adam"]], "snr": {"every": 5, "arms": ["mols"]},
    "arms": {"adam": {}, "mols": {"mols": {"samples": 8}, "grid": {"mols.samples": [4, 8]}, "models": ["tiny"]}},
    "evaluation": {"sequences": 8, "every": 5}, "deepspeed": {"zero_optimization": {"stage": 1}}, "clip": 1.0,
}  # fmt: skip
NUMBERS = ("snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high", "alpha")
GROUP: dict[str, Any] = {
    **dict.fromkeys(NUMBERS, 0.5), "elements": 64, "never_moved_share": 0.1, "moved_once_share": None, "clamped": False,
}  # fmt: skip
REPORT: dict[str, Any] = {
    "schema": 1, "step": 10, "samples": 32, "mode": "probe", "estimator": "damping", "reference": "vo",
    "groups": {"vo": GROUP, "qk.0": GROUP, "qk.1": GROUP}, "world": {"data": 2}, "versions": {"torch": "2"},
    "failed": None, "noise_floor_correction": True, "skipped_samples": 0,
}  # fmt: skip


def file_of(content: bytes, name: str) -> str:
    """`content` as a file; one of each name at a time."""
    path = Path(FOLDER.name) / name
    path.write_bytes(content)
    return str(path)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """JSON is YAML; the block style of people where it can be written in it."""
    try:
        return str(yaml.safe_dump(value, allow_unicode=True, sort_keys=False))
    except (yaml.YAMLError, UnicodeError):
        return as_json(value)


def texts(base: Any, dump: Any = as_json) -> st.SearchStrategy[bytes]:
    return damaged(mutated(base).map(dump))


# ------------------------------------------------------------------ checks


def check_section(section: Any) -> str:
    """Parsing again what was accepted gives the same."""

    def parse() -> None:
        parsed = MolsConfig.parse(section)
        again = MolsConfig.parse(json.loads(json.dumps(parsed.model_dump())))
        assert again == parsed

    return refused_by(parse, MolsConfigError)


def check_deepspeed(case: tuple[bytes, int]) -> str:
    from mols_ds.training.ds_config import BATCH_KEYS, read_config, resolve

    content, world = case
    path = file_of(content, "ds.json")

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resolved = resolve(read_config(path), world=world, steps=100, out=Path("out"))
        total, micro, passes = (resolved[key] for key in BATCH_KEYS)
        assert total == micro * passes * world

    return refused_by(read, MolsError)


def check_doctor(content: Any) -> str:
    """A finding for every problem, never one that a check itself failed. Refused: it found a problem."""
    from mols_ds.apps.doctor.deepspeed_config import check_config
    from mols_ds.apps.doctor.findings import Findings

    findings = Findings()
    check_config(
        findings, file_of(as_json(content).encode("utf-8", "surrogatepass"), "d.json"), model=None, steps=100, world=2
    )
    broken = [finding for finding in findings.items if "cannot be checked" in finding.found]
    assert not broken, broken
    assert findings.items and all(finding.found for finding in findings.items)
    return REFUSED if findings.status(strict=False) else ACCEPTED


def check_megatron(case: tuple[bytes, int, str]) -> str:
    from mols_ds.training.megatron_config import GridSizes, micro_batches
    from mols_ds.training.megatron_settings import read

    content, world, change = case
    path = file_of(content, "m.yaml")

    def look() -> None:
        settings = read(path, [change] if change else [])
        grid = GridSizes.of(settings, world)
        assert micro_batches(settings, grid) * settings.batch.micro * grid.data == settings.batch.total

    return refused_by(look, MolsConfigError)


def check_transformer(content: Any) -> str:
    """Megatron-core's own config objects from settings that were accepted."""
    from megatron_patches.machine import Machine
    from mols_ds.training.megatron_config import ddp_config, optimizer_config, transformer_config
    from mols_ds.training.megatron_settings import validate

    machine = Machine(None, "not here", None)

    def build() -> None:
        settings = validate(content, "config")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformer_config(settings, machine)
            optimizer_config(settings)
            ddp_config(settings)

    return refused_by(build, MolsError)


def check_study(content: bytes) -> str:
    from mols_ds.apps.study.spec import load_study

    path = file_of(content, "study.yaml")

    def load() -> None:
        study = load_study(path)
        assert study.steps >= 1 and study.eval_every >= 1 and study.tokens_per_step >= 1
        for arm in study.arms:
            study.candidates(arm)

    return refused_by(load, MolsConfigError)


def check_report(content: bytes) -> str:
    """What is accepted can be shown."""
    path = file_of(content, "mols_report.json")

    def show() -> None:
        report = load_report(path)
        try:
            assert format_report(report)
        except MolsConfigError as error:
            raise AssertionError(f"accepted, then refused: {error}") from error

    return refused_by(show, MolsConfigError)


CHANGES = st.sampled_from(
    [""] * 12
    + [
        "run.steps=3",
        "run.steps=x",
        "a.b=1",
        "run=1",
        "=",
        "run.steps=",
        "model.x.y=1",
        "run.steps.x=1",
        "parallel.tp=3",
        ".=1",
        "a..b=1",
    ]
)
WORLDS = st.sampled_from([1, 2, 2, 4, 4, 8, 3, 512])
MEGATRON_CASES = st.tuples(texts(MEGATRON, as_yaml), WORLDS, CHANGES)
MEGATRON_OBJECTS = mutated(MEGATRON, 2).filter(lambda value: isinstance(value, dict))
TARGETS = [
    Target('"mols" section (config.py)', mutated(MOLS), check_section, 2000),
    Target("DeepSpeed config (ds_config.py)", st.tuples(texts(DEEPSPEED), WORLDS), check_deepspeed, 1200),
    Target("doctor on a DeepSpeed config (doctor/)", mutated(SCHEDULED), check_doctor, 300),
    Target("Megatron YAML (megatron_settings.py)", MEGATRON_CASES, check_megatron, 800),
    Target("Megatron model (megatron_config.py)", MEGATRON_OBJECTS, check_transformer, 400),
    Target("study YAML (study/spec.py)", texts(STUDY, as_yaml), check_study, 600),
    Target("report file (schema.py)", texts(REPORT), check_report, 1500),
]  # fmt: skip
