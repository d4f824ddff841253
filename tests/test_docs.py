"""The pages: their commands and imports exist, the files they name are there, and every committed figure is shown."""

import ast
import builtins
import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import readme_blocks
import reference_blocks
import sweep_tables
import transformers
import yaml
from documents import fenced

import moefy_hf
from moefy_hf.cli.main import parser

ROOT = Path(__file__).parent.parent
PAGES = [*readme_blocks.pages(), ROOT / "CONTRIBUTING.md"]
GIVEN = ("model", "tokenizer", "cls", "Splitter", "Target")  # what pages call without making it
FACTS = sorted((ROOT / "model_cards" / "facts").glob("*.json"))


def prose(page: Path) -> str:
    """Return a page without its generated blocks, which show commands as they were run."""
    return readme_blocks.BLOCK.sub("", page.read_text(encoding="utf-8"))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Return the `moefy` commands of a page, each in one line."""
    lines = "\n".join(fenced(prose(page), "bash")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("moefy ")]


COMMANDS = [(named(page), command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value)
def test_commands_have_the_flags_that_they_use(page, command):
    arguments = shlex.split(command)[1:]
    args = parser(arguments).parse_args(arguments)  # ends the process where a flag is unknown
    assert args.command == arguments[0] and callable(args.run)


def test_pages_have_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_is_python_and_its_imports_are_there(page):
    for code in fenced(prose(page), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moefy_hf") and not node.level:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_code_calls_is_there(page):
    """Functions and classes are this package's, or of transformers, peft or Python, where the code does not say so."""
    for code in fenced(prose(page), "python"):
        tree = ast.parse(code)
        made = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        made |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        made |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        for name in called - made - {*dir(builtins), *GIVEN}:
            assert any(hasattr(library, name) for library in (moefy_hf, transformers, peft)), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_are_there(page):
    """Those in backquotes and in commands; a star stands for some."""
    text = prose(page)
    spans = re.findall(r"`([^`\n]+)`", text) + "\n".join(fenced(text, "bash")).split()
    folders = ("recipes/", "model_cards/", "tests/", "kernels/", "moefy_hf/", "docs/", ".ci/")
    for span in spans:
        path = span.split()[-1].strip('"')
        if path.startswith(folders) and not re.search(r"[$<>]", path):
            assert any(ROOT.glob(path.rstrip("/"))), span


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = re.findall(r"(\S+\.md)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
    assert yaml.safe_load(text)["strict"] is True


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_every_fact_is_shown_with_its_command(path):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = re.findall(r"<!-- generated: (.+?) -->", pages)
    tables = {words.split()[0] for words in shown if path.stem in words.split()[1:]}
    kind = {"rows": "sweep", "perplexities": "prose", "specialisation": "specialisation"}
    facts = json.loads(path.read_text(encoding="utf-8"))
    wanted = {table for key, table in kind.items() if key in facts}
    assert wanted <= tables if wanted else "exports" in shown and "logits" in facts
    assert "command" in tables or f"model_cards/facts/{path.name}" in pages


@pytest.mark.parametrize(
    "path", [path for path in FACTS if "rows" in json.loads(path.read_text())], ids=lambda p: p.stem
)
def test_the_card_of_a_sweep_shows_all_figures(path):
    """python recipes/figures/sweep_tables.py model_cards/facts/NAME.json > model_cards/NAME.md"""
    card = (ROOT / "model_cards" / f"{path.stem}.md").read_text(encoding="utf-8")
    assert card == sweep_tables.tables(json.loads(path.read_text(encoding="utf-8"))) + "\n"


@pytest.mark.parametrize("kind", reference_blocks.KINDS)
def test_every_method_is_described_and_nothing_else(kind):
    with reference_blocks.METHODS.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind]
    assert [row["name"] for row in rows] == reference_blocks.KINDS[kind][0]
    assert all(row["does"] for row in rows)


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in named(page)], ids=named)
def test_pages_are_in_short_sentences(page):
    """At most 30 words, 15 on average."""
    lengths = [len(sentence.split()) for sentence in sentences(page.read_text(encoding="utf-8"))]
    assert sum(lengths) / len(lengths) <= 15 and max(lengths) <= 30


def sentences(text: str) -> list[str]:
    """Return the prose of a page, without code, tables, headings and generated blocks."""
    text = readme_blocks.BLOCK.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^(#|\||!).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    parts = re.split(r"(?<=[.:;?!])\s+|\n\s*\n|\n *(?:-|\d+\.) ", text)
    return [part for part in parts if len(part.split()) > 1]


GENERATED = ("docs/cli.md", "docs/architectures.md")


def test_no_file_is_long():
    for page in PAGES:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 300 or named(page) in GENERATED
