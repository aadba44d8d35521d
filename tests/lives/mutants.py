"""python -m tests.lives.mutants [WORD ...]: take one mend out at a time, and see a life of `test_lives.py` fail.

Each row names the seed of a life that notices. WORD: only mutants whose name has one of the words. Status 1 where a
mutant survives.
"""

from __future__ import annotations

import sys

from tests.tools.mutants import Mutant, survivors

SESSION = "mols_ds/core/session.py"
SCALER = "mols_ds/core/lr_scaler.py"
SHARDS = "mols_ds/engines/deepspeed/shards.py"
ENGINE = "mols_ds/engines/deepspeed/engine.py"
WINDOW = "mols_ds/core/probe_window.py"

# Name, file, what stands once in it, what takes its place, seed.
ROWS = (
    (
        "a gradient of a former batch is read at ZeRO-3",
        SHARDS,
        "if o.micro_step_id == 0 and not getattr(",
        "if False and not getattr(",
        46,
    ),
    (
        "a gradient of a former batch is read under offload at ZeRO-1 and 2",
        SHARDS,
        "        if self.outer.micro_step_id < 0:\n",
        "        if False:\n",
        64,
    ),
    (
        "a discarded step leaves its gradients at stage 0",
        SHARDS,
        "            self.engine.zero_grad()\n",
        "            pass\n",
        7,
    ),
    (
        "buffers stay as a probe left them",
        WINDOW,
        "        new = self.modules.restore()\n",
        "        new: list[str] = []\n",
        12,
    ),
    (
        "random numbers stay as a probe left them",
        WINDOW,
        "            set_host_random(self._outside)\n            self._outside = None\n",
        "            self._outside = None\n",
        15,
    ),
    (
        "micro_steps count discarded batches",
        ENGINE,
        "            self.engine.micro_steps = before - 1 if self.grid.counts_micro_steps else before\n",
        "            pass\n",
        38,
    ),
    (
        "a loss scale stands still in a probe",
        ENGINE,
        "        return self.shards.lower_scale()\n",
        "        return False\n",
        15,
    ),
    (
        "a sample that is not finite counts",
        SESSION,
        "usable = self.agree(found_finite and self.source.finite())",
        "usable = True",
        15,
    ),
    (
        "a skipped step is an online sample",
        SESSION,
        "controller.close_sample(self.steps, usable=self._sampled)",
        "controller.close_sample(self.steps, usable=True)",
        0,
    ),
    (
        "a skipped step counts in mode moments",
        SESSION,
        "controller.count(self.steps, usable=updated)",
        "controller.count(self.steps, usable=True)",
        78,
    ),
    (
        "alpha_max that changed at a load is not said",
        "mols_ds/core/resume_rules.py",
        '    "alpha_max": "alphas",\n',
        '    "alpha_max": "elsewhere",\n',
        7,
    ),
    (
        "a half-done calibration of another mode goes on",
        "mols_ds/core/resume_rules.py",
        'if samples > 0 and saved.get("mode") != mode:',
        "if False:",
        50,
    ),
    (
        "fixed alphas of the resumed run do not apply",
        SESSION,
        "        controller.follow_config(t)\n",
        "",
        70,
    ),
    (
        "an unfrozen weight is not named",
        SESSION,
        "            self.new_weights.check(lambda line: self.controller.warn(line, every_rank=True))\n",
        "",
        8,
    ),
    (
        "the guard of the step is off",
        SESSION,
        "GUARDED_STEPS = 2\n",
        "GUARDED_STEPS = 0\n",
        7,
    ),
    (
        "temporary groups share a counter",
        "mols_ds/core/state_slices.py",
        "        return value.detach().clone()\n",
        "        return value\n",
        12,
    ),
    (
        "rates stay on after detach",
        SCALER,
        "        for hook in self._hooks:\n            hook.remove()\n",
        "        pass\n",
        7,
    ),
    (
        "an edit of lr is lost",
        SCALER,
        '{"lr": group["lr"] * rate, "params": parts}',
        '{"lr": group.get("initial_lr", group["lr"]) * rate, "params": parts}',
        17,
    ),
    (
        "the base rate is not put back",
        SCALER,
        'if key in ("lr", "params") or',
        'if key == "params" or',
        17,
    ),
    (
        "weights frozen at attach are in the shards at ZeRO",
        "mols_ds/engines/deepspeed/zero_shards.py",
        " and item.name not in self.frozen])",
        "])",
        8,
    ),
    (
        "weights frozen at attach are taken for others on Megatron",
        "megatron_patches/shards.py",
        "    return parameter.requires_grad\n",
        "    return True\n",
        27,
    ),
    (
        "the state is lost in a run without MoLS",
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
        "a recalibration begins at multipliers of 1",
        "mols_ds/core/phases.py",
        "        self.old = self.multipliers(t)\n",
        "        self.old = {}\n",
        24,
    ),
)
LIVES = tuple(
    Mutant(f"lives: {name}", file, old, new, (f"tests/lives/test_lives.py::test_a_life_is_as_the_twin_tells[{seed}]",))
    for name, file, old, new, seed in ROWS
)


def main(words: list[str]) -> int:
    chosen = tuple(m for m in LIVES if not words or any(word in m.name for word in words))
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants killed")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
