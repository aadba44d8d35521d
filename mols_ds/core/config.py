"""The "mols" section of a DeepSpeed config: typed, frozen, validated on construction. An unknown key is an error.

The only source of defaults and key descriptions; docs/config.md is generated from it (`make docs-config`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError, model_validator

from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.core.layout import Granularity, base_group, is_scaled
from mols_ds.core.plain_data import check_plain
from mols_ds.core.schema import Estimator
from mols_ds.core.validation import Frozen, validation_message
from mols_ds.errors import MolsConfigError

Mode = Literal["probe", "online", "moments"]
LARGEST_COUNT = 2**53
"""Larger counts are not exact as float64."""
Count = Annotated[StrictInt, Field(ge=1, le=LARGEST_COUNT)]
Number = Annotated[float, Field(strict=True)]
LOWEST, HIGHEST = 1e-12, 1e12
"""Bounds of a multiplier. Outside them the fp32 learning rate is 0 or not finite."""
Alpha = Annotated[Number, Field(ge=LOWEST, le=HIGHEST)]
Name = Annotated[str, Field(strict=True, min_length=1)]
StepOrShare = Annotated[StrictInt, Field(le=LARGEST_COUNT)] | StrictFloat

PRESETS: dict[str, JsonObject] = {
    "robust": {},
    # The paper as written: average of SNR_i (sec. 3.2), no correction, no bounds, the largest SNR is the reference.
    "paper": {
        "estimator": "mean",
        "unseen_rows": "include",
        "noise_floor_correction": False,
        "reference": "max",
        "alpha_min": None,
        "alpha_max": None,
        "mode": "probe",
        "samples": 32,
    },
    # No measurement: the simple rule that a measurement has to beat (docs/evidence/comparison.md).
    "constant": {"fixed_alphas": {"embedding": 8.0}},
}
MEASUREMENT_KEYS = (
    *("samples", "max_samples", "alpha_rtol", "mode", "estimator", "noise_floor_correction", "unseen_rows"),
    *("reference", "alpha_min", "alpha_max", "accumulators"),
)
"""Keys without effect where nothing is measured."""
MIN_SAMPLES_CORRECTED = 4
"""The correction divides by K - 3 degrees of freedom (noncentral F), so it needs K > 3."""


class Documented(Frozen):
    """A config section. The docstring under each field is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class AccumulatorConfig(Documented):
    """Where a calibration keeps its statistics."""

    device: Literal["cpu", "accelerator"] = "cpu"
    """`"cpu"`: host memory; no GPU memory is used. `"accelerator"`: the memory of the gradients' device."""
    dtype: Literal["float32"] = "float32"
    """Dtype of the mean and of M2."""


class RecalibrateConfig(Documented):
    """Calibrate again after a fixed number of optimizer steps."""

    every: Count
    """Optimizer steps from the end of one calibration to the start of the next. The ramp then starts at the old
    multipliers."""


class SummedRate(Documented):
    """Where the calibration starts, by the learning rates of the steps before it."""

    summed_rate: Annotated[Number, Field(gt=0)]
    """Sum of the learning rates of all steps before the start, divided by the peak rate."""


