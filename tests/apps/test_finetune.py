"""finetune.py on a small checkpoint: methods, ranks and ZeRO stages agree, saved files load, mistakes are errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mols_ds.apps.finetune import evaluate
from mols_ds.apps.finetune import main as job
from mols_ds.apps.finetune.data import AnswerBatches, load_tokenizer, prepare
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.training.batches import BatchShape
from mols_ds.training.sources import DataSpec
from mols_ds.training.trainer import TIMED
from tests.apps.command import ROOT, read_metrics, run
from tests.apps.finetuning import (
    CONFIG,
    DATA,
    STEPS,
    arguments,
    config_path,
    fine_tune,
    resume,
    write_checkpoint,
    write_config,
)
from tests.helpers.harness import Results, run_cases
from tests.helpers.ports import free_port
from tests.helpers.tiers import Cases

METHODS = ("full", "lora", "dora")
ALONE = Cases(METHODS)
PAIR = Cases([("lora", 2), *((method, 3) for method in METHODS)], full=[("lora", 3)])
TOLERANCE = 1e-5
"""Between ways of splitting a batch, on losses of about 7: float32 sums in another order (4e-7 was seen), which six
steps of Adam could amplify."""
SAME = 1e-6
"""Between the logits of an engine and of its weights loaded again: equal float32 numbers (no difference was seen)."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finetune")
    write_checkpoint(base / "tiny")
    for stage in (2, 3):
        write_config(base, stage)
    return base


@pytest.fixture(scope="session")
def alone(folder: Path) -> Results:
    """One rank."""
    return run_cases(fine_tune, 1, [(str(folder), method, 2) for method in ALONE.wanted])


@pytest.fixture(scope="session")
def pair(folder: Path) -> Results:
    """Two ranks."""
    return run_cases(fine_tune, 2, [(str(folder), *case) for case in PAIR.wanted])


@pytest.mark.jobs
def test_shim_fine_tunes_adapters_on_two_processes(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, config_path(folder, 2), tmp_path / "out", "lora", "--steps", str(STEPS))
    script = argv[: argv.index("--config")] + argv[argv.index("--config") + 2 :]
    launch = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", "2", "--config", config_path(folder, 2)]
    done = run(*launch, ROOT / "finetune.py", *script, cwd=tmp_path)
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "2 processes" in done.stdout
    *steps, final = read_metrics(tmp_path / "out")
    assert (steps[0]["phase"], steps[-1]["phase"]) == ("calibrating", "fixed")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(final["alphas"]) == {"qk", "vo", "mlp"} and len(set(final["alphas"].values())) == 3
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def losses(found: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in found["metrics"] if "loss" in line]


@pytest.mark.distributed
@ALONE.parametrize("method")
def test_methods_train_with_mols_and_what_is_saved_loads(method: str, folder: Path, alone: Results) -> None:
    found = alone[(str(folder), method, 2)][0]
    assert found["status"] == 0
    assert found["difference"] < SAME
    *steps, final = found["metrics"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["phase"] == "fixed"
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert steps[-1]["val_loss"] < steps[2]["val_loss"]
    scaled = {"qk", "vo", "mlp"} | ({"embedding", "head", "other"} if method == "full" else set())
    assert set(final["alphas"]) == scaled
    assert final["alphas"]["vo"] == 1.0 != final["alphas"]["qk"]


@pytest.mark.distributed
@ALONE.reads(*METHODS)
@PAIR.parametrize(("method", "stage"))
def test_ranks_and_stages_agree(method: str, stage: int, folder: Path, alone: Results, pair: Results) -> None:
    found = pair[(str(folder), method, stage)][0]
    assert found["status"] == 0
    assert found["difference"] < SAME
    wanted = alone[(str(folder), method, 2)][0]
    assert losses(found) == pytest.approx(losses(wanted), abs=TOLERANCE)
    held_out = [[line["val_loss"] for line in f["metrics"] if "val_loss" in line] for f in (found, wanted)]
    assert held_out[0] == pytest.approx(held_out[1], abs=TOLERANCE)
    assert found["metrics"][-1]["tokens"] == wanted["metrics"][-1]["tokens"]


@pytest.mark.distributed
@ALONE.reads("full")
def test_the_loss_is_the_mean_over_all_answer_tokens_of_the_batch(folder: Path, alone: Results) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(folder / "tiny"))
    spec = DataSpec(str(DATA), eval_share=0.2)
    data, _ = prepare(spec, None, tokenizer=tokenizer, template="auto", cutoff=96, seed=0)
    chosen = AnswerBatches(data, BatchShape(96, 8, 1, 0, 1), 0, 0).indices("train", 0)
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    summed, count = 0.0, 0
    for index in chosen:
        span = slice(data.starts[index], data.starts[index + 1])
        ids, answers = torch.from_numpy(data.ids[span]), data.answers[span]
        with torch.no_grad():
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(answers)
        summed -= float(sum(logs[place - 1, ids[place]] for place in places))
        count += len(places)
    first = alone[(str(folder), "full", 2)][0]["metrics"][0]["loss"]
    assert first == pytest.approx(summed / count, abs=1e-5)  # float32 logits, summed in another order


@pytest.mark.distributed
@pytest.mark.tier("all")
def test_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    """Adapters under stage 3, whose checkpoints leave the frozen weights out; another rank of adapters is refused."""
    case = (str(folder), "lora", 3)
    whole, part = run_cases(resume, 2, [case])[case][0]
    assert len(whole) == STEPS + 1
    for lines in (whole, part):
        for line in lines:
            for key in TIMED:
                line.pop(key, None)
    assert part == whole


