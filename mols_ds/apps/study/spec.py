"""A study file (YAML): which arms are compared, on what, and how they are tuned. Unknown keys raise an error.

Every arm gets the same initial weights (per seed), the same batches in the same order and the same budget. Its settings
are tuned over its grid with the tuning seeds; its result is from the evaluation seeds at the best settings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictInt, StrictStr, ValidationError, model_validator

from mols_ds.core.config import MolsConfig
from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.validation import Frozen, validation_message
from mols_ds.errors import MolsConfigError
from mols_ds.training.yaml_text import read_yaml

Value = int | float | str
Values = tuple[tuple[str, Value], ...]
"""Tuned settings of a run: (name, value) sorted by name, always with ("lr", rate)."""
Positive = Annotated[StrictInt, Field(ge=1, le=2**53)]
Rate = Annotated[float, Field(strict=True, gt=0)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"


class StudyData(Frozen):
    """Text, as in train.py's data arguments (mols_ds/training/sources.py). Paths may be relative to the study file. A
    tokenizer is trained for each model's vocabulary."""

    source: str = "stdlib"
    text_key: str | None = None
    eval_share: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    tokenizer: str | None = None
    split_seed: StrictInt = 0


class StudyBudget(Frozen):
    """Length of a run: optimizer steps or tokens."""

    steps: Positive | None = None
    tokens: Annotated[float, Field(strict=True, gt=0, le=2**53)] | None = None

    @model_validator(mode="after")
    def _one(self) -> StudyBudget:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        return self


class StudyBatch(Frozen):
    """Global batch of every run: `sequences` of `length` tokens; `micro`: sequences per forward pass."""

    sequences: Positive
    length: Positive
    micro: Positive | None = None


class StudyEvaluation(Frozen):
    """Held-out loss: `sequences` held-out sequences, every `every` steps and at the end."""

    sequences: Positive = 256
    every: Positive | None = None


class StudySnr(Frozen):
    """SNR of every group from Adam's moments, every `every` steps in the evaluation runs of these arms."""

    every: Positive
    arms: tuple[str, ...] = ()


class StudySearch(Frozen):
    """A random search over the multipliers of `groups` instead of a grid, see `mols_ds.apps.study.search`. It starts at
    the best settings of the arm `start` and ends after `runs` runs."""

    start: str
    runs: Positive = 60
    groups: Annotated[tuple[str, ...], Field(min_length=1)] = ("embedding", "head", "qk", "vo", "mlp")


class StudyArm(Frozen):
    """Settings of one arm.

    `optimizer` and `params` are as in a DeepSpeed config; `mols` is the "mols" section (None: no MoLS); `deepspeed` is
    merged into the DeepSpeed config. `lr` replaces the study's rates. `grid` lists further tuned settings: dotted names
    that start with `params.`, `mols.` or `deepspeed.`. `models` restricts the arm to some models.
    """

    optimizer: str = "AdamW"
    source: str | None = None
    params: JsonObject = Field(default_factory=dict)
    mols: JsonObject | None = None
    deepspeed: JsonObject = Field(default_factory=dict)
    lr: tuple[Rate, ...] | None = None
    grid: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    models: tuple[str, ...] | None = None
    search: StudySearch | None = None
    about: str = ""

    @model_validator(mode="after")
    def _check(self) -> StudyArm:
        if self.search is not None and (self.mols is None or self.lr is not None or self.grid):
            raise ValueError("search: needs a mols section, and neither lr nor grid (it starts at another arm's best)")
        for name, values in self.grid.items():
            if name.split(".", 1)[0] not in ("params", "mols", "deepspeed") or "." not in name:
                raise ValueError(f'grid: "{name}" must be params.NAME, mols.NAME or deepspeed.NAME')
            if not values:
                raise ValueError(f'grid: "{name}" has no value')
            if name.startswith("mols.") and self.mols is None:
                raise ValueError(f'grid: "{name}" without a mols section (an empty one is {{}})')
        if self.mols is not None:
            MolsConfig.parse({key: value for key, value in self.mols.items() if key != "fixed_alphas"})
        return self


