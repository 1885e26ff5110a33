"""Trained models as folders: config.json + model.safetensors + README.md.

python -m genmodels.checkpoint MODEL out=DIR [half=true]
python -m genmodels.checkpoint MODEL out=DIR format=diffusers
python -m genmodels.checkpoint ema RUN sigma_rel=0.1[,0.15,...] [step=N] [out=DIR]

The second writes a pipeline that diffusers loads without this package (EDM with the network
`unet`), the third averages of other widths of a run that was trained with ema.sigma_rel.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from genmodels import data
from genmodels.atomic import new_folder, write_bytes
from genmodels.checkpoint.models import FORMAT, file_sha256, load, model_path, read_checkpoint
from genmodels.config import Config, Section, setting, settings_of, to_plain
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.run import check_output
from genmodels.version import __version__


def export(path: Path | str, out: Path | str, *, half: bool = False) -> Path:
    """Write a trained model (EMA weights) as config.json + model.safetensors + README.md.

    Args:
        path: run folder, .ckpt file or export.
        out: folder to make; must not exist.
        half: store float16 (half the size; about 3 significant digits).

    Returns:
        The folder.

    Raises:
        ValueError: `out` exists, or the model cannot be read.
    """
    path, out = model_path(path), Path(out)
    check_new(out)
    model = load(path)
    steps = None
    if not (path / "config.json").is_file():
        steps = read_checkpoint(path)["global_step"]
    return write_export(model, out, model_card(model, out.name, steps), half=half)


def check_new(out: Path) -> None:
    """Raise ValueError if the folder to make exists, or would lie among a run's own files."""
    if out.exists():
        raise ValueError(f"out={out}: exists; delete it or choose another name")
    check_output("out", out, folder=True)


def write_export(model: Any, out: Path, card: str, *, half: bool = False) -> Path:
    """Write a method as the new folder `out`, all or nothing, and return it.

    Args:
        model: a method.
        out: folder to make; must not exist.
        card: its README.md.
        half: store float16.
    """
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if half:
        # Parameters only: frequencies and noise levels in buffers need their digits.
        halved = {name for name, _ in model.named_parameters()}
        state = {k: v.half() if k in halved else v for k, v in state.items()}
    plain = to_plain(model.cfg)
    plain |= {"out_dir": Config.out_dir, "init": ""}  # folders of the machine it was made on
    plain["data"]["root"] = ""
    with new_folder(out) as folder:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        description = {
            "genmodels_format": FORMAT,
            "genmodels_version": __version__,
            "weights_sha256": file_sha256(folder / "model.safetensors"),
            "config": plain,
        }
        write_bytes(folder / "config.json", json.dumps(description, indent=1).encode())
        write_bytes(folder / "README.md", card.encode())
    return out


def model_card(model: Any, name: str, steps: int | None, weights: str = "") -> str:
    """Return the README.md of an export.

    Args:
        model: a method.
        name: of the folder.
        steps: optimizer steps it was trained for; None: those of its config.
        weights: what the weights are, if not what the config says.
    """
    cfg, learned = model.cfg, model.learned_from()
    terms = data.data_set(cfg.data.name).terms
    steps = cfg.trainer.max_steps if steps is None else steps
    averaged = cfg.ema.sigma_rel or cfg.ema.half_life
    weights = weights or ("EMA weights" if averaged else "Raw weights")
    images = steps * cfg.data.batch_size
    labels = "class-conditional" if cfg.data.labels else "unconditional"
    task, words = "image-generation", "num=64 out=samples"
    if model.ANY_SIZE:
        task = "image-restoration"
        words = f"denoise=PICTURE_OR_FOLDER law={next(iter(model.DENOISE_LAWS))} out=restored"
    return f"""---
library_name: genmodels
tags: [{task}, {cfg.method.name}]
---
# {name}

{type(cfg.method).__doc__} Network: {cfg.network.name}. {weights}.

- Data: {cfg.data.name}, {" x ".join(map(str, cfg.data.shape))}. {terms}
- Training: `{cfg.name}`, {steps} steps of {cfg.data.batch_size} images
  ({images:,} in all), seed {cfg.seed}; every setting is in config.json.
- {f"Learned from: {learned}" if learned else f"Labels: {labels}"}.

```
genmodels sample {name} {words}
```
"""


@dataclass
class ExportOptions(Section):
    """What python -m genmodels.checkpoint takes."""

    out: str = setting("", "folder to make")
    half: bool = setting(False, "store float16")
    format: str = setting("genmodels", "who is to load it", choices=("genmodels", "diffusers"))


def main(argv: Sequence[str]) -> None:
    """Export a model."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        from genmodels.checkpoint.ema import AverageOptions

        averages = help_text(AverageOptions, "keys of ema:")
        print(f"{__doc__.strip()}\n\n{help_text(ExportOptions)}\n{averages}")
        return
    if positionals[:1] == ["ema"]:
        from genmodels.checkpoint.ema import write_averages

        return write_averages(positionals[1:], words)
    options = ExportOptions(**typed_words(words, settings_of(ExportOptions)))
    if len(positionals) != 1:
        raise ValueError("usage: python -m genmodels.checkpoint MODEL out=DIR [half=true]")
    options.check(options.out, "out", "say which folder to make")
    if options.format == "diffusers":
        from genmodels.checkpoint.diffusers import export_diffusers

        options.check(not options.half, "half", "is not for format=diffusers; leave it out")
        made = export_diffusers(positionals[0], options.out)
    else:
        made = export(positionals[0], options.out, half=options.half)
    print(f"exported: {made}")
