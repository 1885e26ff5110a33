"""Train, finetune, sample and benchmark likelihood-, score- and energy-based image generators.

build(config) makes an untrained model, load(path) reads a trained one; METHODS are the classes by
name. docs/library.md shows a model in a training loop of one's own.
"""

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
    kernels = sys.modules["genmodels.kernels"]


def build(
    config: "Config | str | Path | dict | list", *overrides: str, **needs: Any
) -> "GenerativeModule":
    """Return an untrained method, a LightningModule on the CPU; weights depend on the seed alone.

    Args:
        config: a YAML path, a name of configs/, a dict of the same, a Config, or a list of them
            merged from left to right.
        overrides: "key=value" words, "optim.lr=0.001".
        needs: what the method needs beyond its config, e.g. reference=MODEL for DDO.

    Raises:
        ValueError: the config is wrong; the line says where and what to write.
    """
    from genmodels.checkpoint import build

    return build(config, *overrides, **needs)


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> "GenerativeModule":
    """Return a trained method in eval mode. Nothing in the file is executed.

    Args:
        path: run folder, .ckpt file, exported folder, the name of a model that comes along, or
            OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub.
        ema: the averaged weights (default) or, from a checkpoint, the raw ones.
        device: where to put it.

    Raises:
        ValueError: not a model of this package, broken, or from a newer version; the hub cannot be
            reached or has no such model.
    """
    from genmodels.checkpoint import load

    return load(path, ema=ema, device=device)


def __getattr__(name: str) -> Any:
    # METHODS pulls in torch, lightning and diffusers; `import genmodels` alone stays quick.
    if name == "METHODS":
        from genmodels.methods import METHODS

        return METHODS
    raise AttributeError(f"module 'genmodels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
