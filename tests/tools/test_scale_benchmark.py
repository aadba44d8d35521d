"""benchmarks/scale.py: its short form meets every bound that does not depend on time; a broken bound is an error."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SECONDS = 200.0  # it takes 10 on a quiet machine


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """What the command prints, once it ended with status 0."""
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's module, imported as a script finds its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("scale_benchmark", BENCHMARKS / "scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scale_benchmark", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.tier("all")
def test_every_bound_on_memory_and_counts_holds(quick: dict[str, Any]) -> None:
    binding = [verdict for verdict in quick["verdicts"] if verdict["kind"] != "time"]
    assert len(binding) >= 18
    assert [verdict for verdict in binding if not verdict["holds"]] == []


@pytest.mark.tier("all")
def test_sections_measure_what_they_say(quick: dict[str, Any]) -> None:
    sizes, ranks, parameters = (quick["measured"][name] for name in ("sizes", "ranks", "parameters"))
    assert [round(row["elements"], -6) for row in sizes] == [10**6, 10**7]
    assert all(row["counted"] == row["elements"] for row in sizes)
    assert [(row["held"], row["ranks"]) for row in ranks] == [("each", 1), ("each", 2), ("in all", 1), ("in all", 2)]
    assert [row["parameters"] for row in parameters] == [10, 100, 1000]
    assert parameters[-1]["runs"] > 400  # the rate changes several times a layer: the shard is cut into many views


@pytest.mark.parametrize(("kind", "flags", "status"), [("memory", [], 1), ("time", [], 0), ("time", ["--strict"], 1)])
def test_a_broken_bound_is_the_exit_status(
    scale: Any, monkeypatch: pytest.MonkeyPatch, kind: str, flags: list[str], status: int
) -> None:
    verdicts = [scale.Verdict("kept", 1.0, 1.0, "memory"), scale.Verdict("broken", 1.1, 1.0, kind)]
    monkeypatch.setitem(scale.RUN, "sizes", lambda args, say: ([], verdicts))
    assert scale.main(["--only", "sizes", *flags]) == status


def test_a_slope_is_that_of_the_power(scale: Any) -> None:
    sizes = [1e3, 1e4, 1e5]
    assert scale.slope(sizes, [n**2 for n in sizes]) == pytest.approx(2.0)
    assert scale.slope(sizes, [7.0] * 3) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("arguments", [["--samples", "3"], ["--largest", "1e5"], ["--only", "nothing"]])
def test_a_mistake_is_one_line_and_status_2(
    scale: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        scale.main(arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
