"""A wrong argument of any command is status 2 and one line on stderr; doctor and launch need no other package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mols_ds import cli
from mols_ds.apps.launch import deepspeed_cli, health, signals
from mols_ds.apps.study import command as study
from tests.tools.simulate import command as simulate

Main = Callable[[list[str]], int]
WRONG: dict[str, tuple[Main, list[str], str]] = {
    "mols-ds": (cli.main, ["nonsense"], "mols-ds: argument COMMAND: invalid choice"),
    "mols-ds groups": (cli.main, ["groups", "--nonsense"], "mols-ds: "),
    "mols-ds plan": (cli.main, ["plan", "--config"], "mols-ds: argument --config: expected one argument"),
    "mols-ds compare": (cli.main, ["compare"], "mols-ds: the following arguments are required: STUDY.yaml"),
    "mols-ds doctor": (cli.main, ["doctor", "--nonsense"], "mols-ds doctor: unrecognized arguments: --nonsense"),
    "mols-ds launch": (cli.main, ["launch", "--num_gpus", "x", "train.py"], "deepspeed: argument --num_gpus"),
    "deepspeed": (
        deepspeed_cli.main,
        ["--num_gpus"],
        "deepspeed: argument --num_gpus/--num_accelerators: expected one",
    ),
    "health": (health.main, ["--gpus", "x"], "mols_ds.apps.launch.health: argument --gpus: invalid int value"),
    "signals": (signals.main, ["send", "SIGUSR1"], "mols_ds.apps.launch.signals: the following arguments"),
    "signals run": (signals.main, ["run"], "mols_ds.apps.launch.signals: run: no command"),
    "signals out": (signals.main, ["run", "--unfinished", "9", "x"], "mols_ds.apps.launch.signals: --unfinished needs"),
    "study": (study.main, ["--jobs", "x", "a.yaml"], "mols-ds: argument --jobs: invalid int value: 'x'"),
    "simulate": (simulate.main, ["--stage", "7"], "simulate: argument --stage: invalid choice: 7"),
    "simulate one": (simulate.main, ["--one", '{"rank": 3}'], 'simulate: --one: "source" is missing; "ranks" is'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, argv, message = WRONG[name]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(message) and not out


LIGHT = """
import sys
import mols_ds.cli, mols_ds.training.cli_utils, mols_ds.apps.doctor.command, mols_ds.apps.doctor.imports
import mols_ds.apps.launch.deepspeed_cli, mols_ds.apps.launch.health
print(*sorted({"torch", "deepspeed", "pydantic", "numpy", "transformers", "rich"} & set(sys.modules)))
"""


def test_doctor_and_launch_start_without_the_packages_that_may_be_broken() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_a_model_that_cannot_be_built_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers reads the file, and torch refuses the sizes only when the model is built."""
    model = tmp_path / "model.json"
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": 10, "pad_token_id": 50, **sizes}), "utf-8")
    assert cli.main(["groups", str(model)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mols-ds: model {model}: cannot be built: AssertionError: Padding_idx")


@pytest.mark.parametrize(("module", "package"), [("scipy", "scipy"), ("markdown_it", "markdown-it-py")])
def test_a_package_of_the_report_is_missed_before_the_training(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("mols_ds.apps.study.") or name == module]:
        if name not in ("mols_ds.apps.study.command", "mols_ds.apps.study.runs", "mols_ds.apps.study.spec"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["compare", "studies/smoke.yaml", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mols-ds: the report of a study needs {package}: pip install {package}"
    assert not (tmp_path / "out").exists()
