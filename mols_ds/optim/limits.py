"""Valid values of each optimizer setting, by name: one table for configs and constructors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mols_ds.errors import MolsConfigError
from mols_ds.optim.settings import ReadSettings

LARGEST = 1e30
"""Larger settings overflow fp32 as soon as they are multiplied."""
Check = tuple[Callable[[object], bool], str]
"""(whether a value is valid, valid values in words)."""


def real(value: object) -> float | None:
    """Return a finite real number, or a scalar tensor (the rate of capturable optimizers), as float; None otherwise."""
    if isinstance(value, Tensor):
        return None if value.is_complex() or value.numel() != 1 else real(value.item())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def _is(test: Callable[[float], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        number = real(value)
        return number is not None and test(number)

    return check


def _counts(least: int, most: int = 2**53) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _pair(first: Callable[[object], bool], second: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, tuple | list) and len(value) == 2 and first(value[0]) and second(value[1])

    return check


def _or_none(check: Check) -> Check:
    return (lambda value: value is None or check[0](value)), f"{check[1]}, or null"


_NOT_NEGATIVE: Check = (_is(lambda x: x >= 0), "a number >= 0 (finite)")
_POSITIVE: Check = (_is(lambda x: x > 0), "a number above 0 (finite)")
_SHARE: Check = (_is(lambda x: 0 <= x < 1), "a number in [0, 1)")
_COUNT: Check = (_counts(1), "a whole number >= 1")
_SWITCH: Check = (lambda value: isinstance(value, bool), "true or false")

LIMITS: Mapping[str, Check] = {
    **dict.fromkeys(("lr", "eps", "weight_decay", "eps1", "eps2", "momentum_decay"), _NOT_NEGATIVE),
    "adam_lr": _or_none(_NOT_NEGATIVE),
    "betas": (_pair(_SHARE[0], _SHARE[0]), "two numbers in [0, 1)"),
    "momentum": _SHARE,
    "beta3": _SHARE,
    "shampoo_beta": _or_none((_is(lambda x: x < 1), "a number below 1 (finite)")),
    "decay_rate": (_is(lambda x: x < 0), "a number below 0 (finite)"),
    "scale": _POSITIVE,
    "clip_threshold": _POSITIVE,
    "clamp": _or_none(_POSITIVE),
    **dict.fromkeys(("rank", "head_dim"), _or_none(_COUNT)),
    **dict.fromkeys(
        ("update_proj_gap", "interval", "ns_steps", "precondition_frequency", "max_precondition_dim"), _COUNT
    ),
    "min_8bit_size": (_counts(0), "a whole number >= 0"),
    "clusters": (_counts(1, 255), "a whole number from 1 to 255"),
    "bounds": (_pair(_is(lambda x: 0 < x <= 1), _is(lambda x: x >= 1)), "two numbers around 1, the first above 0"),
    **dict.fromkeys(("amsgrad", "nesterov", "use_adjusted_lr", "bias_correction", "scale_parameter"), _SWITCH),
    "scale_type": (lambda value: value in ("channel", "tensor"), '"channel" or "tensor"'),
    "projection_type": (lambda value: isinstance(value, str), "a word"),
}
"""Setting -> its valid values."""


def check_options(name: str, options: ReadSettings, message: str = "{name}: {key}={value!r}; give {allowed}") -> None:
    """Raise MolsConfigError for the first invalid value: a rate below 0, betas outside [0, 1), ... Ignores unknown
    options. name: of the optimizer."""
    for key, value in options.items():
        valid, allowed = LIMITS.get(key, (lambda _: True, ""))
        if not valid(value):
            raise MolsConfigError(message.format(name=name, key=key, value=value, allowed=allowed))


def check_params(name: str, params: ReadSettings) -> None:
    """As `check_options`, for "params" of a config's "optimizer" section."""
    check_options(name, params, '"optimizer.params.{key}" of {name} is {value!r}: give {allowed}')
