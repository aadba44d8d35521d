"""What the doctor advises to install: packages that are on PyPI, with the versions that setup.py asks for."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from mols_ds.apps.doctor import packages
from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.doctor.imports import Tried


@pytest.mark.parametrize(
    ("wanted", "tried", "fix"),
    [
        ("no-such-package>=2.0 numpy>=1.0", {}, "pip install --upgrade 'no-such-package>=2.0'"),
        ("numpy>=999 no-such-package", {}, "pip install --upgrade 'numpy>=999'"),
        ("numpy>=1.0 torch", {"numpy": Tried(error="broken")}, "pip install --upgrade 'numpy>=1.0'"),
    ],
)
def test_the_packages_are_named(wanted: str, tried: dict[str, Tried], fix: str) -> None:
    findings = Findings()
    packages._extra(findings, "report", [Requirement(word) for word in wanted.split()], tried)
    assert findings.items[0].fix == fix
