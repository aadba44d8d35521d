"""train_megatron.py: configs, data, a comparison through torchrun, a resumed run, and what a mistake looks like."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_patches.machine import Machine
from mols_ds.apps.train_megatron import main as job
from mols_ds.apps.train_megatron.backend import MegatronBackend, MegatronSetup
from mols_ds.apps.train_megatron.dataset import IndexedBatches, Text, evaluation_batches
from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError
from mols_ds.training.batches import BatchShape, held_out_batches
from mols_ds.training.megatron_build import Built
from mols_ds.training.megatron_config import (
    GridSizes,
    micro_batches,
    optimizer_config,
    padded_vocabulary,
    transformer_config,
)
from mols_ds.training.megatron_settings import read
from mols_ds.training.token_files import IndexedWriter, token_dtype
from mols_ds.training.tokens import Tokenizer
from mols_ds.training.train_job import TrainJob
from mols_ds.training.trainer import TIMED
from tests.apps.command import ROOT, events_of, read_metrics, run
from tests.apps.megatron_job import STEPS, TINY, TRAIN, extended, whole_and_resumed, write_job
from tests.helpers.harness import run_ranks

CONTRACT = {"step", "tokens", "loss", "lr", "multipliers", "phase", "step_seconds"}
LAPTOP = Machine(None, "the package transformer_engine is not installed", None)
HOPPER = Machine("2.9.0", "", (9, 0), wgrad_kernel=True, cuda=(12, 9))
WORLDS = {"tiny": 1, "tiny_tp2_pp2": 4, "llama_60m": 8, "llama_7b_tp2_pp2": 8, "llama_70b_tp8_pp8_fp8": 512}
CONFIGS = [ROOT / "configs" / "megatron" / f"{name}.yaml" for name in WORLDS]  # the others: tests/apps/test_configs.py
# hidden, MLP, heads, layers: METHOD, the paper's sizes
SIZES = {"llama_60m": (512, 1376, 8, 8), "llama_7b_tp2_pp2": (4096, 11008, 32, 32)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_become_megatron_s(path: Path) -> None:
    settings = read(str(path))
    grid = GridSizes.of(settings, WORLDS[path.stem])
    assert micro_batches(settings, grid) >= settings.parallel.pp
    assert MolsConfig.parse(settings.mols or {}).enabled
    assert optimizer_config(settings).lr == settings.optimizer.lr
    if settings.precision.fp8:
        with pytest.raises(MolsUnsupportedError, match=r"fp8 \(recipe tensorwise\).*not installed.*train in bf16"):
            transformer_config(settings, LAPTOP)
        plain = read(str(path), ["precision.fp8=null"])
        with pytest.raises(MolsConfigError, match=r"transformer_engine: true, but the package .* is not installed"):
            transformer_config(plain, LAPTOP)
    config = transformer_config(settings, HOPPER if settings.precision.fp8 else LAPTOP)
    assert config.tensor_model_parallel_size == settings.parallel.tp
    assert config.num_layers % (settings.parallel.pp * (settings.parallel.vp or 1)) == 0
    if path.stem in SIZES:
        sizes = (config.hidden_size, config.ffn_hidden_size, config.num_attention_heads, config.num_layers)
        assert sizes == SIZES[path.stem]


def test_changes_and_numbers_are_read_as_yaml(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    settings = read(
        str(path), ["optimizer.lr=2e-3", "parallel.sp=false", "mols.samples=8", "mols.accumulators.device=cpu"]
    )
    assert settings.optimizer.lr == 2e-3
    assert settings.mols is not None
    assert settings.mols["samples"] == 8
    assert settings.mols["accumulators"] == {"device": "cpu"}
    assert padded_vocabulary(301, settings) == 304


MISTAKES: list[tuple[list[str], str]] = [
    (["--config", "missing.yaml"], "config missing.yaml: No such file"),
    (["--confg", "x"], "unrecognized arguments: --confg x"),
    (["--compare", "sgd"], "--compare"),
    (["--set", "run.stepps=3"], '"run.stepps": unknown key; did you mean "steps"?'),
    (["--set", "modell.x=3"], '"modell": unknown key; did you mean "model"?'),
    (["--set", "model.num_layer=3"], '"model.num_layer": unknown key; did you mean "num_layers"?'),
    (["--set", "model.sequence_parallel=true"], 'is set by "parallel.sp"'),
    (["--set", "model.layernorm_epsilon=small"], '"model.layernorm_epsilon"'),
    (["--set", "mols.sampels=3"], 'did you mean "samples"?'),
    (["--set", "optimizer.lr=0"], '"optimizer.lr": Input should be greater than 0'),
    (["--set", "optimizer.lr=[1"], "--set optimizer.lr=[1: not YAML"),
    (["--set", "steps"], "write it as section.key=value"),
    (["--set", "parallel.tp=2"], "needs a multiple of 2 ranks, not 1"),
    (["--set", "batch.global=3", "--set", "batch.micro=2"], "global 3 is not a multiple of micro 2"),
    (["--set", "precision.fp8=hybrid"], "fp8 (recipe delayed) needs Transformer Engine"),
    (["--set", "model.num_attention_heads=3"], "hidden_size 16 does not divide by 3"),
    (["--set", "model.num_query_groups=3"], "model.num_query_groups"),
    (["--set", "model.moe_router_topk=2", "--set", "parallel.ep=1", "--set", "model.num_moe_experts=0"], "refuses it"),
    (["--set", "data.source=./none.txt"], "data ./none.txt: no such file"),
    (["--set", "data.source=team/set"], "is a data set of the hub"),
    (["--set", "data.tokenizer=/none"], "data.tokenizer: /none: no such folder"),
    (["--resume"], "--resume: there is no checkpoint below"),
    (["--compare", "adam", "--set", "mols=null"], "write it as section.key=value"),
    (["--compare", "adam", "--set", "mols.enabled=false"], 'no enabled "mols" section'),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(job, "start_ranks", lambda: pytest.fail("the mistake was not found before the ranks joined"))
    given = [] if "--config" in arguments else ["--config", str(write_job(tmp_path))]
    assert job.main([*given, "--out", str(tmp_path / "out"), *arguments]) == job.USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_megatron.py: ")
    assert message in line


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("run:\n  steps: 3\n  steps: 4\n", "utf-8")
    with pytest.raises(MolsConfigError, match="'steps' is there twice"):
        read(str(path))


def text_of(folder: Path, count: int) -> tuple[Text, np.ndarray[Any, Any]]:
    """Documents of 1 to 30 random tokens, each closed by token 0, as an indexed data set."""
    random = np.random.default_rng(3)
    documents = [np.append(random.integers(1, 300, random.integers(1, 30)), 0) for _ in range(count)]
    tokens = np.concatenate(documents).astype(np.uint16)
    tokenizer = Tokenizer(lambda texts: [], 0, 300, "test")
    writer = IndexedWriter(folder / "text", token_dtype(tokenizer.size))
    writer.add([document[:-1].tolist() for document in documents], 0)
    writer.close()
    return Text([str(folder / "text")], [1.0], str(folder / "samples"), tokens[:500], tokenizer), tokens


def test_indexed_data_set_holds_the_tokens(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text, tokens = text_of(tmp_path, 50)
    stored = IndexedDataset(text.prefixes[0])
    assert np.array_equal(np.concatenate([stored[i] for i in range(len(stored))]), tokens)
    assert len(stored) == 50 == len(stored.document_indices) - 1
    assert all(document[-1] == 0 and (document[:-1] != 0).all() for document in stored[0:50])


def test_batches_are_addressed_by_step_and_dealt_over_ranks(tmp_path: Path) -> None:
    text, tokens = text_of(tmp_path, 200)
    ranks = [BatchShape(16, 2, 2, rank, 2) for rank in range(2)]
    found = [IndexedBatches(text, shape, steps=20, probes=4, seed=1) for shape in ranks]
    whole = tokens.astype(np.int64)
    windows = {bytes(whole[i : i + 17]) for i in range(len(whole) - 16)}
    for stream in ("train", "probe"):
        parts = [list(batches.step(stream, 3)) for batches in found]
        rows = [row for part in parts for batch in part for row in batch["tokens"]]
        assert len({bytes(row.numpy()) for row in rows}) == 8
        for batch in (batch for part in parts for batch in part):
            assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
            assert batch["loss_mask"].eq(1).all()
    again = IndexedBatches(text, ranks[0], steps=20, probes=0, seed=1)
    first = next(again.step("train", 3))["tokens"]
    assert torch.equal(first, next(found[0].step("train", 3))["tokens"])
    assert not torch.equal(first, next(found[0].step("probe", 3))["tokens"])
    # One epoch is cut from the documents in a shuffled order, so most samples begin inside of a window of the text
    assert any(bytes(row.numpy())[: 8 * 8] in window for row in first for window in windows)


@pytest.mark.parametrize("steps", [24, 40])
def test_only_within_one_epoch_the_order_does_not_depend_on_the_steps(steps: int, tmp_path: Path) -> None:
    """So only within one epoch a run can be extended."""
    text, tokens = text_of(tmp_path, 200)
    shape = BatchShape(16, 4, 2, 0, 1)
    short, long = (IndexedBatches(text, shape, steps=number, probes=0, seed=1) for number in (10, steps))
    assert (short.epochs, long.epochs) == (1, -(-steps * shape.tokens // (len(tokens) - 1)))
    rows = [torch.cat([b["tokens"] for step in range(10) for b in data.step("train", step)]) for data in (short, long)]
    assert torch.equal(*rows) == (long.epochs == 1) == (steps == 24)


def blended(folder: str, steps: int = 20) -> tuple[int, list[list[int]]]:
    """(epochs, the sequences of 20 steps) of two sources, one of odd and one of even tokens."""
    parts = [str(Path(folder) / name) for name in ("even", "odd")]
    for part, odd in zip(parts, (0, 1), strict=True):
        writer = IndexedWriter(Path(part), token_dtype(300))
        writer.add([[2 * n + odd for n in range(1, 100)]] * 40, 0)
        writer.close()
    tokenizer = Tokenizer(lambda _: [], 0, 300, "test")
    text = Text(parts, [0.75, 0.25], str(Path(folder) / "samples"), np.zeros(0, np.uint16), tokenizer)
    batches = IndexedBatches(text, BatchShape(16, 4, 1, 0, 1), steps=steps, probes=0, seed=1)
    found = torch.cat([batch["tokens"] for step in range(20) for batch in batches.step("train", step)])
    rows: list[list[int]] = found.tolist()
    return batches.epochs, rows


def blends(folder: str) -> list[tuple[int, list[list[int]]]]:
    """For 20 steps, for more of the same epoch, and for many epochs."""
    return [blended(folder, steps) for steps in (20, 40, 400)]


def test_a_mixture_is_megatron_s_blend(tmp_path: Path) -> None:
    ((one, longer, many),) = run_ranks(blends, 1, str(tmp_path))
    rows = one[1]
    assert len(rows) == 80 and sum(any(token % 2 for token in row) for row in rows) == 20
    assert one == longer and one[0] == 1 and many[0] > 1 and many[1] != rows


def test_evaluation_has_the_targets_of_train_py(tmp_path: Path) -> None:
    text, _ = text_of(tmp_path, 50)
    shape = BatchShape(16, 4, 1, 1, 2)
    plain = held_out_batches(text.held_out, shape, 21)
    found = evaluation_batches(text, shape, 21, multiple=2)
    assert len(plain) == 3
    assert len(found) == 4
    for (ids, valid), batch in zip(plain, found, strict=False):
        kept = batch["loss_mask"].bool()
        assert torch.equal(batch["labels"][kept], ids[:valid, 1:].flatten())
        assert torch.equal(batch["tokens"], ids)
    assert found[3]["loss_mask"].sum() == 0


class Recorder:
    """Megatron's optimizer and scheduler in one: skips every iteration but those of `successful`."""

    def __init__(self) -> None:
        self.taken, self.successful, self.scheduled = 0, [70], []

    def zero_grad(self) -> None: ...

    def step(self, increment: int | None = None) -> tuple[bool, None, None]:
        if increment is None:
            self.taken += 1
            return self.taken in self.successful, None, None
        self.scheduled.append(self.taken)
        return True, None, None


