"""`python -m tests.fuzz`: see tests/tools/fuzz."""

from tests.tools.fuzz.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
