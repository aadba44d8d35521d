"""Commands of README and docs: bash accepts them, programs know their options, quick ones print what the page says."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mols_ds import cli
from mols_ds.apps import train
from mols_ds.apps.doctor import command as doctor
from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.finetune import main as finetune
from mols_ds.apps.launch import health, signals
from mols_ds.apps.launch.jobs import split_nproc
from mols_ds.apps.study.spec import load_study
from mols_ds.apps.train_megatron import main as train_megatron
from mols_ds.core.schema import Report
from mols_ds.report.table import format_report
from tests.helpers.harness import run_ranks
from tests.helpers.pages import PAGES, ROOT, Block, blocks, commands, spans
from tests.tools.simulate import command as simulate

Parse = Callable[[Sequence[str]], argparse.Namespace]


def sub(*words: str) -> Parse:
    """A parser of `mols-ds`, with these words first."""
    return lambda argv: cli._parser().parse_args([*words, *argv])


def job(name: str, parse: Parse) -> Parse:
    """The parser of `mols-ds train` and the other jobs."""
    return lambda argv: parse(split_nproc(name, argv)[1])


PROGRAMS: dict[str, Parse] = {
    "mols-ds train": job("train", train.parse_arguments),
    "mols-ds finetune": job("finetune", finetune.parse_arguments),
    "mols-ds train-megatron": job("train-megatron", train_megatron.parse_arguments),
    "mols-ds configs": sub("configs"),
    "mols-ds export": sub("export"),
    "mols-ds completion": sub("completion"),
    "mols-ds --version": lambda argv: argparse.Namespace(),
    "mols-ds compare": sub("compare"),
    "mols-ds plan": sub("plan"),
    "mols-ds groups": sub("groups"),
    "mols-ds report": sub("report"),
    "mols-ds doctor": doctor.parse_arguments,
    "train.py": train.parse_arguments,
    "finetune.py": finetune.parse_arguments,
    "train_megatron.py": train_megatron.parse_arguments,
    "mols_ds.health": health._arguments,
    "mols_ds.signals": signals._parse,
    "mols_ds.study": sub("compare"),
    "mols_ds.apps.study": sub("compare"),
    "mols_ds.plan.simulate": lambda argv: simulate._parser().parse_args(argv),
}
SOURCES = {
    "tests.faults": "tests/tools/faults/__main__.py",
    "tests.fuzz": "tests/tools/fuzz/__main__.py",
    "benchmarks/scale.py": "benchmarks/scale.py",
    "benchmarks/overhead.py": "benchmarks/overhead.py",
    "benchmarks/accumulator.py": "benchmarks/accumulator.py",
}
"""Programs whose parser is not to be had alone: their options are looked up in the file."""
SYSTEM = {"pip", "set", ".", "env", "grep", "pytest", "make", ".ci/run", "~/.deepspeed_env"}
LAUNCHERS = {"deepspeed", "torchrun", "srun", "python"}


def split(words: list[str]) -> tuple[str, list[str]]:
    """(program, its arguments) of a command, launchers and variables left out; ("", ...) where there is none."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[:1] == ["mols-ds"]:
        return " ".join(words[:2]), words[2:]
    for number, word in enumerate(words):
        module = number > 0 and words[number - 1] in ("-m", "--module")
        if module or word.endswith(".py"):
            config = words.index("--config") if "--config" in words[:number] else None  # passed on to the script
            passed = [] if config is None else words[config : config + 2]
            return word.removeprefix("./"), [*passed, *words[number + 1 :]]
    return "", words


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_bash_accepts_the_block(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_program_that_takes_its_arguments() -> None:
    seen = set()
    for block, words in commands():
        program, arguments = split(words)
        seen.add(program)
        if program in PROGRAMS:
            PROGRAMS[program](arguments)  # raises for what it does not know
        elif program in SOURCES:
            text = (ROOT / SOURCES[program]).read_text("utf-8")
            assert all(f'"{word}"' in text for word in arguments if word.startswith("--")), f"{block}: {words}"
        elif program:
            place = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
            known = program in ("pytest", "deepspeed.checkpoint.ds_to_universal", "snr.py")
            assert known or place.is_file() or place.with_suffix("").is_dir(), f"{block}: {words}"
        else:
            assert arguments[0] in SYSTEM, f"{block}: {words}"
        for word in arguments:
            if word.startswith(("configs/", "studies/", "tests/", "launch/")):
                assert (ROOT / word).exists(), f"{block}: {word}"
    assert {"train.py", "mols-ds plan", "mols-ds doctor", "mols_ds.health", "tests.faults"} <= seen


def options(parse: Parse, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that a program's --help names."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z_][\w-]*", capsys.readouterr().out))


def test_commands_within_sentences_have_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as `train.py --timeout SECONDS`, in prose and tables."""
    known: dict[str, set[str]] = {}
    found = 0
    for page in PAGES:
        for number, span in spans(page):
            words = span.split()
            if len(words) < 2 or not (words[0] in LAUNCHERS | {"mols-ds"} or words[0].endswith(".py")):
                continue
            program, arguments = split(words)
            if program.startswith("mols-ds "):
                assert program in {*PROGRAMS, "mols-ds launch"}, f"{page}:{number}: {span}"
            if program == "mols-ds launch":
                program, arguments = split(arguments)
            if program not in PROGRAMS:
                continue
            found += 1
            if program == "mols_ds.signals":
                assert arguments[0] in ("run", "send", "finished"), f"{page}:{number}: {span}"
                continue
            if program not in known:
                known[program] = options(PROGRAMS[program], capsys)
            given = {word for word in arguments if word.startswith("--")}
            assert given <= known[program], f"{page}:{number}: {span}"
    assert found > 15


def test_subcommands_that_messages_name_exist() -> None:
    for folder in ("mols_ds", "megatron_patches", "launch"):
        for path in (file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".sh", ".sbatch")):
            for name in re.findall(r"(?:`|: )mols-ds ([a-z]+)\b", path.read_text("utf-8")):
                assert f"mols-ds {name}" in {*PROGRAMS, "mols-ds launch"}, f"{path}: mols-ds {name}"


# ---------------------------------------------------------------------- what the pages show


def test_the_table_of_the_report_page_is_what_the_program_prints() -> None:
    (block,) = (block for block in blocks("text") if block.page == "docs/report.md")
    groups = {}
    for line in block.text.splitlines()[4:]:
        name, elements, _, d, low, _, high, alpha, never, *_ = line.split()
        groups[name] = {
            "elements": int(elements.replace(",", "")),
            **{"snr": float(d), "snr_low": float(low), "snr_high": float(high), "alpha": float(alpha)},
            **{"never_moved_share": float(never.rstrip("%")) / 100, "clamped": False},
        }
        assert float(alpha) == (1.0 if name == "other" else pytest.approx(0.435 / float(d), rel=5e-3))
    report: Report = {
        **{"schema": 1, "step": 2, "samples": 32, "mode": "probe", "estimator": "damping", "reference": "vo"},
        **{"world": {}, "versions": {}, "groups": groups},
    }
    assert format_report(report) + "\n" == block.text


def test_the_study_of_the_page_is_read(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    file = tmp_path / "study.yaml"
    file.write_text(block.text.replace("../configs", str(ROOT / "configs")), "utf-8")
    assert set(load_study(file).arms) == {"adam", "mols", "hand", "search"}


def use_the_handle() -> dict[str, object]:
    """On a rank: the lines of README's block about `engine.mols`, on a calibrated engine of DeepSpeed."""
    import mols_ds
    from tests.engines.deepspeed.engines import config, engine_of
    from tests.engines.deepspeed.loops import iterate
    from tests.helpers.oracle.adamw import AdamSettings

    section = {"start": 1, "samples": 4, "ramp_end": 3}
    engine = engine_of(config(0, section), "llama", AdamSettings(lr=1e-3, eps=1e-5, clip=0.5))
    for iteration in range(8):
        iterate(engine, iteration)
    (block,) = (block for block in blocks("python") if "engine.mols.phase" in block.text)
    found: dict[str, object] = {}
    for line in block.text.splitlines():
        if line.startswith("mols_ds.attach"):
            engine.mols.detach()
        code = line.split("#")[0].strip()
        found[code] = repr(eval(code, {"engine": engine, "model": engine.module, "mols_ds": mols_ds}))
    return found


@pytest.mark.tier("all")
def test_the_lines_of_the_readme_run() -> None:
    (found,) = run_ranks(use_the_handle, 1)
    assert found["engine.mols.phase"] == "'fixed'"
    assert "'embedding'" in found["engine.mols.alphas"] and "'embedding'" in found["engine.mols.applied_lrs"]
    assert "'groups'" in found["engine.mols.report()"]
    assert len(found) == 6


PLANS = [block for block in blocks("text") if block.text.startswith("$ mols-ds ")]


@pytest.mark.tier("all")
@pytest.mark.parametrize("block", PLANS, ids=str)
def test_the_plans_of_the_pages_are_what_the_program_prints(block: Block) -> None:
    """The output may have lines before the page's."""
    command, _, shown = block.text.replace("\\\n", " ").partition("\n")
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        shlex.split(command)[1:], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=280, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip().endswith(shown.strip())


@pytest.mark.tier("all")
def test_the_example_of_the_doctor_is_what_the_program_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The findings about the config; those about the machine differ."""
    config, output = (b for b in blocks() if b.page == "docs/doctor.md" and b.language in ("json", "text"))
    (tmp_path / "short.json").write_text(config.text, "utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    command = "mols-ds doctor --config short.json --model configs/models/llama_tiny.json --steps 200"
    assert f"`{command}`" in (ROOT / "docs/doctor.md").read_text("utf-8")
    findings = Findings()
    doctor._check_config(findings, doctor.parse_arguments(command.split()[2:]))
    findings.items = [item for item in findings.items if item.name != "config.values"]
    assert output.text.split() == findings.as_text(width=120).rpartition("\n")[0].split()[6:]
    assert findings.status(strict=False) == 1
