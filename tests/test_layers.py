"""The kernels stand below everything, which the import linter cannot see: it reads genmodels/."""

import ast
import sys

from tests.helpers.paths import ROOT

ALLOWED = {"torch", "triton", *sys.stdlib_module_names}


def imported(path):
    """Yield the packages that a file imports, anywhere in it; "" for those of its own folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path.name} imports from above its folder"
            yield "" if node.level else node.module.partition(".")[0]


def test_kernels_know_nothing_of_the_package():
    files = sorted((ROOT / "kernels/ops").glob("*.py"))
    assert len(files) > 8
    for path in files:
        assert set(imported(path)) <= ALLOWED | {""}, path.name


def test_the_folder_of_the_kernels_is_no_package():
    """A kernels/__init__.py would stand before Hugging Face's package of that name."""
    assert not (ROOT / "kernels/__init__.py").exists()
