"""python -m tests.scenarios.mutants [WORD ...]: remove one fix at a time, and check that a scenario then fails.

Each row names the seed of a scenario that fails without the fix. WORD: only mutants whose name contains one of the
words. Exit status 1 if the test of a mutant still passes.
"""

from __future__ import annotations

import sys

from tests.tools.mutants import Mutant, survivors

SESSION = "mols_ds/core/session.py"
SCALER = "mols_ds/core/lr_scaler.py"
SHARDS = "mols_ds/engines/deepspeed/shards.py"
ENGINE = "mols_ds/engines/deepspeed/engine.py"
WINDOW = "mols_ds/core/probe_window.py"

# Name, file, text that occurs once in it, its replacement, seed.
ROWS = (
    (
        "ZeRO-3 reads the gradient of an earlier batch",
        SHARDS,
        "if o.micro_step_id == 0 and not getattr(",
        "if False and not getattr(",
        46,
    ),
    (
        "ZeRO-1 and 2 with offload read the gradient of an earlier batch",
        SHARDS,
        "        if self.outer.micro_step_id < 0:\n",
        "        if False:\n",
        64,
    ),
    (
        "a discarded step keeps its gradients at stage 0",
        SHARDS,
        "            self.engine.zero_grad()\n",
        "            pass\n",
        7,
    ),
    (
        "buffers are not restored after a probe",
        WINDOW,
        "        new = self.modules.restore()\n",
        "        new: list[str] = []\n",
        12,
    ),
    (
        "the random state is not restored after a probe",
        WINDOW,
        "            set_host_random(self._outside)\n            self._outside = None\n",
        "            self._outside = None\n",
        15,
    ),
    (
        "micro_steps counts discarded batches",
        ENGINE,
        "            self.engine.micro_steps = before - 1 if self.grid.counts_micro_steps else before\n",
        "            pass\n",
        38,
    ),
    (
        "the loss scale is not lowered in a probe",
        ENGINE,
        "        return self.shards.lower_scale()\n",
        "        return False\n",
        15,
    ),
    (
        "a sample that is not finite is used",
        SESSION,
        "usable = self.agree(found_finite and self.source.finite())",
        "usable = True",
        15,
    ),
    (
        "mode online uses a skipped step as a sample",
        SESSION,
        "controller.close_sample(self.steps, usable=self._sampled)",
        "controller.close_sample(self.steps, usable=True)",
        0,
    ),
    (
        "mode moments counts a skipped step as usable",
        SESSION,
        "controller.count(self.steps, usable=updated)",
        "controller.count(self.steps, usable=True)",
        78,
    ),
    (
        "no warning when alpha_max differs from the checkpoint's",
        "mols_ds/core/resume_rules.py",
        '    "alpha_max": "alphas",\n',
        '    "alpha_max": "elsewhere",\n',
        7,
    ),
    (
        "an unfinished calibration of another mode continues",
        "mols_ds/core/resume_rules.py",
        'if samples > 0 and saved.get("mode") != mode:',
        "if False:",
        50,
    ),
    (
        "fixed alphas of the resumed run are not applied",
        SESSION,
        "        controller.follow_config(t)\n",
        "",
        70,
    ),
    (
        "no warning about an unfrozen weight",
        SESSION,
        "            self.new_weights.check(lambda line: self.controller.warn(line, every_rank=True))\n",
        "",
        8,
    ),
    (
        "the step guard is disabled",
        SESSION,
        "GUARDED_STEPS = 2\n",
        "GUARDED_STEPS = 0\n",
        7,
    ),
    (
        "temporary parameter groups share a step counter",
        "mols_ds/core/state_slices.py",
        "        return value.detach().clone()\n",
        "        return value\n",
        12,
    ),
    (
        "rates are still applied after detach",
        SCALER,
        "        for hook in self._hooks:\n            hook.remove()\n",
        "        pass\n",
        7,
    ),
    (
        "the user's change of lr is lost",
        SCALER,
        '{"lr": group["lr"] * rate, "params": parts}',
        '{"lr": group.get("initial_lr", group["lr"]) * rate, "params": parts}',
        17,
    ),
    (
        "the base rate is not restored",
        SCALER,
        'if key in ("lr", "params") or',
        'if key == "params" or',
        17,
    ),
    (
        "ZeRO shards contain weights that were frozen at attach",
        "mols_ds/engines/deepspeed/zero_shards.py",
        " and item.name not in self.frozen])",
        "])",
        8,
    ),
    (
        "Megatron shards contain weights that were frozen at attach",
        "megatron_patches/shards.py",
        "    return parameter.requires_grad\n",
        "    return True\n",
        27,
    ),
    (
        "a run without MoLS loses the saved state",
        "mols_ds/core/off.py",
        "        self.kept = {SINCE: t, **saved}\n",
        "",
        110,
    ),
    (
        "unscaled weight decay is scaled",
        SCALER,
        '                one["weight_decay"] = group["weight_decay"] / rate\n',
        "                pass\n",
        7,
    ),
    (
        "Megatron's loss scale grows in a probe",
        "megatron_patches/engine.py",
        "                scaler.load_state_dict(state)\n",
        "                pass\n",
        20,
    ),
    (
        "a recalibration starts at multipliers of 1",
        "mols_ds/core/phases.py",
        "        self.old = self.multipliers(t)\n",
        "        self.old = {}\n",
        24,
    ),
)
SCENARIO_MUTANTS = tuple(
    Mutant(
        f"scenarios: {name}",
        file,
        old,
        new,
        (f"tests/scenarios/test_scenarios.py::test_scenario_matches_reference[{seed}]",),
    )
    for name, file, old, new, seed in ROWS
)


def main(words: list[str]) -> int:
    chosen = tuple(m for m in SCENARIO_MUTANTS if not words or any(word in m.name for word in words))
    survived = survivors(chosen)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants killed")
    return int(bool(survived))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
