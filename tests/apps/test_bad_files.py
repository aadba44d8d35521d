"""Whatever a user's file is, each program ends with status 2 and one line on stderr: no traceback, no waiting."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import mols_ds
from mols_ds.apps.doctor.findings import Findings
from mols_ds.cli import main as cli
from mols_ds.errors import MolsConfigError
from tests.apps.command import ROOT

DEEP = "[" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
COMMON: dict[str, bytes] = {
    "empty": b"",
    "deep": DEEP.encode(),
    "list": b"[1, 2]",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "NUL": b'{"a": "\0"}',
    "huge": b'{"optimizer": ' + b"9" * 5000 + b"}",
    "large": b'{"mols": {"samples": ' + b"9" * 400 + b"}}",
    "twice": b'{"mols": {"start": 1, "start": 2}}',
}
YAML: dict[str, bytes] = {**COMMON, "bomb": BOMB.encode(), "itself": b"a: &a [*a]"}


def train(args: Sequence[str]) -> int:
    from mols_ds.apps.train import main

    return main(["--steps", "1", *args])


def tune(args: Sequence[str]) -> int:
    from mols_ds.apps.finetune.main import main

    return main(args)


def megatron(args: Sequence[str]) -> int:
    from mols_ds.apps.train_megatron.main import main

    return main(args)


MODEL = str(ROOT / "configs" / "models" / "llama_tiny.json")
DATA = str(ROOT / "configs" / "data" / "instructions.jsonl")
JSON_PROGRAMS: dict[str, Callable[[str], int]] = {
    "train config": lambda file: train(["--deepspeed_config", file, "--model", MODEL]),
    "train model": lambda file: train(["--deepspeed_config", str(ROOT / "configs/ds_mols_cpu.json"), "--model", file]),
    "finetune": lambda file: tune(["--deepspeed_config", file, "--model", MODEL, "--data", DATA]),
    "report": lambda file: cli(["report", file]),
    "groups": lambda file: cli(["groups", file]),
    "groups config": lambda file: cli(["groups", MODEL, "--config", file]),
    "plan": lambda file: cli(["plan", "--config", file, "--model", MODEL, "--memory", "80GiB"]),
}
YAML_PROGRAMS: dict[str, Callable[[str], int]] = {
    "megatron": lambda file: megatron(["--config", file]),
    "compare": lambda file: cli(["compare", file]),
    "plan cluster": lambda file: cli(
        ["plan", "--config", str(ROOT / "configs/ds_mols_cpu.json"), "--model", MODEL, "--cluster", file]
    ),
    "plan megatron": lambda file: cli(["plan", "--config", file, "--memory", "80GiB"]),
}
KINDS = [
    *[(program, kind) for program in JSON_PROGRAMS for kind in (*COMMON, "folder", "pipe")],
    *[(program, kind) for program in YAML_PROGRAMS for kind in (*YAML, "folder", "pipe")],
]


def make(place: Path, kind: str) -> None:
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.write_bytes(YAML[kind])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.mark.parametrize(("program", "kind"), KINDS)
def test_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, kind: str) -> None:
    place = tmp_path / ("file.yaml" if program in YAML_PROGRAMS else "file.json")
    make(place, kind)
    status = {**JSON_PROGRAMS, **YAML_PROGRAMS}[program](str(place))
    err = capsys.readouterr().err
    assert status == 2, err
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(line) < 1000 and line.isprintable()


@pytest.mark.parametrize(
    ("suffix", "kind"), [*[("json", kind) for kind in COMMON], *[("yaml", kind) for kind in YAML]]
)  # HJSON takes the others for texts
def test_the_doctor_has_a_finding(tmp_path: Path, suffix: str, kind: str) -> None:
    from mols_ds.apps.doctor.deepspeed_config import check_config
    from mols_ds.apps.doctor.megatron_config import check_yaml

    place, findings = tmp_path / f"file.{suffix}", Findings()
    make(place, kind)
    if suffix == "json":
        check_config(findings, str(place), model=None, steps=None, world=None)
    else:
        check_yaml(findings, str(place), steps=None, world=None)
    problems = [item for item in findings.items if item.level == "problem"]
    assert problems and all(len(item.found) < 1000 and item.found.isprintable() for item in problems)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_the_doctor_wants_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    make(tmp_path / "file.json", kind)
    assert cli(["doctor", "--config", str(tmp_path / "file.json")]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*COMMON, "folder", "pipe"])
def test_initialize(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "file.json", kind)
    with pytest.raises(MolsConfigError) as caught:
        mols_ds.initialize(model=None, config=str(tmp_path / "file.json"))
    assert str(caught.value).isprintable()


def test_initialize_with_what_is_no_config() -> None:
    deep: list[object] = []
    for _ in range(2000):
        deep = [deep]
    bad: list[object] = [{"mols": {"rules": deep}}, {"a": deep}, "no base64 \x1b[31m", "eyJh", 7]
    for config in bad:
        with pytest.raises(MolsConfigError) as caught:
            mols_ds.initialize(model=None, config=config)
        assert str(caught.value).isprintable()
