"""A study's report as blocks (headings, text, tables, pictures), which `report` turns into Markdown and `page` to HTML.

Text may hold `**strong**` and `` `code` ``, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mols_ds.apps.study.cells import (
    alpha_text,
    compact,
    difference_text,
    loss_text,
    memory_text,
    p_text,
    perplexity_text,
    speed_up_text,
    step_text,
)
from mols_ds.apps.study.summary import ENOUGH_SEEDS, Summary, group_order, setting_text
from mols_ds.core.json_types import JsonMapping

MAX_LISTED = 6
"""Up to this many missing runs of an arm are named one by one; of more, the number is told."""


@dataclass(frozen=True, slots=True)
class HeadingBlock:
    """level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A paragraph; `warning`: something that limits the whole report."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class ListBlock:
    """An unordered list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class TableBlock:
    """`command` made it and stands above it. The columns whose heads are in `words` are read as text, others lined up
    as numbers."""

    command: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG beside the report; `caption` says what is drawn and serves those who cannot see it."""

    file: str
    title: str
    caption: str


Block = HeadingBlock | TextBlock | ListBlock | TableBlock | Picture
WORDS = frozenset({"arm", "compared with", "model", "tuned settings", "notes", "setting", "value", "about", "settings"})


def build(
    summary: Summary,
    study: JsonMapping,
    command: str,
    pictures: Sequence[Picture],
    facts: JsonMapping | None = None,
) -> list[Block]:
    """All blocks of the report in their order.

    `pictures`: what was drawn; empty where matplotlib is missing. `facts`: further settings, such as the machine.
    """
    drawn = {picture.file: picture for picture in pictures}
    blocks: list[Block] = [HeadingBlock(1, f"Study {summary.name}")]
    if study.get("about"):
        blocks.append(TextBlock(" ".join(str(study["about"]).split())))
    blocks += _status(summary)
    blocks += [HeadingBlock(2, "In short"), ListBlock(_in_short(summary))]
    blocks += [HeadingBlock(2, "Final validation loss"), TextBlock(_result_text(summary))]
    for model in summary.models:
        blocks += [HeadingBlock(3, _model_title(summary, model)), *_result_table(summary, model, command)]
    blocks += [*_pair_blocks(summary, command), *_take(drawn, "forest")]
    blocks += [HeadingBlock(2, "Loss over tokens"), *_take(drawn, "curves")] if _has(drawn, "curves") else []
    blocks += [HeadingBlock(2, "How each arm was tuned"), TextBlock(_tuning_text(summary))]
    for model in summary.models:
        blocks += [HeadingBlock(3, model), *_tuning_table(summary, model, command), *_take(drawn, f"{model}-lr")]
    if _has(drawn, "snr"):
        blocks += [HeadingBlock(2, "Signal-to-noise ratio over training"), TextBlock(SNR_TEXT), *_take(drawn, "snr")]
    if summary.alphas:
        blocks += [HeadingBlock(2, "Alphas by model"), TextBlock(ALPHA_TEXT), _alpha_table(summary, command)]
        blocks += _take(drawn, "alphas")
    blocks += [
        HeadingBlock(2, "What was run"),
        _settings_table(summary, {**study, **(facts or {})}, command),
        _arms_table(summary, study, command),
    ]
    blocks += [HeadingBlock(2, "Before you rely on it"), ListBlock(_limits(summary))]
    return blocks


SNR_TEXT = (
    "Read off Adam's two moments during training, without any further pass; mean over the evaluation seeds. "
    "`effective` is the SNR whose effective step is the group's mean one, d²/(1 − d²); `mean`, `median` and `pooled` "
    "are the group's values of the other estimators, with the noise floor of Adam's window taken off. Readings of zero "
    "and less have no place on a logarithmic axis and are left out; a curve that lacks a share of them lies too high."
)
ALPHA_TEXT = (
    "Multipliers of every arm with MoLS, measured or given: geometric mean over the evaluation seeds, least and "
    "greatest in brackets. `*`: held at a bound in at least one run."
)


def _take(drawn: Mapping[str, Picture], part: str) -> list[Block]:
    """The pictures PART.png and MODEL-PART.png."""
    return [p for file, p in drawn.items() if file == f"{part}.png" or file.endswith(f"-{part}.png")]


def _has(drawn: Mapping[str, Picture], part: str) -> bool:
    return bool(_take(drawn, part))


