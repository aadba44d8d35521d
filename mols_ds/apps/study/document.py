"""Text of a study's report: its lists, the rows and cells of its tables, and the Markdown from templates/report.md."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mols_ds.apps.study.curves import Band
from mols_ds.apps.study.paired import Difference
from mols_ds.apps.study.questions import PairRow, change_of
from mols_ds.apps.study.relative import RelativeCost
from mols_ds.apps.study.runs import setting_text
from mols_ds.apps.study.summary import ENOUGH_SEEDS, ArmRow, Summary, group_order
from mols_ds.core.json_types import JsonMapping
from mols_ds.errors import printable

MAX_LISTED = 6
"""List up to this many missing runs of an arm by name; if more are missing, only their number."""


class Picture(NamedTuple):
    """A PNG beside the report. `caption` describes it, also for readers who cannot see it."""

    file: str
    title: str
    caption: str


class Lines(str):
    """Markdown of several lines, printed unchanged. Any other value is made printable, on one line."""


WORDS = frozenset(
    {"question", "arm", "compared with", "model", "tuned settings", "notes", "setting", "value", "about", "settings"}
)
"""Columns of text; all others are aligned as numbers."""


@functools.cache
def templates(*, html: bool = False) -> Environment:
    """Return the templates of the report. `html`: escape all values except `Markup`."""
    found = Environment(
        loader=PackageLoader("mols_ds.apps.study"),
        undefined=StrictUndefined,
        autoescape=html,
        finalize=lambda value: value if isinstance(value, Lines | Markup) else printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["one_line"] = lambda text: Lines(" ".join(text.split()) + "\n")
    found.filters["item"] = lambda text: Lines("- " + " ".join(text.split()) + "\n")
    found.filters["number"] = "{:g}".format
    return found


def markdown(
    summary: Summary,
    study: JsonMapping,
    command: str,
    pictures: Sequence[Picture],
    facts: JsonMapping | None = None,
) -> str:
    """Return the report as GitHub's Markdown; pictures are linked by their file names.

    `command`: what produced the results, printed above each table. `pictures`: empty without matplotlib. `facts`:
    further settings, such as the machine.
    """
    pairs = [row.difference.pairs for row in summary.rows if row.difference is not None]
    return templates().get_template("report.md").render(
        summary=summary,
        about=" ".join(str(study.get("about") or "").split()),
        enough=ENOUGH_SEEDS,
        fewest=min([len(summary.seeds), *pairs]),
        # Pictures PART.png and MODEL-PART.png
        take=lambda part: [p for p in pictures if p.file == f"{part}.png" or p.file.endswith(f"-{part}.png")],
        table=lambda head, rows: Lines(f"`{printable(command)}`\n\n{table(head, rows)}"),
        missing=_missing(summary, study),
        in_short=_in_short(summary),
        title_of=lambda model: _model_title(summary, model),
        result_head=RESULT_HEAD,
        results=lambda model: _result_rows(summary, model),
        pairs=_pair_rows(summary),
        questions=_question_rows(summary),
        shares=_share_rows(summary),
        searched=study.get("searched"),
        settings_of=lambda model: change_of(study, model).get("settings_of"),
        rates=lambda model: _rates(summary, model),
        tuning=lambda model: _tuning_rows(summary, model),
        alpha_groups=group_order(group for row in summary.alphas for group in row.alphas),
        alphas=_alpha_rows(summary),
        settings=_setting_rows(summary, {**study, **(facts or {})}),
        arms=_arm_rows(summary, study),
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. A bar in a cell is escaped."""
    marks = "|" + "|".join("---" if name in WORDS else "---:" for name in head) + "|"
    head, *lines = ("| " + " | ".join(printable(c).replace("|", "\\|") for c in row) + " |" for row in (head, *rows))
    return "\n".join([head, marks, *lines])


def _missing(summary: Summary, study: JsonMapping) -> list[str]:
    """Return one line per arm and model with missing runs."""
    runs: dict[tuple[str, str], list[str]] = {pair: [] for pair in summary.absent}
    for run in summary.missing:
        text = f"{setting_text(run['values'])} seed {run['seed']}"
        runs.setdefault((run["model"], run["arm"]), []).append(text)
    items = []
    for (model, arm), named in runs.items():
        text = f"`{arm}` on {model}: {len(named)} runs"
        text += f" ({'; '.join(named)})" if 0 < len(named) <= MAX_LISTED else ""
        items.append(text + (", its tuning is not finished" if (model, arm) in summary.absent else ""))
    items += [
        f"every arm on {model}: it trains the best arms of {change['settings_of']}, where not every arm is finished"
        for model, change in (study.get("changes") or {}).items()
        if change.get("best") and model in summary.models and not summary.of(model)
    ]
    return items


