"""Damaged or unusual checkpoints: a clear message, the same on every rank, and no hang."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from mols_ds.errors import MolsCheckpointError, MolsUnsupportedError
from tests.engines.deepspeed.engines import STAGES
from tests.engines.deepspeed.resume import (
    SAMPLES,
    engine_part,
    iterate_tiny,
    section,
    side_files,
    tiny_engine,
    until,
)
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, HALF = 2, 3
DAMAGES = ("missing", "truncated", "flipped", "empty", "foreign", "another save", "another rank's")
FILES = [f"mols_rank_0000{rank}_of_0000{WORLD}.pt" for rank in range(WORLD)]


def half_done(mols: Any) -> bool:
    return mols.phase == "calibrating" and mols.samples == HALF


def finished(mols: Any) -> bool:
    return mols.phase in ("ramping", "fixed")


def damage(kind: str, folder: Path, spare: Path) -> None:
    """Spoil the side file of rank 1, or of rank 0 where that is the harder case."""
    path = folder / FILES[0 if kind in ("truncated", "empty") else 1]
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        moments = torch.load(path, weights_only=True)["samples"]["moments"]
        at = content.index(moments["mean"].numpy().tobytes()[:64])
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"something": "else"}, path)
    elif kind == "another save":
        shutil.copy(spare / path.name, path)
    else:
        path.write_bytes((folder / FILES[0]).read_bytes())


def damaged(stage: int) -> dict[str, Any]:
    """Results of each damage on each rank: (phase, samples, warnings) after the load; training continues."""
    folder = f"damaged-{stage}"
    engine = tiny_engine(stage, section())
    iteration = until(engine, 0, half_done)
    for tag in ("spare", *DAMAGES):
        engine.save_checkpoint(folder, tag=tag)
    found: dict[str, Any] = {}
    for kind in DAMAGES:
        if dist.get_rank() == 0:
            damage(kind, Path(folder, kind), Path(folder, "spare"))
        dist.barrier()
        if stage == 3:
            engine.destroy()
            engine = tiny_engine(stage, section())
        with caught() as warned:
            engine.load_checkpoint(folder, tag=kind)
        found[kind] = (engine.mols.phase, engine.mols.samples, engine.mols.accumulator_bytes, warned)
    until(engine, iteration, finished)
    found["after"] = (engine.mols.samples, engine.mols.accumulator_bytes, engine.mols.alphas)
    engine.destroy()
    return found


def refused() -> dict[str, str]:
    """The message of each error, on each rank."""
    engine = tiny_engine(1, section())
    until(engine, 0, half_done)
    found = {}
    with pytest.raises(MolsCheckpointError) as error:
        engine.save_checkpoint("refused", tag="clash", client_state={"mols": 1})
    found["clash"] = str(error.value)
    found["clash wrote"] = str(sorted(path.name for path in Path("refused").glob("*")))
    engine.save_checkpoint("refused", tag="ours")
    engine.destroy()
    other = tiny_engine(1, section(rules=[["up_proj", "vo"]]))
    before = (other.mols.phase, other.mols.samples)
    with pytest.raises(MolsCheckpointError) as error:
        other.load_checkpoint("refused", tag="ours")
    found["groups"] = str(error.value)
    assert (other.mols.phase, other.mols.samples) == before
    other.destroy()
    stock = tiny_engine(1, None, initialize=deepspeed.initialize)
    for name, content in {"number": 3, "dict": {"a": 1}, "future": {"version": 99}, "part": {"version": 1}}.items():
        stock.save_checkpoint("refused", tag=name, client_state={"mols": content})
    stock.destroy()
    engine = tiny_engine(1, section())
    for name in ("number", "dict", "future", "part"):
        with pytest.raises(MolsCheckpointError) as error:
            engine.load_checkpoint("refused", tag=name)
        found[name] = str(error.value)
    engine.destroy()
    robin = tiny_engine(2, section(), zero={"round_robin_gradients": True}, universal=True)
    with pytest.raises(MolsUnsupportedError) as unsupported:
        robin.load_checkpoint("refused", tag="ours")
    found["round robin"] = str(unsupported.value)
    robin.destroy()
    return found


def contents() -> dict[str, Any]:
    """Files in the tag's folder and client_state during one run with one tag, and the state after a load."""
    mine = {"epoch": 3, "nested": {"a": [1, 2.5, None]}, "tensor": torch.arange(3)}
    engine = tiny_engine(1, section())
    iterate_tiny(engine, 0)
    found: dict[str, Any] = {}
    engine.save_checkpoint("contents", tag="t", client_state=mine)
    found["waiting"] = side_files("contents/t")
    iteration = until(engine, 1, half_done)
    assert engine.save_checkpoint("contents", "t", mine, True, False) is True  # by position, as DeepSpeed takes them
    found["calibrating"] = side_files("contents/t")
    if dist.get_rank() == 0:
        names = ["mols_rank_00002_of_00003.pt", "mols_rank_00000_of_00003.tmp", FILES[0].replace(".pt", ".tmp")]
        names += [f".{FILES[0]}.0123456789abcdef.tmp", ".mols_rank_00002_of_00003.pt.0123456789abcdef.tmp"]
        for name in names:
            Path("contents/t", name).write_bytes(b"left by a run of three ranks, or by one that was killed")
    dist.barrier()
    stored = torch.load("contents/t/mp_rank_00_model_states.pt", weights_only=False)["mols"]
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    found["plain"] = torch.load(buffer, weights_only=True) == json.loads(json.dumps(stored)) == stored
    assert engine.load_checkpoint("contents")[0] is not None  # by DeepSpeed's `latest`
    found["latest"] = (engine.mols.phase, engine.mols.samples)
    until(engine, iteration, finished)
    engine.save_checkpoint("contents", tag="t", client_state=mine)
    found["finished"] = side_files("contents/t")
    stored = torch.load("contents/t/mp_rank_00_model_states.pt", weights_only=False)["mols"]
    found["plain report"] = json.loads(json.dumps(stored)) == stored
    given = dict(engine.load_checkpoint("contents", tag="t")[1])
    found["phase"] = (engine.mols.phase, engine.mols.samples)
    found["client_state"] = {key: given.get(key) for key in (*mine, "mols")}
    found["not there"] = engine.load_checkpoint("nowhere")
    found["unwritable"] = _unwritable()
    assert mine.keys() == {"epoch", "nested", "tensor"}, "the caller's dict is not changed"
    with pytest.raises(ValueError, match="save_dir"):
        engine.save_checkpoint("")
    engine.destroy()
    return found