def _status(summary: Summary) -> list[Block]:
    """What is missing, and whether the intervals mean anything, before any number."""
    blocks: list[Block] = []
    if summary.missing or summary.absent:
        text = f"**This study is not complete**: {len(summary.missing)} runs could start now and are missing. What "
        blocks.append(TextBlock(text + "follows is what has finished; the same command goes on.", warning=True))
        blocks.append(ListBlock(_missing(summary)))
    pairs = [row.difference.pairs for row in summary.rows if row.difference is not None]
    fewest = min([len(summary.seeds), *pairs])
    if fewest < ENOUGH_SEEDS:
        text = f"**Fewer than {ENOUGH_SEEDS} evaluation seeds** ({fewest}): the intervals are not to be relied on."
        blocks.append(TextBlock(text, warning=True))
    return blocks


def _missing(summary: Summary) -> list[str]:
    """One line an arm and model that lacks something."""
    runs: dict[tuple[str, str], list[str]] = {pair: [] for pair in summary.absent}
    for run in summary.missing:
        text = f"{setting_text(run['values'])} seed {run['seed']}"
        runs.setdefault((run["model"], run["arm"]), []).append(text)
    items = []
    for (model, arm), named in runs.items():
        text = f"`{arm}` on {model}: {len(named)} runs"
        text += f" ({'; '.join(named)})" if 0 < len(named) <= MAX_LISTED else ""
        items.append(text + (", its tuning has not ended" if (model, arm) in summary.absent else ""))
    return items


def _in_short(summary: Summary) -> list[str]:
    items = []
    for model in summary.models:
        rows = summary.of(model)
        base = next((row for row in rows if row.baseline and row.mean is not None), None)
        if base is None:
            items.append(f"{model}: no result of the baseline `{summary.baseline}` yet, so nothing to compare with.")
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
    tested = [row for row in summary.rows if row.difference is not None and row.difference.p is not None]
    lower = [row for row in tested if row.difference and row.difference.clear and row.difference.mean < 0]
    higher = [row for row in tested if row.difference and row.difference.clear and row.difference.mean > 0]
    kept = sum(row.adjusted is not None and row.adjusted < 0.05 for row in lower)
    if not tested:
        return [*items, "No comparison with the baseline has an interval yet."]
    text = f"Of {len(tested)} comparisons with the baseline, {len(lower)} have an interval below zero (better; {kept} "
    text += f"of them with Holm's p below 0.05), {len(higher)} one above zero (worse), the others hold zero."
    without = sum(not row.baseline for row in summary.rows) - len(tested)
    items.append(text + (f" {without} more have no interval (no two pairs, or a diverged run)." if without else ""))
    return items


def _result_text(summary: Summary) -> str:
    return (
        "Every arm at the settings that its tuning chose, at the end of its budget. Losses are in nats a token on "
        f"held-out text, over seeds {', '.join(map(str, summary.seeds))}; perplexity is exp of the mean loss, with the "
        "least and greatest seed's. Differences are paired by seed, with Student's 95 % interval, **bold** where it "
        f"leaves zero out; p is Holm's, over all {summary.comparisons} comparisons of this study. Speed-up: the "
        "baseline's tokens over those after which the arm's mean curve is at the baseline's final loss; in brackets "
        "with the tokens of MoLS's measuring passes charged. Step time (median, quartiles) and memory are relative to "
        "the baseline."
    )


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


def _result_table(summary: Summary, model: str, command: str) -> list[Block]:
    if not summary.of(model):
        return [TextBlock("No arm has a result on it yet.")]
    rows = []
    for row in summary.of(model):
        difference = "baseline" if row.baseline else difference_text(row.difference)
        won = f"{row.difference.won}/{row.difference.pairs}" if row.difference else "-"
        cells = [row.arm, setting_text(row.values), str(row.tried), f"{len(row.losses)}/{row.planned}"]
        cells += [loss_text(row.mean), "-" if row.sd is None else f"{row.sd:.4f}", perplexity_text(row.perplexity)]
        cells += [difference, p_text(row.adjusted), won, speed_up_text(row)]
        cells += [step_text(row.cost), memory_text(row.cost), "; ".join(row.notes)]
        rows.append(cells)
    return [TableBlock(command, RESULT_HEAD, rows, WORDS)]


def _pair_blocks(summary: Summary, command: str) -> list[Block]:
    """The comparisons that the study names beside those with the baseline."""
    found = [(row, row.difference) for row in summary.pairs if row.difference is not None]
    if not found:
        return []
    text = "Comparisons that the study names, paired in the same way; not adjusted for their number."
    rows = [
        [row.model, row.arm, row.other, difference_text(difference), f"{difference.won}/{difference.pairs}"]
        for row, difference in found
    ]
    head = ("model", "arm", "compared with", "difference", "won")
    return [HeadingBlock(3, "Arm against arm"), TextBlock(text), TableBlock(command, head, rows, WORDS)]


