"""Write the report of a study: Markdown, CSV, JSON, PNG and one HTML page, all from the same numbers."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from mols_ds.apps.study.curves import final_loss
from mols_ds.apps.study.document import Picture, markdown
from mols_ds.apps.study.page import page
from mols_ds.apps.study.summary import Summary, group_order, summarise, to_json
from mols_ds.core.files import write_whole
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError

if TYPE_CHECKING:
    from mols_ds.apps.study.runs import StudyResults

COMMAND = "mols-ds compare STUDY.yaml --out OUT"
DPI = 130
"""Resolution of the pictures in dots per inch."""
MEMORY = ("weights", "gradients", "optimizer", "accumulators", "peak")


def write_report(results: StudyResults, out: Path, command: str = COMMAND) -> list[Path]:
    """Write report.md, report.html, results.csv, table.csv, summary.json and the pictures into `out`.

    `command`: what produced the results, printed above every table. The report of an unfinished study says so. Without
    matplotlib there are no pictures, but a `MolsWarning`.

    Returns the files, the two main ones first. Raises `MolsConfigError` if `out` cannot be written.
    """
    summary = summarise(results)
    try:
        out.mkdir(parents=True, exist_ok=True)
        images, pictures = _draw(summary)
        facts = made_on(out)
        text = markdown(summary, results.study, command, pictures, facts)
        files: dict[str, str | bytes] = {
            "report.md": text,
            "report.html": page(text, images),
            "table.csv": csv_text(table_records(summary)),
            "results.csv": csv_text(run_records(results)),
            "summary.json": json.dumps({"command": command, **facts, **to_json(summary)}, indent=1, allow_nan=False)
            + "\n",
        }
        for name, data in {**files, **images}.items():
            write_whole(out / name, data)
        return [out / name for name in [*files, *images]]
    except OSError as error:
        raise MolsConfigError(
            f"the report cannot be written to {str(out)!r} ({error.strerror or error}); "
            "name a folder that this user may write to: --out"
        ) from error


def made_on(out: Path) -> JsonObject:
    """Read machine and versions of the newest call from OUT/study.json; empty if it is missing or damaged."""
    try:
        content = json.loads((out / "study.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return {key: content[key] for key in ("machine", "versions") if isinstance(content, dict) and key in content}


def _draw(summary: Summary) -> tuple[dict[str, bytes], list[Picture]]:
    """Draw the figures. Return PNG bytes by file name, and the pictures with their captions."""
    try:
        from mols_ds.apps.study.figures import draw
    except ImportError as error:
        warn_here(
            f"the pictures of the report were not drawn ({error}); pip install matplotlib",
            stacklevel=3,
        )
        return {}, []
    images: dict[str, bytes] = {}
    pictures = []
    for picture, figure in draw(summary):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        images[picture.file] = buffer.getvalue()
        pictures.append(picture)
    return images, pictures


# ---------------------------------------------------------------------- CSV


def csv_text(records: Sequence[JsonMapping]) -> str:
    """Return CSV text with one line per record. Columns are the keys in order of first appearance."""
    # Floats in full, infinity as `inf`, booleans as 1 and 0, None as an empty cell
    plain = [{key: int(v) if isinstance(v, bool) else v for key, v in record.items()} for record in records]
    frame = pandas.DataFrame(plain, dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def run_records(results: StudyResults) -> list[JsonObject]:
    """Return the records of results.csv: one per finished run (tuning too), sorted by model, arm, settings and seed."""
    study = results.study
    settings = sorted({name for run in results.runs for name, _ in run.values})
    groups = group_order(group for result in results.runs.values() for group in result.get("alphas") or {})
    records = []
    for run in sorted(results.runs, key=lambda r: (r.model, r.arm, str(r.values), r.seed)):
        result = results.runs[run]
        chosen = results.chosen.get((run.model, run.arm))
        mine = chosen is not None and chosen.values == run.values
        loss = final_loss(result)
        memory = result.get("memory") or {}
        records.append(
            {
                "model": run.model,
                "arm": run.arm,
                **{name: dict(run.values).get(name) for name in settings},
                "seed": run.seed,
                "chosen": mine,
                "tuning": run.seed in study.get("tune_seeds", ()),
                "evaluation": mine and run.seed in study.get("seeds", ()),
                **{key: result.get(key) for key in ("weights", "steps", "tokens", "tokens_per_step", "probe_passes")},
                "val_loss": loss,
                "perplexity": math.exp(loss) if loss < 700 else math.inf,
                "diverged": math.isinf(loss),
                **{key: result.get(key) for key in ("seconds", "step_seconds")},
                **{f"memory_{part}": memory.get(part) for part in MEMORY if part in memory},
                **{f"alpha_{group}": (result.get("alphas") or {}).get(group) for group in groups},
            }
        )
    return records


def table_records(summary: Summary) -> list[JsonObject]:
    """Return the records of table.csv: one per arm and model, as in the main table."""
    records = []
    alphas = {(row.model, row.arm): row.alphas for row in summary.alphas}
    groups = group_order(group for row in alphas.values() for group in row)
    for row in summary.rows:
        difference, cost = row.difference, row.cost
        ppl, mine = row.perplexity, alphas.get((row.model, row.arm), {})
        record: JsonObject = {"model": row.model, "arm": row.arm, "baseline": row.baseline}
        record |= {"values": json.dumps(row.values), "tried": row.tried, "edge": row.edge}
        record |= {"seeds": len(row.losses), "seeds_planned": row.planned, "diverged": row.diverged}
        record |= {"loss_mean": row.mean, "loss_sd": row.sd}
        record |= {f"perplexity{end}": ppl and ppl[i] for i, end in enumerate(("", "_low", "_high"))}
        record |= {f"difference{end}": difference and difference[i] for i, end in enumerate(("", "_low", "_high"))}
        record |= {"p": difference and difference.p, "p_holm": row.adjusted}
        record |= {"won": difference and difference.won, "pairs": difference and difference.pairs}
        record |= {"tokens_to_baseline": row.reached, "speed_up": row.speed_up}
        record |= {"speed_up_charged": row.speed_up_charged, "step_seconds": cost.step_seconds}
        record |= {f"step_ratio{end}": cost.step and cost.step[i] for i, end in enumerate(("", "_low", "_high"))}
        record |= {"step_in_turns": cost.in_turns, "memory_bytes": cost.memory_bytes}
        record |= {"memory_ratio": cost.memory_ratio, "accumulator_bytes": cost.accumulators}
        record |= {f"alpha_{group}": mine[group].mean if group in mine else None for group in groups}
        record |= {"notes": "; ".join(row.notes)}
        records.append(record)
    return records
