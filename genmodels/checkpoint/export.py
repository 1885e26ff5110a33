"""Trained models as folders: config.json + model.safetensors + README.md.

python -m genmodels.checkpoint MODEL out=DIR [half=true]
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

import genmodels
from genmodels import data
from genmodels.atomic import write_bytes
from genmodels.checkpoint.models import FORMAT, load, read_checkpoint
from genmodels.config import Config, Section, setting, settings_of, to_plain
from genmodels.config.words import check_flags, help_text, split_words, typed_words


def export(path, out, *, half=False):
    """Write a trained model (EMA weights) as config.json + model.safetensors + README.md.

    Args:
        path: run folder, .ckpt file or export.
        out: folder to make; must not exist.
        half: store float16 (half the size; about 3 significant digits).

    Raises:
        ValueError: `out` exists, or the model cannot be read.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"out={out}: exists; delete it or choose another name")
    model = load(path)
    steps = None
    if not (Path(path) / "config.json").is_file():
        path = path if Path(path).suffix == ".ckpt" else Path(path) / "checkpoints" / "last.ckpt"
        steps = read_checkpoint(path)["global_step"]
    return write_export(model, out, _model_card(model, out.name, steps), half=half)


def write_export(model, out, card, *, half=False):
    """Write a method as the new folder `out`, all or nothing; `card` is its README.md."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        if half:
            # Parameters only: frequencies and noise levels in buffers need their digits.
            halved = {name for name, _ in model.named_parameters()}
            state = {k: v.half() if k in halved else v for k, v in state.items()}
        save_file(state, partial / "model.safetensors", {"format": "pt"})
        plain = to_plain(model.cfg)
        plain |= {"out_dir": Config.out_dir, "init": ""}  # folders of the machine it was made on
        plain["data"]["root"] = ""
        description = {
            "genmodels_format": FORMAT,
            "genmodels_version": genmodels.__version__,
            "config": plain,
        }
        write_bytes(partial / "config.json", json.dumps(description, indent=1).encode())
        write_bytes(partial / "README.md", card.encode())
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _model_card(model, name, steps):
    cfg, learned = model.cfg, model.learned_from()
    terms = data.TERMS.get(cfg.data.name, "your own data: say here where they come from")
    steps = cfg.trainer.max_steps if steps is None else steps
    weights = "EMA" if cfg.ema.half_life else "Raw"
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

{type(cfg.method).__doc__} Network: {cfg.network.name}. {weights} weights.

- Data: {cfg.data.name}, {" x ".join(map(str, cfg.data.shape))}. {terms}
- Training: `{cfg.name}`, {steps} steps of {cfg.data.batch_size} images
  ({images:,} in all), seed {cfg.seed}; every setting is in config.json.
- {f"Learned from: {learned}" if learned else f"Labels: {labels}"}.

```
python sample.py {name} {words}
```
"""


@dataclass
class ExportOptions(Section):
    """What python -m genmodels.checkpoint takes."""

    out: str = setting("", "folder to make")
    half: bool = setting(False, "store float16")


def main(argv):
    """Export a model."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        print(f"{__doc__.strip()}\n\n{help_text(ExportOptions)}")
        return
    options = ExportOptions(**typed_words(words, settings_of(ExportOptions)))
    if len(positionals) != 1:
        raise ValueError("usage: python -m genmodels.checkpoint MODEL out=DIR [half=true]")
    options.check(options.out, "out", "say which folder to make")
    print(f"exported: {export(positionals[0], options.out, half=options.half)}")