def test_mistakes_are_one_line_and_status_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_path(folder, 2)
    good = '{"prompt": "a", "completion": "b"}\n'
    files = {
        "line 2: not JSON": good + "{",
        'line 2: key "completion" is missing': good + '{"prompt": "a"}',
        'line 3: "output" is empty': good + '\n{"instruction": "a", "output": " "}',
        "line 1: it needs": '{"text": "a"}',
        "it has no example": "\n",
        "only one document": good,
    }
    cases: dict[str, list[str]] = {}
    for number, (message, text) in enumerate(files.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text, "utf-8")
        cases[message] = ["--data", str(path)]
    cases |= {
        "no such file or folder": ["--data", "none.jsonl"],
        "neither a local file": ["--data", "nobody/nothing"],
        "neither a checkpoint folder": ["--model", str(tmp_path / "none")],
        "hub name, not a file": ["--model", str(config)],
        "cannot be loaded": ["--tokenizer", str(tmp_path)],
        "--lora-rank is for adapters": ["--method", "full", "--lora-rank", "4"],
        "max_position_embeddings 96": ["--cutoff", "97"],
        "within --cutoff 2 tokens": ["--cutoff", "2"],
        "no chat template": ["--template", "chat"],
        "there is no checkpoint": ["--resume"],
        "trains nothing: give --evaluate": ["--epochs", "0"],
        "--evaluate-limit needs --evaluate": ["--evaluate-limit", "3"],
        "invalid choice": ["--method", "qlora"],
    }
    for message, changed in cases.items():
        argv = [*arguments(folder, config, tmp_path / "out", "lora"), *changed]
        assert job.main(argv) == job.USER_MISTAKE, message
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("finetune.py: ") and message in line, (message, line)


def test_a_calibration_that_small_data_spoil_is_told(recwarn: pytest.WarningsRecorder) -> None:
    section = {"start": 1, "samples": 32, "mode": "probe"}
    config = {**CONFIG, "mols": section}
    job.warn_small(config, 256, 10, adapters=True)
    assert not recwarn.list
    with pytest.warns(MolsWarning, match="32 batches of 8, more than the 255 examples"):
        job.warn_small(config, 255, 10, adapters=True)
    with pytest.warns(MolsWarning, match="lora_A has no gradient"):
        job.warn_small({**config, "mols": {**section, "start": 0.01}}, 256, 10, adapters=True)
    with pytest.raises(MolsConfigError, match="no rate would ever change"):
        job.warn_small({**config, "mols": {**section, "mode": "online"}}, 256, 33, adapters=True)


class _Manager:
    """In the place of lm-eval's index of tasks."""

    def __init__(self, include_path: str | None = None) -> None:
        self.all_tasks = [*evaluate.SETS[evaluate.COMMONSENSE], "mmlu", "mine"]


def _simple_evaluate(*, tasks: list[str], num_fewshot: int | None, bootstrap_iters: int, **_: Any) -> dict[str, Any]:
    if tasks == ["piqa"]:
        raise ConnectionError("the hub cannot be reached\nand more")
    error = (num_fewshot or 0) if bootstrap_iters else "N/A"
    return {"results": {tasks[0]: {"alias": "x", "sample_len": 2, "acc,none": 0.25, "acc_stderr,none": error}}}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of lm-eval is called, without the package, which is optional and not among the tests' requirements."""
    package = types.SimpleNamespace(simple_evaluate=_simple_evaluate, __version__="0")
    monkeypatch.setitem(sys.modules, "lm_eval", package)  # type: ignore[arg-type]
    for name, value in {
        "tasks": {"TaskManager": _Manager},
        "models.huggingface": {"HFLM": lambda **given: given},
    }.items():
        monkeypatch.setitem(sys.modules, f"lm_eval.{name}", types.SimpleNamespace(**value))  # type: ignore[arg-type]


@pytest.mark.usefixtures("lm_eval")
def test_evaluation_keeps_what_there_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", str(folder / "tiny"), "--epochs", "0", "--out", str(tmp_path), "--evaluate"]
    assert job.main([*base, "mmlu, mine:3", "--evaluate-limit", "2"]) == 0
    found = json.loads((tmp_path / evaluate.FILE).read_text("utf-8"))
    assert found["limit"] == 2
    assert found["tasks"]["mmlu"] == {"shots": 5, "metrics": {"acc": 0.25, "acc_stderr": 5.0}}
    assert found["tasks"]["mine"]["shots"] == 3
    capsys.readouterr()
    assert job.main([*base, "commonsense8"]) == job.USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "finetune.py: --evaluate piqa: ConnectionError: the hub cannot be reached"
    found = json.loads((tmp_path / evaluate.FILE).read_text("utf-8"))
    assert len(found["tasks"]) == 8 and "error" in found["tasks"]["piqa"] and found["averages"] == {}
    for asked, message in {"mmlus": "no task 'mmlus'", "mine:x": "number of shots", "mine,mine": "twice"}.items():
        assert job.main([*base, asked]) == job.USER_MISTAKE
        assert message in capsys.readouterr().err
    full = evaluate.Results({task: {"acc": 0.5} for task in evaluate.SETS[evaluate.COMMONSENSE]})
    assert evaluate.averages([evaluate.COMMONSENSE], full) == {evaluate.COMMONSENSE: 0.5}


def test_a_missing_lm_eval_is_told_before_anything_is_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    argv = arguments(folder, config_path(folder, 2), tmp_path / "out", "lora", "--evaluate", "mmlu")
    assert job.main(argv) == job.USER_MISTAKE
    assert "pip install 'lm-eval>=0.4'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
