"""python -m tests.tools.mutants [WORD ...]: plant one bug at a time in what was merged, and see the tests fail.

One or more mutants for each part that release 0.5 made one of two: the step protocol, the training loop, ranges of
parameters, the split among replicas, the optimizer catalog. Each is planted in a copy of the tree, and the tests
beside it must fail there. WORD: only mutants whose name has one of the words. Status 1 where a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
LEFT_OUT = (".git", ".venv", "__pycache__", "*.egg-info", "runs", "mols_report", ".*_cache", ".hypothesis")


class Mutant(NamedTuple):
    """Replace `old`, which stands once in `file`, by `new`; `tests`: pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SESSION, TRAINER, RANGES = "mols_ds/core/session.py", "mols_ds/training/trainer.py", "mols_ds/core/ranges.py"
CATALOG, ZERO = "mols_ds/optim/catalog.py", "tests/engines/deepspeed"
LOOP, RANGE_TESTS = ("tests/unit/test_trainer.py",), ("tests/unit/test_ranges.py",)
FACTS = ("tests/unit/test_optimizer_facts.py",)
FILES, JSON = "mols_ds/core/files.py", "mols_ds/core/json_text.py"
DATA = "mols_ds/core/plain_data.py"
SHARED, FOREIGN = ("tests/unit/test_shared_machine.py",), ("tests/unit/test_foreign_text.py",)
PLAIN = ("tests/unit/test_plain_data.py",)

