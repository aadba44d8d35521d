"""What this folder's tests are made of, without a GPU: comparisons with a reference, reasons for skipping."""

from __future__ import annotations

import pytest

from megatron_patches.machine import Machine
from tests.gpu.apex_adam import check
from tests.gpu.conftest import missing


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_the_reference_of_torchs_adam_is_the_same() -> None:
    check("torch", 0.0)


def test_each_file_asks_for_what_it_needs() -> None:
    nothing = Machine(None, "not installed", None)
    apex = Machine(None, "not installed", (9, 0), apex=True)
    engine = Machine("2.1.0", "", (9, 0), apex_missing="PyPI's")
    assert missing(nothing, "test_apex.py") == missing(nothing, "test_fp8.py") == "no CUDA device"
    assert missing(nothing, "test_scripts.py") == ""
    assert (missing(apex, "test_apex.py"), missing(engine, "test_fp8.py")) == ("", "")
    assert missing(apex, "test_fp8.py") == "no Transformer Engine: not installed"
    assert missing(engine, "test_apex.py") == "no NVIDIA apex: PyPI's"
