"""The package of checkpoints is cheap to import; its functions are found when they are used."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def test_importing_the_package_loads_neither_torch_nor_lightning():
    code = (
        "import sys\n"
        "from genmodels import checkpoint\n"
        "assert not {'torch', 'lightning', 'genmodels.methods'} & set(sys.modules)\n"
        "import genmodels.checkpoint.exports\n"
        "assert callable(checkpoint.export) and checkpoint.FORMAT == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_all_names_are_there_and_no_others():
    from genmodels import checkpoint

    assert all(getattr(checkpoint, name) is not None for name in checkpoint.__all__)
    with pytest.raises(AttributeError, match=r"genmodels\.checkpoint.*no attribute 'nothing'"):
        checkpoint.nothing  # noqa: B018
