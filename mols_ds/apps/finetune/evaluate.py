"""Evaluate a fine-tuned model with EleutherAI's lm-evaluation-harness (package lm-eval, optional).

Evaluates one task at a time and writes OUT/evaluation.json after each, so a task that fails loses no other result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mols_ds.apps.finetune.model import load_saved
from mols_ds.core.files import write_whole
from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

COMMONSENSE = "commonsense8"
SETS: dict[str, tuple[str, ...]] = {
    COMMONSENSE: (
        "boolq",
        "piqa",
        "social_iqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    ),
}
"""Our set names -> tasks of lm-eval. The mean accuracy of each set is reported too."""
SHOTS = {"mmlu": 5}
"""Default number of shots: the paper's for MMLU (table 11). Other tasks: their own."""
BOOTSTRAP = 1000
"""Draws for the standard error of metrics without a formula for it (F1). With 0, lm-eval gives none for accuracies."""
FILE = "evaluation.json"


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """A task of lm-eval; `shots` None: the task's default."""

    task: str
    shots: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The --evaluate options. `limit`: questions per task (None: all). `manager`: lm-eval's index of tasks, which takes
    seconds to build."""

    tasks: tuple[TaskRequest, ...]
    manager: TaskManager
    sets: tuple[str, ...] = ()
    limit: int | None = None
    batch: int = 8


@dataclass
class Results:
    """Results: task -> metrics, and task -> error."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def parse(text: str, *, folder: Path | None, limit: int | None, batch: int) -> Evaluation:
    """Parse --evaluate: comma-separated names of sets above or of lm-eval's tasks; `TASK:5` sets the shots.

    Raises:
        MolsConfigError: lm-eval is not installed, or a name is unknown.
    """
    tasks: list[TaskRequest] = []
    sets = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, shots = part.partition(":")
        if shots and not shots.isdigit():
            raise MolsConfigError(f"--evaluate {part}: give the number of shots after the colon, such as {name}:5")
        number = int(shots) if shots else SHOTS.get(name)
        sets += [name] if name in SETS else []
        tasks += [TaskRequest(task, number) for task in SETS.get(name, (name,))]
    if not tasks:
        raise MolsConfigError(f"--evaluate {text!r} names no task")
    if len({asked.task for asked in tasks}) < len(tasks):
        raise MolsConfigError(f"--evaluate {text}: a task is named twice")
    if folder is not None and not folder.is_dir():
        raise MolsConfigError(f"--evaluate-tasks {folder}: no such folder")
    manager = task_manager(folder)
    known = set(manager.all_tasks)
    for asked in tasks:
        if asked.task not in known:
            raise MolsConfigError(f"--evaluate: lm-eval has no task {asked.task!r} (`lm-eval ls tasks` lists them)")
    return Evaluation(tuple(tasks), manager, tuple(sets), limit, batch)


def task_manager(folder: Path | None) -> TaskManager:
    """Build lm-eval's index of tasks. Raises MolsConfigError if lm-eval is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MolsConfigError(
            f"--evaluate needs lm-eval, which is not installed ({one_line(error)}): pip install 'lm-eval>=0.4'"
        ) from error
    return TaskManager(include_path=None if folder is None else str(folder))


def evaluate(
    asked: Evaluation, model_folder: str, out: Path, *, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Results:
    """Evaluate a saved model or adapter and write out/evaluation.json. Only one process calls it.

    Raises:
        MolsConfigError: the model cannot be loaded. An error of a task is in the results instead.
    """
    from deepspeed.accelerator import get_accelerator
    from lm_eval.models.huggingface import HFLM

    model = load_saved(model_folder, dtype).to(get_accelerator().current_device_name())
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch)
    results = Results()
    out.mkdir(parents=True, exist_ok=True)
    for task in asked.tasks:
        try:
            results.metrics[task.task] = _one(wrapped, asked.manager, task, asked.limit)
        except Exception as error:  # errors of the hub's client, datasets and the task's own code
            results.failures[task.task] = one_line(error)
        write_whole(out / FILE, json.dumps(_content(asked, results), indent=2) + "\n")
    return results


def _one(model: HFLM, manager: TaskManager, asked: TaskRequest, limit: int | None) -> dict[str, float]:
    """Return the metrics of one task or task group, with names such as "acc" and "acc_stderr"."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[asked.task],
        num_fewshot=asked.shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAP,
    )
    values: JsonObject = {}
    for name, metrics in {**found["results"], **found.get("groups", {})}.items():
        if name == asked.task or asked.task not in found["results"]:  # a tag lists tasks and has no result itself
            prefix = "" if name == asked.task else f"{name}/"
            # "acc,none" is a metric and its filter; other keys ("alias", "sample_len") describe the task
            values |= {prefix + key.removesuffix(",none"): value for key, value in metrics.items() if "," in key}
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def averages(sets: Sequence[str], results: Results) -> dict[str, float]:
    """Return the mean accuracy of each set whose tasks all have one."""
    means = {}
    for name in sets:
        found = [results.metrics.get(task, {}).get("acc") for task in SETS[name]]
        numbers = [value for value in found if value is not None]
        if len(numbers) == len(found):
            means[name] = sum(numbers) / len(numbers)
    return means


def _content(asked: Evaluation, results: Results) -> JsonObject:
    import lm_eval

    tasks: JsonObject = {}
    for task in asked.tasks:
        if task.task in results.metrics:
            tasks[task.task] = {"shots": task.shots, "metrics": results.metrics[task.task]}
        elif task.task in results.failures:
            tasks[task.task] = {"shots": task.shots, "error": results.failures[task.task]}
    return {
        "tasks": tasks,
        "averages": averages(asked.sets, results),
        "limit": asked.limit,
        "lm_eval": lm_eval.__version__,
    }