def _unwritable() -> tuple[list[str], list[str], str, int]:
    """Rank 1 cannot write its accumulators: warnings of the save and of the load, then phase and samples."""
    engine = tiny_engine(1, section())
    until(engine, 0, half_done)
    if dist.get_rank() == 1:
        Path("unwritable/t", FILES[1], "in the way").mkdir(parents=True)
    with caught() as saving:
        engine.save_checkpoint("unwritable", tag="t")
    with caught() as loading:
        engine.load_checkpoint("unwritable", tag="t")
    found = (saving, loading, engine.mols.phase, engine.mols.samples)
    engine.destroy()
    return found


def stock(stage: int) -> dict[str, Any]:
    """Stock checkpoints in MoLS runs, and MoLS checkpoints in stock and disabled runs."""
    folder, found = f"stock-{stage}", {}
    engine = tiny_engine(stage, None, initialize=deepspeed.initialize)
    for iteration in range(4):
        iterate_tiny(engine, iteration)
    engine.save_checkpoint(folder, tag="stock")
    engine.destroy()
    for name, mols in {"late": section(), "early": section("online", start=8), "fixed": _fixed()}.items():
        engine = tiny_engine(stage, mols)
        with caught() as warned:
            path, _ = engine.load_checkpoint(folder, tag="stock")
        assert path is not None and engine.global_steps == 4
        found[name] = (engine.mols.phase, engine.mols.samples, warned)
        iterate_tiny(engine, 4)
        if name == "late":
            until(engine, 5, finished)
            engine.save_checkpoint(folder, tag="mols")
            ours = engine_part(engine)
        engine.destroy()
    for name, initialize, mols in (("disabled", None, {"enabled": False}), ("stock", deepspeed.initialize, None)):
        engine = tiny_engine(stage, mols, **({} if initialize is None else {"initialize": initialize}))
        engine.load_checkpoint(folder, tag="mols")
        found[name] = differing(ours, engine_part(engine), "random")
        iterate_tiny(engine, 20)
        engine.destroy()
    return found


