"""Write an EDM with the network `unet` as a folder for diffusers, to be used without this package.

    python -m genmodels.diffusers_export MODEL out=DIR

    from diffusers import DiffusionPipeline
    DiffusionPipeline.from_pretrained("DIR")(batch_size=4, num_inference_steps=18)

The pipeline is diffusers' ConsistencyModelPipeline, which is a plain loop over a scheduler, with an
EDMEulerScheduler: Euler's method on the same noise levels (DDPMPipeline would load the folder too,
and make other images). It starts from noise of standard deviation sqrt(sigma_max^2 + 1) where EDM
has sigma_max: its images equal those of `sampler=euler` within about 1e-4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genmodels.atomic import new_folder, write_bytes
from genmodels.checkpoint import models
from genmodels.checkpoint.cards import NO_LICENSE
from genmodels.checkpoint.exports import check_new
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import check_flags, help_text, split_words, typed_words

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
{license}---
# {name}

EDM (Karras et al. 2022, arXiv 2206.00364) on {data}, {shape}. Licence of the model: {terms}.

```
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("{name}")({call}num_inference_steps={steps})
```
{labels}
"""


def export_diffusers(path: Path | str, out: Path | str, *, license: str = "") -> Path:
    """Write a trained model (EMA weights) as a diffusers pipeline; return the folder.

    Args:
        path: run folder, .ckpt file or exported folder.
        out: folder to make; must not exist.
        license: of the model, for its card; "": none is stated.

    Raises:
        ValueError: `out` exists; a model that is no EDM with network.name=unet; a shape that the
            pipeline cannot make.
    """
    from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

    out = Path(out)
    check_new(out)
    model = _load_fitting(path)
    cfg = model.cfg
    scheduler = EDMEulerScheduler(
        sigma_min=cfg.method.sigma_min,
        sigma_max=cfg.method.sigma_max,
        sigma_data=cfg.method.sigma_data,
        rho=cfg.method.rho,
    )
    pipeline: Any = ConsistencyModelPipeline(unet=model.net.net.unet, scheduler=scheduler)
    labels = f"class_labels: 0..{model.classes - 1}, {model.classes} = none."
    # Left to itself the pipeline would draw the label that means none as well.
    call = "batch_size=4, class_labels=[0, 1, 2, 3], " if model.classes else "batch_size=4, "
    card = _CARD.format(
        call=call,
        license=f"license: {license}\n" if license else "",
        terms=license or NO_LICENSE,
        name=out.name,
        data=cfg.data.name,
        shape=" x ".join(map(str, model.shape)),
        steps=cfg.method.steps,
        labels=labels if model.classes else "",
    )
    with new_folder(out) as folder:
        pipeline.save_pretrained(folder)
        write_bytes(folder / "README.md", card.encode())
    return out


def _load_fitting(path: Path | str) -> Any:
    """Return the model at this path, if diffusers has a place for all of it."""
    model = models.load(path)
    cfg, (_, height, width) = model.cfg, model.shape
    if (cfg.method.name, cfg.network.name) != ("edm", "unet"):
        raise ValueError(
            f"model={path}: is {cfg.method.name} with network {cfg.network.name}; diffusers has a "
            "place for edm with unet only"
        )
    if cfg.data.vae.mean:
        raise ValueError(
            f"model={path}: makes latents; diffusers has no pipeline of EDM with a VAE"
        )
    if cfg.method.sigmas != "edm":
        raise ValueError(
            f"model={path}: method.sigmas={cfg.method.sigmas}; diffusers has edm's grid"
        )
    if cfg.method.precond != "edm":
        raise ValueError(f"model={path}: method.precond={cfg.method.precond}; diffusers knows edm")
    multiple = model.net.net.multiple
    if height != width or height % multiple:
        raise ValueError(
            f"model={path}: images of {height}x{width}; the pipeline makes squares of a multiple "
            f"of {multiple} pixels"
        )
    return model


@dataclass
class DiffusersOptions(Section):
    """What python -m genmodels.diffusers_export takes."""

    out: str = setting("", "folder to make")


def main(argv: Sequence[str]) -> None:
    """Export a model; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(f"{__doc__.strip()}\n\n{help_text(DiffusersOptions)}")
        return
    options = DiffusersOptions(**typed_words(words, settings_of(DiffusersOptions)))
    if len(positionals) != 1 or not options.out:
        raise ValueError("usage: python -m genmodels.diffusers_export MODEL out=DIR")
    print(f"exported: {export_diffusers(positionals[0], options.out)}")
