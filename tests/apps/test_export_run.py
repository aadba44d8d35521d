"""`mols-ds export` writes a folder that transformers loads, with the logits of the engine; checkpoints that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds import cli
from tests.apps.command import write_job
from tests.apps.mains import train
from tests.helpers.harness import run_cases

pytestmark = [pytest.mark.jobs, pytest.mark.tier("all")]
IDS = torch.arange(40).view(2, 20)
FILES = {"model": "tiny.json", "config": "ds.json", "data": "text.jsonl"}
CASES = [(0, False, True), (2, True, False), (3, False, True)]


def place_of(folder: Path, case: tuple[int, bool, bool]) -> Path:
    return folder / "-".join(map(str, case))


def prepare(folder: Path, case: tuple[int, bool, bool]) -> None:
    stage, bf16, tied = case
    place_of(folder, case).mkdir()
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    given: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "mols": {"enabled": False}}
    model = write_job(place_of(folder, case), **given)["model"]
    model.write_text(json.dumps({**json.loads(model.read_text("utf-8")), "tie_word_embeddings": tied}), "utf-8")


def trained(folder: str, *case: Any) -> Any:
    """Train five steps; the engine's logits at the end."""
    from mols_ds.training.deepspeed_backend import DeepSpeedBackend

    place = place_of(Path(folder), case)
    paths = {name: place / file for name, file in FILES.items()}
    seen: dict[str, torch.Tensor] = {}
    stock = DeepSpeedBackend.close

    def close(self: DeepSpeedBackend) -> None:
        self.engine.eval()
        with torch.no_grad():
            seen["logits"] = self.engine(input_ids=IDS, use_cache=False).logits.float().clone()
        stock(self)

    DeepSpeedBackend.close = close  # type: ignore[method-assign]
    try:
        done = train(paths, place / "out", "--steps", "5", "--save-every", "1", "--keep-last", "2", "--keep-every", "2")
    finally:
        DeepSpeedBackend.close = stock  # type: ignore[method-assign]
    assert done.status == 0, done.stderr
    return seen["logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    for case in CASES:
        prepare(made, case)
    return made


@pytest.fixture(scope="module")
def logits(folder: Path) -> dict[tuple[int, bool, bool], torch.Tensor]:
    cases = [(str(folder), *case) for case in CASES]
    found = run_cases(trained, 2, cases, timeout=120)
    return {case: found[whole][0] for case, whole in zip(CASES, cases, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_the_exported_folder_has_the_engine_s_logits(
    case: tuple[int, bool, bool], folder: Path, logits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = place_of(folder, case) / "out"
    assert sorted(path.name for path in (out / "checkpoints").glob("step*")) == ["step2", "step4", "step5"]
    assert cli.main(["export", str(out), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'model'}: step5 of {out}, ")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert model.dtype == (torch.bfloat16 if case[1] else torch.float32)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits.float(), logits[case])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 300
    capsys.readouterr()  # transformers' own progress bars
    assert cli.main(["export", str(out), str(tmp_path / "other"), "--step", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mols-ds: export: checkpoint {out / 'checkpoints' / 'step3'}: there is no step3"
    assert cli.main(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "it is not a run of train.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "run", "other"])
def test_an_export_writes_over_models_only(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers writes nothing at all where a file has the folder's name, and only logs it."""
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir()
    for file in ("file", "run/run.json", "run/config.json", "other/notes.txt"):
        (tmp_path / file).write_text("{}", "utf-8")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.endswith(f"{tmp_path / name} has other files than a model's: name a new folder\n")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("finetune.py", "is a run of finetune.py, which writes transformers folders itself: use {out}/model or "),
        ("train_megatron.py", "convert them with Megatron Bridge or Megatron-LM's tools/checkpoint"),
    ],
)
def test_runs_of_other_programs_name_what_to_use(
    program: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"program": program}}), "utf-8")
    (tmp_path / "mols").mkdir()
    for out in (tmp_path, tmp_path / "mols"):
        assert cli.main(["export", str(out), str(tmp_path / "other")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"mols-ds: export: {out} is a run of {program}") and message.format(out=out) in line
