"""Files on a machine with other users: unpredictable names, and no writing through links."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.doctor.machine import _kernel_caches, check_machine
from mols_ds.core import cache_folders
from mols_ds.core.cache_folders import cache_problems, foreign_problem, own_root, use_own_inductor_cache
from mols_ds.core.files import append, empty_folder, make_once, write_whole
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.training import kernel_caches
from mols_ds.training.checkpointer import Checkpointer
from mols_ds.training.kernel_caches import check_kernel_caches
from mols_ds.training.preemption import SIGNALS, Preempted, StopRequest


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Another user's file, which must not change."""
    path = tmp_path / "target"
    path.write_text("precious")
    return path


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_whole_file_has_the_mode_of_the_umask_and_replaces_a_link(tmp_path: Path, target: Path) -> None:
    place = tmp_path / "report.json"
    place.symlink_to(target)
    write_whole(place, "new")
    assert place.read_text() == "new" and not place.is_symlink() and target.read_text() == "precious"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "target"]


def test_the_name_beside_a_file_is_another_one_each_time(tmp_path: Path) -> None:
    seen: set[Path] = set()
    for _ in range(4):
        write_whole(tmp_path / "file", lambda beside: (seen.add(beside), beside.write_text("x")))
    assert len(seen) == 4 and not any(str(os.getpid()) == part for path in seen for part in path.name.split("."))


def test_a_file_that_is_added_to(tmp_path: Path, target: Path) -> None:
    append(tmp_path / "metrics.jsonl", "a\n")
    append(tmp_path / "metrics.jsonl", "b\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "a\nb\n"
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "link", tmp_path / "pipe", Path("/dev/full"), tmp_path):
        with pytest.raises(OSError):
            append(place, "a\n")
    assert target.read_text() == "precious"


def test_a_folder_in_the_place_of_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    place = tmp_path / "step1.partial"
    place.symlink_to(other)
    empty_folder(place)
    assert place.is_dir() and not place.is_symlink() and (other / "kept").exists()
    (place / "old").touch()
    empty_folder(place)
    assert list(place.iterdir()) == []


def test_a_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step1.partial").symlink_to(tmp_path / "other")
    Checkpointer(tmp_path / "checkpoints").save("step1", lambda place: (place / "weights").write_text("w"))
    assert list((tmp_path / "other").iterdir()) == []
    assert (tmp_path / "checkpoints" / "step1" / "weights").is_file()


def test_a_folder_that_is_made_once(tmp_path: Path) -> None:
    left = tmp_path / ".cache.0123.tmp"
    left.mkdir()
    names: list[str] = []
    make_once(tmp_path / "cache", lambda folder: (names.append(folder.name), (folder / "x").touch()))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and (tmp_path / "cache" / "x").exists()
    assert names[0].startswith(".cache.") and names[0] != left.name


def test_whose_kernels_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    assert foreign_problem(folder) is None
    folder.mkdir(mode=0o700)
    assert foreign_problem(folder) is None
    for mode in (0o702, 0o1777):
        folder.chmod(mode)
        assert foreign_problem(folder) == "can be written by other users"
    folder.chmod(0o770)
    for private in (False, True):
        monkeypatch.setattr(cache_folders, "_is_private", lambda group, private=private: private)
        assert foreign_problem(folder) == (None if private else cache_folders.BY_GROUP)
    folder.chmod(0o755)
    uid = os.getuid()
    monkeypatch.setattr(cache_folders.os, "getuid", lambda: uid + 1)
    assert foreign_problem(folder) == (None if uid == 0 else "belongs to another user")
    if uid == 0:
        os.chown(folder, 4242, -1)
        assert foreign_problem(folder) == "belongs to another user"


def test_whose_folder_a_cache_will_be_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "shared" / "new" / "kernels"
    (tmp_path / "shared").mkdir(mode=0o755)
    assert foreign_problem(place) is None
    (tmp_path / "shared").chmod(0o1777)
    assert foreign_problem(place) is None
    (tmp_path / "shared").chmod(0o777)
    assert foreign_problem(place) == "can be written by other users"
    # An own folder in one that another user created first under this user's name
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (own_root() / "triton").mkdir(parents=True, mode=0o700)
    own_root().chmod(0o777)
    assert foreign_problem(own_root() / "triton") == f"is in {own_root()}, which can be written by other users"
    place.parents[1].chmod(0o755)
    (tmp_path / "loop").symlink_to("loop")
    assert foreign_problem(tmp_path / "loop") == "cannot be read"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder, a home and no cache variables."""
    for variable in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_compilers_cache_is_this_users_alone(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_inductor_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own_root() / "inductor")
    assert stat.S_IMODE(own_root().stat().st_mode) == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    use_own_inductor_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("squatted", ["open", "link", "file"])
def test_a_cache_that_somebody_made_first_is_not_used(caches: Path, squatted: str) -> None:
    if squatted == "open":
        own_root().mkdir()
        own_root().chmod(0o777)
    elif squatted == "link":
        (caches / "other").mkdir(mode=0o700)
        own_root().symlink_to(caches / "other")
    else:
        own_root().touch()
    with pytest.raises(MolsConfigError, match="TORCHINDUCTOR_CACHE_DIR"):
        check_kernel_caches()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_jobs_and_the_doctor_look_at_the_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(caches / "triton"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_kernel_caches()
    (caches / "triton").mkdir()
    (caches / "triton").chmod(0o777)
    ((what, fix),) = cache_problems()
    assert str(caches / "triton") in what and "TRITON_CACHE_DIR" in fix
    findings = Findings()
    _kernel_caches(findings)
    assert [item.level for item in findings.items] == ["warning" if os.getuid() == 0 else "problem"]
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(MolsConfigError, match="triton"):
        check_kernel_caches()
    (caches / "triton").chmod(0o770)
    monkeypatch.setattr(cache_folders, "cache_problems", lambda: [("triton " + cache_folders.BY_GROUP, "chmod")])
    monkeypatch.setattr(kernel_caches, "cache_problems", cache_folders.cache_problems)
    with pytest.warns(MolsWarning, match="triton can be written by its group; chmod"):
        check_kernel_caches()
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["compile_locks", "kernel_caches"])
def test_the_doctor_looks_at_both(caches: Path, name: str) -> None:
    findings = Findings()
    check_machine(findings, caches, None)
    assert name in [item.name for item in findings.items]


def test_jobs_name_a_stale_lock(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    lock = caches / ".cache" / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.warns(MolsWarning, match=str(lock)):
        check_kernel_caches()


def test_a_process_that_ends_for_a_signal_ignores_the_next() -> None:
    import signal

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(Preempted), StopRequest():
            raise Preempted("stopped")
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