class StudyChange(Frozen):
    """What is different on one model. `params` is merged into the optimizer settings of every arm.

    `settings_of`: nothing is tuned here; every arm has its best settings on that model. `best`: with `settings_of`,
    only the baseline and the `best` arms of that model by mean loss over its evaluation seeds, once all are known.
    """

    batch: StudyBatch | None = None
    budget: StudyBudget | None = None
    params: JsonObject = Field(default_factory=dict)
    seeds: tuple[StrictInt, ...] | None = None
    settings_of: str | None = None
    best: Positive | None = None


class Study(Frozen):
    """A study file. `load_study` reads it and raises MolsConfigError.

    `pairs`: further comparisons besides those with the baseline: (arm, other arm). `changes`: model -> what is
    different there. `rows`: file that gets one line per finished run and replaces the result files, so that results can
    be kept in git; relative to the study file. `primary`, `secondary`: the comparisons (arm, other arm) that the study
    was made for; with `primary`, Holm's adjustment is over all others, `pairs` too. `searched`: the arm whose gain over
    the baseline is the upper bound that other arms are compared with.
    """

    name: Annotated[StrictStr, Field(pattern=NAME)]
    about: str = ""
    models: Annotated[dict[str, str | JsonObject], Field(min_length=1)]
    data: StudyData = StudyData()
    batch: StudyBatch
    budget: StudyBudget
    lr: Annotated[tuple[Rate, ...], Field(min_length=1)]
    extend: Annotated[StrictInt, Field(ge=0)] = 2
    tune_seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1)] = (0,)
    seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1)]
    baseline: str = "adam"
    pairs: tuple[tuple[str, str], ...] = ()
    primary: tuple[str, str] | None = None
    secondary: tuple[str, str] | None = None
    searched: str | None = None
    changes: dict[str, StudyChange] = Field(default_factory=dict)
    rows: str | None = None
    arms: Annotated[dict[str, StudyArm], Field(min_length=1)]
    deepspeed: JsonObject = Field(default_factory=dict)
    clip: Annotated[float, Field(strict=True, ge=0)] = 1.0
    evaluation: StudyEvaluation = StudyEvaluation()
    snr: StudySnr | None = None
    save_every: Annotated[StrictInt, Field(ge=0)] = 0
    activation_checkpointing: bool = False
    costs: bool = True

    @property
    def tokens_per_step(self) -> int:
        """Tokens per global batch."""
        return self.batch.sequences * self.batch.length

    @property
    def steps(self) -> int:
        """Optimizer steps of every run."""
        if self.budget.steps is not None:
            return self.budget.steps
        assert self.budget.tokens is not None
        return max(1, math.ceil(self.budget.tokens / self.tokens_per_step))

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; default: a twentieth of the run."""
        return self.evaluation.every or max(1, self.steps // 20)

    @model_validator(mode="after")
    def _check(self) -> Study:
        import re

        if self.baseline not in self.arms:
            raise ValueError(f'baseline: "{self.baseline}" is not one of the arms {", ".join(self.arms)}')
        for kind, names in (("models", self.models), ("arms", self.arms)):
            for name in names:
                if not re.fullmatch(NAME, name):
                    raise ValueError(f'{kind}: "{name}" is not a plain name (letters, digits, "_", ".", "+", "-")')
        for name, arm in self.arms.items():
            for model in arm.models or ():
                if model not in self.models:
                    raise ValueError(f'arms.{name}.models: "{model}" is not one of {", ".join(self.models)}')
        if self.arms[self.baseline].models is not None:
            raise ValueError(f"arms.{self.baseline}.models: the baseline runs on every model")
        tuned = [model for model in self.models if (self.changes.get(model) or StudyChange()).settings_of is None]
        for name, change in self.changes.items():
            if name not in self.models:
                raise ValueError(f'changes: "{name}" is not one of the models {", ".join(self.models)}')
            if change.settings_of is not None and change.settings_of not in tuned:
                raise ValueError(f'changes.{name}.settings_of: "{change.settings_of}" is not one of {", ".join(tuned)}')
            if change.best is not None and change.settings_of is None:
                raise ValueError(f"changes.{name}.best: needs settings_of, the model whose best arms they are")
        named_arms = {
            "pairs": itertools.chain(*self.pairs),
            "primary": self.primary or (),
            "secondary": self.secondary or (),
            "searched": (self.searched,) if self.searched else (),
            "snr.arms": self.snr.arms if self.snr else (),
            "search.start": (arm.search.start for arm in self.arms.values() if arm.search),
        }
        for key, arm_names in named_arms.items():
            for arm_name in arm_names:
                if arm_name not in self.arms:
                    raise ValueError(f'{key}: "{arm_name}" is not one of the arms')
                if key == "search.start" and self.arms[arm_name].search is not None:
                    raise ValueError(f'{key}: "{arm_name}" searches too')
        for name, arm in self.arms.items():
            first = arm.search.start if arm.search else name
            for model in tuned:
                if name in self.arms_of(model) and first not in self.arms_of(model):
                    raise ValueError(f'arms.{name}.search.start: "{first}" does not run on {model}')
        named = {"seeds": self.seeds, "tune_seeds": self.tune_seeds}
        named |= {f"changes.{name}.seeds": change.seeds for name, change in self.changes.items() if change.seeds}
        for key, values in named.items():
            if len(set(values)) < len(values) or min(values) < 0:
                raise ValueError(f"{key}: each seed once, none negative")
        return self

    def at(self, model: str) -> Study:
        """Return the study as it is on a model: with its `changes`."""
        change = self.changes.get(model)
        if change is None:
            return self
        own = {"batch": change.batch, "budget": change.budget, "seeds": change.seeds}
        arms = {
            name: arm.model_copy(update={"params": {**arm.params, **change.params}}) for name, arm in self.arms.items()
        }
        known = {key: value for key, value in own.items() if value is not None}
        return self.model_copy(update={**known, "arms": arms, "changes": {}})

    def arms_of(self, model: str) -> list[str]:
        """Return the arms that run on a model, in the file's order."""
        return [name for name, arm in self.arms.items() if arm.models is None or model in arm.models]

    def candidates(self, arm: str) -> list[Values]:
        """Return every combination of the arm's rates and grid, before the rates are extended."""
        spec = self.arms[arm]
        axes: dict[str, tuple[Value, ...]] = {"lr": spec.lr or self.lr, **spec.grid}
        names = sorted(axes)
        return [tuple(zip(names, chosen, strict=True)) for chosen in itertools.product(*(axes[n] for n in names))]


