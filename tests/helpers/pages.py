"""The Markdown pages of the repository: their code blocks, commands, links and headings."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(f"{p.relative_to(ROOT)}" for p in ROOT.glob("docs/**/*.md")),
]
_FENCE = re.compile(r"^ *```(\S*)\s*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`+[^`]*`+")


@dataclass(frozen=True)
class Block:
    """A fenced code block. `line`: of its first line in the page, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def text_of(page: str) -> str:
    """The text of a page, named from the root of the repository."""
    return (ROOT / page).read_text("utf-8")


def blocks(language: str | None = None) -> list[Block]:
    """Every code block of every page; `language`: only those with this label."""
    found = [block for page in PAGES for block in _blocks(page)]
    return [block for block in found if language is None or block.language == language]


def prose(page: str) -> list[tuple[int, str]]:
    """(number, line) of the lines outside code blocks."""
    inside, lines = False, []
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            lines.append((number, line))
    return lines


def links(page: str) -> Iterator[tuple[int, str]]:
    """(number of the line, target) of each link and picture."""
    text = _CODE.sub(lambda code: "\n" * code[0].count("\n"), _without_blocks(page))
    for link in _LINK.finditer(text):
        yield text.count("\n", 0, link.start()) + 1, link[1]


def spans(page: str) -> Iterator[tuple[int, str]]:
    """(number of the line, text) of each piece of code within a sentence."""
    text = _without_blocks(page)
    for code in _CODE.finditer(text):
        yield text.count("\n", 0, code.start()) + 1, " ".join(code[0].strip("`").split())


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = (re.match(r"#+ (.*)", line) for _, line in prose(page))
    return {re.sub(r"[^\w\- ]", "", heading[1].lower()).strip().replace(" ", "-") for heading in headings if heading}


def commands() -> list[tuple[Block, list[str]]]:
    """Every command of a bash block as words, with the variables that are set before it; pipes and `&&` split one."""
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            parts = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
            parts.whitespace_split = True
            words: list[str] = []
            for word in [*parts, ";"]:
                if set(word) <= set("();<>|&"):
                    found += [(block, words)] if words else []
                    words = []
                else:
                    words.append(word)
    return found


def _without_blocks(page: str) -> str:
    """The page with an empty line for each line of a code block."""
    lines = dict(prose(page))
    return "\n".join(lines.get(number, "") for number in range(1, len(text_of(page).splitlines()) + 1))


def _blocks(page: str) -> Iterator[Block]:
    language, begun, lines = "", 0, []
    for number, line in enumerate(text_of(page).splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and begun:
            yield Block(page, begun, language, "\n".join(lines) + "\n")
            begun, lines = 0, []
        elif fence:
            language, begun = fence[1], number + 1
        elif begun:
            lines.append(line)