def _in_short(summary: Summary) -> list[str]:
    items = []
    for model in summary.models:
        rows = summary.of(model)
        base = next((row for row in rows if row.baseline and row.mean is not None), None)
        if base is None:
            items.append(f"{model}: no result of the baseline `{summary.baseline}` yet, so no comparison.")
            continue
        text = f"{model}: `{base.arm}` ends at perplexity {perplexity_text(base.perplexity)}"
        others = [row for row in rows if not row.baseline and row.mean is not None and math.isfinite(row.mean)]
        if others:
            best = min(others, key=lambda row: row.mean if row.mean is not None else math.inf)
            below = "below" if best.difference is not None and best.difference.mean < 0 else "not below"
            text += f"; the lowest of the other arms, `{best.arm}`, is {below} it: perplexity "
            text += (
                f"{perplexity_text(best.perplexity)}, loss {difference_text(best.difference)} against the baseline, "
            )
            text += f"Holm's p {p_text(best.adjusted)}"
        items.append(text + ".")
    diverged = [
        f"{row.arm} on {row.model}" for row in summary.rows if row.diverged or "diverged" in " ".join(row.notes)
    ]
    if diverged:
        items.append(f"With diverged runs: {', '.join(diverged)}.")
    tested = [row for row in summary.rows if row.adjusted is not None]
    lower = [row for row in tested if row.difference and row.difference.clear and row.difference.mean < 0]
    higher = [row for row in tested if row.difference and row.difference.clear and row.difference.mean > 0]
    kept = sum(row.adjusted is not None and row.adjusted < 0.05 for row in lower)
    if not tested:
        return [*items, "No comparison with the baseline has an interval yet."]
    text = (
        f"Of {len(tested)} adjusted comparisons with the baseline, {len(lower)} have an interval below zero (better; "
    )
    text += f"{kept} of them with Holm's p below 0.05), {len(higher)} one above zero (worse), the others hold zero."
    without = sum(not row.baseline and not (row.difference and row.difference.p is not None) for row in summary.rows)
    items.append(text + (f" {without} more have no interval (no two pairs, or a diverged run)." if without else ""))
    return items


def _model_title(summary: Summary, model: str) -> str:
    weights = next((row.weights for row in summary.of(model) if row.weights), None)
    tokens = next((row.tokens for row in summary.of(model) if row.tokens), None)
    parts = [f"{weights:,} weights"] if weights else []
    parts += [f"{tokens:,} tokens"] if tokens else []
    return f"{model} ({', '.join(parts)})" if parts else model


RESULT_HEAD: tuple[str, ...] = (
    "arm",
    "tuned settings",
    "tried",
    "seeds",
    "loss",
    "sd",
    "perplexity",
    "minus the baseline",
)
RESULT_HEAD += ("p", "won", "speed-up", "step time", "memory", "notes")


def _result_rows(summary: Summary, model: str) -> list[list[str]]:
    rows = []
    for row in summary.of(model):
        difference = "baseline" if row.baseline else difference_text(row.difference)
        won = f"{row.difference.won}/{row.difference.pairs}" if row.difference else "-"
        cells = [row.arm, setting_text(row.values), str(row.tried), f"{len(row.losses)}/{row.planned}"]
        cells += [loss_text(row.mean), "-" if row.sd is None else f"{row.sd:.4f}", perplexity_text(row.perplexity)]
        cells += [difference, p_text(row.adjusted), won, speed_up_text(row)]
        cells += [step_text(row.cost), memory_text(row.cost), "; ".join(row.notes)]
        rows.append(cells)
    return rows


def _pair_rows(summary: Summary) -> list[list[str]]:
    """Return the rows of the comparisons in the study's `pairs`; with Holm's p in a study with a primary comparison."""
    with_p = any(pair.question == "primary" for pair in summary.pairs)
    found = [(pair, cells) for pair, cells in _compared(summary) if not pair.question]
    return [[*cells, p_text(pair.adjusted)] if with_p else cells for pair, cells in found]


def _compared(summary: Summary) -> list[tuple[PairRow, list[str]]]:
    return [
        (pair, [pair.model, pair.arm, pair.other, difference_text(found), f"{found.won}/{found.pairs}"])
        for pair in summary.pairs
        if (found := pair.difference) is not None
    ]


def _question_rows(summary: Summary) -> list[list[str]]:
    """Return the rows of the primary and the secondary comparison, also of models without a result."""
    known = {id(pair): cells for pair, cells in _compared(summary)}
    rows = []
    for pair in summary.pairs:
        if pair.question:
            high = pair.difference.high if pair.difference else None
            reached = "-" if high is None else "yes" if high <= 0 else "no"
            cells = known.get(id(pair), [pair.model, pair.arm, pair.other, "no result yet", "-"])
            p = pair.difference.p if pair.difference else None
            rows.append([pair.question, *cells, p_text(p), reached])
    return rows


def _share_rows(summary: Summary) -> list[list[str]]:
    """Return the rows of the shares of the searched gain."""
    return [
        [
            row.model,
            row.arm,
            difference_text(row.difference),
            "-" if row.share is None else f"{row.share.value:.0%} [{row.share.low:.0%}, {row.share.high:.0%}]",
            str(row.tuning),
            f"{row.passes:.2f}",
        ]
        for row in summary.shares
    ]