def test_skipped_iterations_count_and_only_many_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that MoLS measures return "not successful" too, and are no skipped iterations."""
    settings, optimizer = read(str(write_job(tmp_path))), Recorder()
    setup = MegatronSetup(settings, LAPTOP, GridSizes(1, 1), [], 300, False)
    run = TrainJob(setup, None, BatchShape(32, 1, 4, 0, 1), 0, 6, tmp_path, 0)  # type: ignore[arg-type]
    backend = MegatronBackend(run, setup, Built([], None, optimizer, optimizer), Handle())
    monkeypatch.setattr(backend, "_pass", lambda batches, number: torch.zeros(2, dtype=torch.float64))
    for _ in range(60):
        assert not backend.step(iter(()), number=1, measures=True).updated
    for number in range(1, 60):
        assert backend.step(iter(()), number=number, measures=False).updated
    assert optimizer.scheduled == [70]
    with pytest.raises(MolsError, match="50 iterations in a row were skipped up to step 60: the grad"):
        backend.step(iter(()), number=60, measures=False)


@pytest.mark.jobs
def test_torchrun_compares_both_arms_on_two_stages(tmp_path: Path) -> None:
    board = str(tmp_path / "board")
    path = write_job(tmp_path, parallel={"pp": 2}, run={**TINY["run"], "tensorboard_dir": board})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    out = tmp_path / "out"
    done = run(*launch, "--config", path, "--out", out, "--compare", "adam", cwd=tmp_path)
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    for words in (
        "2 processes, PP2",
        "Adam + MoLS",
        "perplexity",
        "alphas: embedding",
        "mols_report.json",
        "4 further",
    ):
        assert words in done.stdout
    assert (out / "compare.png").stat().st_size > 1000
    adam, mols = read_metrics(out / "adam"), read_metrics(out / "mols")
    # Probed batches come from a separate stream: up to the calibration both arms see the same and do the same
    assert [line.get("step") for line in adam] == [line.get("step") for line in mols] == [*range(1, STEPS + 1), None]
    assert [line["loss"] for line in adam[:2]] == [line["loss"] for line in mols[:2]]
    assert adam[-2]["loss"] != mols[-2]["loss"]
    assert {line.get("phase") for line in adam} == {"disabled", None}
    *steps, final = mols
    for line in steps:
        assert set(line) >= CONTRACT and {"grad_norm", "tokens_per_second", "memory_bytes"} <= set(line)
        assert line["tokens"] == line["step"] * 4 * 32
    assert final["final"] is True
    assert set(final) == {"final", "val_loss", "val_ppl", "tokens", "alphas"}
    assert math.isclose(final["val_ppl"], math.exp(final["val_loss"]))
    assert set(final["alphas"]) == {"embedding", "head", "qk", "vo", "mlp", "other"}
    assert steps[-1]["phase"] == "fixed"
    assert steps[-1]["multipliers"] == pytest.approx(final["alphas"])
    # Warm-up over a tenth of the steps, here one, then cosine to a tenth of the rate
    assert steps[0]["lr"] == pytest.approx(1e-2)
    assert steps[-1]["lr"] < steps[1]["lr"]
    found = events_of(Path(board))
    assert found["applied_lr_qk"][-1] == pytest.approx(steps[-1]["applied_lrs"]["qk"])
    assert found["snr_qk"][-1] == pytest.approx(next(line["snr"] for line in steps if "snr" in line)["qk"])
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "alpha_qk"} <= set(found)


@pytest.mark.jobs
@pytest.mark.distributed
@pytest.mark.tier("all")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """From the middle of a calibration, with dropout, on two tensor-parallel ranks; and evaluating changes nothing."""
    online = {"start": 2, "samples": 4, "mode": "online", "ramp_end": 6}
    path = write_job(
        tmp_path,
        parallel={"tp": 2, "sp": True},
        model={"hidden_dropout": 0.1},
        run={"save_every": 3, "eval_every": 1},
        mols=online,
    )
    assert run_ranks(whole_and_resumed, 2, str(path), str(tmp_path), 3, timeout=240) == [(0, 0, 0, 0, 2)] * 2

    def updates(name: str, *without: str) -> list[dict[str, Any]]:
        lines = read_metrics(tmp_path / name)
        return [{key: value for key, value in line.items() if key not in (*TIMED, *without)} for line in lines]

    assert [line["phase"] for line in updates("whole")[1:4]] == ["calibrating"] * 3
    assert updates("part") == updates("whole")
    assert updates("blind", "val_loss") == updates("whole", "val_loss")
    slower = [line["lr"] / other["lr"] for line, other in zip(updates("slower")[:-1], updates("whole"), strict=False)]
    assert slower == pytest.approx([1.0] * 3 + [0.5] * 3)
    latest = tmp_path / "part" / "checkpoints" / "latest"
    assert latest.read_text("utf-8") == f"step{STEPS}"


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_a_run_is_extended_within_one_epoch(tmp_path: Path) -> None:
    """It is the longer run, by a schedule that does not depend on the steps. A refused extension changes nothing."""
    path = write_job(tmp_path, scheduler={"style": "constant", "warmup": 0.0}, run={"eval_every": 0},
                     mols={"total_steps": 6})  # fmt: skip
    ((statuses, text),) = run_ranks(extended, 1, str(path), str(tmp_path), timeout=240)
    assert statuses == [0, 0, 0, 2, 0], text
    (line,) = text.splitlines()
    assert line.startswith("train_megatron.py: --resume: the checkpoint was made with run.steps 6, not 200: 200 steps")
    whole, part = (
        [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "part")
    )
    assert [line.get("step") for line in part] == [1, 2, 3, 4, 5, 6, None]
    assert part[-1] == whole[-1]
    assert [{**line, "val_loss": 0} for line in part[:-1]] == [{**line, "val_loss": 0} for line in whole[:-1]]