def _fixed() -> dict[str, Any]:
    return {"fixed_alphas": {"qk": 2.0}, "start": 2, "ramp_end": 6, "report_dir": "report"}


def options(stage: int) -> dict[str, Any]:
    """load_module_only, load_optimizer_states=False, and another config than the saving run's."""
    folder, found = f"options-{stage}", {}
    for mode in ("probe", "moments"):
        engine = tiny_engine(stage, section(mode))
        iteration = until(engine, 0, half_done)
        engine.save_checkpoint(folder, tag=mode)
        if mode == "probe":
            until(engine, iteration, finished)
            engine.save_checkpoint(folder, tag="done")
            found["alphas"] = engine.mols.alphas
        engine.destroy()
    for name, mols, tag, arguments in (
        ("module only", section(), "done", {"load_module_only": True}),
        ("no optimizer, probe", section(), "probe", {"load_optimizer_states": False}),
        ("no optimizer, moments", section("moments"), "moments", {"load_optimizer_states": False}),
        ("no optimizer, done", section(), "done", {"load_optimizer_states": False}),
        ("other mode", section("online"), "probe", {}),
        ("now fixed", _fixed(), "done", {}),
        ("now fixed, half-done", _fixed(), "probe", {}),
    ):
        if stage == 3 and "no optimizer" in name:
            # DeepSpeed reads the weights from the tag in `latest`
            _point_latest(folder, tag)
        engine = tiny_engine(stage, mols)
        with caught() as warned:
            engine.load_checkpoint(folder, tag=tag, **arguments)
        found[name] = (engine.mols.phase, engine.mols.samples, engine.mols.alphas, warned)
        iterate_tiny(engine, 30)
        if name == "now fixed":
            engine.save_checkpoint(folder, tag="fixed")
        engine.destroy()
    engine = tiny_engine(stage, section())
    with caught() as warned:
        engine.load_checkpoint(folder, tag="fixed")
    found["no longer fixed"] = (engine.mols.phase, engine.mols.alphas["qk"], warned)
    engine.destroy()
    return found