def _rates(summary: Summary, model: str) -> list[float]:
    return sorted({rate for curve in summary.sensitivity.get(model, {}).values() for rate in curve.rates})


def _tuning_rows(summary: Summary, model: str) -> list[list[str]]:
    rows, rates = [], _rates(summary, model)
    for arm, curve in summary.sensitivity.get(model, {}).items():
        at = dict(zip(curve.rates, curve.losses, strict=True))
        cells = [loss_text(at[rate]) if rate in at else "" for rate in rates]
        rows.append([arm, *(f"**{c}**" if rate == curve.chosen else c for rate, c in zip(rates, cells, strict=True))])
    return rows


def _alpha_rows(summary: Summary) -> list[list[str]]:
    groups = group_order(group for row in summary.alphas for group in row.alphas)
    rows = []
    for row in summary.alphas:
        weights = f"{row.weights:,}" if row.weights else "-"
        cells = [alpha_text(row.alphas.get(group)) + "*" * (group in row.clamped) for group in groups]
        rows.append([row.arm, row.model, weights, str(row.seeds), *cells])
    return rows


def _setting_rows(summary: Summary, study: JsonMapping) -> list[list[str]]:
    rows = [["models", ", ".join(_model_title(summary, model) for model in summary.models)]]
    rows += [[key, compact(value)] for key, value in study.items() if key not in ("arms", "models", "about", "name")]
    return [row for row in rows if row[1]]


def _arm_rows(summary: Summary, study: JsonMapping) -> list[list[str]]:
    rows = []
    for arm in summary.arms:
        settings = dict(study.get("arms", {}).get(arm) or {})
        about = str(settings.pop("about", "") or "")
        shown = {key: compact(value) for key, value in settings.items()}
        if settings.get("mols") == {}:
            shown["mols"] = "{}"  # the defaults, unlike no section
        rows.append([arm, about, ", ".join(f"{key} {text}" for key, text in shown.items() if text)])
    return rows


# ---------------------------------------------------------------------- cells


def loss_text(value: float | None) -> str:
    """Format with four decimals; `diverged` for infinity, `-` for None."""
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"


def difference_text(value: Difference | None) -> str:
    """Format as `-0.0969 [-0.1235, -0.0702]`; bold if the interval excludes zero."""
    if value is None:
        return "-"
    if not math.isfinite(value.mean):
        return "baseline diverged" if not value.mean > 0 else "diverged"
    if value.low is None or value.high is None:
        return f"{value.mean:+.4f}"
    text = f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
    return f"**{text}**" if value.clear else text


def p_text(value: float | None) -> str:
    """Format with three decimals."""
    return "-" if value is None else "< 0.001" if value < 0.0005 else f"{value:.3f}"


def perplexity_text(value: Band | None) -> str:
    """Format the mean, with the smallest and largest seed."""
    if value is None:
        return "-"
    low, high = (f"{end:.2f}" if math.isfinite(end) else "inf" for end in value[1:])
    return f"{value.mean:.2f} ({low} to {high})" if math.isfinite(value.mean) else f"diverged ({low} to {high})"


def speed_up_text(row: ArmRow) -> str:
    """Format as `1.31`, in brackets the value with measuring passes charged; `-` if the arm never reaches the loss."""
    if row.speed_up is None or row.speed_up_charged is None:
        return "-"
    charged = f" ({row.speed_up_charged:.2f})" if row.speed_up_charged != row.speed_up else ""
    return f"{row.speed_up:.2f}{charged}"


def step_text(cost: RelativeCost) -> str:
    """Format the median ratio with quartiles; `~` if the engines did not take turns."""
    if cost.step is None:
        return "-"
    middle, low, high = cost.step
    return f"{'' if cost.in_turns else '~'}{middle:.2f} [{low:.2f}, {high:.2f}]"


def memory_text(cost: RelativeCost) -> str:
    """Format the ratio, and the MiB that MoLS adds during the measurement."""
    if cost.memory_ratio is None:
        return "-"
    more = f" (+{cost.accumulators / 2**20:.1f} MiB)" if cost.accumulators else ""
    return f"{cost.memory_ratio:.2f}{more}"


def alpha_text(value: Band | None) -> str:
    """Format three digits, with the range unless it is a point."""
    if value is None:
        return "-"
    middle, low, high = (f"{number:#.3g}".rstrip(".") for number in value)
    return middle if low == high else f"{middle} [{low}, {high}]"


def compact(value: object) -> str:
    """Format a setting in one line; empty if it is not set. An absolute path is cut to its name."""
    if value is None or value == {} or value == [] or value == "":
        return ""
    if isinstance(value, str):
        return PurePath(value).name if PurePath(value).is_absolute() else value
    if isinstance(value, Mapping):
        value = {
            key: compact(item) if isinstance(item, str) else item for key, item in value.items() if item is not None
        }
    return json.dumps(value)
