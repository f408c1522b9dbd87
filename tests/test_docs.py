"""The documentation: it builds, leads nowhere wrong, and quotes commands and keys that exist."""

import ast
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import benchmarks_page
import docs_pages
import pytest
import typer.main
import yaml

from drafthead.cli import app
from drafthead.recipe import parse_recipe
from drafthead.vllm_plugin import registry

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES = sorted((ROOT / "docs").rglob("*.md")) + ROOT_PAGES
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FILES = {"json", "html", "md", "jsonl", "py", "yaml", "log", "safetensors", "gguf", "done", "begun"}
"""Endings that make `verify.json` a file and no key of the section `verify`."""


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_has_every_page(site):
    for page in (ROOT / "docs").rglob("*.md"):
        relative = page.relative_to(ROOT / "docs")
        html = relative.with_name("index.html" if page.stem == "README" else f"{page.stem}.html")
        assert (site / html).stat().st_size > 1000
    assert "--num-speculative" not in (site / "reference/cli.html").read_text()
    assert "num_speculative_tokens" in (site / "reference/recipe.html").read_text()
    assert "drafthead.head.drafting.draft_chain" in (site / "reference/api.html").read_text()


class _Loaded(HTMLParser):
    """What a browser fetches by itself when it opens the page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag != "a":
            self.found += [value for key, value in attrs if key in ("src", "href", "srcset")]


def test_no_page_asks_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.found
        away = [url for url in loaded.found if re.match(r"(https?:)?//", url or "")]
        assert away == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text())


@pytest.mark.parametrize("page", ROOT_PAGES, ids=name)
def test_links_of_the_root_pages_lead_somewhere(page):
    """MkDocs checks those between the site's pages; these are read in the repository."""
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def quoted_commands(text):
    """Commands in a page: lines of code blocks (whole), and code in sentences (may be a part)."""
    fence = None
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fence = None if fence else line.strip()
        elif (fence or line.startswith("    ")) and (
            found := re.match(r"\s*(?:torchrun .* -m )?(drafthead\s.*)", line)
        ):
            yield found[1], True
        elif not fence:
            yield from ((code, False) for code in re.findall(r"`(drafthead [^`]+)`", line))


def check_command(line, whole):
    """A quoted command exists, with each of its options; a whole one can be parsed as it stands."""
    words = shlex.split(re.sub(r"\{[^}]*\}", "X", line), comments=True)[1:]
    root = typer.main.get_command(app)
    if words and words[0].startswith("-"):
        known = {opt for parameter in root.params for opt in parameter.opts} | {"--help"}
        assert set(words) <= known, line
        return
    full = "drafthead " + " ".join(words[: 2 if words and words[0] == "states" else 1])
    command = docs_pages.commands().get(full)
    assert command is not None, f"no such command: {line}"
    args = words[full.count(" ") :]
    own = args[: args.index("--")] if "--" in args else args
    known = {opt for parameter in command.params for opt in parameter.opts} | {"--help"}
    unknown = {word.split("=")[0] for word in own if word.startswith("--")} - known
    assert not unknown, f"{line}: no option {unknown}"
    if whole and "--help" not in own:
        command.make_context(full, list(args))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_commands_exist(page):
    for line, whole in quoted_commands(page.read_text(encoding="utf-8")):
        check_command(line, whole)


def test_the_check_of_commands_finds_what_is_wrong():
    for wrong in ("drafthead trian recipe.yaml", "drafthead run recipe.yaml --form train"):
        with pytest.raises(AssertionError):
            check_command(wrong, False)
    with pytest.raises(Exception, match="Missing parameter"):
        check_command("drafthead run", True)


def strings(path):
    """The texts in a source file that are no docstrings: what a user may read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and id(node) not in docs | inside:
            yield str(node.value)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_messages_name_commands_and_keys_that_exist(path):
    """An error's mend must be one."""
    for text in strings(path):
        for code in re.findall(r"`(drafthead [^`]+)`", text):
            check_command(code, False)
        for section, key in re.findall(r"(?<![\w./-])([a-z]+)\.([a-z_]+)(?![\w(/:-]*[(/])", text):
            check_key(section, key)


def test_examples_of_the_help_can_be_parsed():
    for full, command in docs_pages.commands().items():
        assert command.epilog, f"{full}: no example"
        assert command.epilog.startswith(f"Example: {full} ") or "-m drafthead" in command.epilog
        (line, whole) = next(quoted_commands("    " + command.epilog.removeprefix("Example: ")))
        check_command(line.split(", ")[0], whole)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_files_of_the_repository_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"(?<![\w./-])(?:src|tests|benchmarks|recipes|tools|docs)/[\w./-]+", text
    ):
        if not path.endswith(".cpp"):  # llama.cpp's
            assert (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/how-it-works.md", "docs/head.md"])
def test_quoted_files_of_the_package_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    files = re.findall(r"`(?:drafthead/)?([\w/]+/\w+\.py)`", text)
    assert files
    for file in files:
        found = [
            ROOT / at / file for at in ("", "src/drafthead", "tests") if (ROOT / at / file).exists()
        ]
        assert found, file


def check_key(section, key):
    """`section.key` is a key of the recipe, if that section is one."""
    model = docs_pages.sections().get(section)
    if model is not None and key not in FILES:
        assert key in model.model_fields, f"no such recipe key: {section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_recipe_keys_exist(page):
    text = page.read_text(encoding="utf-8")
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)[^`]*`", text):
        check_key(section, key)
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        needed = {"name": "n", "target": {"path": "t"}, "prompts": {"sources": [{"path": "p"}]}}
        parse_recipe(needed | yaml.safe_load(block), name(page))


def test_the_check_of_keys_finds_what_is_wrong():
    with pytest.raises(AssertionError, match=r"serve\.num_spec"):
        check_key("serve", "num_spec")


def test_the_page_of_benchmarks_is_what_the_records_say():
    """`python tools/benchmarks_page.py` makes it anew."""
    page = benchmarks_page.page()
    assert benchmarks_page.PAGE.read_text(encoding="utf-8") == page
    assert "{{" not in page
    assert len(page.splitlines()) <= 150


def meanings(page):
    """What a reference page says of each command or section: the cells after each name."""
    found, part = {}, None
    for line in page.splitlines():
        if line.startswith("## "):
            part = found.setdefault(line.removeprefix("## ").strip("`"), {})
        elif part is not None and line.startswith("| `"):
            name, *cells = re.split(r"(?<!\\)\|", line.strip("| "))
            part[name.strip(" `")] = [cell.strip() for cell in cells]
    return found


def test_the_reference_has_every_option_with_its_meaning():
    page = meanings(docs_pages.cli_page())
    for full, command in docs_pages.commands().items():
        options = [p for p in command.params if p.name != "help"]
        assert len(page[full]) == len(options), full
        assert all(meaning for meaning, *_ in page[full].values()), full


def test_the_reference_has_every_key_with_type_default_and_meaning():
    page = meanings(docs_pages.recipe_page())
    for section, model in docs_pages.sections().items():
        assert page[section].keys() == model.model_fields.keys()
        for key, cells in page[section].items():
            assert all(cells), f"{section}.{key}"
            # A type that the page has no words for would be Python's own.
            assert not re.search(r"annotation=|typing\.|Pydantic|<class|Ellipsis", " ".join(cells))


def test_the_page_on_vllm_has_every_patch():
    rows = [line for line in docs_pages.vllm_page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [patch.name for patch in registry.TABLE]
    (marked,) = (row for row in rows if "`draft_kv_group`" in row)
    assert marked.endswith("| needed |  |")  # in 0.32 and not in 0.33
