"""Engine-independent MoLS state: groups, accumulators, alphas and phases.

An engine adapter passes the ranges that this rank owns, feeds gradient samples to `elements`, calls `advance` after
each optimizer step, and reads the multipliers of step t from `rates(t)`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.nn.functional import pad

from mols_ds.core import estimators
from mols_ds.core.adam_moments import MOVING_BETAS
from mols_ds.core.config import MolsConfig
from mols_ds.core.document import build_report, measured_rows, remarks, unmeasured_rows
from mols_ds.core.former_groups import advice
from mols_ds.core.group_stats import GroupSums
from mols_ds.core.groups import GroupTable, format_group_table, is_scaled
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.log import warn_here
from mols_ds.core.phases import Calibration, Phase, Schedule
from mols_ds.core.protocols import Context
from mols_ds.core.ranges import ShardRange
from mols_ds.core.schema import Report, ReportGroup
from mols_ds.core.state_check import STATE_VERSION, check_saved
from mols_ds.core.vocabulary import find_vocabulary
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError, MolsWarning


class Controller:
    """The MoLS state of one engine. The same calls in the same order on every rank give identical bits on every rank.

    Args:
        config: the "mols" section.
        table: module groups and their layouts, the same on every rank.
        owned: element ranges that this rank owns.
        schedule: start and ramp end in optimizer steps.
        context: rank, device, reduction and output of the engine.

    Raises:
        MolsConfigError: the reference group or a group of `fixed_alphas` or `factors` does not exist in this model.
    """

    def __init__(
        self, config: MolsConfig, table: GroupTable, owned: Sequence[ShardRange], schedule: Schedule, context: Context
    ) -> None:
        self.config = config
        self.table = table
        self.context = context
        self.groups: tuple[str, ...] = tuple(row.group for row in table)
        vocabulary = find_vocabulary(table.layouts, table.shapes, context.columns)
        layouts = context.layouts or table.layouts
        self.elements = LocalStats(owned, layouts, self.groups, context.device, vocabulary)
        self.state = Calibration(
            schedule, config.samples, config.max_samples, config.recalibrate.every if config.recalibrate else None
        )
        self.multipliers: dict[str, float] = {}
        self.applied_lrs: dict[str, float] = {}
        self._report: Report | None = None
        self._said_unseen = ""
        config.check_groups(self.groups)
        self.log(f"MoLS module groups\n{format_group_table(table)}")
        for remark in schedule.remarks:
            self.warn(remark)

    # ------------------------------------------------------------------ what users read

    @property
    def phase(self) -> Phase:
        """Phase of the next step."""
        return self.state.phase

    @property
    def alphas(self) -> dict[str, float]:
        """group -> multiplier after the ramp; empty before the first calibration ends."""
        return dict(self.state.alphas)

    @property
    def samples(self) -> int:
        """Usable gradient samples of the current or last calibration."""
        return self.state.samples

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of this rank's accumulators now; 0 outside a calibration."""
        return self.elements.accumulators.nbytes if self.elements.accumulators is not None else 0

    def report(self) -> dict[str, Any]:
        """The content of mols_report.json as a dict (docs/report.md); empty before the first calibration ends."""
        return json.loads(json.dumps(self._report)) if self._report else {}

    # ------------------------------------------------------------------ steps

    def log(self, message: str) -> None:
        """Log on rank 0."""
        if self.context.rank == 0:
            with contextlib.suppress(Exception):  # a failing log handler must not stop rank 0: the other ranks go on
                self.context.log(message)

    def warn(self, message: str, *, every_rank: bool = False) -> None:
        """Issue a `MolsWarning` on rank 0; with `every_rank` on every rank, where each caller should see it."""
        if every_rank:
            warnings.warn(message, MolsWarning, stacklevel=3)
        elif self.context.rank == 0:
            warn_here(message, stacklevel=3)

    @property
    def measuring(self) -> bool:
        """Whether the next step is a gradient sample."""
        return self.state.phase == "calibrating"

    @property
    def discards_steps(self) -> bool:
        """Whether the next `engine.step()` only measures and does not update (mode "probe")."""
        return self.measuring and self.config.mode == "probe"

    def advance(self, t: int) -> None:
        """Move to the phase of step t. Call before step t: at attach, after each step, after a load."""
        self.state.advance(t)
        if not self.state.due(t):
            return
        late = self.state.phase == "waiting" and t > self.state.schedule.start
        if self.config.fixed_alphas is not None:
            self._fix(t, self.config.fixed_alphas)
            return
        self.state.begin(t)
        if late:
            self.warn(f"step {t} is past mols.start (step {self.state.schedule.start}): the calibration begins now")
        if self.config.mode == "probe":
            self.log(f"MoLS: {self.context.announce(self.state.window)}")

    def _fix(self, t: int, fixed: Mapping[str, float]) -> None:
        """Set the alphas of `fixed_alphas` before step t. The ramp starts at the current multipliers."""
        self.state.begin(t)
        alphas = {g: fixed.get(g, 1.0) for g in self.groups}
        self._report = self._new_report(t, self.config.reference, unmeasured_rows(self.table, alphas))
        self._finish(t, alphas)

    def follow_config(self, t: int) -> None:
        """Apply this run's `fixed_alphas` after a load. They override the checkpoint; warns when they differ."""
        fixed, came_fixed = self.config.fixed_alphas, self._report is not None and self._report["mode"] == "fixed"
        if self.state.phase == "waiting" or (fixed is None and not came_fixed):
            return
        if fixed is None:
            self.warn(
                "the alphas of this checkpoint come from mols.fixed_alphas and stay, although this run's config has "
                "none; to measure, load an earlier checkpoint or load with load_module_only"
            )
        elif self.measuring or self.alphas != {g: fixed.get(g, 1.0) for g in self.groups}:
            self.warn("mols.fixed_alphas of this run's config override the checkpoint's alphas or calibration")
            self._fix(t, fixed)

    def rates(self, t: int) -> dict[str, float]:
        """Multiplier of every group for step t."""
        current = self.state.multipliers(t)
        return {group: current.get(group, 1.0) for group in self.groups}

    def applied(self, t: int, base_lrs: Mapping[str, float]) -> None:
        """Record the rates that step t applied. `base_lrs`: the scheduler's learning rate per group."""
        self.multipliers = self.rates(t)
        self.applied_lrs = {g: lr * self.multipliers[g] for g, lr in base_lrs.items()}

    # ------------------------------------------------------------------ samples

    def close_sample(self, t: int, *, usable: bool) -> None:
        """End one gradient sample.

        Args:
            t: the next step.
            usable: the same on all ranks. An unusable sample was never opened: a non-finite gradient would stay in the
                accumulators.
        """
        if usable:
            self.elements.close()
        self.elements.drop_ids()
        self.count(t, usable=usable)

    def count(self, t: int, *, usable: bool) -> None:
        """Count a sample and end the calibration after the last one. Mode "moments" only counts."""
        self.state.count(usable)
        if not usable:
            self.warn(
                f"gradient sample {self.state.attempts} is not finite (or its step was skipped) and is left out on "
                f"every rank ({self.state.skipped} so far)"
            )
        outcome = self.state.exhausted()
        if outcome == "failed":
            self.give_up(
                t, f"only {self.state.samples} of {self.state.attempts} gradient samples were finite; check the loss"
            )
        elif self.config.mode == "moments":
            return  # `close_moments` reads the moments after this step
        elif outcome == "complete" or (outcome == "no" and usable and self.state.check_due() and self._precise()):
            self.end_calibration(t, self._gradient_sums())

    def find_seen(self, by_gradient: Callable[[], Tensor]) -> None:
        """Find the tokens that occurred, see `LocalStats.find_seen`. Collective; each warning once."""
        if self.config.unseen_rows == "exclude":
            problem = self.elements.find_seen(by_gradient, self.context.reduce_max)
            if problem and problem != self._said_unseen:
                self.warn(problem)
            self._said_unseen = problem or self._said_unseen

    def _gradient_sums(self) -> GroupSums:
        """Sums of the samples so far, of all ranks."""
        self.find_seen(self.elements.rows_by_gradient)
        return self._reduced(self.elements.gradient_sums())

    def _reduced(self, sums: GroupSums) -> GroupSums:
        """Sum over all ranks: the one all-reduce of group sums of a calibration."""
        sums.load_packed(self.context.reduce(sums.pack()))
        return sums

    def _precise(self) -> bool:
        """Whether the 95 % interval of every alpha is within alpha_rtol (samples="auto"). One small all-reduce."""
        try:
            _, found = self._compute(self._gradient_sums(), self.config.noise_floor_correction)
        except MolsError:
            return False
        return all(estimators.narrow(a, self.config.alpha_rtol) for g, a in found.items() if is_scaled(g))

    @property
    def reads_moments_next(self) -> bool:
        """Whether the next step is the last of a "moments" window: its optimizer state is read."""
        return self.measuring and self.config.mode == "moments" and self.state.samples + 1 >= self.state.window

    def close_moments(self, t: int, steady: bool) -> None:
        """End a "moments" calibration with the sums of all ranks. Raises on all unless each has `steady` betas."""
        sums = self.elements.take_squares()
        packed = self.context.reduce(pad(sums.pack(), (0, 1), value=float(not steady)))
        if packed[-1]:
            raise MolsUnsupportedError(MOVING_BETAS)
        sums.load_packed(packed[:-1])
        self.end_calibration(t, sums)

    # ------------------------------------------------------------------ alphas

    def _compute(self, sums: GroupSums, correction: bool) -> tuple[str, dict[str, estimators.Alpha]]:
        config = self.config
        reference, found = estimators.compute_alphas(
            sums,
            estimator=config.estimator,
            correction=correction,
            reference=config.reference,
            alpha_min=config.alpha_min,
            alpha_max=config.alpha_max,
        )
        return reference, {group: alpha.times(self._factor(group)) for group, alpha in found.items()}

    def _factor(self, group: str) -> float:
        return (self.config.factors or {}).get(group, 1.0)

    def _alphas(self, sums: GroupSums) -> tuple[bool, str, dict[str, estimators.Alpha]]:
        """Return (whether the noise floor was corrected, reference, alphas).

        The correction subtracts the average reading of pure noise. If the whole reference group is below that (small
        batches, few samples), no ratio exists. Falls back to the uncorrected values: they still order the groups.
        """
        corrected = self.config.noise_floor_correction
        try:
            return corrected, *self._compute(sums, corrected)
        except MolsConfigError:
            raise
        except MolsError as error:
            if not corrected:
                raise
            found = self._compute(sums, False)
            self.warn(
                f"{error}; the alphas come from the uncorrected {self.config.estimator} instead. "
                "Use more samples or larger batches to lift the signal above the noise floor"
            )
            return False, *found

    def end_calibration(self, t: int, sums: GroupSums) -> None:
        """Compute the alphas from global sums, free the accumulators, write the report, start the ramp at step t."""
        try:
            corrected, reference, found = self._alphas(sums)
        except MolsConfigError:
            raise
        except MolsError as error:
            self.give_up(t, str(error))
            return
        known = self.elements.seen is not None
        rows = measured_rows(self.table, sums, found, self.config.estimator, corrected, self.config.mode, known)
        self._report = self._new_report(t, reference, rows, self.config.factors)
        self._report["noise_floor_correction"] = corrected
        for remark in remarks(self.config, rows):
            self.warn(remark)
        self._finish(t, {group: alpha.alpha for group, alpha in found.items()})

    def give_up(self, t: int, why: str) -> None:
        """End a failed calibration with a warning. Keeps the former multipliers (1 the first time)."""
        keep = {group: self.state.old.get(group, self._factor(group)) for group in self.groups}
        factors = self.config.factors
        if self.state.old:
            former, factors = "the former alphas", self._report.get("factors") if self._report else None
            former += ", without the new mols.factors" if factors != self.config.factors else ""
        else:
            former = "alpha = 1 for every group" + (", times mols.factors" if factors else "")
        self.warn(f"the calibration failed at step {t}: {why}. Training continues with {former}")
        self._report = self._new_report(t, self.config.reference, unmeasured_rows(self.table, keep), factors)
        self._report["failed"] = why
        self._finish(t, keep)

    def _finish(self, t: int, alphas: dict[str, float]) -> None:
        self.elements.free()
        if not self.state.end(t, alphas):
            self.warn(
                f"the calibration ended at step {t}, after mols.ramp_end (step {self.state.schedule.ramp_end}); "
                f"the ramp ends at step {self.state.ramp_until} instead"
            )
        self._publish()

    def _publish(self) -> None:
        """Publish the new report on rank 0. Warns on failure: an exception would leave the other ranks waiting."""
        if self.context.rank != 0 or self.context.publish is None or self._report is None:
            return
        try:
            self.context.publish(self._report)
        except Exception as error:
            self.warn(f"the report could not be written: {str(error) or type(error).__name__}")

    def _new_report(
        self, t: int, reference: str, rows: dict[str, ReportGroup], factors: Mapping[str, float] | None = None
    ) -> Report:
        return build_report(
            self.config,
            self.table,
            rows,
            step=t,
            samples=self.state.samples,
            skipped=self.state.skipped,
            reference=reference,
            factors=factors,
            summed_rate=self.state.schedule.summed_rate,
            world=self.context.world,
            versions=self.context.versions,
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint state, the same on every rank. Accumulators go into side files (`elements.state_dict`).

        Not saved: the config, the schedule (a resumed run has its own), and `multipliers` and `applied_lrs` of the last
        step.
        """
        return {
            "version": STATE_VERSION,
            "groups": dict(self.table.elements),
            "state": self.state.state_dict(),
            "report": self.report(),
        }

    def check_saved(self, saved: object) -> None:
        """Raise `MolsCheckpointError` unless `saved` is a `state_dict` of these module groups."""

        def advise(groups: Mapping[str, object]) -> str:
            return advice(self.table, self.config.rules, groups)

        check_saved(saved, self.table.elements, self.state.state_dict(), advise)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load phase, alphas and report.

        Raises:
            MolsCheckpointError: not a MoLS state, another version, or other groups. Nothing is changed then.
        """
        self.check_saved(saved)
        self.elements.free()
        self.state.load_state_dict(copy.deepcopy(dict(saved["state"])))
        self._report = cast(Report, copy.deepcopy(dict(saved["report"]))) if saved["report"] else None

    def restart(self, t: int, why: str, *, forget: bool = False) -> None:
        """Discard a partial calibration and start again at or after step t.

        A recalibration restarts at step t and keeps its multipliers. Anything else restarts as the schedule says.

        Args:
            t: the next step.
            why: the warning.
            forget: discard finished calibrations too.
        """
        self.elements.free()
        self.warn(why)
        if not forget and self.state.phase == "calibrating" and self.state.ended_at is not None:
            self.state.begin(t)
            return
        old = self.state
        self.state = Calibration(old.schedule, old.wanted, old.max_samples, old.every)
        self._report = None
        self.advance(t)
