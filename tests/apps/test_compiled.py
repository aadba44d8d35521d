"""train.py --compile: the graphs are torch.compile's, the training is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mols_ds.training.trainer import TIMED
from tests.apps.command import read_metrics, write_job
from tests.apps.mains import changed_file, one_line, train
from tests.helpers.harness import run_ranks

pytestmark = [pytest.mark.jobs, pytest.mark.tier("all")]


def compiled(folder: str) -> dict[str, Any]:
    """Train with and without a backend that counts its graphs' matrix products, and with three that do not work."""
    import torch
    from torch._dynamo import register_backend

    products = 0

    @register_backend(name="counted")
    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal products
        products += sum("linear" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @register_backend(name="broken")
    def broken(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise OSError("no compiler\nanywhere")

    found: dict[str, Any] = {}
    base = Path(folder)
    mols = {"mode": "probe", "start": 2, "samples": 4, "ramp_end": 6}
    paths = write_job(base, mols=mols, zero_optimization={"stage": 1})
    for name, more in (("plain", ()), ("compiled", ("--compile", "counted"))):
        products = 0
        done = train(paths, base / name, "--steps", "8", *more)
        assert done.status == 0, done.stderr
        found[name] = products
    found |= {name: train(paths, base / "none", "--compile", name) for name in ("broken", "unknown")}
    paths["config"] = changed_file(paths["config"], base / "stage3.json", zero_optimization={"stage": 3})
    return {**found, "stage 3": train(paths, base / "none", "--compile", "counted")}


def test_a_compiled_model_trains_the_same(tmp_path: Path) -> None:
    found, *_ = run_ranks(compiled, 2, str(tmp_path), timeout=300)
    runs = [read_metrics(tmp_path / name) for name in ("plain", "compiled")]
    plain, ours = ([{k: v for k, v in line.items() if k not in TIMED} for line in lines] for lines in runs)
    assert len(plain) == 9 and ours == plain
    assert found["plain"] == 0 < found["compiled"]
    assert "broken: torch.compile fails on this machine, train without it: " in one_line(found["broken"])
    assert "no compiler" in one_line(found["broken"])
    assert "train.py: --compile unknown: torch.compile has " in one_line(found["unknown"])
    assert "no matrix product would be compiled: use stage 0, 1 or 2" in one_line(found["stage 3"])
