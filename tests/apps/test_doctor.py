"""`mols-ds doctor`: broken packages, wrong configs, exit status, output."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.doctor import command, machine, packages
from mols_ds.apps.doctor.findings import Findings, split_way_out
from mols_ds.apps.doctor.imports import Tried, try_all
from mols_ds.errors import MolsUnsupportedError
from tests.apps.doctor_checks import BASE, changed, examined, only

ROOT = Path(__file__).resolve().parent.parent.parent
WORKS = Tried("1.0")
BROKEN = {
    "broken_import": "raise ImportError('first line\\nlibmissing.so.1: cannot open shared object file')",
    "broken_exit": "import sys; sys.exit(7)",
    "broken_gone": "import os; os._exit(3)",
    "broken_signal": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "whole": "__version__ = '2.5'",
}


def write_modules(folder: Path, modules: dict[str, str]) -> None:
    for name, text in modules.items():
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text, "utf-8")


# ------------------------------------------------------------------ broken packages


def test_packages_that_break_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modules(tmp_path, BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    tried = try_all([*BROKEN, "no_such_package"])
    assert tried["whole"] == Tried("2.5")
    assert tried["broken_import"].error == "ImportError: libmissing.so.1: cannot open shared object file"
    assert tried["broken_exit"].error == "SystemExit: 7"
    assert tried["broken_gone"].error == "it exited with status 3"
    assert tried["broken_signal"].error == "it ended the process with signal 11"
    assert "No module named" in tried["no_such_package"].error


@pytest.mark.tier("all")
def test_a_package_that_hangs_is_blamed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modules(tmp_path, {"hangs": "import time; time.sleep(600)", "whole": BROKEN["whole"]})
    monkeypatch.syspath_prepend(str(tmp_path))
    tried = try_all(["hangs", "whole"], limit=5.0)  # start-up of an interpreter without torch: well below a second
    assert tried["hangs"].error == "it did not finish within 5 s"
    assert tried["whole"].works


@pytest.mark.tier("all")
def test_the_command_survives_a_broken_torch(tmp_path: Path) -> None:
    """Torch, pydantic and rich at once: nothing of them may be imported by the command itself."""
    broken = {name: BROKEN["broken_import"] for name in ("torch", "pydantic", "rich")}
    write_modules(tmp_path, broken)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    argv = [sys.executable, "-m", "mols_ds.cli", "doctor", "--config", str(ROOT / "configs/ds_mols.json")]
    for more in (["--json"], []):
        done = subprocess.run(
            [*argv, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "torch cannot be imported: ImportError: libmissing.so.1" in done.stdout
        assert "not checked, because torch" in done.stdout


@pytest.mark.parametrize("name", ["deepspeed", "megatron.core", "transformers", "bitsandbytes"])
def test_one_broken_package_is_one_finding_and_the_rest_is_checked(name: str) -> None:
    tried = {**dict.fromkeys(["torch", machine.GLOO, *packages.IMPORTS], WORKS), name: Tried(error="OSError: bad ELF")}
    findings = Findings()
    packages.check_packages(findings, tried)
    blamed = [f for f in findings.items if "bad ELF" in f.found]
    assert blamed and all(f.level in ("problem", "warning") and f.fix for f in blamed)
    assert only(findings, "apex") and only(findings, "fp8"), "the checks after it were made"


def test_apex_of_another_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modules(tmp_path, {"apex": ""})
    folder = tmp_path / "apex-0.9.10.dev0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    findings = Findings()
    packages._apex(findings, {})
    sys.modules.pop("apex", None)
    (finding,) = findings.items
    assert finding.level == "warning" and "not NVIDIA's" in finding.found and "PyPI's" in finding.found
    assert "pip uninstall apex" in finding.fix and "github.com/NVIDIA/apex" in finding.fix


def test_versions_beside_the_tested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    core = pytest.importorskip("megatron.core")
    findings = Findings()
    monkeypatch.setattr(packages, "_ops", lambda findings: None)
    packages._deepspeed(findings, Tried("0.18.2"))
    assert findings.items[0].level == "warning" and "tested with 0.19.8" in findings.items[0].found
    monkeypatch.setattr(core, "__version__", "0.12.1")
    with findings.guard("megatron"):
        packages._megatron(findings, Tried("0.12.1"))
    last = findings.items[-1]
    assert last.level == "problem" and "0.12.1 has not been tested" in last.found and "install one" in last.fix


def test_a_kernel_lock_that_was_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    findings = Findings()
    packages._ops(findings)
    assert [f.level for f in only(findings, "deepspeed.lock")] == ["warning"]


# ------------------------------------------------------------------ the machine


def test_limits_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    monkeypatch.setattr(machine, "LEAST_SHARED", 2**60)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = Findings()
    machine.check_machine(findings, tmp_path / "runs" / "a", elements=10**15)
    levels = {f.name: f.level for f in findings.items}
    assert levels["omp_num_threads"] == levels["compiler"] == levels["shared_memory"] == "warning"
    assert levels["open_files"] == "note" and "ulimit -n 512" in only(findings, "open_files")[0].fix
    assert levels["disk"] == "problem", "14 PB do not fit"


def test_gloo_and_devices_of_this_machine() -> None:
    findings = Findings()
    machine.check_torch(findings, try_all(["torch", machine.GLOO]))
    assert only(findings, "torch", "ok") and only(findings, "gloo", "ok")
    failing = Findings()
    machine.check_torch(
        failing, {"torch": WORKS, machine.GLOO: Tried(error="RuntimeError: unable to resolve hostname")}
    )
    assert "must resolve" in only(failing, "gloo", "problem")[0].fix


# ------------------------------------------------------------------ configs

WARMUP = {"type": "WarmupCosineLR", "params": {"total_num_steps": 200, "warmup_num_steps": 20}}
CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0}}
FP16 = {"fp16": {"enabled": True}}
CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    # changes; then level, name, part of what was found, part of the fix
    "unknown key": ({"mols": {"smaples": 8}}, "problem", "config.file", "unknown key", 'did you mean "samples"'),
    "bad value": ({"mols": {"mode": "x"}}, "problem", "config.file", "mols.mode", "docs/config.md"),
    "misspelt top level": ({"zero_optimisation": {}}, "warning", "config.keys", "ignores it", "zero_optimization"),
    "batch": ({"train_batch_size": 7}, "problem", "config.values", "does not divide among 2", "correct"),
    "deepspeed refuses": ({"zero_optimization": {"stage": 9}}, "problem", "config.deepspeed", "stage", "correct"),
    "start after ramp": ({"mols": {"start": 30}}, "problem", "config.file", "is after ramp_end", "must end later"),
    "start after the end": (
        *({"mols": {"start": 150, "ramp_end": 1.0, "total_steps": 100}}, "problem", "config.schedule"),
        *("is after", "start earlier"),
    ),
    "two lengths": ({"mols": {"total_steps": 50}}, "warning", "config.total_steps", "run has 100", "to one value"),
    "auto without warm-up": (
        *({"mols": {"ramp_end": "auto"}, "scheduler": {"type": "OneCycle", "params": {}}}, "problem"),
        *("config.scheduler", "refuses its params", "lr_schedules.OneCycle"),
    ),
    "online in a short warm-up": (
        *({"mols": {"mode": "online", "samples": 32, "ramp_end": "auto"}, "scheduler": WARMUP}, "warning"),
        *("config.mode", "past the end of ramp or warm-up (step 20)", '"mode": "probe"'),
    ),
    "calibration after the warm-up": (
        *({"mols": {"start": 25, "ramp_end": 60}, "scheduler": WARMUP}, "warning", "config.start"),
        *("when the warm-up (step 20) is over", "inside the warm-up"),
    ),
    "another length of the scheduler": ({"scheduler": WARMUP}, "warning", "config.scheduler", "has 200 steps", "100"),
    "unknown scheduler": (
        *({"scheduler": {"type": "Cosine", "params": {}}}, "problem", "config.scheduler", "unknown", "WarmupCosineLR"),
    ),
    "torch's scheduler under ZeRO": (
        *({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}, "problem", "config.scheduler"),
        *("refuse ZeRO", "lr_scheduler=lambda"),
    ),
    "a scheduler that moves beta1": (
        {"mols": {"mode": "moments"}, "scheduler": CYCLE},
        *("warning", "config.scheduler", "changes Adam's beta1", "cycle_momentum"),
    ),
    "range test": (
        *({"scheduler": {"type": "LRRangeTest", "params": {}}}, "warning", "config.scheduler", "LRRange", "false"),
    ),
    "probe takes the run": ({"mols": {"samples": 64}}, "warning", "config.cost", "64.0% of the run", "fewer samples"),
    "fp16": ({**FP16, "mols": {"start": 3}}, "warning", "config.fp16", "samples overflow", "bf16"),
    "a jump": ({"mols": {"ramp_end": 2}}, "warning", "config.ramp", "jump", "warm-up"),
    "endless ramps": (
        *({"mols": {"recalibrate": {"every": 5}}}, "warning", "config.recalibrate", "never constant", "ramp"),
    ),
    "moments without moments": (
        *({"mols": {"mode": "moments"}, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "problem"),
        *("config.engine", "keeps no Adam moments", "probe"),
    ),
    "decay that cannot be unscaled": (
        {
            "mols": {"weight_decay": "unscaled"},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.1}},
        },
        *("problem", "config.engine", "added to the gradient", '"scaled"'),
    ),
    "Adam's L2": (
        {
            "mols": {"weight_decay": "unscaled"},
            "optimizer": {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.1, "adam_w_mode": False}},
        },
        *("problem", "config.engine", "added to the gradient", "AdamW"),
    ),
    "whole tensors under ZeRO": (
        *({"optimizer": {"type": "SOAP", "params": {"lr": 1e-3}}}, "problem", "config.values"),
        *("needs whole tensors", '"zero_optimization.stage": 0'),
    ),
    "no norm": ({"compute_grad_norm": False, "mols": {"mode": "online"}}, "problem", "config.engine", "norm", "remove"),
    "offload ratio": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        *("problem", "config.engine", "ratio < 1", "1.0"),
    ),
    "a compiled Adam": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        *("note", "config.kernels", "fused_adam", "torch_adam"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion"])
def test_decay_that_can_be_unscaled(name: str, tmp_path: Path) -> None:
    optimizer = {"type": name, "params": {"lr": 1e-3, "weight_decay": 0.1}}
    findings = examined(changed({"mols": {"weight_decay": "unscaled"}, "optimizer": optimizer}), tmp_path)
    assert not only(findings, "config.engine", "problem")


def test_a_good_config_has_nothing_to_mend(tmp_path: Path) -> None:
    findings = examined(changed({}), tmp_path, model=str(ROOT / "configs/models/gpt2_125m.json"))
    assert {f.level for f in findings.items} <= {"ok", "note"}, findings.items
    assert only(findings, "config.groups", "ok") and only(findings, "config.accumulators", "ok")
    assert "fused parameters" in only(findings, "config.fused")[0].found


@pytest.mark.parametrize("case", CASES)
def test_config_problem_has_a_fix(case: str, tmp_path: Path) -> None:
    changes, level, name, found, fix = CASES[case]
    findings = examined(changed(changes), tmp_path)
    matching = [f for f in only(findings, name, level) if found in f.found and fix in f.fix]
    assert matching, "\n".join(map(str, findings.items))
    assert not any("cannot be checked" in f.found for f in findings.items), findings.items


def test_rules_and_groups_need_the_model(tmp_path: Path) -> None:
    model = str(ROOT / "configs/models/llama_tiny.json")
    for section, found in (
        ({"rules": [["nothing", "qk"]]}, "matches no trainable parameter"),
        ({"reference": "qkv"}, 'no group "qkv" in this model'),
        ({"fixed_alphas": {"other": 2.0}}, "never scaled"),
        ({"factors": {"embeding": 2.0}}, 'no group "embeding" in this model'),
    ):
        findings = examined(changed({"mols": section}), tmp_path, model=model)
        assert found in only(findings, "config.groups", "problem")[0].found
        without = examined(changed({"mols": section}), tmp_path)
        assert found not in str(without.items)
        assert "reference" in section or only(without, "config.groups", "note")


def test_shares_without_a_length(tmp_path: Path) -> None:
    config = changed({"mols": {"start": 0.01, "ramp_end": 0.1}})
    (finding,) = only(examined(config, tmp_path, steps=None), "config.total_steps")
    assert finding.level == "warning" and "--steps N" in finding.fix
    assert not only(examined(config, tmp_path, steps=1000), "config.total_steps")


def test_megatron_config(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from mols_ds.apps.doctor.megatron_config import check_yaml

    text = (ROOT / "configs/megatron/tiny_tp2_pp2.yaml").read_text("utf-8")
    path = tmp_path / "m.yaml"

    def look(old: str = "", new: str = "", **options: Any) -> Findings:
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text, "utf-8")
        findings = Findings()
        check_yaml(findings, str(path), **{"steps": None, "world": None, **options})
        assert not any("cannot be checked" in f.found for f in findings.items), findings.items
        return findings

    good = look()
    assert {f.level for f in good.items} <= {"ok", "note"}, good.items
    assert "unknown key" in only(look("model:", "model:\n  num_layer: 3"), "config.model", "problem")[0].found
    assert "needs a multiple of 4 ranks" in only(look(world=6), "config.grid", "problem")[0].found
    assert only(look("mols:", "mols:\n  smaples: 3"), "config.file", "problem")
    if importlib.util.find_spec("transformer_engine") is not None:
        return  # with it, the device decides (tests/engines/megatron/test_precision.py)
    fp8 = look("run:", "precision:\n  fp8: hybrid\nrun:")
    assert "needs Transformer Engine" in only(fp8, "config.model", "problem")[0].found


# ------------------------------------------------------------------ the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh import and no changed package: tests the command as users run it."""
    monkeypatch.setattr(command, "try_all", lambda tasks: dict.fromkeys(tasks, WORKS))
    monkeypatch.setattr(command, "check_packages", lambda findings, tried: None)
    monkeypatch.setattr(command, "check_machine", lambda findings, out, elements: None)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    from mols_ds.cli import main

    status = main(["doctor", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.usefixtures("quick")
def test_exit_status_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    expected = {"good": ({}, 0, 0), "warning": ({"mols": {"ramp_end": 2}}, 0, 1), "problem": ({"mols": {"x": 1}}, 1, 1)}
    for changes, loose, strict in expected.values():
        path.write_text(json.dumps(changed(changes)), "utf-8")
        argv = ("--config", str(path), "--steps", "100", "--json")
        status, out, _ = run(capsys, *argv)
        assert status == loose
        content = json.loads(out)
        assert list(content) == ["schema", "status", "counts", "findings"] and content["status"] == loose
        assert list(content["counts"]) == ["ok", "note", "warning", "problem"]
        assert all(list(finding) == ["level", "name", "found", "fix"] for finding in content["findings"])
        assert run(capsys, *argv, "--strict")[0] == strict


@pytest.mark.usefixtures("quick")
def test_mistakes_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, what in (
        (["--config", str(tmp_path / "none.json")], "no such file"),
        (["--config", str(tmp_path)], "(a folder"),
        (["--model", "nowhere"], "no such file"),
        (["--steps", "0"], "not at least 1"),
        (["--steps", "many"], "invalid int value"),
        (["--nonsense"], "unrecognized arguments"),
    ):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, "") and what in err and err.count("\n") == 1, err


@pytest.mark.usefixtures("quick")
def test_text_with_and_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    status, out, _ = run(capsys)
    assert status == 0 and "gloo" in out and "0 problem" in out.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, plain, _ = run(capsys)
    assert status == 0 and "ok       gloo:" in plain and plain.splitlines()[-1] == out.splitlines()[-1]


def test_messages_are_split_where_the_way_out_begins() -> None:
    assert split_way_out("step 5 is late; start earlier") == ("step 5 is late", "start earlier")
    assert split_way_out('MoLS does not support x: set "a.b": false') == ("MoLS does not support x", 'set "a.b": false')
    assert split_way_out('"mols.k": bad (got 1)')[1] == ""
    assert split_way_out("a; b; c")[1] == ""
    findings = Findings()
    with findings.guard("name", "the fix"):
        raise MolsUnsupportedError("what it is")
    with findings.guard("name", "the fix"):
        raise SystemExit("gone")
    assert [(f.level, f.found, f.fix) for f in findings.items] == [
        ("problem", "what it is", "the fix"),
        ("problem", "cannot be checked: SystemExit: gone", "the fix"),
    ]


@pytest.mark.usefixtures("quick")
def test_the_command_takes_base64(capsys: pytest.CaptureFixture[str]) -> None:
    coded = base64.urlsafe_b64encode(json.dumps(BASE).encode()).decode()
    status, out, err = run(capsys, "--config", coded, "--steps", "100")
    assert (status, err) == (0, "") and "accepted by DeepSpeed" in " ".join(out.split())
    status, out, err = run(capsys, "--config", coded[:-7])
    assert (status, out) == (2, "") and "no such file, and not a config in base64" in err and err.count("\n") == 1
