"""Module groups: ordered name rules over a model's parameters, and the table of what they give.

Groups are those of the paper (arXiv 2605.05794): embedding, head, qk, vo, mlp; all else is `other`. A user's rule can
name further groups (identifiers); those whose name is `other` or starts with `other_` are measured but not scaled.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import regex  # type: ignore[import-untyped]
from torch import nn

from mols_ds.core.group_rules import (
    PRESETS,
    CanonicalName,
    Fused,
    Rule,
    canonical_name,
    config_value,
    strip_wrappers,
    text_config,
)
from mols_ds.core.layout import GROUPS, SCALED_GROUPS, ElementLayout, Granularity, base_group, is_scaled
from mols_ds.errors import MolsConfigError

__all__ = [
    "GROUPS",
    "SCALED_GROUPS",
    "ElementLayout",
    "Granularity",
    "GroupRow",
    "GroupTable",
    "base_group",
    "build_layouts",
    "format_group_table",
    "group_table",
    "is_scaled",
    "order_groups",
    "parameter_kinds",
]

RULE_SECONDS = 5.0
"""Longest search of a user's rule in one parameter name; an ordinary one takes microseconds."""
RULE_SECONDS_IN_ALL = 60.0
"""Longest search of a rule in the names of a whole model."""
LONGEST_PATTERN = 10_000
"""Characters of a rule's pattern: Python takes seconds to compile longer ones."""
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|decoder_layers)\.(\d+)(?=\.|$)")
_ANY_INDEX = re.compile(r"(?:^|\.)(?<!experts\.)(\d+)(?=\.|$)")


def order_groups(keys: Iterable[str]) -> list[str]:
    """Distinct keys ordered as GROUPS, then custom groups in order of appearance; layers of one group by index."""
    distinct = list(dict.fromkeys(keys))
    bases = list(dict.fromkeys([*GROUPS, *(base_group(key) for key in distinct)]))
    return sorted(distinct, key=lambda key: (bases.index(base_group(key)), int(key.partition(".")[2] or -1)))


