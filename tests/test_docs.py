"""What the documents name is there: modules, functions, files, links."""

import functools
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest

from tests.helpers.paths import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
# What is not there: the files that recipes add, and what a command on a GPU will write.
NOT_HERE = re.compile(
    r"/(NAME\b.*|flow\.py|flow_digits\.yaml|test_flow\.py|convnet\.py|edm_convnet\.yaml|spread\.py)$"
    r"|^benchmarks/results/gpu\.\w+$"
)
FOLDERS = "genmodels|kernels|configs|benchmarks|tests|docs|pretrained"


@functools.cache
def text_of(page):
    return (ROOT / page).read_text()


def found(pattern, blocks=True):
    """Return [(page, what)] of a pattern in all pages; blocks: in blocks of code as well."""
    pairs = []
    for page in sorted(PAGES):
        text = (
            text_of(page)
            if blocks
            else re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
        )
        pairs += [(page, what) for what in re.findall(pattern, text)]
    return list(dict.fromkeys(pairs))


@pytest.mark.parametrize(
    ("page", "path"), found(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.*-]*\w(?:\.\w+|/))(?![\w/*])")
)
def test_path(page, path):
    if not NOT_HERE.search(path):
        assert list(ROOT.glob(path)), f"{page} names {path}"


@pytest.mark.parametrize(("page", "name"), found(r"(?<![\w./-])(genmodels(?:\.[A-Za-z_]\w*)+)"))
def test_dotted_name(page, name):
    """The longest part of it that is a module is found, the rest are attributes."""
    module, attributes = name, []
    while not is_module(module):
        module, _, last = module.rpartition(".")
        attributes.insert(0, last)
    thing = importlib.import_module(module) if attributes else None
    for attribute in attributes:
        thing = getattr(thing, attribute)  # an error names what is missing


def is_module(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(("page", "link"), found(r"\]\((?!https?:)([^)\s]+)\)", blocks=False))
def test_link(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        heads = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_every_page_is_in_the_index():
    index = text_of("docs/README.md")
    assert [p for p in PAGES if p.startswith("docs/") and f"]({p[5:]})" not in index] == [
        "docs/README.md"
    ]


def test_the_changelog_names_modules_that_are_there():
    table = text_of_changelog_table()
    new = [name for _, cell in table for name in re.findall(r"`(genmodels[\w.]*)`", cell)]
    old = [name for cell, _ in table for name in re.findall(r"`(genmodels[\w.]*)`", cell)]
    assert len(new) > 15 and [name for name in new if not is_module(name)] == []
    # An old name that is still there is a package now, or has a function of that name no more.
    assert [name for name in old if is_module(name)] == ["genmodels.images", "genmodels.noise"]


def text_of_changelog_table():
    rows = re.findall(r"^\| (`genmodels.+?) \| (.+) \|$", text_of("CHANGELOG.md"), re.M)
    assert len(rows) > 10
    return rows


def test_the_floors_of_the_page_are_those_of_the_contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    floors = [sorted(re.split(r"\s*[|:]\s*", layer)) for layer in contract["layers"]]
    rows = re.findall(r"^\| \d+ \| (.+) \|$", text_of("docs/design.md"), re.M)
    assert [sorted(row.replace("`", "").split(", ")) for row in rows] == floors


def test_the_tree_of_the_page_has_every_package():
    tree = re.search(r"^```\n(train\.py.*?)^```", text_of("docs/design.md"), re.S | re.M)[1]
    named = set(re.findall(r"^  (\w+(?:/|\.py))", tree, re.M))
    here = {f"{p.name}/" for p in (ROOT / "genmodels").iterdir() if (p / "__init__.py").exists()}
    here |= {p.name for p in (ROOT / "genmodels").glob("*.py")}
    apart = {"__init__.py", "__main__.py", "version.py", "importers.py", "diffusers_export.py"}
    assert named == here - apart


@pytest.mark.parametrize("name", ["METHODS", "NETWORKS", "METRICS", "DATASETS", "LAWS"])
def test_the_tables_lie_where_the_recipes_say(name):
    path = re.search(rf"`{name}` in `(genmodels/\S+\.py)`", text_of("docs/extending.md"))[1]
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert getattr(importlib.import_module(module), name)


def test_citation_agrees_with_the_package():
    from genmodels.version import __version__

    lines = text_of("CITATION.cff")
    assert f"\nversion: {__version__}\n" in lines and "\nlicense: Apache-2.0\n" in lines


API = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.M)


@pytest.mark.parametrize("name", API)
def test_the_api_page_names_what_there_is_with_a_docstring(name):
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link():
    pytest.importorskip("mkdocstrings", reason="make docs installs it")
    done = subprocess.run(
        [sys.executable, "docs/site.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "seeds[k]" in (ROOT / "build/site/docs/api.html").read_text()
