"""What a run may not do silently: overwrite a run, share its folder, go on with other settings."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apps.command import TRAIN, Done, job_arguments, read_metrics, run, write_job
from tests.apps.finetuning import write_checkpoint
from tests.apps.launch.running import started
from tests.apps.mains import changed_file, copy_run, one_line, train
from tests.helpers.harness import run_ranks
from tests.helpers.ports import free_port

pytestmark = pytest.mark.jobs
PLAIN = {"train_batch_size": 2, "mols": {"enabled": False}}
SAVED = ["--save-every", "2", "--eval-every", "2"]
LR = ["--resume", "--lr", "0.004", "--steps", "6", *SAVED]

# Arguments, changed keys of the config and of the model file -> what the refusal says
REFUSED: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], list[str]]] = {
    "order": (
        ["--seq-len", "16", "--seed", "1"],
        {},
        {},
        ["--seq-len is 16 and was 32 (the order of the data depends on it)", "; --seed is 1 and was 0"],
    ),
    "shorter": (["--steps", "3"], {}, {}, ["--steps is 3 and was 4 (a run can be extended, not cut)"]),
    "batch": ([], {"train_batch_size": 4}, {}, ["train_batch_size is 4 and was 2"]),
    "optimizer": (
        [],
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-2}}},
        {},
        ["optimizer.type is SGD and was AdamW (the checkpoint's optimizer state does not fit it)"],
    ),
    "precision": ([], {"bf16": {"enabled": True}}, {}, ["bf16.enabled is True and was False"]),
    "model": (
        [],
        {},
        {"intermediate_size": 48},
        ["model.intermediate_size is 48 and was 32 (the checkpoint's weights"],
    ),
}


def work(folder: str) -> dict[str, Done]:
    """Everything on one rank, so that torch and DeepSpeed are imported once."""
    base = Path(folder)
    paths, whole = write_job(base, **PLAIN), base / "whole"
    found = {"whole": train(paths, whole, "--steps", "4", *SAVED)}
    held = copy_run(whole, base / "held")
    found["held"] = train(paths, held, "--steps", "4")
    (held / "notes.txt").write_text("mine", "utf-8")
    found["overwritten"] = train(paths, held, "--steps", "3", "--overwrite")
    for name, (arguments, config, model, _) in REFUSED.items():
        place = base / name
        place.mkdir()
        other = {
            "data": paths["data"],
            "config": changed_file(paths["config"], place / "ds.json", **config),
            "model": changed_file(paths["model"], place / "model.json", **model),
        }
        steps = [] if "--steps" in arguments else ["--steps", "4"]
        found[name] = train(other, copy_run(whole, base / f"{name}-out", 2), "--resume", *steps, *SAVED, *arguments)
    rows = paths["data"].read_text("utf-8")
    more = {**paths, "data": base / "more.jsonl"}
    more["data"].write_text(f"{rows}\n{json.dumps({'text': 'one more document'})}", "utf-8")
    found["text"] = train(more, copy_run(whole, base / "text-out", 2), "--steps", "4", "--resume", *SAVED)
    unsaved = copy_run(whole, base / "unsaved-out", 2)  # as release 0.4.0 left it
    (unsaved / "run.json").unlink()
    found["unsaved"] = train(paths, unsaved, "--steps", "4", "--resume", "--seed", "1", *SAVED)
    pretrained = {**paths, "model": write_checkpoint(base / "pretrained")}
    found["pretrained"] = train(pretrained, base / "pretrained-out", "--steps", "1", "--cache-dir", str(base / "own"))
    found["vocab-size"] = train(pretrained, base / "no-out", "--vocab-size", "300")
    for file in base.glob("pretrained/tokenizer*"):
        file.unlink()
    found["no tokenizer"] = train(pretrained, base / "no-out")
    moved = {**paths, "data": base / "moved.jsonl"}
    shutil.copy(paths["data"], moved["data"])
    found["moved"] = train(moved, copy_run(whole, base / "moved-out", 2), *LR)
    return found


@functools.cache
def base() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="run_folder_"))


@functools.cache
def results() -> dict[str, Done]:
    found: dict[str, Done] = run_ranks(work, 1, str(base()), timeout=300)[0]
    return found


@pytest.fixture(scope="module", autouse=True)
def removed() -> Any:
    yield
    shutil.rmtree(base(), ignore_errors=True)


def test_the_settings_and_the_names_of_a_run_are_saved() -> None:
    assert results()["whole"].status == 0, results()["whole"].stderr
    settings = json.loads((base() / "whole" / "run.json").read_text("utf-8"))["settings"]
    expected = {"program": "train.py", "--steps": 4, "--seq-len": 32, "optimizer.params.lr": 1e-2}
    assert {key: settings[key] for key in expected} == expected
    assert settings["model.hidden_size"] == 16 and ["tokens" in text for text in settings["text.train"]] == [True]
    names = {"model": str(base() / "tiny.json"), "data": str(base() / "text.jsonl"), "tokenizer": "trained on the data"}
    first, *others = read_metrics(base() / "whole")
    assert first["run"] == names and not any("run" in line for line in others)
    header = results()["whole"].stdout.splitlines()[0]
    assert header.startswith(f"{names['model']}, data {names['data']}, tokenizer trained on the data (300 tokens), ")


def test_a_folder_that_holds_a_run_is_not_lost() -> None:
    out = base() / "held"
    assert one_line(results()["held"]) == (
        f"train.py: --out {out} contains a run: --resume continues it, --overwrite deletes it; or give another --out"
    )
    assert results()["overwritten"].status == 0, results()["overwritten"].stderr
    assert sorted(path.name for path in (out / "checkpoints").glob("step*")) == ["step3"]
    assert (out / "notes.txt").is_file() and len(read_metrics(out)) == 4


@pytest.mark.parametrize("name", REFUSED)
def test_settings_with_which_a_run_cannot_go_on(name: str) -> None:
    line = one_line(results()[name])
    assert line.startswith("train.py: --resume: ") and all(part in line for part in REFUSED[name][3]), line
    assert read_metrics(base() / f"{name}-out") == read_metrics(base() / "whole")


def test_another_text_is_refused() -> None:
    assert "(it is not the text of this run)" in one_line(results()["text"])


def test_a_refused_checkpoint_leaves_no_settings() -> None:
    """Else the next --resume, with the run's own settings, would be refused."""
    assert one_line(results()["unsaved"]).endswith("--resume: the checkpoint was made with --seed 0, not 1")
    assert not (base() / "unsaved-out" / "run.json").exists()


