"""Optimizers and settings that MoLS refuses on every engine."""

from __future__ import annotations

from typing import Any

from mols_ds.core.config import MolsConfig
from mols_ds.optim.step_trial import class_refusal, decay_in_moments
from mols_ds.optim.traits import has_adam_moments, has_several_betas, unscaled_refusal

Refusal = tuple[bool, str, str]
"""(whether it applies, what is not supported, what to do)."""


def optimizer_refusals(inner: Any, config: MolsConfig) -> list[Refusal]:
    """Return the refusals of an inner optimizer with this section. Tries out a class that the catalog does not have."""
    name = type(inner).__name__
    refused = class_refusal(inner)
    decay = unscaled_refusal(inner) if config.weight_decay == "unscaled" else None
    return [
        (refused is not None, *(refused or ("", ""))),
        (decay is not None, *(decay or ("", ""))),
        (
            config.measures == "moments" and not has_adam_moments(inner),
            f'mode "moments" with {name}, which keeps no Adam moments',
            'use "mode": "probe" or "online"',
        ),
        (
            config.measures == "moments" and has_several_betas(inner),
            'mode "moments" with different betas in the parameter groups',
            'use "mode": "probe" or "online"',
        ),
        (
            config.measures == "moments" and decay_in_moments(inner),
            f'mode "moments" with the weight_decay of {name}, which is added to the gradient and so is in its moments',
            'use AdamW, weight_decay 0, or "mode": "probe" or "online"',
        ),
    ]
