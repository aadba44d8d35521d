"""python -m tests.tools.mutants [WORD ...]: plant one bug at a time and see the tests fail.

One or more mutants for each part that release 0.5 made one of two (the step protocol, the training loop, ranges of
parameters, the split among replicas, the optimizer catalog) and for memory, NVMe, fp32's range and the guard. Each is
planted in a copy of the tree, and the tests beside it must fail there. WORD: only mutants whose name has one of the
words. Status 1 where a mutant survives.
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
    """Replace `old`, which occurs once in `file`, by `new`; `tests`: pytest's arguments."""

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
LOOP = ("tests/unit/test_trainer.py", "tests/unit/test_trainer_resume.py")
RANGE_TESTS = ("tests/unit/test_ranges.py",)
FACTS = ("tests/unit/test_optimizer_facts.py",)
PIECES, SHARDS = "mols_ds/core/pieces.py", "mols_ds/engines/deepspeed/shards.py"
NVME, SMALL = (f"{ZERO}/test_nvme.py", "-k", "memory"), ("tests/unit/test_exponents.py",)
WINDOW, STATE = "mols_ds/core/probe_window.py", "mols_ds/core/module_state.py"
GIVEN_BACK, TRACES = ("tests/unit/test_module_state.py",), f"{ZERO}/test_traces.py"
MEGATRON_TRACES = "tests/engines/megatron/test_traces.py"
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
        "        new = sorted({*self.window.close_batch()} - self._kept_buffers)\n",
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
        '        """Return False: the loss has no scale to lower."""\n        return False\n',
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
        RULES,
        'if samples > 0 and saved.get("mode") != mode:',
        "if False:",
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
        'self.guarded("metrics", partial(self.metrics.rewind, self.updates))',
        "pass",
        LOOP,
    ),
    Mutant(
        "loop: a signal is ignored", TRAINER, "                self.stop_on_signal()\n", "                pass\n", LOOP
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
    Mutant(
        "decay: delta decays a weight without a gradient",
        SCALER,
        "or gradient_of(tensor) is None or",
        "or",
        DECAY_TESTS,
    ),
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
        "return decay if _inherits(type(optimizer), cls) else None",
        "return decay",
        DECAY_TESTS,
    ),
    Mutant(
        "decay: DeepSpeed's and Megatron's adapters scale it",
        "mols_ds/optim/scaling.py",
        "unscaled_decay=unscaled_decay(optimizer, weight_decay)",
        "unscaled_decay=None",
        (
            f"{ZERO}/test_weight_decay.py",
            "tests/engines/megatron/test_weight_decay.py",
            "-k",
            "(0 and unscaled and fixed) or TP2",
            "--tier",
            "quick",
        ),
    ),
    Mutant(
        "decay: DeepSpeed's adapter refuses nothing",
        "mols_ds/optim/refusals.py",
        "(decay is not None, *",
        "(False, *",
        (f"{ZERO}/test_weight_decay.py", "-k", "RMSprop", "--tier", "quick"),
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
        "mols_ds/core/adam_moments.py",
        " or state[key].numel() < tensor.numel()",
        "",
        ("tests/unit/test_adam_state.py",),
    ),
    Mutant(
        "optimizers: any unknown class counts as proportional to lr",
        "mols_ds/optim/step_trial.py",
        "    if error <= TOLERANCE:\n",
        "    if True:\n",
        (f"{ZERO}/test_step_trial.py",),
    ),
    Mutant(
        "rates: the user's step hooks come between",
        SESSION,
        "            scaler.keep_order()\n",
        "",
        (f"{ZERO}/test_unusual_use.py", "-k", "hooks"),
    ),
    Mutant(
        "optimizers: a subclass that changes what a step calls is its parent",
        "mols_ds/optim/traits.py",
        " and not any(hasattr(known, name) for name in own - NOT_IN_A_STEP)",
        "",
        ("tests/unit/test_lr_scaler_groups.py",),
    ),
    Mutant(
        "moments: a stale gradient of ZeRO-3 is read",
        "mols_ds/engines/deepspeed/engine.py",
        "if self.controller.measuring and torch.is_grad_enabled():",
        'if self.controller.measuring and self.config.mode != "moments" and torch.is_grad_enabled():',
        (f"{ZERO}/test_unused_parameters.py", "-k", "moments", "--tier", "all"),
    ),
    Mutant(
        "attach: sections of ranks are not compared",
        "mols_ds/engines/deepspeed/engine.py",
        "        check_section(config, schedule, self.reduce)\n",
        "",
        (f"{ZERO}/test_unusual_use.py", "-k", "differs"),
    ),
    Mutant(
        "detach: drops what others have put around a method",
        "mols_ds/core/replaced_methods.py",
        "            if before is _MISSING:\n",
        "            if True:\n",
        (f"{ZERO}/test_unusual_use.py", "-k", "wrappers"),
    ),
    Mutant(
        "load: other weights in a window, the samples stay",
        "mols_ds/engines/deepspeed/checkpoint.py",
        "        if controller.measuring and controller.samples:\n",
        "        if False:\n",
        (f"{ZERO}/test_unusual_use.py", "-k", "window"),
    ),
    Mutant(
        "memory: a gradient is finite where its largest element is",
        PIECES,
        "here = (low - low) + (high - high)",
        "here = high - high",
        ("tests/unit/test_pieces.py", "-k", "finite"),
    ),
    Mutant(
        "memory: a shard is made one tensor",
        SHARDS,
        "flat.grad if o.offload_optimizer else o.averaged_gradients[i])",
        "flat.grad if o.offload_optimizer else torch.cat([g.reshape(-1) for g in o.averaged_gradients[i]]))",
        (f"{ZERO}/test_memory.py", "-k", "3 and probe and fp32 and not offload"),
    ),
    Mutant(
        "memory: a copy to the host is read before it is there",
        "mols_ds/core/host_copies.py",
        "                last[2]()\n                yield",
        "                yield",
        ("tests/unit/test_pieces.py", "-k", "host"),
    ),
    Mutant(
        "memory: long segments are corrected by delta",
        "mols_ds/core/lr_scaler.py",
        "return not elementwise or layout.period < len(layout.pattern) * LONG_RUN",
        "return True",
        ("tests/unit/test_lr_scaler_memory.py",),
    ),
    Mutant(
        "memory: the plan leaves the copies of a scaled step out",
        "mols_ds/apps/plan/job.py",
        'scaled = name == "ramping" or',
        'scaled = name == "fixed" or',
        ("tests/apps/test_plan.py", "-k", "copies"),
    ),
    Mutant(
        "nvme: buffers are kept where the reader raises",
        SHARDS,
        """            yield from self.owned_parts(flat, flat.grad)
        finally:
            o._release_swap_buffers(i)
""",
        """            yield from self.owned_parts(flat, flat.grad)
            o._release_swap_buffers(i)
        finally:
            pass
""",
        NVME,
    ),
    Mutant(
        "nvme: a parameter that the batch does not use keeps its gradient",
        SHARDS,
        "if key not in o.norm_for_param_grads:",
        "if False:",
        NVME,
    ),
    Mutant(
        "nvme: a discarded gradient is stepped with",
        SHARDS,
        "                self._forget_swapped(i, flat)\n",
        "                pass\n",
        NVME,
    ),
    Mutant(
        "range: exponents are not undone",
        "mols_ds/core/local_stats.py",
        "m2, measured.count, exponent)",
        "m2, measured.count)",
        SMALL,
    ),
    Mutant(
        "range: squares that were lost stay lost",
        "mols_ds/core/accumulators.py",
        "        squares_of_one(mean, self.m2[begin:end], self.count)\n",
        "        self.m2[begin:end].mul_(4.0**exponent)\n",
        SMALL,
    ),
    Mutant(
        "range: exponents are not in the state",
        "mols_ds/core/exponents.py",
        "            exponents[index] = exponent\n",
        "            pass\n",
        SMALL,
    ),
    Mutant(
        "range: moments that Adam has lost are read",
        "mols_ds/core/adam_moments.py",
        "lost.logical_or_(s2 < MOMENTS_CUT * mu2)",
        "s2 < MOMENTS_CUT * mu2",
        SMALL,
    ),
    Mutant(
        "range: elements whose squares are lost are counted",
        "mols_ds/core/group_stats.py",
        "        s2.masked_fill_(s2 < samples * LOST, 0.0)\n",
        "        pass\n",
        SMALL,
    ),
    Mutant(
        "guard: gradients that lie apart are not watched",
        "mols_ds/core/step_guard.py",
        "gradient = gradient_of(tensor)",
        "gradient = tensor.grad",
        ("tests/unit/test_step_guard.py", "tests/engines/megatron/test_step_guard.py"),
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
    Mutant("data: nested without end", DATA, "    for _ in range(MAX_DEPTH):\n", "    while True:\n", PLAIN),
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
        "    except Exception:  # the warning itself, or a hook that shows it\n",
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
        '            self.guarded("metrics", self.metrics.clear)\n',
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
        "after if ending else handler or signal.SIG_DFL",
        "handler or signal.SIG_DFL",
        SHARED,
    ),
    Mutant(
        "rules: a slow one is tried on every name",
        "mols_ds/core/user_rules.py",
        "        self.left -= time.monotonic() - began\n",
        "",
        ("tests/unit/test_groups.py", "-k", "slow"),
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
        'if rule == "elsewhere" or key not in before or before[key] == now:',
        'if rule == "elsewhere" or key not in before or key == "ramp" or before[key] == now:',
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
        "if (warning := reenabled_warning(saved, t)) is not None:",
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
        "factors: the measured multiplier alone",
        "mols_ds/core/controller.py",
        "alpha.times(self._factor(group))",
        "alpha",
        ("tests/unit/test_factors.py",),
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
        "if not LOWEST <= number <= HIGHEST:",
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
