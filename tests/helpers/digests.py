"""What runs are compared by, bit for bit: digests of tensors, keys that differ, warnings that were raised."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mols_ds.errors import MolsWarning


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bits."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def differing(one: Mapping[str, Any], other: Mapping[str, Any], *leave_out: str) -> list[str]:
    """The keys under which two fingerprints differ; a missing key differs from every value but None."""
    return sorted(k for k in {*one, *other} if k not in leave_out and one.get(k) != other.get(k))


@contextmanager
def caught() -> Iterator[list[str]]:
    """The texts of the MolsWarnings that are raised inside, when it is left."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in found if issubclass(w.category, MolsWarning)]
