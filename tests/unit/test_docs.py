"""README and docs: code blocks parse, links and anchors exist, and so do advised commands and packages."""

from __future__ import annotations

import ast
import functools
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_patches
import mols_ds
from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.schema import Report, ReportGroup
from mols_ds.optim.catalog import ENTRIES
from tests.helpers.pages import PAGES, ROOT, anchors, blocks, links, prose, text_of

LANGUAGES = {"bash", "python", "json", "yaml", "diff", "text", "bibtex"}
NOT_PINNED = {"transformer-engine", "lm-eval"}
"""On PyPI (`pip index versions`), but not in constraints.txt: the tests do not install them."""
WIDTH = 120
README_LINES = 220


# ---------------------------------------------------------------------- code blocks


def test_every_block_has_a_language() -> None:
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []
    assert len(blocks()) > 40


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_parses_and_names_exist(block: Any) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in ("mols", "engine.mols", "megatron_patches.current()"):
            assert hasattr(Handle, node.attr), node.attr
        elif owner == "mols_ds":
            assert node.attr in mols_ds.__all__, node.attr
        elif owner == "megatron_patches":
            assert hasattr(megatron_patches, node.attr) or (ROOT / f"megatron_patches/{node.attr}.py").is_file()


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_parses_and_its_section_is_valid(block: Any) -> None:
    section = json.loads(block.text).get("mols")
    if section is not None:
        MolsConfig.parse(section)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_parses(block: Any) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


# ---------------------------------------------------------------------- form


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    """Rows of tables cannot be wrapped."""
    long = [n for n, line in enumerate(text_of(page).splitlines(), 1) if len(line) > WIDTH and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("page", PAGES)
def test_a_list_has_an_empty_line_before_it(page: str) -> None:
    """Without one, mkdocs shows it as running text."""
    lines = dict(prose(page))
    item = re.compile(r"( *)(?:[-*]|\d+\.) ")
    for number, line in lines.items():
        before = lines.get(number - 1, "")
        if item.match(line) and before.strip() and not item.match(before):
            assert before.startswith("  "), f"{page}:{number}"


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for number, target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}:{number}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}:{number}: {target}"
        if page.startswith("docs/"):
            assert (ROOT / "docs") in file.resolve().parents, f"{page}:{number}: mkdocs has the files of docs/ only"


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    reached = {target.partition("#")[0] for _, target in links("docs/index.md")} | {"index.md"}
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - reached == set()
    assert {page for page in pages if f": {page}\n" not in (ROOT / "mkdocs.yml").read_text("utf-8")} == set()


