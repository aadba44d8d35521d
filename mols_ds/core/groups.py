"""Module groups: apply ordered name rules to a model's parameters and build the group table.

The paper (arXiv 2605.05794) has the groups embedding, head, qk, vo and mlp. Everything else is `other`. Groups of a
tower of another modality have its name as prefix (`vision.qk`). A user's rule can add groups (identifiers). `other`,
groups that start with `other_` and groups of towers are measured, not scaled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from mols_ds.core.group_layouts import LayoutError, layer_config, tower_config
from mols_ds.core.group_rules import PRESETS, Rule, canonical_name, config_value, strip_wrappers
from mols_ds.core.layout import GROUPS, SCALED_GROUPS, ElementLayout, Granularity, base_group, is_scaled
from mols_ds.core.param_names import kind_of, kind_pattern, layer_match, layer_number
from mols_ds.core.towers import TOWER_NAMES, tower_of
from mols_ds.core.user_rules import AS_WEIGHT, UserRule, tower_group
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

_ATTENTION = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo"}
_BLOCK = re.compile(r"(?:^|\.)\w*(?:layers?|h|blocks?)\.\d+\.")


def order_groups(keys: Iterable[str]) -> list[str]:
    """Sort distinct keys: first as in GROUPS, then others in order of appearance; layers of one group by index."""
    distinct = list(dict.fromkeys(keys))
    bases = list(dict.fromkeys([*GROUPS, *(base_group(key) for key in distinct)]))

    def place(key: str) -> tuple[int, int]:
        base = base_group(key)
        return bases.index(base), -1 if base == key else int(key.rpartition(".")[2])

    return sorted(distinct, key=place)


class _Refused(NamedTuple):
    """A parameter without a group. reason: the error of its rule; None where no rule matches."""

    name: str
    shape: tuple[int, ...]
    reason: str | None


class _Resolver:
    """Find the layout of each parameter: user rules, then presets, then the default for vectors."""

    def __init__(
        self,
        config: object | None,
        rules: Sequence[Sequence[str]] | None,
        presets: Sequence[Rule],
        names: Iterable[str],
    ) -> None:
        """names: of all parameters, frozen ones too. They show whether a tower belongs to a larger model."""
        names = list(names)
        self.config = config
        self.rules = [UserRule(position, rule, TOWER_NAMES) for position, rule in enumerate(rules or ())]
        self.presets = presets
        outside = (canonical for name in names if not tower_of(canonical := canonical_name(name).name, config))
        self.has_towers = any(_BLOCK.search(name) for name in outside)
        self.refused: dict[str, list[_Refused]] = {}
        self.names = {canonical_name(name).name for name in names}

    def resolve(self, aliases: Sequence[str], shape: tuple[int, ...]) -> tuple[str, ElementLayout] | None:
        """Return (the alias that decided, layout). For a weight without a group, record the reason and return None.

        aliases: all names of one parameter (tied weights). For tied embeddings the embedding's name decides.
        """
        winner: tuple[str, UserRule] | None = None
        # Try every rule: `check_decided` tells a shadowed rule from one without a match.
        for rule in self.rules:
            for name in aliases:
                if rule.matches((name, strip_wrappers(name), canonical_name(name).name)) and winner is None:
                    winner = (name, rule)
        if winner is not None:
            winner[1].decided = True
            if not winner[1].follows_table and winner[1].group != AS_WEIGHT:
                return winner[0], ElementLayout.whole(winner[1].group)
        try:
            found = self._by_table(aliases, shape, winner)
        except (MolsConfigError, LayoutError) as error:
            self._refuse(aliases[0], shape, str(error))
            return None
        if found is None:
            self._refuse(aliases[0], shape, None)
        return found

    def _by_table(
        self, aliases: Sequence[str], shape: tuple[int, ...], winner: tuple[str, UserRule] | None
    ) -> tuple[str, ElementLayout] | None:
        names = aliases
        if winner is not None:
            names = [winner[0]]
            if winner[1].group == AS_WEIGHT:
                names, shape = [re.sub(r"bias(\d*)$", r"weight\1", winner[0])], (*shape, 1)
        found = [(name, layout) for name in names if (layout := self._preset(name, shape)) is not None]
        if winner is not None and winner[1].follows_table and found:
            return found[0][0], winner[1].apply(found[0][1])
        found = [(name, self._in_tower(name, layout)) for name, layout in found]
        if not found:
            follows = winner is not None and winner[1].group == AS_WEIGHT  # the bias of a norm: its weight is `other`
            weight = canonical_name(names[0]).name.endswith("weight") and not follows
            vector = math.prod(shape) == max(shape, default=1) and not weight
            if len(shape) < 2 or vector:
                return names[0], ElementLayout.whole("other")
            # An unknown weight in a tower is `other`: towers are not scaled
            known = next((name for name in names if self._tower(name) is not None), None)
            return None if known is None or winner is not None else (known, ElementLayout.whole("other"))
        embedding = next((entry for entry in found if entry[1].groups == ("embedding",)), None)
        if embedding is None and len({layout for _, layout in found}) > 1:
            groups = dict.fromkeys(group for _, layout in found for group in layout.groups)
            raise MolsConfigError(
                f"parameter {found[0][0]!r} is shared by modules of several groups ({', '.join(groups)}); add a rule"
            )
        return embedding or found[0]

    def _tower(self, name: str) -> str | None:
        return tower_of(canonical_name(name).name, self.config) if self.has_towers else None

    def _in_tower(self, name: str, layout: ElementLayout) -> ElementLayout:
        tower = self._tower(name)
        return layout if tower is None else layout.relabel(lambda group: tower_group(tower, group))

    def _preset(self, name: str, shape: tuple[int, ...]) -> ElementLayout | None:
        canonical = canonical_name(name)
        config = layer_config(tower_config(self.config, self._tower(name)), layer_number(canonical.name))
        for rule in self.presets:
            if not rule.regex.search(canonical.name) or (rule.applies and not rule.applies(shape, config)):
                continue
            if _beside(canonical.name, rule.unless_beside, self.names):
                continue
            if isinstance(rule.target, str):
                return ElementLayout.whole(rule.target if len(shape) > 1 or canonical.adapter else "other")
            if canonical.adapter == "shared":  # lora_A feeds queries, keys and values at once: see group_layouts
                return ElementLayout.whole("vo")
            if canonical.adapter == "mixed":
                raise MolsConfigError(f"parameter {name!r} adapts a fused projection, but not by its rows; add a rule")
            return rule.target.layout(name, shape, config, adapter=canonical.adapter == "rows")
        group = _sibling_group(canonical.name, self.names) if len(shape) > 1 else None
        return None if group is None else ElementLayout.whole(group)

    def _refuse(self, name: str, shape: tuple[int, ...], reason: str | None) -> None:
        self.refused.setdefault(kind_of(name), []).append(_Refused(name, shape, reason))

    def finish(self) -> None:
        """Raise MolsConfigError for weights without a group and for user rules that decided nothing."""
        if self.refused:
            raise MolsConfigError(_refusal(self.refused))
        for rule in self.rules:
            rule.check_decided()


def _beside(name: str, leaves: Iterable[str], names: Collection[str]) -> set[str]:
    """Return those of `leaves` that are weights in the module of the weight `name`, or such weights themselves."""
    parent = name.removesuffix(".weight").rpartition(".")[0]
    paths = {leaf: f"{parent}.{leaf}".removeprefix(".") for leaf in leaves}
    return {leaf for leaf, path in paths.items() if path in names or f"{path}.weight" in names}


def _sibling_group(name: str, names: Collection[str]) -> str | None:
    """Return the group of a projection in a module that no rule matches, by its siblings in the model's `names`.

    Queries, keys and values are known by each other. Attention gates are called `gate_proj` too: it needs both others.
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    known = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
    beside = _beside(name, [other for other in known if other != leaf], names)
    if leaf == "out_proj":  # torch.nn.MultiheadAttention, flash-attn, ViTs
        return "vo" if _beside(name, ("in_proj_weight", "Wqkv", "qkv"), names) else None
    if leaf in _ATTENTION:
        return _ATTENTION[leaf] if beside & {"q_proj", "k_proj", "v_proj"} else None
    if leaf == "gate_proj":
        return "mlp" if beside >= {"up_proj", "down_proj"} else None
    return "mlp" if leaf in known and beside else None


