"""The "rules" of the "mols" section: regular expressions over parameter names, with their target groups."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable, Sequence

import regex  # type: ignore[import-untyped]

from mols_ds.core.layout import GROUPS, SCALED_GROUPS, ElementLayout
from mols_ds.errors import MolsConfigError

RULE_SECONDS = 5.0
"""Time limit, in seconds, for one rule on one parameter name. An ordinary search takes microseconds."""
RULE_SECONDS_IN_ALL = 60.0
"""Time limit, in seconds, for one rule on all names of a model."""
LONGEST_PATTERN = 10_000
"""Most characters in a pattern: Python takes seconds to compile longer ones."""
NEW = "new:"
AS_WEIGHT = "=weight"


def tower_group(tower: str, group: str) -> str:
    """Return the name of a tower's group: `qk` of `vision` is `vision.qk`; `other` stays `other`."""
    return f"{tower}.{group}" if group in SCALED_GROUPS else group


class UserRule:
    """A validated rule of the user. Records whether it matched and whether it decided a group.

    Valid targets: a built-in group; `other_NAME`; a tower's group (`vision.qk`); `new:NAME` for a new group. `*` is
    replaced by the group from the built-in rules, per element (`new:NAME_*`, `vision.*`, `*`). `=weight`, for biases:
    the groups of the weight of the same module, row by row.
    """

    def __init__(self, position: int, rule: Sequence[str], towers: Sequence[str]) -> None:
        """Validate rule number `position`. towers: names of towers, allowed as prefix of a group."""
        pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not pair or not all(isinstance(part, str) for part in rule):
            raise MolsConfigError(f'rules[{position}] is {rule!r}; a rule is ["regular expression", "group"]')
        self.pattern, self.target = rule
        where = f"rules[{position}]"
        if len(self.pattern) > LONGEST_PATTERN:
            raise MolsConfigError(
                f"{where}: a pattern of {len(self.pattern):,} characters; {LONGEST_PATTERN:,} are allowed"
            )
        try:
            re.compile(self.pattern)
            self.regex = regex.compile(self.pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise MolsConfigError(
                f"{where}: {self.pattern[:200]!r} is not a regular expression ({why}); correct the pattern"
            ) from None
        self.group = self.target.removeprefix(NEW)
        self._check_group(where, towers)
        self.matched = self.decided = False
        self.left = RULE_SECONDS_IN_ALL

    def _check_group(self, where: str, towers: Sequence[str]) -> None:
        plain = self.group.replace("*", "x", 1)
        tower, dot, rest = self.group.partition(".")
        if self.target.startswith(NEW):
            if plain.isidentifier() and self.group not in ("max", "*", *GROUPS):
                return
        elif (
            self.group in (*GROUPS, "*", AS_WEIGHT)
            or (plain.isidentifier() and self.group.startswith("other_"))
            or (dot and tower in towers and rest in (*SCALED_GROUPS, "*"))
        ):
            return
        close = difflib.get_close_matches(self.group, GROUPS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        new = self.group if self.group.isidentifier() and self.group != "max" else "NAME"
        examples = ", ".join(f"{name}.qk" for name in towers)
        raise MolsConfigError(
            f"{where} ({self.pattern!r}): {self.target!r} is not a group name; {hint}allowed are {', '.join(GROUPS)}, "
            f'other_NAME and those of towers ({examples}, ...); for a new group, write "{NEW}{new}" '
            "(letters, digits and underscores, not max)"
        )

    @property
    def follows_table(self) -> bool:
        """Whether the rule keeps or renames the groups of the built-in rules."""
        return "*" in self.group

    def apply(self, layout: ElementLayout) -> ElementLayout:
        """Rename the groups of a built-in layout. Unscaled elements keep their group."""
        return layout.relabel(lambda group: self.group.replace("*", group) if group in SCALED_GROUPS else group)

    def matches(self, names: Iterable[str]) -> bool:
        """Return whether the pattern matches one of `names`. Raises MolsConfigError above RULE_SECONDS for one name or
        RULE_SECONDS_IN_ALL in total."""
        began = time.monotonic()
        limit = min(RULE_SECONDS, max(self.left, 0.001))
        try:
            found = any(self.regex.search(name, timeout=limit) for name in names)
        except TimeoutError:
            what = f"{RULE_SECONDS:g} seconds on one parameter name"
            if limit < RULE_SECONDS:
                what = f"{RULE_SECONDS_IN_ALL:g} seconds on all parameter names"
            raise MolsConfigError(
                f"rules: {self.pattern!r} takes more than {what} (a repetition inside a repetition, such as (a|aa)+); "
                "rewrite it"
            ) from None
        self.left -= time.monotonic() - began
        self.matched |= found
        return found

    def check_decided(self) -> None:
        """Raise MolsConfigError for a rule that decided no group."""
        if self.decided:
            return
        reason = (
            "matches only parameters that earlier rules took; move it before them or drop it"
            if self.matched
            else "matches no trainable parameter; correct the pattern or drop the rule"
        )
        raise MolsConfigError(f"rule [{self.pattern!r}, {self.target!r}] {reason}")
