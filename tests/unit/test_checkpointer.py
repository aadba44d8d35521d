"""Checkpoints that are whole or not there, on one rank; tests/tools/faults does it on several, with real engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mols_ds.errors import MolsCheckpointError, MolsTrainingError, MolsWarning
from mols_ds.training.checkpointer import FORMER, LATEST, MANIFEST, PARTIAL, Keeper, has_checkpoint, refuse_non_finite

CONTENT = b"weights of step "


def write(content: bytes) -> Callable[[Path], None]:
    def into(place: Path) -> None:
        (place / "ranks").mkdir()
        (place / "ranks" / "0.pt").write_bytes(content)
        (place / "model.pt").write_bytes(content * 3)

    return into


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """Steps 2, 4 and 10 are kept."""
    keeper = Keeper(tmp_path / "checkpoints")
    for step in (2, 4, 10):
        keeper.save(f"step{step}", write(CONTENT + str(step).encode()))
    return keeper


def names(keeper: Keeper) -> set[str]:
    return {path.name for path in keeper.folder.iterdir()}


def test_the_newest_is_named_last(keeper: Keeper) -> None:
    assert names(keeper) == {"step2", "step4", "step10", LATEST}
    assert keeper.newest() == (keeper.folder / LATEST).read_text() == "step10"
    assert has_checkpoint(keeper.folder)
    assert not has_checkpoint(keeper.folder / "other")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda place: flip(place / "model.pt"), "model.pt is corrupt"),
        (lambda place: (place / "ranks" / "0.pt").write_bytes(b"weig"), "has 4 bytes and not 18"),
        (lambda place: (place / "ranks" / "0.pt").unlink(), "ranks/0.pt is missing"),
        (lambda place: (place / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda place: (place / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
        (lambda place: (place / MANIFEST).write_text('{"files": {"model.pt": {"bytes": "3"}}}'), "has 54 bytes"),
        (shutil.rmtree, "there is no step10"),
    ],
)
def test_a_broken_one_is_named_and_passed_over(keeper: Keeper, harm: Callable[[Path], None], what: str) -> None:
    harm(keeper.folder / "step10")
    with pytest.warns(MolsWarning, match=f"step10 is broken.*{what}.*going back to step4"):
        assert keeper.newest() == "step4"


def test_what_a_user_names_in_latest_counts(keeper: Keeper) -> None:
    """An earlier step on purpose; only older ones take its place."""
    (keeper.folder / LATEST).write_text("step4\n")
    assert keeper.newest() == "step4"
    flip(keeper.folder / "step4" / "model.pt")
    with pytest.warns(MolsWarning):
        assert keeper.newest() == "step2"


def test_where_none_is_whole_each_is_named(keeper: Keeper) -> None:
    for step in (2, 4, 10):
        flip(keeper.folder / f"step{step}" / "model.pt")
    with pytest.raises(MolsCheckpointError, match=r"--resume: .*step10 is broken.*step4 is broken.*step2 is broken"):
        keeper.newest()
    with pytest.raises(MolsCheckpointError, match="there is no checkpoint"):
        Keeper(keeper.folder / "other").newest()


def test_a_checkpoint_without_a_manifest_is_taken_as_it_is(keeper: Keeper) -> None:
    (keeper.folder / "step10" / MANIFEST).unlink()
    assert keeper.newest() == "step10"


def test_a_save_that_fails_changes_nothing(keeper: Keeper) -> None:
    def full(place: Path) -> None:
        (place / "model.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MolsCheckpointError, match=r"step12 cannot be saved in .*No space left"):
        keeper.save("step12", full)
    assert names(keeper) == {"step2", "step4", "step10", f"step12{PARTIAL}", LATEST}
    assert keeper.newest() == "step10"
    keeper.save("step12", write(b"again"))
    assert keeper.newest() == "step12"
    assert f"step12{PARTIAL}" not in names(keeper)


def test_a_step_is_saved_again(keeper: Keeper) -> None:
    keeper.save("step10", write(b"other"))
    assert (keeper.folder / "step10" / "model.pt").read_bytes() == b"other" * 3
    assert keeper.newest() == "step10"
    assert names(keeper) == {"step2", "step4", "step10", LATEST}


def test_killed_between_its_two_renames_the_former_comes_back(keeper: Keeper) -> None:
    (keeper.folder / "step10").rename(keeper.folder / f"step10{FORMER}")
    assert keeper.newest() == "step10"
    shutil.copytree(keeper.folder / "step10", keeper.folder / f"step10{FORMER}")
    assert keeper.newest() == "step10"
    assert f"step10{FORMER}" not in names(keeper)


def test_killed_before_latest_was_first_written(keeper: Keeper) -> None:
    (keeper.folder / LATEST).unlink()
    assert has_checkpoint(keeper.folder)
    assert keeper.newest() == "step10"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    fine, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.tensor([1.0, value]))
    refuse_non_finite([fine], 7, bool)
    with pytest.raises(MolsTrainingError, match="not finite after step 7: nothing is saved"):
        refuse_non_finite([fine, bad], 7, bool)
    with pytest.raises(MolsTrainingError):  # another rank's
        refuse_non_finite([fine], 7, lambda mine: False)
