"""Trained models as folders: config.json + model.safetensors + README.md.

python -m genmodels.checkpoint MODEL out=DIR [half=true]
python -m genmodels.checkpoint MODEL out=DIR format=diffusers
python -m genmodels.checkpoint ema RUN sigma_rel=0.1[,0.15,...] [step=N] [out=DIR]
python -m genmodels.checkpoint merge A B out=DIR [weights=2,1] [fisher=DATA]

The second writes a pipeline that diffusers loads without this package (EDM with the network
`unet`), the third averages of other widths of a run that was trained with
ema.sigma_rel, the fourth an average of models of one network.

The model card README.md gets a grid of images, the scores of the run's training or those of
scores=FILE.json, and license=; its header is as the Hugging Face hub reads it.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from genmodels.atomic import new_folder, write_bytes
from genmodels.checkpoint.cards import (
    GRID,
    CardOptions,
    model_card,
    sample_grid,
    scores_of_report,
    scores_of_run,
    vae_to_share,
)
from genmodels.checkpoint.models import (
    CHAINS,
    FORMAT,
    file_sha256,
    load,
    model_path,
    read_checkpoint,
)
from genmodels.config import Config, setting, settings_of, to_json
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.run import check_output
from genmodels.version import __version__


def export(
    path: Path | str,
    out: Path | str,
    *,
    half: bool = False,
    license: str = "",
    scores: Path | str = "",
    samples: int = 0,
    name: str = "",
) -> Path:
    """Write a trained model (EMA weights) as config.json + model.safetensors + README.md.

    Args:
        path: run folder, .ckpt file or export.
        out: folder to make; must not exist.
        half: store float16 (half the size; about 3 significant digits).
        license: of the model, as the Hugging Face hub writes it: "apache-2.0"; "": none is stated.
        scores: JSON of evaluate.py for its card; "": those made in the run's training, if any.
        samples: images of a grid, samples.png; -1: 16 if they take less than a minute.
        name: what the card calls it; "": the folder's name.

    Returns:
        The folder.

    Raises:
        ValueError: `out` exists, or the model or the scores cannot be read.
    """
    CardOptions(license=license, samples=samples)
    path, out = model_path(path), Path(out)
    check_new(out)
    found = scores_of_report(scores) if scores else []
    model = load(path)
    steps = None
    if not (path / "config.json").is_file():
        steps = read_checkpoint(path)["global_step"]
        found = found or scores_of_run(path, steps, model.cfg.data.name, model.cfg.eval.features)
    grid = sample_grid(model, samples)
    card = model_card(
        model, name or out.name, steps, license=license, scores=found, grid=grid is not None
    )
    return write_export(model, out, card, half=half, files={} if grid is None else {GRID: grid})


def check_new(out: Path) -> None:
    """Raise ValueError if the folder to make exists, or would lie among a run's own files."""
    if out.exists():
        raise ValueError(f"out={out}: exists; delete it or choose another name")
    check_output("out", out, folder=True)


def write_export(
    model: Any,
    out: Path,
    card: str,
    *,
    half: bool = False,
    files: Mapping[str, bytes] = {},
    chains: bool = True,
) -> Path:
    """Write a method as the new folder `out`, all or nothing, and return it.

    Args:
        model: a method.
        out: folder to make; must not exist.
        card: its README.md.
        half: store float16.
        files: what else lies in it, by name.
        chains: with those that the method keeps; of other weights than its own they are wrong.
    """
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if half:
        # Parameters only: frequencies and noise levels in buffers need their digits.
        halved = {name for name, _ in model.named_parameters()}
        state = {k: v.half() if k in halved else v for k, v in state.items()}
    kept = model.kept_chains() if chains else {}
    state |= {f"{CHAINS}{key}": value for key, value in kept.items()}
    plain = to_json(model.cfg)
    plain |= {"out_dir": Config.out_dir, "init": ""}  # folders of the machine it was made on
    plain["data"] |= {"root": "", "source_root": ""}
    vae = plain["data"]["vae"]
    vae["name"] = vae_to_share(vae["name"])
    with new_folder(out) as folder:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        description = {
            "genmodels_format": FORMAT if kept else 1,
            "genmodels_version": __version__,
            "weights_sha256": file_sha256(folder / "model.safetensors"),
            "config": plain,
        }
        write_bytes(
            folder / "config.json", json.dumps(description, indent=1, allow_nan=False).encode()
        )
        for name, content in {"README.md": card.encode(), **files}.items():
            write_bytes(folder / name, content)
    return out


def save_model(
    model: Any,
    out: Path | str,
    *,
    half: bool = False,
    license: str = "",
    scores: Path | str = "",
    samples: int = 0,
    name: str = "",
) -> Path:
    """Write a model that is in memory as an export; see export().

    Raises:
        ValueError: `out` exists, or the scores cannot be read.
    """
    CardOptions(license=license, samples=samples)
    out = Path(out)
    check_new(out)
    found = scores_of_report(scores) if scores else []
    grid = sample_grid(model, samples)
    trainer = getattr(model, "_trainer", None)
    card = model_card(
        model,
        name or out.name,
        trainer.global_step if trainer else None,
        "The weights as they were in memory",
        license=license,
        scores=found,
        grid=grid is not None,
    )
    return write_export(model, out, card, half=half, files={} if grid is None else {GRID: grid})


@dataclass
class ExportOptions(CardOptions):
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
        from genmodels.checkpoint.merge import MergeOptions

        averages = help_text(AverageOptions, "keys of ema:")
        merges = help_text(MergeOptions, "keys of merge:")
        print(f"{__doc__.strip()}\n\n{help_text(ExportOptions)}\n{averages}\n{merges}")
        return
    if positionals[:1] == ["ema"]:
        from genmodels.checkpoint.ema import write_averages

        return write_averages(positionals[1:], words)
    if positionals[:1] == ["merge"]:
        from genmodels.checkpoint.merge import write_merged

        return write_merged(positionals[1:], words)
    options = ExportOptions(**typed_words(words, settings_of(ExportOptions)))
    if len(positionals) != 1:
        raise ValueError("usage: python -m genmodels.checkpoint MODEL out=DIR [half=true]")
    options.check(options.out, "out", "say which folder to make")
    if options.format == "diffusers":
        from genmodels.checkpoint.diffusers import export_diffusers

        ours = [key for key in ("half", "scores", "samples") if key in words]
        for key in ours:
            options.check(False, key, "is not for format=diffusers; leave it out")
        made = export_diffusers(positionals[0], options.out, license=options.license)
    else:
        made = export(positionals[0], options.out, **card_words(options))
    note_license(options.license)
    print(f"exported: {made}")


def card_words(options: Any) -> dict[str, Any]:
    """Return what export() takes of the options of a command."""
    return {key: getattr(options, key) for key in ("half", "license", "scores", "samples")}


def note_license(license: str) -> None:
    """Warn where others are not told what they may do with a model."""
    if not license:
        warnings.warn(
            "license=: the card says that none is stated; license=apache-2.0 or another tells "
            "others what they may do with the model",
            stacklevel=2,
        )