def sources() -> Iterator[Path]:
    for folder in ("mols_ds", "megatron_patches", "launch", "configs", "studies", "benchmarks"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    yield from (ROOT / name for name in ("train.py", "finetune.py", "train_megatron.py", "setup.py", "Makefile"))


def test_pages_that_the_code_names_exist() -> None:
    named = {name for path in sources() for name in re.findall(r"(?<!/)\bdocs/[\w/]+\.md", path.read_text("utf-8"))}
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_tests_that_the_pages_name_exist() -> None:
    folders = {"deepspeed": "tests/engines/deepspeed", "megatron": "tests/engines/megatron"}
    found = {named for page in PAGES for named in re.findall(r"`([\w/]+\.py)::(\w+)`", text_of(page))}
    assert len(found) > 50
    for file, name in found:
        first, _, rest = file.partition("/")
        path = ROOT / (file if first == "tests" else f"{folders.get(first, f'tests/{first}')}/{rest}")
        assert path.is_file() and f"def {name}(" in path.read_text("utf-8"), f"{file}::{name}"


# ---------------------------------------------------------------------- complete


def test_every_public_name_is_in_the_api_reference() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", text_of("docs/api.md"), re.MULTILINE))
    public = {f"mols_ds.{name}" for name in mols_ds.__all__} | {
        f"megatron_patches.{n}" for n in megatron_patches.__all__
    }
    assert public - shown == set()


def test_every_key_of_the_report_is_explained() -> None:
    keys = {key for kind in (Report, ReportGroup) for key in kind.__annotations__}
    assert {key for key in keys if f"`{key}`" not in text_of("docs/report.md")} == set()


def test_every_collective_of_the_packages_is_on_its_page() -> None:
    """A new call in the method or in an adapter needs a row in docs/communication.md, and a line here."""
    calls = re.compile(r"\bdist\.(all_\w+|broadcast\w*|reduce\w*|gather\w*|barrier)\(")
    found: dict[str, list[str]] = {}
    for folder in ("mols_ds/core", "mols_ds/engines", "megatron_patches"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = calls.findall(path.read_text("utf-8"))
            found |= {str(path.relative_to(ROOT)): names} if names else {}
    assert found == {
        "mols_ds/engines/deepspeed/bind_optimizer.py": ["all_reduce"],  # optimizers that sum over shards
        "mols_ds/engines/deepspeed/parallel/pipeline.py": ["all_gather_object"],  # attach
        "mols_ds/engines/deepspeed/zero_shards.py": ["all_reduce"] * 2,  # `reduce`, `reduce_max`: all others
        "megatron_patches/collective_checks.py": ["all_gather_object"],  # attach
        "megatron_patches/shards.py": ["all_reduce"] * 2,
    }


# ---------------------------------------------------------------------- advice


def strings(path: Path) -> Iterator[str]:
    """The string constants of a Python file; parts of an f-string that are computed are `{}`."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    formatted = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    for node in formatted:
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    parts = {id(value) for node in formatted for value in node.values}
    yield from (
        n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in parts
    )


@functools.cache
def advice() -> list[tuple[str, str]]:
    """(where, text) of everything that may tell a user what to do."""
    found = [(page, text_of(page)) for page in PAGES]
    for path in sources():
        texts = strings(path) if path.suffix == ".py" else [path.read_text("utf-8")]
        found += [(str(path.relative_to(ROOT)), text) for text in texts]
    return found


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """Arguments of setup.py for setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~;{ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_advised_install_exists(metadata: dict[str, Any]) -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    known = {distribution(name) for name in pinned} | NOT_PINNED
    found = 0
    for where, line in ((where, line) for where, text in advice() if where != "Makefile" for line in text.splitlines()):
        for command in re.findall(r"\bpip install ([^#`]+)", line):
            found += 1
            words = [word for word in command.split() if not word.startswith("-")]
            name = words[0].strip("'\"),.;:") if words else ""
            assert "mols-ds" not in command, f"{where}: mols-ds is not on PyPI: {line}"
            for extras in re.findall(r"'\.\[([\w,]+)\]'", line):
                assert set(extras.split(",")) <= set(metadata["extras_require"]), f"{where}: {line}"
            local = not words or words[0].lstrip("'").startswith((".", "{"))  # a folder, or computed: tested below
            assert local or distribution(name) in known, f"{where}: {line}"
    assert found > 10


def test_packages_of_optimizers_and_extras_are_known(metadata: dict[str, Any]) -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    known = {distribution(name) for name in pinned} | NOT_PINNED
    wanted = [*metadata["install_requires"], *(name for extra in metadata["extras_require"].values() for name in extra)]
    wanted += [entry.package for entry in ENTRIES if entry.package]
    assert {name for name in map(distribution, wanted) if name not in known} == set()


def test_every_advised_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", makefile, re.MULTILINE))
    names = {name for line in targets for name in line.split()}
    variables = set(re.findall(r"^(\w+) [?:]?=", makefile, re.MULTILINE))
    found = 0
    for where, text in advice():
        for call in re.findall(r"(?:`|^|: )make ((?:[A-Z_]+=\S+ )*[a-z][\w-]+(?: [A-Z_]+=\S+)*)", text, re.MULTILINE):
            given = {word.split("=")[0] for word in call.split() if "=" in word}
            target = [word for word in call.split() if "=" not in word]
            assert set(target) <= names, f"{where}: make {call}"
            assert given <= variables, f"{where}: make {call}"
            found += 1
    assert found > 10
