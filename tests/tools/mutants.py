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
SCALER, DECAY_TESTS = "mols_ds/core/lr_scaler.py", ("tests/unit/test_weight_decay.py",)
RULES, RESUME_TESTS = "mols_ds/core/resume_rules.py", ("tests/unit/test_resume_rules.py",)
OFF_TESTS, BAD_NUMBERS = (f"{ZERO}/test_changed_sections.py",), ("tests/unit/test_bad_numbers.py",)
LOOP, RANGE_TESTS = ("tests/unit/test_trainer.py",), ("tests/unit/test_ranges.py",)
FACTS = ("tests/unit/test_optimizer_facts.py",)

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
        '_elementwise("FusedAdagrad", APEX, ',
        '_elementwise("FusedAdagrad", DEEPSPEED, ',
        FACTS,
    ),
    Mutant(
        "decay: a temporary group decays by its multiplied rate",
        SCALER,
        'one["weight_decay"] = group["weight_decay"] / rate',
        "pass",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: delta mixes with weights that did not decay",
        SCALER,
        "else view * (1 - decay)",
        "else view.clone()",
        DECAY_TESTS,
    ),
    Mutant("decay: delta decays a weight without a gradient", SCALER, "or tensor.grad is None or", "or", DECAY_TESTS),
    Mutant(
        "decay: a temporary group's decay is written back",
        SCALER,
        ' or (key == "weight_decay" and value is self.made.get(key))',
        "",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: a decay that comes later is not looked at",
        SCALER,
        "            self.unscaled_decay()\n",
        "            pass\n",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: Adam's L2 is taken for decoupled decay",
        CATALOG,
        'Decay((TORCH,), flag="decoupled_weight_decay")',
        "Decay((TORCH,))",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: the step of a subclass is not looked at",
        "mols_ds/optim/traits.py",
        "return decay if _unhooked(type(optimizer)) is _unhooked(cls) else None",
        "return decay",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: DeepSpeed's adapter scales it",
        "mols_ds/engines/deepspeed/engine.py",
        "unscaled_decay=unscaled_decay(shards.inner, self.config)",
        "unscaled_decay=None",
        (f"{ZERO}/test_weight_decay.py", "-k", "0 and unscaled and fixed", "--tier", "quick"),
    ),
    Mutant(
        "decay: DeepSpeed's adapter refuses nothing",
        "mols_ds/engines/deepspeed/checks.py",
        "(decay is not None, *",
        "(False, *",
        (f"{ZERO}/test_weight_decay.py", "-k", "RMSprop", "--tier", "quick"),
    ),
    Mutant(
        "decay: Megatron's adapter scales it",
        "megatron_patches/engine.py",
        "unscaled_decay=unscaled_decay(part.inner, self.config)",
        "unscaled_decay=None",
        ("tests/engines/megatron/test_weight_decay.py", "--tier", "quick"),
    ),
    Mutant(
        "decay: Megatron's adapter refuses nothing",
        "megatron_patches/checks.py",
        "unscaled=unscaled)",
        "unscaled=False)",
        ("tests/engines/megatron/test_weight_decay.py", "-k", "refused"),
    ),
    Mutant(
        "catalog: Adamax's state is taken for Adam's moments",
        CATALOG,
        '_elementwise("Adamax", TORCH, adam_moments=False, ',
        '_elementwise("Adamax", TORCH, ',
        (*FACTS, "tests/unit/test_adam_state.py"),
    ),
    Mutant(
        "moments: state of another shape is read",
        SESSION,
        "or state[key].numel() < tensor.numel()",
        "",
        ("tests/unit/test_adam_state.py",),
    ),
    Mutant(
        "resume: alphas of the checkpoint are said to follow this run",
        RULES,
        '"estimator": "alphas",',
        '"estimator": "config",',
        ("tests/engines/deepspeed/test_changed_sections.py", "-k", "changed-0"),
    ),
    Mutant(
        "resume: a key that differs is not said",
        RULES,
        'if rule == "elsewhere" or key not in saved or saved[key] == now:',
        'if rule == "elsewhere" or key not in saved or key == "ramp" or saved[key] == now:',
        RESUME_TESTS,
    ),
    Mutant(
        "resume: a calibration that is under way follows another start",
        RULES,
        'begun, over = phase != "waiting",',
        'begun, over = phase in ("ramping", "fixed"),',
        RESUME_TESTS,
    ),
    Mutant(
        "resume: alphas of a finished calibration are said to change",
        RULES,
        'phase in ("ramping", "fixed")',
        'phase == "fixed"',
        RESUME_TESTS,
    ),
    Mutant(
        "off: the state is lost on the next save",
        "mols_ds/engines/deepspeed/off.py",
        "kept = {} if self.kept is None else {KEY: self.kept}",
        "kept: dict[str, Any] = {}",
        (*OFF_TESTS, "-k", "2-disabled", "--tier", "quick"),
    ),
    Mutant(
        "off: nothing is said",
        "mols_ds/core/off.py",
        "        warnings.warn(\n",
        "        (lambda *a, **k: None)(\n",
        (*OFF_TESTS, "-k", "2-disabled", "--tier", "quick"),
    ),
    Mutant(
        "off: nothing is said when it is on again",
        SESSION,
        "if (said := on_again(saved, t)) is not None:",
        "if False:",
        (*OFF_TESTS, "-k", "2-disabled", "--tier", "quick"),
    ),
    Mutant(
        "off: Megatron's updates without MoLS are not counted",
        "megatron_patches/checkpoint.py",
        "self.count_from(steps if SINCE not in saved else max(steps, self._updates()))",
        "self.count_from(steps)",
        ("tests/engines/megatron/test_changed_sections.py", "--tier", "quick"),
    ),
    Mutant(
        "new weights: an unfrozen weight is not named",
        "mols_ds/core/new_weights.py",
        "        if still:\n",
        "        if False:\n",
        (f"{ZERO}/test_new_weights.py", "--tier", "quick"),
    ),
    Mutant(
        "new weights: a weight without a plan is not noted",
        SCALER,
        "                    self._unknown.append(tensor)\n",
        "",
        (f"{ZERO}/test_new_weights.py", "--tier", "quick"),
    ),
    Mutant(
        "shards: offload at ZeRO-1 and 2 keeps gradients of former batches",
        "mols_ds/engines/deepspeed/shards.py",
        "        if self.outer.micro_step_id < 0:\n",
        "        if False:\n",
        (f"{ZERO}/test_unused_parameters.py", "-k", "offload"),
    ),
    Mutant(
        "numbers: true is a number",
        "mols_ds/core/config.py",
        "Field(strict=True)]\nLOWEST",
        "Field()]\nLOWEST",
        BAD_NUMBERS,
    ),
    Mutant(
        "numbers: a multiplier may be as large as can be",
        "mols_ds/core/config.py",
        "if not LOWEST <= alpha <= HIGHEST:",
        "if False:",
        BAD_NUMBERS,
    ),
    Mutant(
        "numbers: settings of an added group are not looked at",
        "mols_ds/optim/sharded.py",
        "        check_options(type(self).__name__, {**self.defaults, **param_group})\n",
        "",
        BAD_NUMBERS,
    ),
    Mutant(
        "numbers: a bool is a setting",
        "mols_ds/optim/limits.py",
        "isinstance(value, bool) or not isinstance(value, int | float)",
        "not isinstance(value, int | float)",
        BAD_NUMBERS,
    ),
    Mutant(
        "numbers: infinity is above zero",
        "mols_ds/training/cli_utils.py",
        "0 < value < math.inf",
        "0 < value",
        BAD_NUMBERS,
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
