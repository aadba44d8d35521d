"""Train finished runs of a study again and compare: the same settings must give the same bits."""

from __future__ import annotations

import contextlib
import random

from mols_ds.apps.study.rows import difference
from mols_ds.apps.study.runs import Store, StudyRun
from mols_ds.apps.study.spec import Study
from mols_ds.apps.study.workers import Failure, Pool, Task
from mols_ds.core.json_types import JsonMapping
from mols_ds.core.log import tell
from mols_ds.errors import MolsConfigError

AGAIN = "rerun.jsonl"


def rerun(study: Study, store: Store, number: int) -> list[Failure]:
    """Train `number` random runs of the study's rows again, one at a time. Tell for each whether its bits are the same.

    Returns the runs that failed or whose bits differ. Raises MolsConfigError without rows of this study.
    """
    rows = {} if store.rows is None else store.rows.read()
    runs = {key: run for key, row in rows.items() if (run := _run(study, store, key, row)) is not None}
    if not runs:
        raise MolsConfigError(f"--rerun: {study.rows or 'a study without rows'} has no finished run of this study")
    wanted = {key: runs[key] for key in random.sample(sorted(runs), min(number, len(runs)))}
    path = store.out / AGAIN
    path.unlink(missing_ok=True)
    again = Store(study.model_copy(update={"rows": str(path)}), store.out)
    with contextlib.closing(Pool(again.study, again, 1)) as pool:
        failures = pool.run(lambda: [Task(run) for run in wanted.values() if again.load(run) is None], lambda *_: None)
    for run in wanted.values():
        old, new = store.load(run), again.load(run)
        if old is not None and new is not None:
            why = difference(old, new)
            tell(f"{run.label}: {why or 'the same bits'}")
            failures += [Failure(run, why)] if why else []
    return failures


def _run(study: Study, store: Store, key: str, row: JsonMapping) -> StudyRun | None:
    """Return the run of a row; None if the study has no such run any more."""
    run = StudyRun(row["model"], row["arm"], tuple(sorted(row["values"].items())), row["seed"])
    known = run.model in study.models and run.arm in study.arms
    return run if known and store.digest(run) == key else None
