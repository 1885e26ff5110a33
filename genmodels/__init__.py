"""Train, finetune, sample and benchmark likelihood-, score- and energy-based image generators."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genmodels.version import __version__

if TYPE_CHECKING:
    from genmodels.config import Config
    from genmodels.methods.base import GenerativeModule

__all__ = ["METHODS", "__version__", "build", "load"]

# In a clone the kernels lie beside this folder (see setup.py), and an editable install elsewhere
# would bring the other clone's. setup.py tells a clone from Hugging Face's `kernels` in
# site-packages.
_beside = Path(__file__).resolve().parent.parent
if (_beside / "kernels/ops/philox.py").is_file() and (_beside / "setup.py").is_file():
    _spec = importlib.util.spec_from_file_location(
        "genmodels.kernels", _beside / "kernels/ops/__init__.py"
    )
    assert _spec is not None and _spec.loader is not None  # the file is there
    sys.modules["genmodels.kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["genmodels.kernels"])


def build(
    config: "Config | str | Path | dict | list", *overrides: str, **needs: Any
) -> "GenerativeModule":
    """Return an untrained method: see genmodels.checkpoint.build."""
    from genmodels.checkpoint import build

    return build(config, *overrides, **needs)


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> "GenerativeModule":
    """Return a trained method: see genmodels.checkpoint.load."""
    from genmodels.checkpoint import load

    return load(path, ema=ema, device=device)


def __getattr__(name: str) -> Any:
    # METHODS pulls in torch, lightning and diffusers; `import genmodels` alone stays quick.
    if name == "METHODS":
        from genmodels.methods import METHODS

        return METHODS
    raise AttributeError(f"module 'genmodels' has no attribute {name!r}")
