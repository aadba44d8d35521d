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
WINDOW, STATE = "mols_ds/core/probe_window.py", "mols_ds/core/module_state.py"
GIVEN_BACK, TRACES = ("tests/unit/test_module_state.py",), f"{ZERO}/test_traces.py"
MEGATRON_TRACES = "tests/engines/megatron/test_traces.py"

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
        "            self._close_window()\n",
        "            pass\n",
        (f"{ZERO}/test_probe.py",),
    ),
    Mutant(
        "window: passes draw from the loader's generator",
        WINDOW,
        "            set_host_random(self._outside)\n",
        "",
        (TRACES, "-k", "loader"),
    ),
    Mutant(
        "window: every pass draws the same numbers",
        WINDOW,
        "            self._stream = host_random()\n",
        "",
        GIVEN_BACK,
    ),
    Mutant(
        "window: generators of modules stay where they are",
        WINDOW,
        "                generator.set_state(state)\n",
        "                pass\n",
        GIVEN_BACK,
    ),
    Mutant(
        "window: parameters that a pass moves are not named",
        WINDOW,
        "if name in before and not torch.equal(value, before[name])",
        "if name not in before",
        GIVEN_BACK,
    ),
    Mutant(
        "window: buffers stay as a batch left them",
        SESSION,
        "        new = sorted({*self.window.close_batch()} - self._stay)\n",
        "        new: list[str] = []\n",
        (TRACES, "-k", "no_trace and probed-0"),
    ),
    Mutant(
        "window: a buffer that was replaced stays",
        STATE,
        "            module._buffers.update(buffers)\n",
        "",
        GIVEN_BACK,
    ),
    Mutant(
        "window: a buffer that was changed in place stays",
        STATE,
        "                tensor.data.copy_(copy)\n",
        "                pass\n",
        GIVEN_BACK,
    ),
    Mutant(
        "window: the length of a cache stays",
        STATE,
        "            here.update({name: value for name, value in plain.items() if _is_plain(here.get(name))})\n",
        "",
        (TRACES, "-k", "no_trace and probed-3"),
    ),
    Mutant(
        "window: sums for logging stay",
        STATE,
        "            tracker.update(sums)\n",
        "            pass\n",
        GIVEN_BACK,
    ),
    Mutant(
        "window: a checkpoint holds what half a batch moved",
        "mols_ds/engines/deepspeed/checkpoint.py",
        "        self.window.close_batch()  #",
        "        #",
        (TRACES, "-k", "checkpoint"),
    ),
    Mutant(
        "window: micro_steps by the number of micro-batches",
        "mols_ds/engines/deepspeed/engine.py",
        "            self.engine.micro_steps = before - 1 if self.grid.counts_micro_steps else before\n",
        "            self.engine.micro_steps -= self.engine.gradient_accumulation_steps()\n",
        (TRACES, "-k", "hand"),
    ),
    Mutant(
        "window: generators of DeepSpeed's tracker stay",
        "mols_ds/engines/deepspeed/probe_window.py",
        '            rng_tracker().set_states(saved["tracker"])\n',
        "            pass\n",
        (TRACES, "-k", "no_trace and probed-3"),
    ),
    Mutant(
        "window: a loss scale that scales no loss falls",
        "mols_ds/engines/deepspeed/shards.py",
        '        """It does not scale the loss: a lower one makes no gradient finite."""\n        return False\n',
        "        return super().lower_scale()\n",
        (TRACES, "-k", "broken"),
    ),
    Mutant(
        "window: Megatron's loss scale grows",
        "megatron_patches/engine.py",
        "                scaler.load_state_dict(state)\n",
        "                pass\n",
        (MEGATRON_TRACES, "-k", "fp16"),
    ),
    Mutant(
        "window: Megatron's sums for logging are not found",
        "megatron_patches/trackers.py",
        "            found.append(value)\n",
        "            pass\n",
        (MEGATRON_TRACES,),
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
        "            self.metrics.rewind(self.updates)\n",
        "            pass\n",
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