def _refusal(refused: Mapping[str, Sequence[_Refused]]) -> str:
    """Return one line with every kind of parameter without a group, and the rules to paste."""
    unknown = [
        f"{(kind if len(found) > 1 else found[0].name)!r} of shape {list(found[0].shape)}"
        f"{f' ({len(found)} of them)' if len(found) > 1 else ''}"
        for kind, found in refused.items()
        if found[0].reason is None
    ]
    reasons = [found[0].reason for found in refused.values() if found[0].reason is not None]
    parts = [f"no rule matches {', '.join(unknown)}"] if unknown else []
    rules = json.dumps([[kind_pattern(found[0].name), "other"] for found in refused.values()])
    return (
        f'{"; ".join([*parts, *reasons])}; to continue without scaling them: "rules": {rules} (other: measured, not '
        f"scaled; or give them one of {', '.join(SCALED_GROUPS)})"
    )


def layer_key(name: str) -> Callable[[str], str]:
    """Return the map from group to key of granularity "layer_type" for the parameter `name`."""
    number = layer_number(canonical_name(name).name)
    suffix = "" if number is None else f".{number}"
    return lambda group: group + suffix if is_scaled(group) and group not in ("embedding", "head") else group


def parameter_kinds(layouts: Mapping[str, ElementLayout]) -> dict[str, list[str]]:
    """Return parameter names without numbers -> groups without layers, for the report.

    The layer number becomes `{layer}`, other numbers become `*`: `model.layers.{layer}.mlp.experts.*.w1.weight`. Names
    of one kind in different groups (a user's rule for the first layer) keep their numbers.

    Args:
        layouts: parameter name -> layout.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, layout in layouts.items():
        layer = layer_match(name)
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
    names: Iterable[str] | None = None,
) -> dict[str, ElementLayout]:
    """Return the layouts under the first name of each parameter. parameters: all names of a parameter -> shape."""
    if granularity not in ("type", "layer_type"):
        raise MolsConfigError(f"granularity is {granularity!r}; allowed are 'type' and 'layer_type'")
    every = [name for aliases in parameters for name in aliases] if names is None else names
    resolver = _Resolver(model_config, rules, presets, every)
    layouts: dict[str, ElementLayout] = {}
    for aliases, shape in parameters.items():
        resolved = resolver.resolve(aliases, tuple(int(size) for size in shape))
        if resolved is not None:
            name, layout = resolved
            layouts[aliases[0]] = layout.relabel(layer_key(name)) if granularity == "layer_type" else layout
    resolver.finish()
    return layouts


def build_layouts(
    shapes: Mapping[str, Sequence[int]],
    model_config: object | None,
    rules: Sequence[Sequence[str]] | None = None,
    granularity: Granularity = "type",
    *,
    presets: Sequence[Rule] = PRESETS,
    names: Iterable[str] | None = None,
) -> dict[str, ElementLayout]:
    """Assign the elements of each trainable parameter to module groups.

    Args:
        shapes: fully qualified name -> logical (unsharded) shape.
        model_config: transformers config (object or dict) with the head counts of fused projections, or None.
        rules: the user's (regular expression, group), tried before the presets. `re.search` in the full name, the name
            without wrapper prefixes and the name of the adapted layer. The first match wins.
        granularity: "type", or "layer_type", which appends the layer's index to the group ("qk.3"). Embedding, head,
            unscaled groups and parameters outside layers keep the plain name.
        presets: the built-in rules.
        names: of all parameters, frozen ones too, to find towers of other modalities. None: the names in `shapes`.

    Returns:
        Parameter name -> layout, in the order of `shapes`.

    Raises:
        MolsConfigError: a weight (2-D or more) without a matching rule, a user rule that decides nothing, a bad pattern
            or group name, a fused parameter with a missing or wrong config, an unknown granularity.
    """
    return _build({(name,): shape for name, shape in shapes.items()}, model_config, rules, granularity, presets, names)


class GroupRow(NamedTuple):
    """One module group: number of parameters with elements in it, number of elements, share of trainable elements."""

    group: str
    parameters: int
    elements: int
    share: float


class GroupTable(list[GroupRow]):
    """Rows in the order of `order_groups`, without empty groups."""

    layouts: dict[str, ElementLayout]
    """Parameter name -> layout."""
    elements: dict[str, int]
    """Group -> number of logical elements."""
    shapes: dict[str, tuple[int, ...]]
    """Parameter name -> logical shape."""

    def __init__(self, layouts: Mapping[str, ElementLayout], shapes: Mapping[str, Sequence[int]]) -> None:
        """layouts, shapes: the same keys. Raises MolsConfigError when they are empty."""
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
    """Build the group table of a model's trainable parameters. Tied parameters count once, under their first name.

    Args:
        model: any model, also on the meta device or partitioned by `zero.Init` (reads `ds_shape`).
        rules: the user's (regular expression, group), tried before the built-in rules. The first match wins.
        granularity: "type", or "layer_type" for one group per kind of module and layer.

    Returns:
        One row per group: parameters, elements, share of all trainable elements.

    Raises:
        MolsConfigError: as `build_layouts`, and for a model without trainable parameters.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    every: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every.append(name)
        if not parameter.requires_grad:
            continue
        aliases = names.setdefault(id(parameter), [])
        aliases.append(name)
        if len(aliases) == 1:
            shapes[name] = tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))
    parameters = {tuple(aliases): shapes[aliases[0]] for aliases in names.values()}
    return GroupTable(_build(parameters, _find_config(model), rules, granularity, PRESETS, every), shapes)


def _find_config(model: nn.Module) -> object | None:
    """Return the outermost module's transformers config (it has model_type), else the unwrapped model's config."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config_value(config, "model_type") is not None:
            return config
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DeepSpeed's engine has its own config
        model = inner
    return getattr(model, "config", None)


def format_group_table(table: GroupTable) -> str:
    """Format the table as aligned plain text: one line per group, then the totals."""
    total = sum(row.elements for row in table)
    rows = [("group", "parameters", "elements", "share")]
    rows += [(row.group, f"{row.parameters:,}", f"{row.elements:,}", f"{100 * row.share:.2f} %") for row in table]
    rows.append(("total", f"{len(table.layouts):,}", f"{total:,}", "100.00 %"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3))]) for row in rows]
    return "\n".join(lines)
