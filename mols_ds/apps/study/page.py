"""The report as one HTML file that needs nothing else: pictures are inside, no request leaves the page, no script."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping

from mols_ds.apps.study.document import Block, HeadingBlock, ListBlock, Picture, TableBlock, TextBlock
from mols_ds.errors import printable

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --faint: #5d6573; --paper: #ffffff; --line: #d9dde3;
        --head: #f3f5f8; --stripe: #fafbfc; --accent: #0b62a8; --warn: #fff4d6; --warn-line: #d9a300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --faint: #9aa3b2; --paper: #15181d; --line: #343a44; --head: #20252d; --stripe: #1a1e24;
          --accent: #74b9f2; --warn: #3a2f10; --warn-line: #c99a1c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 94rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 0.6rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem; }
p, ul { max-width: 62rem; }
li { margin: 0.3rem 0; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.92rem; margin: 0 0 1rem; }
nav a { color: var(--accent); }
code, .command { font: 0.86em/1.5 ui-monospace, monospace; background: var(--head); border-radius: 4px; }
code { padding: 0.1em 0.35em; overflow-wrap: anywhere; }
.command { padding: 0.35rem 0.7rem; margin: 0.7rem 0 0.35rem; color: var(--faint); overflow-x: auto; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: 0.6rem 0.9rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.38rem 0.6rem; text-align: right; vertical-align: top; white-space: nowrap; }
th.word, td.word { text-align: left; }
td.word { min-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
thead th { background: var(--head); border-bottom: 1px solid var(--line); }
tbody th { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr:nth-child(even) > * { background: var(--stripe); }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
             border-radius: 6px; padding: 6px; }
figcaption { color: var(--faint); font-size: 0.9rem; margin-top: 0.4rem; max-width: 62rem; }
"""


def page(blocks: Iterable[Block], images: Mapping[str, bytes]) -> str:
    """The whole HTML text. `images`: PNG file name -> its bytes; a picture without bytes is left out."""
    every = list(blocks)
    title = next((block.text for block in every if isinstance(block, HeadingBlock) and block.level == 1), "Study")
    sections = [block.text for block in every if isinstance(block, HeadingBlock) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{_safe(text)}</a>' for text in sections)
    body: list[str] = []
    for block in every:
        body.append(_block(block, images))
        if isinstance(block, HeadingBlock) and block.level == 1 and links:
            body.append(f'<nav aria-label="Sections">{links}</nav>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return html.escape(printable(text))


def inline(text: str) -> str:
    """Escaped text with its `**strong**` and `` `code` ``."""
    safe = _safe(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _block(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case HeadingBlock(level, text):
            return f'<h{level} id="{_anchor(text)}">{_safe(text)}</h{level}>'
        case TextBlock(text, warning):
            return f'<p class="warning" role="note">{inline(text)}</p>' if warning else f"<p>{inline(text)}</p>"
        case ListBlock(items):
            return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in items) + "\n</ul>"
        case TableBlock():
            return _table(block)
        case Picture(file, title, caption):
            if file not in images:
                return ""
            data = base64.b64encode(images[file]).decode("ascii")
            alt = _safe(f"{title}: {caption}")
            source = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
            below = f"<strong>{_safe(title)}.</strong> {inline(caption)}"
            return f"<figure>{source}\n<figcaption>{below}</figcaption></figure>"


def _table(table: TableBlock) -> str:
    kinds = [' class="word"' if head in table.words else "" for head in table.head]
    head = "".join(f'<th scope="col"{kind}>{inline(text)}</th>' for kind, text in zip(kinds, table.head, strict=True))
    rows = []
    for first, *cells in table.rows:
        data = "".join(f"<td{kind}>{inline(cell)}</td>" for kind, cell in zip(kinds[1:], cells, strict=True))
        rows.append(f'<tr><th scope="row">{inline(first)}</th>{data}</tr>')
    return (
        f'<p class="command">{_safe(table.command)}</p>\n<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )
