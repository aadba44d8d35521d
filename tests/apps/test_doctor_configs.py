"""`mols-ds doctor` on DeepSpeed configs: how they are read, "auto", refused optimizers, shipped configs."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mols_ds.apps.doctor.findings import Findings
from mols_ds.errors import MolsUnsupportedError
from tests.apps.doctor_checks import BASE, changed, examined, only
from tests.helpers.optimizer_facts import CLASSES

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_config_as_deepspeed_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments and trailing commas, and the same in base64; the clients that read JSON alone are named."""
    from mols_ds.apps.doctor.deepspeed_config import check_config

    text = json.dumps(BASE, indent=1).replace("{", "{ # a comment\n", 1)[:-1].rstrip() + ",\n}"
    (tmp_path / "ds.json").write_text(text, "utf-8")
    coded = base64.urlsafe_b64encode(text.encode()).decode()
    for given in (str(tmp_path / "ds.json"), coded):
        findings = Findings()
        check_config(findings, given, model=None, steps=100, world=2)
        assert {f.level for f in findings.items} <= {"ok", "note"}, findings.items
        assert bool(only(findings, "config.file", "note")) == (given != coded)
        assert all(len(f.found) < 400 for f in findings.items)


def test_who_fills_in_which_auto(tmp_path: Path) -> None:
    auto = changed(
        {
            **dict.fromkeys(("train_batch_size", "gradient_clipping"), "auto"),
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": "auto"},
            "bf16": {"enabled": "auto"},
            "mols": {"total_steps": "auto"},
        }
    )
    findings = examined(auto, tmp_path)
    assert not any(f.level == "problem" for f in findings.items), findings.items
    said = {level: [f for f in only(findings, "config.auto", level)] for level in ("ok", "note", "warning")}
    (filled,) = said["ok"]
    assert set(filled.found.partition(": ")[2].split(", ")) == {
        *("train_batch_size", "gradient_clipping", "optimizer.params.lr", "bf16.enabled"),
        "zero_optimization.reduce_bucket_size",
    }
    left, alone = said["warning"]
    assert left.found.endswith("zero_optimization.overlap_comm") and "accelerate raises ValueError" in left.found
    assert set(alone.found.partition("): ")[2].split(", ")) == {
        *("train_batch_size", "gradient_clipping", "optimizer.params.lr")
    }
    assert "mols_ds.initialize" in alone.found and "TypeError" in alone.found and "Trainer" in alone.fix
    (default,) = said["note"]
    assert default.found.endswith("zero_optimization.reduce_bucket_size, zero_optimization.overlap_comm, bf16.enabled")
    assert not only(examined(changed({}), tmp_path), "config.auto")
    library = {"type": "Adam-mini", "params": {"lr": "auto"}}  # for the library's, "auto" is the default
    assert not only(examined(changed({"optimizer": library}), tmp_path), "config.auto", "warning")


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", ["OneBitAdam", "onebitlamb", "ZeroOneAdam", "Prodigy", "Rprop", "ASGD", "LBFGS",
                                  "Adafactor", "Muon", "muon", "SAM", "ScheduleFreeAdamW"])  # fmt: skip
def test_optimizers_that_mols_refuses(name: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the refusal of the table, in any spelling that DeepSpeed takes, and never as an unknown name."""
    from mols_ds.optim.choose import rename

    monkeypatch.setattr("mols_ds.optim.choose._where_it_runs", lambda section, config: None)  # as on a GPU
    given = {"type": name, "params": {"lr": 1e-3}}
    findings = examined(changed({"optimizer": given, "zero_optimization": {"stage": stage}}), tmp_path)
    problem = [f for f in findings.items if f.level == "problem"][-1]  # Adafactor reads whole tensors besides
    facts = {one.name.lower(): one.refused for one in CLASSES if one.refused}
    reason = facts.get(name.lower(), "its gradients are already orthogonalised when they can be read")
    assert problem.found.startswith("MoLS does not support ") and reason in problem.found and problem.fix
    if name.lower() in ("onebitlamb", "prodigy", "sam"):
        with pytest.raises(MolsUnsupportedError, match="MoLS does not support"):
            rename({"type": "AdamW"}, name)


def test_settings_that_torchs_optimizer_refuses(tmp_path: Path) -> None:
    findings = examined(changed({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "betas": [0.9, 0.95]}}}), tmp_path)
    (problem,) = [f for f in findings.items if f.level == "problem"]
    assert problem.found == '"optimizer.params.betas" of SGD: unknown key' and "momentum" in problem.fix
    wrong = {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}}  # needs momentum
    findings = examined(changed({"optimizer": wrong}), tmp_path)
    (problem,) = [f for f in findings.items if f.level == "problem"]
    assert "torch.optim.SGD refuses its params: ValueError" in problem.found and "optimizer.params" in problem.fix


@pytest.mark.parametrize("name", ["adagrad", "Muon"])
def test_an_optimizer_is_judged_as_it_is_written(name: str, tmp_path: Path) -> None:
    """On a CPU the programs take the library's Muon. `mols_ds.initialize` takes DeepSpeed's, which it refuses."""
    findings = examined(changed({"optimizer": {"type": name, "params": {"lr": 1e-3}}}), tmp_path)
    found = [f.found for f in findings.items if f.level == "problem"]
    assert len(found) == (name == "Muon") and all("MoLS does not support Muon" in line for line in found)


def test_shipped_configs_have_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    from mols_ds.apps.doctor.deepspeed_config import check_config

    for path in sorted((ROOT / "configs").glob("ds_*.json")):
        findings = Findings()
        check_config(findings, str(path), model=None, steps=10_000, world=None)
        assert not [f for f in findings.items if f.level == "problem"], (path, findings.items)