MUTANTS = (
    Mutant(
        "session: a probe keeps the gradient",
        SESSION,
        "        self.source.discard()\n",
        "",
        (f"{ZERO}/test_probe.py", "-k", "no_trace and 2"),
    ),
    Mutant(
        "session: ranks do not agree whether a sample is usable",
        SESSION,
        "usable = self.agree(found_finite and self.source.finite())",
        "usable = found_finite and self.source.finite()",
        (f"{ZERO}/test_session.py",),
    ),
    Mutant(
        "session: random numbers of a window are not given back",
        SESSION,
        "            self.random.restore()\n",
        "            pass\n",
        (f"{ZERO}/test_probe.py",),
    ),
    Mutant(
        "session: moments are never closed",
        SESSION,
        "            if reads_moments and updated:\n",
        "            if False:\n",
        (f"{ZERO}/test_engines.py", "-k", "moments"),
    ),
    Mutant(
        "session: a half-done calibration of another mode goes on",
        SESSION,
        "problem = self._mode_problem(saved) or load_samples()",
        "problem = load_samples()",
        (f"{ZERO}/test_checkpoint_faults.py",),
    ),
    Mutant(
        "loop: a probe step counts as an update",
        TRAINER,
        "            self.probe_steps += 1\n",
        "            self.probe_steps += 1\n            self.updates += 1\n",
        LOOP,
    ),
    Mutant(
        "loop: no evaluation at the last step",
        TRAINER,
        "due = now >= job.steps or (job.eval_every and",
        "due = (job.eval_every and",
        LOOP,
    ),
    Mutant(
        "loop: metrics are not rewound",
        TRAINER,
        'self.aside("metrics", partial(self.metrics.rewind, self.updates))',
        "pass",
        LOOP,
    ),
    Mutant(
        "loop: a signal is ignored", TRAINER, "                self.stop_if_asked()\n", "                pass\n", LOOP
    ),
    Mutant(
        "loop: probe batches come from the training stream",
        TRAINER,
        'stream: Stream = "probe" if measures and not job.probe_ahead else "train"',
        'stream: Stream = "train"',
        LOOP,
    ),
    Mutant(
        "loop: another seed is resumed",
        TRAINER,
        '"seed": self.job.seed, **self.backend.identity}',
        "**self.backend.identity}",
        LOOP,
    ),
    Mutant(
        "loop: Megatron's schedule stands still",
        "mols_ds/apps/train_megatron/backend.py",
        "            self.built.scheduler.step(increment=self.setup.settings.batch.total)\n",
        "            pass\n",
        ("tests/apps/test_train_megatron.py", "-k", "torchrun"),
    ),
    Mutant(
        "split: off by one at the end of a share",
        RANGES,
        "total * (rank + 1) // replicas\n",
        "total * (rank + 1) // replicas - 1\n",
        RANGE_TESTS,
    ),
    Mutant(
        "split: the position is moved by the part",
        RANGES,
        "        at += item.numel\n",
        "        at += part.numel\n",
        RANGE_TESTS,
    ),
    Mutant(
        "ranges: packed ranges keep their places in the tensors",
        RANGES,
        "packed.append(item._replace(offset=offset))",
        "packed.append(item)",
        RANGE_TESTS,
    ),
    Mutant(
        "ranges: neighbours in the source alone are merged",
        RANGES,
        "(last.source + last.numel, last.target + last.numel) == (span.source, span.target)",
        "last.source + last.numel == span.source",
        RANGE_TESTS,
    ),
    Mutant(
        "catalog: SOAP's state is taken for Adam's moments",
        CATALOG,
        '_tensors("SOAP", adam_moments=False)',
        '_tensors("SOAP")',
        (*FACTS, "tests/engines/deepspeed/test_optimizer_refusals.py"),
    ),
    Mutant(
        "catalog: DeepSpeed's FusedAdam has a counter for each tensor",
        CATALOG,
        '_elementwise("FusedAdam", DEEPSPEED, APEX, shared_counter=True, ',
        '_elementwise("FusedAdam", DEEPSPEED, APEX, ',
        FACTS,
    ),
    Mutant(
        "catalog: apex's FusedAdagrad is not elementwise",
        CATALOG,
        '_elementwise("FusedAdagrad", APEX)',
        '_elementwise("FusedAdagrad", DEEPSPEED)',
        FACTS,
    ),
    Mutant("shared: the name beside a file can be foreseen", FILES, "secrets.token_hex(8)", "os.getpid()", SHARED),
    Mutant("shared: a file is added to through a link", FILES, " | os.O_NOFOLLOW | ", " | ", SHARED),
    Mutant(
        "shared: a checkpoint is written through a link",
        FILES,
        "        path.unlink()\n    shutil.rmtree(path, ignore_errors=True)\n    path.mkdir()\n",
        "        pass\n    shutil.rmtree(path, ignore_errors=True)\n    path.mkdir(exist_ok=True)\n",
        SHARED,
    ),
    Mutant(
        "shared: somebody else's kernels are used",
        "mols_ds/core/cache_folders.py",
        "    if {linked.st_uid, found.st_uid} - {os.getuid(), 0}:\n",
        "    if False:\n",
        SHARED,
    ),
    Mutant(
        "shared: a cache is made in anybody's folder",
        "mols_ds/core/cache_folders.py",
        "    while not os.path.lexists(there) and there != there.parent:\n",
        "    while False:\n",
        SHARED,
    ),
    Mutant(
        "shared: the compiler's cache is not looked at",
        "mols_ds/core/cache_folders.py",
        "    if problem is not None:\n",
        "    if False:\n",
        SHARED,
    ),
    Mutant(
        "shared: launch scripts take any cache",
        "launch/common.sh",
        "-perm /022 -o ",
        "",
        ("tests/apps/launch/test_files.py", "-k", "cache"),
    ),
    Mutant(
        "locks: jobs of DeepSpeed do not look",
        "mols_ds/training/ranks.py",
        "    check_kernel_caches()\n",
        "",
        (f"{ZERO}/test_rank0.py", "-k", "lock"),
    ),
    Mutant(
        "locks: jobs of Megatron do not look",
        "mols_ds/training/megatron_build.py",
        "    check_kernel_caches()\n",
        "",
        (f"{ZERO}/test_rank0.py", "-k", "lock"),
    ),
    Mutant(
        "locks: the doctor does not look",
        "mols_ds/apps/doctor/machine.py",
        '        ("compile_locks", _compile_locks),\n',
        "",
        SHARED,
    ),
    Mutant(
        "text: escapes reach the terminal",
        "mols_ds/errors.py",
        '    return _escaped(" ".join(str(text).split()))\n',
        '    return " ".join(str(text).split())\n',
        FOREIGN,
    ),
    Mutant(
        "text: lines of a table are not made safe",
        "mols_ds/errors.py",
        "_escaped(line) for line in",
        "line for line in",
        FOREIGN,
    ),
    Mutant("data: a key may stand twice", JSON, "    if len(content) < len(pairs):\n", "    if False:\n", PLAIN),
    Mutant("data: nested without end", DATA, "    for _ in range(DEEPEST):\n", "    while True:\n", PLAIN),
    Mutant("data: aliases multiply", DATA, "        if count > most:\n", "        if False:\n", PLAIN),
    Mutant(
        "data: folders are read",
        FILES,
        "        if stat.S_ISREG(mode):\n",
        "        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):\n",
        PLAIN,
    ),
    Mutant(
        "rank 0: a warning of it alone is raised",
        "mols_ds/core/log.py",
        "    except Exception:  # the warning itself, or what shows it\n",
        "    except OSError:\n",
        (f"{ZERO}/test_rank0.py", "-k", "warnings"),
    ),
    Mutant(
        "rank 0: DeepSpeed's monitor ends it",
        "mols_ds/training/deepspeed_backend.py",
        "        monitor.write_events = write_events\n",
        "",
        (f"{ZERO}/test_rank0.py", "-k", "monitor"),
    ),
    Mutant(
        "rank 0: metrics that cannot be begun end it",
        TRAINER,
        '            self.aside("metrics", self.metrics.clear)\n',
        "            self.metrics.clear()\n",
        LOOP,
    ),
    Mutant(
        "reports: two engines share a folder",
        "mols_ds/report/files.py",
        "        while place in _TAKEN:\n",
        "        while False:\n",
        ("tests/unit/test_publish.py",),
    ),
    Mutant(
        "reports: a detached engine keeps its folder",
        "mols_ds/report/files.py",
        "        _TAKEN.discard(self._folder or Path())\n",
        "",
        ("tests/unit/test_publish.py",),
    ),
    Mutant(
        "signals: a second one kills a rank that ends",
        "mols_ds/training/preemption.py",
        "signal.SIG_IGN if ending else handler",
        "handler",
        SHARED,
    ),
    Mutant(
        "rules: a slow one is tried on every name",
        "mols_ds/core/groups.py",
        "        self.left -= time.monotonic() - began\n",
        "",
        ("tests/unit/test_groups.py", "-k", "slow"),
    ),
)


def survivors(mutants: tuple[Mutant, ...]) -> list[str]:
    """Plant each mutant in a copy of the tree and run its tests. Returns the names of those that no test noticed."""
    left: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for mutant in mutants:
            path = tree / mutant.file
            text = path.read_text("utf-8")
            if text.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: {text.count(mutant.old)} places in {mutant.file}, not one")
            path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", *mutant.tests]
            done = subprocess.run(
                command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True,
                timeout=SECONDS,
            )  # fmt: skip
            path.write_text(text, "utf-8")
            failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(
                f"{mutant.name}: {'killed by ' + failed[0] if done.returncode == 1 and failed else 'SURVIVES'}",
                flush=True,
            )
            if done.returncode != 1 or not failed:
                left.append(mutant.name)
    return left


def main(words: list[str]) -> int:
    chosen = tuple(m for m in MUTANTS if not words or any(word in m.name for word in words))
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants killed")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