def _point_latest(folder: str, tag: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        Path(folder, "latest").write_text(tag)
    dist.barrier()


WORK = {"damaged": damaged, "refused": refused, "contents": contents, "stock": stock, "options": options}
CASES: Cases[tuple[Any, ...]] = Cases(
    [
        *[("damaged", stage) for stage in (0, 1, 3)],
        ("refused",),
        ("contents",),
        *[("stock", stage) for stage in STAGES],
        *[("options", stage) for stage in (0, 2, 3)],
    ],
    quick=[("damaged", 3), ("refused",)],
    full=[("damaged", 0), ("stock", 1), ("options", 0)],
)


def work(name: str, *case: Any) -> dict[str, Any]:
    return WORK[name](*case)


@functools.cache
def outcomes() -> Results:
    return run_cases(work, WORLD, CASES.wanted, timeout=60)


@CASES.parametrize("stage", [0, 1, 3], reads=lambda stage: [("damaged", stage)])
@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_accumulators_restart_the_calibration_on_every_rank(kind: str, stage: int) -> None:
    ranks = outcomes()["damaged", stage]
    for rank, found in enumerate(ranks):
        phase, samples, held, warned = found[kind]
        assert (phase, samples, held) == ("calibrating", 0, 0)
        assert len(warned) == (1 if rank == 0 else 0)  # once per job
        if rank == 0:
            bad = 0 if kind in ("truncated", "empty") else 1
            assert f"rank {bad} has no usable accumulators" in warned[0] and "starts over" in warned[0]
        assert found["after"][:2] == (SAMPLES, 0)
    assert ranks[0]["after"] == ranks[1]["after"]


@CASES.reads(("refused",))
def test_refusals_are_the_same_on_every_rank() -> None:
    ranks = outcomes()["refused",]
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert found["clash wrote"] == "[]" and '"mols"' in found["clash"] and "another key" in found["clash"]
    assert "module groups" in found["groups"] and "mols.rules" in found["groups"]
    assert "not written by MoLS" in found["number"] and "not written by MoLS" in found["dict"]
    assert "version 99" in found["future"] and "lacks groups, state, report" in found["part"]
    assert "round_robin_gradients" in found["round robin"] and "same number of ranks" in found["round robin"]
    assert all("\n" not in message for message in found.values())


@CASES.reads(("contents",))
def test_files_and_client_state() -> None:
    for rank, found in enumerate(outcomes()["contents",]):
        assert found["waiting"] == [] and found["finished"] == []
        assert found["calibrating"] == FILES
        assert found["plain"] and found["plain report"]
        assert found["latest"] == ("calibrating", HALF)
        assert found["phase"] == ("ramping", SAMPLES)
        given = found["client_state"]
        assert given["epoch"] == 3 and given["nested"] == {"a": [1, 2.5, None]} and given["mols"] is None
        assert torch.equal(given["tensor"], torch.arange(3))
        assert found["not there"] == (None, None)
        saving, loading, *after = found["unwritable"]
        assert after == ["calibrating", 0]
        if rank == 0:
            assert "rank 1 could not write" in saving[0] and "rank 1 has no usable accumulators" in loading[0]


@CASES.parametrize("stage", STAGES, reads=lambda stage: [("stock", stage)])
def test_checkpoints_without_mols_and_runs_without_mols(stage: int) -> None:
    for rank, found in enumerate(outcomes()["stock", stage]):
        assert found["late"][:2] == ("calibrating", 0)
        assert found["early"][:2] == ("waiting", 0)
        assert found["fixed"][:2] == ("ramping", 0)
        assert found["disabled"] == [] and found["stock"] == []
        if rank == 0:
            assert "no MoLS state" in found["late"][2][0] and "calibration starts at step 4" in found["late"][2][0]
            assert "calibration starts at step 8" in found["early"][2][0]
            assert "mols.fixed_alphas apply at step 4" in found["fixed"][2][0]


@CASES.parametrize("stage", [0, 2, 3], reads=lambda stage: [("options", stage)])
def test_load_options_and_changed_configs(stage: int) -> None:
    for rank, found in enumerate(outcomes()["options", stage]):
        alphas = found["alphas"]
        assert found["module only"] == ("waiting", 0, {}, [])
        assert found["no optimizer, probe"] == ("calibrating", HALF, {}, [])
        assert found["no optimizer, done"] == ("ramping", SAMPLES, alphas, [])
        assert found["no optimizer, moments"][:3] == ("calibrating", 0, {})
        assert found["other mode"][:3] == ("calibrating", 0, {})
        assert found["now fixed"][0] == found["now fixed, half-done"][0] == "ramping"
        assert found["now fixed"][2] == found["now fixed, half-done"][2] == {**dict.fromkeys(alphas, 1.0), "qk": 2.0}
        assert found["no longer fixed"][:2] == ("ramping", 2.0)
        if rank == 0:
            assert "load_optimizer_states=False" in found["no optimizer, moments"][3][0]
            assert 'mode "probe"' in found["other mode"][3][0] and '"online"' in found["other mode"][3][0]
            assert "override the checkpoint's alphas" in found["now fixed"][3][0]
            assert "mols.fixed_alphas and stay" in found["no longer fixed"][2][0]