def load_study(path: str | Path) -> Study:
    """Read a study file. Raises MolsConfigError with one line that names the key, if it is missing or invalid."""
    file = Path(path)
    if not file.is_file():
        raise MolsConfigError(f"study {path}: no such file (see studies/)")
    content = read_yaml(file, f"study {path}")
    if not isinstance(content, Mapping):
        raise MolsConfigError(f"study {path}: not a mapping of settings")
    try:
        study = Study.model_validate(dict(content))
    except ValidationError as error:
        raise MolsConfigError(f"study {path}: {validation_message(error, Study)}") from None
    except UnicodeEncodeError as error:  # pydantic cannot format an error for such text
        raise MolsConfigError(f"study {path}: half of a surrogate pair in {error.object!r}") from None
    models = {name: _model(value, file.parent) for name, value in study.models.items()}
    data = study.data
    if (file.parent / data.source).exists():
        data = data.model_copy(update={"source": str(file.parent / data.source)})
    rows = None if study.rows is None else str(file.parent / study.rows)
    return study.model_copy(update={"models": models, "data": data, "rows": rows})


def _model(value: str | JsonObject, folder: Path) -> str | JsonObject:
    """Return the settings of a model: inline, or from a model file with a path relative to the study file."""
    if isinstance(value, dict):
        return value
    path = folder / value
    if path.is_dir():
        return str(path)
    if not path.is_file():
        raise MolsConfigError(f"study: model {value}: no such file below {folder}")
    settings = read_json(path, f"study: model {value}")
    if not isinstance(settings, dict):
        raise MolsConfigError(f"study: model {value}: not a JSON object")
    return settings