def test_a_run_is_extended_at_another_rate_from_a_text_elsewhere() -> None:
    """A text is compared by its content. What the command line changes is said, and applies from the next step on."""
    assert results()["moved"].status == 0, results()["moved"].stderr
    said = [line for line in results()["moved"].stdout.splitlines() if line.startswith("--resume: ")]
    ours = {line["step"]: line["lr"] for line in read_metrics(base() / "moved-out")[:-1]}
    theirs = {line["step"]: line["lr"] for line in read_metrics(base() / "whole")[:-1]}
    assert said == [
        "--resume: --steps is 6 and was 4: this run's value applies",
        "--resume: optimizer.params.lr is 0.004 and was 0.01: this run's value applies",
        f"--resume: extended from 4 to 6 steps; by this run's schedule the rate of step 3 is {ours[3]:.4g} instead of "
        f"{theirs[3]:.4g}",
    ]
    from mols_ds.training.deepspeed_backend import schedule

    assert list(ours) == [1, 2, 3, 4, 5, 6] and ours[2] == theirs[2]
    assert [ours[step] for step in (3, 4, 5, 6)] == pytest.approx(
        [0.004 * schedule(6)(step - 1) for step in (3, 4, 5, 6)]
    )


def test_a_model_folder_has_its_own_tokenizer() -> None:
    done, folder = results()["pretrained"], base() / "pretrained"
    assert done.status == 0, done.stderr
    assert f"tokenizer {folder} (512 tokens)" in done.stdout.splitlines()[0]
    assert read_metrics(base() / "pretrained-out")[0]["run"]["tokenizer"] == str(folder)
    assert [path.name.partition("-")[0] for path in (base() / "own").iterdir() if path.is_dir()] == ["tokens"]
    message = f"train.py: model {folder}: the folder has no tokenizer: give the model's by --tokenizer FOLDER, or train"
    assert one_line(results()["no tokenizer"]).startswith(message)
    assert one_line(results()["vocab-size"]).startswith("train.py: --vocab-size is the size of a tokenizer to train")


@pytest.mark.tier("all")
def test_two_runs_do_not_use_one_folder(tmp_path: Path) -> None:
    """The second run ends in one line, on both of its ranks; a killed run leaves no lock."""
    paths, out = write_job(tmp_path, **PLAIN), tmp_path / "out"
    arguments = ["--deepspeed_config", str(paths["config"]), *job_arguments(paths, out)]
    with started([sys.executable, TRAIN, *arguments, "--steps", "100000"], tmp_path) as running:
        running.until(out / "metrics.jsonl")
        launch = ["deepspeed", "-q", "--master_port", str(free_port()), "--num_gpus", "2", TRAIN]
        line = one_line(run(*launch, *arguments, "--steps", "2", "--overwrite", cwd=tmp_path))
        assert line.startswith(f"train.py: --out {out}: another run uses it (process {running.process.pid} on ")
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
    after = run(sys.executable, TRAIN, *arguments, "--steps", "2", "--overwrite", cwd=tmp_path)
    assert after.status == 0, after.stderr
