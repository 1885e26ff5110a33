"""The tutorials run from top to bottom, and what they print is what their text says."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# What an output must have in it, by notebook.
SAYS = {
    "own_pictures": ["classes", "(10, 1, 8, 8)", "my_pipeline", "To try"],
    "noisy_stacks": ["ZYX (8, 192, 192) uint16", "best Gaussian filter", "Return the restored"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_tutorial_runs(name, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[docs]' runs the notebooks")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]' runs the notebooks")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(ROOT / f"docs/tutorials/{name}.ipynb", 4)
    nbclient.NotebookClient(
        book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "\n".join(
        str(output.get("text") or output.get("data", {}))
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert not re.search(r"(?im)traceback|^(error|\w+error):", printed)
    assert [words for words in SAYS[name] if words not in printed] == []