class MolsConfig(Documented):
    """The "mols" section. In `start` and `ramp_end` a float is a share of all steps, an integer is a step.

    The docstring under a field is its description in docs/config.md. `parse` raises `MolsConfigError`; the message
    names the key, the value and what is allowed.
    """

    enabled: StrictBool = True
    """`false`: stock DeepSpeed or Megatron-core, bit for bit."""
    preset: Literal["robust", "paper", "constant"] = "robust"
    """Defaults of the other keys. Keys that you write override the preset. `"constant"` measures nothing: the embedding
    has 8 times the rate, every other group the base rate."""
    start: StepOrShare | SummedRate = 0.01
    """Where the calibration starts. A float in [0, 1] is a share of all steps, an integer is a step: `1.0` is the end
    of the run, `1` is its second step. `{"summed_rate": 4}`: where the rates of the steps before add up to 4 times the
    peak rate, see [Start](#start-by-the-summed-rate)."""
    samples: Annotated[StrictInt, Field(ge=2, le=LARGEST_COUNT)] | Literal["auto"] = 32
    """K, the number of gradient samples. At least 4 with `noise_floor_correction`. `"auto"`: until the 95 % interval of
    every alpha is within `alpha_rtol`; not for mode `moments`."""
    max_samples: Annotated[StrictInt, Field(ge=16, le=LARGEST_COUNT)] = 256
    """Where `"samples": "auto"` stops at the latest."""
    alpha_rtol: Annotated[Number, Field(gt=0)] = 0.1
    """`"samples": "auto"` stops when half the 95 % interval of every alpha is at most this share of it."""
    mode: Mode = "probe"
    """Where the gradient samples come from, see [Modes](#modes). `moments` needs an optimizer with Adam's moments."""
    estimator: Estimator = "damping"
    """How the elements of a group become one number, see [Estimators](#estimators)."""
    noise_floor_correction: StrictBool = True
    """Subtract what pure noise would read, about 1/K. Needs K of 4 or more."""
    unseen_rows: Literal["exclude", "include"] = "exclude"
    """Rows of the output head, and of a tied embedding, whose token does not occur in the samples: `"exclude"` leaves
    them out of the estimators, see [Unseen rows](#unseen-rows)."""
    reference: Name = "vo"
    """The group with multiplier 1. It must exist in the model. `"max"`: the scaled group with the largest value."""
    alpha_min: Annotated[Alpha, Field(le=1)] | None = 0.1
    """Lower bound of the multipliers, `null` for none. A multiplier at its bound is a warning and is marked in the
    report."""
    alpha_max: Annotated[Alpha, Field(ge=1)] | None = 10.0
    """Upper bound of the multipliers, `null` for none."""
    ramp: Literal["linear", "cosine"] = "linear"
    """How the multipliers go from 1 to alpha after the calibration."""
    ramp_end: StepOrShare | Literal["auto"] = 0.10
    """End of the ramp: a share, a step, or `"auto"` for the end of the scheduler's warm-up. Not before `start`."""
    granularity: Granularity = "type"
    """`"type"`: one multiplier per module group. `"layer_type"`: one per module group and layer; the groups are `qk.0`,
    `qk.1`, ... A layer of the encoder and one of the decoder with the same number are in one group."""
    rules: tuple[tuple[Name, Name], ...] = ()
    """`[["regex", "group"], ...]`, searched in the full parameter name before the built-in rules. The first match wins.
    A rule that matches nothing is an error, and so is an unknown group. Groups are `embedding`, `head`, `qk`, `vo`,
    `mlp`, `other`, `other_NAME` (measured, not scaled) and those of towers (`vision.qk`, ...); `"new:NAME"` asks for a
    group of your own. `*` stands for the group that the built-in rules give: `"new:vision_*"` makes `vision_qk`,
    `vision_vo`, ..., which are scaled. `"=weight"` puts a bias into the groups of its weight."""
    accumulators: AccumulatorConfig = AccumulatorConfig()
    """Where the running mean and M2 of the gradients are held during a calibration: 8 bytes per owned element. They are
    freed when the multipliers are set."""
    recalibrate: RecalibrateConfig | None = None
    """`{"every": 10000}`: measure again every 10000 steps. Not with `fixed_alphas`."""
    fixed_alphas: dict[str, Number] | None = None
    """`{"embedding": 3.9}`: no calibration, these multipliers (1 for groups that are not named). The ramp still
    applies."""
    factors: dict[str, Number] | None = None
    """`{"embedding": 32}`: constants beside the measurement. The measured multiplier of a group, after its bounds, is
    multiplied by the group's constant (1 for groups that are not named). Not with `fixed_alphas`."""
    weight_decay: Literal["scaled", "unscaled"] = "scaled"
    """Whether multipliers act on decoupled weight decay too. `"unscaled"`: every group decays at the base rate."""
    total_steps: Count | None = None
    """Optimizer steps of the run. Needed for a share if no scheduler gives the length."""
    report_dir: Name = "mols_report"
    """Where rank 0 writes `mols_report.json` and `mols_report.png`. A second engine of the process with the same folder
    writes to `REPORT_DIR-2`, with a warning."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: object) -> object:
        if isinstance(values, Mapping):
            preset = values.get("preset", "robust")
            if isinstance(preset, str) and preset in PRESETS:
                return {**PRESETS[preset], **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> MolsConfig:
        for key in ("start", "ramp_end"):
            value = getattr(self, key)
            if isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{key}: a float is a share of all steps in [0, 1], an integer is a step; got {value}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{key}: a step must be >= 0, got {value}")
        if type(self.start) is type(self.ramp_end) and self.start > self.ramp_end:
            raise ValueError(f"start ({self.start}) is after ramp_end ({self.ramp_end}); the ramp must end later")
        if isinstance(self.samples, int) and self.noise_floor_correction and self.samples < MIN_SAMPLES_CORRECTED:
            raise ValueError(
                f"samples: {self.samples} is too few for noise_floor_correction (needs K >= {MIN_SAMPLES_CORRECTED}); "
                'use more samples or set "noise_floor_correction": false'
            )
        if self.mode == "moments" and self.samples == "auto":
            raise ValueError('samples: "auto" needs gradient samples; use mode "probe" or "online", or a number')
        if not self.report_dir or "\0" in self.report_dir:
            raise ValueError(f"report_dir: must be the name of a folder, got {self.report_dir!r}")
        for key, given in (("fixed_alphas", self.fixed_alphas), ("factors", self.factors)):
            for group, number in (given or {}).items():
                if not 0 < number < math.inf:
                    raise ValueError(f"{key}.{group}: must be a finite number > 0, got {number}")
                if not LOWEST <= number <= HIGHEST:
                    raise ValueError(f"{key}.{group}: must be from {LOWEST:g} to {HIGHEST:g}, got {number}")
            if given is not None and not given:
                raise ValueError(f"{key}: is empty; name at least one group or use null")
        if self.fixed_alphas is not None and self.factors is not None:
            raise ValueError(
                'factors: cannot go with fixed_alphas, which preset "constant" has too (nothing is measured); '
                "write the products there"
            )
        if self.fixed_alphas is not None and self.recalibrate is not None:
            raise ValueError("recalibrate: cannot go with fixed_alphas (nothing is ever calibrated); drop one of them")
        return self

    @property
    def measures(self) -> Mode | None:
        """The calibration mode; None with `fixed_alphas`."""
        return None if self.fixed_alphas is not None else self.mode

    def without_effect(self) -> Iterator[str]:
        """One line for each reason why keys that the section has, not its preset, change nothing."""
        preset = PRESETS[self.preset]
        written = {key for key in self.model_fields_set if key not in preset or getattr(self, key) != preset[key]}
        found: list[tuple[tuple[str, ...], str]] = []
        if self.fixed_alphas is not None:
            found.append((MEASUREMENT_KEYS, 'beside "fixed_alphas": nothing is measured'))
        else:
            if self.samples != "auto":
                found.append((("max_samples", "alpha_rtol"), 'without "samples": "auto"'))
            if self.mode == "moments":
                found.append((("accumulators",), 'in mode "moments": there are none'))
        for keys, why in found:
            if names := ", ".join(f'"mols.{key}"' for key in keys if key in written):
                yield f"{names}: no effect {why}"

    def check_groups(self, groups: Sequence[str]) -> None:
        """Raise MolsConfigError if the reference, or a group of `fixed_alphas` or `factors`, is none of `groups`."""
        known = ", ".join(groups)
        names = {*groups, *map(base_group, groups), "max"}
        if self.reference not in names and self.fixed_alphas is None:
            raise MolsConfigError(
                f'"mols.reference": no group "{self.reference}" in this model; groups: {known}, or "max"'
            )
        for key, given in (("fixed_alphas", self.fixed_alphas), ("factors", self.factors)):
            for group, number in (given or {}).items():
                if group not in groups:
                    raise MolsConfigError(f'"mols.{key}": no group "{group}" in this model; groups: {known}')
                if not is_scaled(group) and number != 1.0:
                    raise MolsConfigError(f'"mols.{key}": group "{group}" is measured but never scaled; remove it')

    @classmethod
    def parse(cls, section: JsonMapping | MolsConfig) -> MolsConfig:
        """Validate a section.

        Args:
            section: the "mols" section as a mapping, or a config that is returned unchanged.

        Returns:
            The config, with the values of its preset and all defaults.

        Raises:
            MolsConfigError: one line that names every wrong key.
        """
        if isinstance(section, MolsConfig):
            return section
        if not isinstance(section, Mapping):
            raise MolsConfigError(f'"mols": must be an object (a JSON section), got {type(section).__name__}')
        check_plain({"mols": section}, 'the "mols" section')
        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            raise MolsConfigError(validation_message(error, cls, "mols")) from None
