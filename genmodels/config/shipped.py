"""What comes with the package: configs, and pretrained models, by their names."""

import difflib
from pathlib import Path

CONFIGS, MODELS = "configs", "pretrained"


def shipped(kind: str) -> dict[str, Path]:
    """Return {name: path} of what came along, by name; in a clone it is what lies in the clone.

    Args:
        kind: CONFIGS or MODELS.
    """
    package = Path(__file__).resolve().parents[1]
    clone = package.parent
    # As with the kernels (genmodels/__init__.py): what is beside this very code comes first.
    folder = (clone if (clone / "setup.py").is_file() else package) / kind
    if kind == CONFIGS:
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def nearest(kind: str, name: str) -> str:
    """Return "; did you mean NAME?" of what came along, "" if nothing is like it."""
    near = difflib.get_close_matches(name, shipped(kind), 1)
    return f"; did you mean {near[0]}?" if near else ""
