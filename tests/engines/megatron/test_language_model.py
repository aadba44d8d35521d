"""Megatron-LM's own pretrain_gpt.py with README's lines, on two CPU ranks: where MEGATRON_LM names a checkout."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from tests.apps.command import run
from tests.helpers.pages import blocks

CHECKOUT = os.environ.get("MEGATRON_LM", "")
RELEASE = "0.16.1"
ITERATIONS, START, SAMPLES, STOPPED = 20, 3, 6, 6
PLANNED = 400
PROBE = f'{{"start": {START}, "samples": {SAMPLES}, "ramp_end": 12, "report_dir": "mols_report"}}'
ITERATION = re.compile(r"iteration +(\d+)/ +\d+ \|.*?\| (learning rate: .*?) \| number of skipped iterations: +(\d+)")
MAIN = 'if __name__ == "__main__":\n'


def missing() -> str:
    """Why the tests are skipped; "" = they are not."""
    if not CHECKOUT:
        return "MEGATRON_LM names no checkout of Megatron-LM"
    if not Path(CHECKOUT, "pretrain_gpt.py").is_file():
        return f"MEGATRON_LM={CHECKOUT} holds no pretrain_gpt.py"
    if importlib.util.find_spec("six") is None:
        return "the package six, which Megatron-LM's tokenizers import, is not installed"
    core = pytest.importorskip("megatron.core")
    return "" if core.__version__ == RELEASE else f"megatron-core {core.__version__} is installed, not {RELEASE}"


pytestmark = [pytest.mark.distributed, pytest.mark.tier("all"), pytest.mark.timeout(600)]
needs_checkout = pytest.mark.skipif(bool(missing()), reason=missing())


def snippet() -> str:
    """README's lines, as they stand there below the line that is in the script already."""
    (block,) = (block for block in blocks("python") if block.page == "README.md" and block.text.startswith(MAIN))
    lines, dots, _ = block.text.removeprefix(MAIN).partition("    ...")
    assert dots and "megatron_patches.apply(" in lines
    return lines


def command() -> list[str]:
    """The command of docs/megatron.md."""
    (block,) = (block for block in blocks("bash") if "-m megatron_patches.cpu" in block.text)
    return shlex.split(block.text.replace("\\\n", " "))


class Checkout:
    """The checkout, by links, with other lines in its script."""

    def __init__(self, folder: Path, lines: str) -> None:
        folder.mkdir()
        for place in Path(CHECKOUT).iterdir():
            (folder / place.name).symlink_to(place)
        script = (folder / "pretrain_gpt.py").read_text("utf-8")
        assert script.count(MAIN) == 1
        (folder / "pretrain_gpt.py").unlink()
        (folder / "pretrain_gpt.py").write_text(script.replace(MAIN, MAIN + lines), "utf-8")
        self.folder = folder

    def run(self, *more: str, stop: int = ITERATIONS) -> str:
        """The first `stop` iterations of a longer run, in which README's 32 samples fit. Returns what it printed."""
        words = [word.replace("Megatron-LM/", f"{self.folder}/") for word in command()]
        words += ["--train-iters", str(PLANNED), "--exit-interval", str(stop)]
        done = run(*words, *more, cwd=self.folder.parent, timeout=300)
        assert done.status == 0, f"{more}: {done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr


@functools.cache
def outputs() -> dict[str, str]:
    """What each run printed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        probe = re.sub(r"apply\(\{.*\}\)", f"apply({PROBE})", snippet())
        stock, readme = Checkout(folder / "stock", ""), Checkout(folder / "readme", snippet())
        probing = Checkout(folder / "probe", probe)
        found = {
            "stock": stock.run(),
            "readme": readme.run(),
            "whole": probing.run(),
            "stopped": probing.run("--save", "saved", "--save-interval", "1000", stop=STOPPED),
            "resumed": probing.run("--load", "saved"),
            "torch stopped": probing.run(
                "--save", "torch", "--save-interval", "1000", "--ckpt-format", "torch", stop=STOPPED
            ),
            "torch resumed": probing.run("--load", "torch", "--ckpt-format", "torch"),
        }
    return found


def printed(name: str) -> dict[int, str]:
    """Iteration -> Megatron's own words from the learning rate on; no loss and no gradient norm in a skipped one."""
    return {int(number): words for number, words, _ in ITERATION.findall(outputs()[name])}


def skipped(name: str) -> list[int]:
    """The iterations that Megatron counts as skipped. It does not set the count back after the first one it prints."""
    counts = [(int(number), int(count)) for number, _, count in ITERATION.findall(outputs()[name])]
    first, second = counts[0][1], (counts[1][0], counts[1][1] - counts[0][1])
    return [number for number, count in [(counts[0][0], first), second, *counts[2:]] if count]


@needs_checkout
def test_readmes_lines_measure_and_leave_the_run_as_it_was() -> None:
    """32 samples are not there after 20 iterations: nothing is scaled, and every line is that of stock Megatron-LM."""
    assert list(printed("stock")) == list(range(1, ITERATIONS + 1))
    assert printed("readme") == printed("stock")
    assert "MoLS module groups" in outputs()["readme"] and "MoLS" not in outputs()["stock"]


@needs_checkout
def test_a_probe_is_skipped_iterations_and_then_rates_differ() -> None:
    whole, stock = printed("whole"), printed("stock")
    window = range(START + 1, START + SAMPLES + 1)
    assert [whole[i] for i in range(1, START + 1)] == [stock[i] for i in range(1, START + 1)]
    assert skipped("whole") == list(window) and not any("lm loss" in whole[i] for i in window)
    assert len({whole[i].split("|")[0] for i in (START, *window)}) == 1, "the schedule stands still"
    after = window[-1] + 1
    assert "lm loss" in whole[after] and len(set(whole.values())) > SAMPLES
    assert f"MoLS at step {START}: {SAMPLES} gradient samples" in outputs()["whole"]


@needs_checkout
def test_resumed_inside_the_probe_it_prints_what_the_whole_run_prints() -> None:
    whole, stopped, resumed = printed("whole"), printed("stopped"), printed("resumed")
    assert START < STOPPED < START + SAMPLES and list(stopped) == list(range(1, STOPPED + 1))
    assert list(resumed) == list(range(STOPPED + 1, ITERATIONS + 1))
    assert stopped | resumed == whole
    assert skipped("stopped") + skipped("resumed") == skipped("whole")
    table = re.compile(r"^(?:embedding|head|qk|vo|mlp|other) .*$", re.MULTILINE)
    assert table.findall(outputs()["resumed"])[-6:] == table.findall(outputs()["whole"])[-6:]


@needs_checkout
def test_the_format_torch_starts_over_and_advises_torch_dist() -> None:
    words = " ".join(outputs()["torch resumed"].split())
    assert "--ckpt-format torch), which holds only the state common to all ranks: save as torch_dist" in words
    assert "apply()" not in words
    assert skipped("torch resumed") == list(range(STOPPED + 1, STOPPED + SAMPLES + 1))


def test_readme_and_docs_hold_what_these_tests_run() -> None:
    """Also without a checkout."""
    assert snippet().strip().startswith("import megatron_patches") and "--tensor-model-parallel-size" in command()
    assert command()[:3] == ["torchrun", "--standalone", "--nproc_per_node"]