class _UserRule:
    """A validated rule of the user, which remembers whether it matched and whether it decided."""

    def __init__(self, position: int, rule: Sequence[str]) -> None:
        pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not pair or not all(isinstance(part, str) for part in rule):
            raise MolsConfigError(f'rules[{position}] is {rule!r}; a rule is ["regular expression", "group"]')
        self.pattern, self.group = rule
        if len(self.pattern) > LONGEST_PATTERN:
            raise MolsConfigError(
                f"rules[{position}]: a pattern of {len(self.pattern):,} characters; {LONGEST_PATTERN:,} are allowed"
            )
        try:
            re.compile(self.pattern)
            self.regex = regex.compile(self.pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise MolsConfigError(
                f"rules[{position}]: {self.pattern[:200]!r} is not a regular expression ({why}); correct the pattern"
            ) from None
        if not self.group.isidentifier() or self.group == "max":
            raise MolsConfigError(
                f"rules[{position}] ({self.pattern!r}): {self.group!r} is not a group name; allowed are "
                f"{', '.join(GROUPS)} or an own name of letters, digits and underscores (not 'max')"
            )
        self.matched = self.decided = False
        self.left = RULE_SECONDS_IN_ALL

    def matches(self, names: Iterable[str]) -> bool:
        """Raises MolsConfigError for a pattern that takes longer than RULE_SECONDS on one name, or as long in all as
        RULE_SECONDS_IN_ALL."""
        began = time.monotonic()
        limit = min(RULE_SECONDS, max(self.left, 0.001))
        try:
            found = any(self.regex.search(name, timeout=limit) for name in names)
        except TimeoutError:
            what = f"{RULE_SECONDS:g} seconds on one parameter name"
            if limit < RULE_SECONDS:
                what = f"{RULE_SECONDS_IN_ALL:g} seconds on all parameter names"
            raise MolsConfigError(
                f"rules: {self.pattern!r} takes more than {what} (it repeats a repetition, such as (a|aa)+); "
                "write it without"
            ) from None
        self.left -= time.monotonic() - began
        self.matched |= found
        return found


class _Resolver:
    """Finds the layout of each parameter: user rules, then presets, then the default for 1-D parameters."""

    def __init__(self, config: object | None, rules: Sequence[Sequence[str]] | None, presets: Sequence[Rule]) -> None:
        self.config = text_config(config)
        self.rules = [_UserRule(position, rule) for position, rule in enumerate(rules or ())]
        self.presets = presets
        self.unmatched: list[str] = []

    def resolve(self, aliases: Sequence[str], shape: tuple[int, ...]) -> tuple[str, ElementLayout] | None:
        """(the alias that decided, layout); None, and the name noted, for a weight that no rule matches.

        aliases: all names of one parameter (tied weights). With tied embeddings the name of the embedding decides.
        """
        winner: tuple[str, _UserRule] | None = None
        # Every rule is tried on, so that a shadowed rule is told from one that matches nothing.
        for rule in self.rules:
            for name in aliases:
                if rule.matches((name, strip_wrappers(name), canonical_name(name).name)) and winner is None:
                    winner = (name, rule)
        if winner is not None:
            winner[1].decided = True
            return winner[0], ElementLayout.whole(winner[1].group)
        found = [(name, layout) for name in aliases if (layout := self._preset(name, shape)) is not None]
        if not found:
            self.unmatched.append(f"{aliases[0]!r} of shape {list(shape)}")
            return None
        return next((entry for entry in found if entry[1].groups == ("embedding",)), found[0])

    def _preset(self, name: str, shape: tuple[int, ...]) -> ElementLayout | None:
        canonical = canonical_name(name)
        for rule in self.presets:
            if not rule.regex.search(canonical.name) or (rule.applies and not rule.applies(shape, self.config)):
                continue
            if isinstance(rule.target, str):
                return ElementLayout.whole(rule.target)
            return self._fused(rule.target, name, canonical, shape)
        return ElementLayout.whole("other") if len(shape) < 2 else None

    def _fused(self, fused: Fused, name: str, canonical: CanonicalName, shape: tuple[int, ...]) -> ElementLayout:
        if canonical.adapter == "shared":  # lora_A feeds queries, keys and values at once: see presets
            return ElementLayout.whole("vo")
        return fused.layout(name, shape, self.config, adapter=canonical.adapter == "rows")

    def finish(self) -> None:
        """Raises MolsConfigError for weights that no rule matches and for user rules that decide nothing."""
        if self.unmatched:
            more = f" (and {len(self.unmatched) - 1} more weights)" if len(self.unmatched) > 1 else ""
            raise MolsConfigError(
                f'no rule matches parameter {self.unmatched[0]}{more}; add ["regular expression", "group"] to "rules", '
                f"with a group of {', '.join(GROUPS)}"
            )
        for rule in self.rules:
            if not rule.decided:
                reason = (
                    "matches only parameters that earlier rules took; move it before them or drop it"
                    if rule.matched
                    else "matches no trainable parameter; correct the pattern or drop the rule"
                )
                raise MolsConfigError(f"rule [{rule.pattern!r}, {rule.group!r}] {reason}")


def _layer_match(name: str) -> re.Match[str] | None:
    """Where a parameter's name has the number of its layer."""
    return _LAYER.search(name) or _ANY_INDEX.search(name)


def _layer_key(name: str) -> Callable[[str], str]:
    """group -> key of granularity "layer_type" for the parameter `name`."""
    match = _layer_match(canonical_name(name).name)
    suffix = "" if match is None else f".{int(match[1])}"
    return lambda group: group + suffix if is_scaled(group) and group not in ("embedding", "head") else group


def parameter_kinds(layouts: Mapping[str, ElementLayout]) -> dict[str, list[str]]:
    """The parameters' names without their numbers -> their groups without layers; what a report keeps of the names.

    The layer's number becomes `{layer}`, other numbers become `*`: `model.layers.{layer}.mlp.experts.*.w1.weight`.
    Names that differ in numbers only and in groups (a user's rule for the first layer) stay as they are.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, layout in layouts.items():
        layer = _layer_match(name)
        kind = name if layer is None else f"{name[: layer.start(1)]}{{layer}}{name[layer.end(1) :]}"
        kind = re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "*", kind)
        found.setdefault(kind, {})[name] = list(dict.fromkeys(map(base_group, layout.groups)))
    kinds: dict[str, list[str]] = {}
    for kind, names in found.items():
        groups = list(names.values())
        kinds |= {kind: groups[0]} if groups.count(groups[0]) == len(groups) else names
    return kinds


def _build(
    parameters: Mapping[tuple[str, ...], Sequence[int]],
    model_config: object | None,
    rules: Sequence[Sequence[str]] | None,
    granularity: str,
    presets: Sequence[Rule],
) -> dict[str, ElementLayout]:
    """Layouts under the first name of each parameter; `parameters`: all names of a parameter -> its shape."""
    if granularity not in ("type", "layer_type"):
        raise MolsConfigError(f"granularity is {granularity!r}; allowed are 'type' and 'layer_type'")
    resolver = _Resolver(model_config, rules, presets)
    layouts: dict[str, ElementLayout] = {}
    for aliases, shape in parameters.items():
        resolved = resolver.resolve(aliases, tuple(int(size) for size in shape))
        if resolved is not None:
            name, layout = resolved
            layouts[aliases[0]] = layout.relabel(_layer_key(name)) if granularity == "layer_type" else layout
    resolver.finish()
    return layouts


def build_layouts(
    shapes: Mapping[str, Sequence[int]],
    model_config: object | None,
    rules: Sequence[Sequence[str]] | None = None,
    granularity: Granularity = "type",
    *,
    presets: Sequence[Rule] = PRESETS,
) -> dict[str, ElementLayout]:
    """The layout of each trainable parameter: which module group each of its elements belongs to.

    Args:
        shapes: fully qualified name -> logical (unsharded) shape.
        model_config: the transformers config (object or dict) with the head numbers of fused projections, or None.
        rules: the user's (regular expression, group), before the presets. Searched with `re.search` in the name as
            given, in the name without wrapper prefixes, and in the name of the adapted layer. The first match wins.
        granularity: "type", or "layer_type", which appends the layer's index to the group ("qk.3"). Embedding, head,
            unscaled groups and parameters outside layers keep the plain name.
        presets: the built-in rules.

    Returns:
        Parameter name -> layout, in the order of `shapes`.

    Raises:
        MolsConfigError: a weight (2-D or more) that no rule matches, a user rule that decides nothing, a bad pattern or
            group name, a fused parameter whose config is missing or does not fit, an unknown granularity.
    """
    return _build({(name,): shape for name, shape in shapes.items()}, model_config, rules, granularity, presets)


class GroupRow(NamedTuple):
    """One module group: how many parameters hold elements of it, how many elements, share of all trainable ones."""

    group: str
    parameters: int
    elements: int
    share: float


class GroupTable(list[GroupRow]):
    """Rows in the order of `order_groups`; only groups that exist."""

    layouts: dict[str, ElementLayout]
    """Parameter name -> layout."""
    elements: dict[str, int]
    """Group -> number of logical elements."""
    shapes: dict[str, tuple[int, ...]]
    """Parameter name -> logical shape."""

    def __init__(self, layouts: Mapping[str, ElementLayout], shapes: Mapping[str, Sequence[int]]) -> None:
        """layouts and shapes have the same keys. Raises MolsConfigError when they are empty."""
        self.layouts = dict(layouts)
        self.shapes = {name: tuple(int(size) for size in shapes[name]) for name in layouts}
        elements: dict[str, int] = {}
        parameters: dict[str, int] = {}
        for name, layout in self.layouts.items():
            for group, count in layout.counts(0, math.prod(self.shapes[name])).items():
                elements[group] = elements.get(group, 0) + count
                parameters[group] = parameters.get(group, 0) + 1
        total = sum(elements.values())
        if not total:
            raise MolsConfigError("the model has no trainable parameter; set requires_grad on what should be trained")
        self.elements = {group: elements[group] for group in order_groups(elements)}
        super().__init__(GroupRow(g, parameters[g], count, count / total) for g, count in self.elements.items())


def group_table(
    model: nn.Module,
    rules: Sequence[Sequence[str]] | None = None,
    granularity: Granularity = "type",
) -> GroupTable:
    """The module groups of the trainable parameters of a model. Tied parameters count once, under their first name.

    Args:
        model: any model, also on the meta device or partitioned by `zero.Init` (`ds_shape` is read).
        rules: the user's (regular expression, group), tried before the built-in rules; the first match wins.
        granularity: "type", or "layer_type" for a group for each kind of module and layer.

    Returns:
        The table: a row for each group with its parameters, elements and share of all trainable elements.

    Raises:
        MolsConfigError: as `build_layouts`, and for a model without trainable parameters.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        aliases = names.setdefault(id(parameter), [])
        aliases.append(name)
        if len(aliases) == 1:
            shapes[name] = tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))
    parameters = {tuple(aliases): shapes[aliases[0]] for aliases in names.values()}
    return GroupTable(_build(parameters, _find_config(model), rules, granularity, PRESETS), shapes)


def _find_config(model: nn.Module) -> object | None:
    """The config of the outermost module that has a transformers one (with model_type), else of the unwrapped model."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config_value(config, "model_type") is not None:
            return config
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DeepSpeed's engine has a config of its own
        model = inner
    return getattr(model, "config", None)


def format_group_table(table: GroupTable) -> str:
    """The table as aligned plain text, one line a group and a last line with the totals."""
    total = sum(row.elements for row in table)
    rows = [("group", "parameters", "elements", "share")]
    rows += [(row.group, f"{row.parameters:,}", f"{row.elements:,}", f"{100 * row.share:.2f} %") for row in table]
    rows.append(("total", f"{len(table.layouts):,}", f"{total:,}", "100.00 %"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3))]) for row in rows]
    return "\n".join(lines)
