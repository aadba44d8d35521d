"""`python -m tests.faults`: see tests/tools/faults."""

from tests.tools.faults.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