def _tuning_text(summary: Summary) -> str:
    return (
        f"Mean final loss over the tuning seeds ({', '.join(map(str, summary.tune_seeds))}) at each base rate, with "
        "the best of the arm's other tuned settings; **bold**: chosen. While the best rate is at an edge, the next "
        "one on that side is tried. Every single candidate is in summary.json."
    )


def _tuning_table(summary: Summary, model: str, command: str) -> list[Block]:
    found = summary.sensitivity.get(model, {})
    rates = sorted({rate for curve in found.values() for rate in curve.rates})
    if not rates:
        return [TextBlock("No arm has been tuned on it yet.")]
    rows = []
    for arm, curve in found.items():
        at = dict(zip(curve.rates, curve.losses, strict=True))
        cells = [loss_text(at[rate]) if rate in at else "" for rate in rates]
        rows.append([arm, *(f"**{c}**" if rate == curve.chosen else c for rate, c in zip(rates, cells, strict=True))])
    return [TableBlock(command, ["arm", *(f"{rate:g}" for rate in rates)], rows, WORDS)]


def _alpha_table(summary: Summary, command: str) -> TableBlock:
    groups = group_order(group for row in summary.alphas for group in row.alphas)
    rows = []
    for row in summary.alphas:
        weights = f"{row.weights:,}" if row.weights else "-"
        cells = [alpha_text(row.alphas.get(group)) + "*" * (group in row.clamped) for group in groups]
        rows.append([row.arm, row.model, weights, str(row.seeds), *cells])
    return TableBlock(command, ["arm", "model", "weights", "seeds", *groups], rows, WORDS)


def _settings_table(summary: Summary, study: JsonMapping, command: str) -> TableBlock:
    rows = [["models", ", ".join(_model_title(summary, model) for model in summary.models)]]
    rows += [[key, compact(value)] for key, value in study.items() if key not in ("arms", "models", "about", "name")]
    return TableBlock(command, ["setting", "value"], [row for row in rows if row[1]], WORDS)


def _arms_table(summary: Summary, study: JsonMapping, command: str) -> TableBlock:
    rows = []
    for arm in summary.arms:
        settings = dict(study.get("arms", {}).get(arm) or {})
        about = str(settings.pop("about", "") or "")
        shown = {key: compact(value) for key, value in settings.items()}
        if settings.get("mols") == {}:
            shown["mols"] = "{}"  # the defaults, which is not the same as none
        rows.append([arm, about, ", ".join(f"{key} {text}" for key, text in shown.items() if text)])
    return TableBlock(command, ["arm", "about", "settings"], rows, WORDS)


def _limits(summary: Summary) -> list[str]:
    rows = summary.rows
    items = [
        "An interval tells how a result varies with the seed, that is with initial weights and the order of the data. "
        "It says nothing about other models, texts, budgets or batch sizes, nor about rates between those tried.",
        f"{summary.comparisons} comparisons were made. The intervals are not corrected for that; the p-values are "
        "(Holm's method, over all arms and models together).",
        "A speed-up is read off a run whose schedule ends at the full budget; a run planned for fewer tokens would end "
        "at a lower loss there, so it understates what an arm with a shorter schedule could save.",
    ]
    if any("measuring passes" in note for row in rows for note in row.notes):
        items.append(
            "Measuring passes of MoLS (column `notes`), forward and backward without an update, are not charged to the "
            "budget: every arm takes the same updates. Each costs about a step."
        )
    tried = sorted({row.tried for row in rows})
    if len(tried) > 1:
        items.append(
            f"Arms were tuned over {tried[0]} to {tried[-1]} candidates (column `tried`); more is an advantage."
        )
    edges = [f"{row.arm} on {row.model}" for row in rows if row.edge]
    if edges:
        items.append(
            f"The best rate is at the edge of those tried, so a better one may lie outside, for {', '.join(edges)}."
        )
    shared = sorted(set(summary.seeds) & set(summary.tune_seeds))
    if shared:
        items.append(
            f"The tuning saw these seeds of the result too, for all arms alike: {', '.join(map(str, shared))}."
        )
    if any(not row.cost.in_turns and row.cost.step for row in rows if not row.baseline):
        items.append("Step times marked `~` are from the training runs, not taken in turns: other work is in them.")
    how = sorted({row.cost.how for row in rows if row.cost.how})
    items += [f"Memory: {text}." for text in how]
    if any(row.cost.accumulators for row in rows):
        items.append("In the column `memory`, + is what MoLS holds besides while it measures, and frees afterwards.")
    return items
