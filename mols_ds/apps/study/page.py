"""The report as one self-contained HTML file: pictures inside, no request, no script."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, MutableMapping, Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup

from mols_ds.apps.study.document import templates

PLAIN = ("autolink", "entity", "escape", "html_block", "html_inline", "link", "reference", "code", "fence")
"""Markdown rules that are off for users' text."""
TOGETHER = re.compile(r"\[\S+, \S+\]|\([\d.]+ to \S+\)|\(\+\S+ MiB\)|&lt; 0\.001")
"""`[-0.1235, -0.0702]`, `(19.30 to 20.72)`, `(+4.8 MiB)`: never broken over two lines."""


def page(markdown: str, images: Mapping[str, bytes]) -> str:
    """Convert a report from Markdown to one HTML text. `images`: PNG file name -> bytes; other images are left out."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(PLAIN)
    reader.add_render_rule("image", _image)
    reader.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = reader.parse(markdown)
    titles = {}
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            name = tokens[at + 1].content
            titles[name] = token.tag
            token.attrSet("id", _anchor(name))
        elif token.type == "tr_open" and tokens[at + 1].type == "td_open":  # the first cell heads its row
            tokens[at + 1].tag = tokens[at + 3].tag = "th"
            tokens[at + 1].attrSet("scope", "row")
    body = reader.renderer.render(tokens, reader.options, {"images": images})
    body = Markup(TOGETHER.sub(lambda found: found[0].replace(" ", "&nbsp;"), body))
    links = {_anchor(name): name for name, tag in titles.items() if tag == "h2"}
    title = next((name for name, tag in titles.items() if tag == "h1"), "Study")
    return templates(html=True).get_template("page.html").render(title=title, links=links, body=body)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _image(
    _: RendererHTML,
    tokens: Sequence[Token],
    at: int,
    options: OptionsDict,
    env: MutableMapping[str, Mapping[str, bytes]],
) -> str:
    token = tokens[at]
    data = env["images"].get(str(token.attrs["src"]))
    if data is None:
        return ""
    source = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(token.content)}">'
