"""Runs the examples and writes a page for each: what it shows, its code, and what it printed.

    make examples            (or: python docs/write_examples.py [NAME.py ...])

Two CPU processes each, as `tests/integrations/test_examples.py` starts them; Lightning's on one, with its checks of the
CPU put aside. Messages of the frameworks are left out.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.integrations.test_examples import EXAMPLES, SCRIPTS, start  # noqa: E402

PAGES = ROOT / "docs/examples"
OURS = re.compile(r"(?:\d+%|\[20\d\d-|\[rank|DeepSpeed |W\d{4}|.*Warning:|\*+$)")
"""How lines of torchrun, DeepSpeed and the clients begin that say nothing about the example."""


def page(name: str, printed: str | None) -> str:
    """The page of example `name`; `printed`: what it printed, None: a mark in its place."""
    source = (EXAMPLES / name).read_text("utf-8")
    tree = ast.parse(source)
    doc = (ast.get_docstring(tree) or "").split("\n\n")
    first, command, *rest = doc
    end = tree.body[0].end_lineno
    code = source.split("\n", end)[end].strip("\n") if end else source
    return "\n\n".join(
        [
            f"# {name}",
            f"{first}",
            f"```bash\n{command}\n```",
            *rest,
            f"```python\n{code}\n```",
            "`examples/tiny.py` holds the model, the data and the section. It printed:",
            f"```text\n{printed or '...'}\n```",
            "Written by `make examples`.\n",
        ]
    )


def shown(stdout: str) -> str:
    """What an example printed, in lines of at most 120 characters."""
    lines = [line.rstrip() for line in stdout.replace("\r", "\n").splitlines() if not OURS.match(line)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip("\n"))
    return "\n".join(
        part.rstrip()
        for line in text.splitlines()
        for part in textwrap.wrap(line, 120, subsequent_indent="    ", drop_whitespace=False) or [""]
    )


def main(names: list[str]) -> None:
    PAGES.mkdir(exist_ok=True)
    for name in names or SCRIPTS:
        with tempfile.TemporaryDirectory(prefix="example_") as folder:
            done = start(name, Path(folder))
        if done.status:
            raise SystemExit(f"{name} ended with status {done.status}\n{done.stderr[-3000:]}")
        (PAGES / f"{Path(name).stem}.md").write_text(page(name, shown(done.stdout)), "utf-8")
        print(f"docs/examples/{Path(name).stem}.md")


if __name__ == "__main__":
    main(sys.argv[1:])
