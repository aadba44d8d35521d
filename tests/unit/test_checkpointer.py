"""Checkpoints that are whole or not there, on one rank; tests/tools/faults does it on several, with real engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mols_ds.errors import MolsCheckpointError, MolsTrainingError, MolsWarning
from mols_ds.training.checkpointer import (
    FORMER,
    LATEST,
    MANIFEST,
    PARTIAL,
    Checkpointer,
    check_finite,
    has_checkpoint,
)

CONTENT = b"weights of step "


def write(content: bytes) -> Callable[[Path], None]:
    def into(place: Path) -> None:
        (place / "ranks").mkdir()
        (place / "ranks" / "0.pt").write_bytes(content)
        (place / "model.pt").write_bytes(content * 3)

    return into


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    """Steps 2, 4 and 10 are kept."""
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for step in (2, 4, 10):
        checkpointer.save(f"step{step}", write(CONTENT + str(step).encode()))
    return checkpointer


def names(checkpointer: Checkpointer) -> set[str]:
    return {path.name for path in checkpointer.folder.iterdir()}


def test_the_newest_is_named_last(checkpointer: Checkpointer) -> None:
    assert names(checkpointer) == {"step2", "step4", "step10", LATEST}
    assert checkpointer.newest() == (checkpointer.folder / LATEST).read_text() == "step10"
    assert has_checkpoint(checkpointer.folder)
    assert not has_checkpoint(checkpointer.folder / "other")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda place: flip(place / "model.pt"), "model.pt is corrupt"),
        (lambda place: (place / "ranks" / "0.pt").write_bytes(b"weig"), "has 4 bytes instead of 18"),
        (lambda place: (place / "ranks" / "0.pt").unlink(), "ranks/0.pt is missing"),
        (lambda place: (place / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda place: (place / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
        (lambda place: (place / MANIFEST).write_text('{"files": {"model.pt": {"bytes": "3"}}}'), "has 54 bytes"),
        (shutil.rmtree, "there is no step10"),
    ],
)
def test_a_broken_one_is_named_and_passed_over(
    checkpointer: Checkpointer, harm: Callable[[Path], None], what: str
) -> None:
    harm(checkpointer.folder / "step10")
    with pytest.warns(MolsWarning, match=f"step10 is broken.*{what}.*using step4"):
        assert checkpointer.newest() == "step4"


def test_what_a_user_names_in_latest_counts(checkpointer: Checkpointer) -> None:
    """An earlier step on purpose; only older ones take its place."""
    (checkpointer.folder / LATEST).write_text("step4\n")
    assert checkpointer.newest() == "step4"
    flip(checkpointer.folder / "step4" / "model.pt")
    with pytest.warns(MolsWarning):
        assert checkpointer.newest() == "step2"


def test_where_none_is_whole_each_is_named(checkpointer: Checkpointer) -> None:
    for step in (2, 4, 10):
        flip(checkpointer.folder / f"step{step}" / "model.pt")
    with pytest.raises(MolsCheckpointError, match=r"--resume: .*step10 is broken.*step4 is broken.*step2 is broken"):
        checkpointer.newest()
    with pytest.raises(MolsCheckpointError, match="there is no checkpoint"):
        Checkpointer(checkpointer.folder / "other").newest()


def test_a_checkpoint_without_a_manifest_is_taken_as_it_is(checkpointer: Checkpointer) -> None:
    (checkpointer.folder / "step10" / MANIFEST).unlink()
    assert checkpointer.newest() == "step10"


def test_a_save_that_fails_changes_nothing(checkpointer: Checkpointer) -> None:
    def full(place: Path) -> None:
        (place / "model.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MolsCheckpointError, match=r"step12 cannot be saved in .*No space left"):
        checkpointer.save("step12", full)
    assert names(checkpointer) == {"step2", "step4", "step10", f"step12{PARTIAL}", LATEST}
    assert checkpointer.newest() == "step10"
    checkpointer.save("step12", write(b"again"))
    assert checkpointer.newest() == "step12"
    assert f"step12{PARTIAL}" not in names(checkpointer)


def test_a_step_is_saved_again(checkpointer: Checkpointer) -> None:
    checkpointer.save("step10", write(b"other"))
    assert (checkpointer.folder / "step10" / "model.pt").read_bytes() == b"other" * 3
    assert checkpointer.newest() == "step10"
    assert names(checkpointer) == {"step2", "step4", "step10", LATEST}


def test_killed_between_its_two_renames_the_former_comes_back(checkpointer: Checkpointer) -> None:
    (checkpointer.folder / "step10").rename(checkpointer.folder / f"step10{FORMER}")
    assert checkpointer.newest() == "step10"
    shutil.copytree(checkpointer.folder / "step10", checkpointer.folder / f"step10{FORMER}")
    assert checkpointer.newest() == "step10"
    assert f"step10{FORMER}" not in names(checkpointer)


def test_killed_before_latest_was_first_written(checkpointer: Checkpointer) -> None:
    (checkpointer.folder / LATEST).unlink()
    assert has_checkpoint(checkpointer.folder)
    assert checkpointer.newest() == "step10"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    fine, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.tensor([1.0, value]))
    check_finite([fine], 7, bool)
    with pytest.raises(MolsTrainingError, match="not finite after step 7: nothing is saved"):
        check_finite([fine, bad], 7, bool)
    with pytest.raises(MolsTrainingError):  # another rank's
        check_finite([fine], 7, lambda mine: False)
