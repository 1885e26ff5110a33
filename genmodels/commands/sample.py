"""Generate images with a trained model, restore noisy ones, or reconstruct measured ones.

    python sample.py MODEL num=64 seed=0 out=DIR             seeds 0..63
    python sample.py MODEL seeds=0-63,100 labels=3 out=DIR   labels: 3 | 3,5 | balanced
    python sample.py MODEL cluster=IMAGES out=DIR            clusters.csv and exemplars.png
    python sample.py MODEL inpaint=PATH mask=PATH out=DIR    seed k completes image k (in turn)
    torchrun --nproc_per_node 2 sample.py MODEL num=64 out=DIR
    python sample.py MODEL denoise=PATH law=gaussian level=25 out=DIR     level=auto estimates it
    python sample.py MODEL solve=PATH operator=blur:2 noise=0.05 out=DIR  or inpaint, downsample:4

MODEL is a run folder (or one of runs: its newest), a .ckpt, an exported folder, the name of a
model that comes along, or OWNER/NAME on the Hugging Face hub. Writes DIR/000000.png ... named by
seed and DIR/grid.png; a DIR that holds images of other seeds is refused. With format=npz
DIR/images.npz (uint8 NHWC images, seeds, labels).
Image k depends on seed k alone: not on batch=, on the number of processes, or on the other seeds.
IMAGES to cluster are a folder, .zip, .npz or NAME[:SPLIT].

denoise= takes a picture, a folder or .zip of them, or an .npy of floats on the scale 0..255, not
clipped, which keeps what 8 bits cut off. Noise2Score restores pictures of any size, grey or colour,
of 8 to 32 bits, and stacks of planes in TIFF or Zarr; DIR holds each under its own name, as it came
(JPEG and the like as PNG), and before_after.png. MODEL may be noise2score then: noise2score_grey,
and for pictures in colour noise2score_colour where it is there. GBM (law=lognormal) takes images of
its own shape, an .npz too, and an .npy (N, H, W, C); DIR/000000.png ... follow their order.

solve= takes pictures that were measured by operator=, as files that denoise= takes, and draws
samples= of what they were: DIR/0, DIR/1, ..., DIR/mean and DIR/spread hold each under its own name,
DIR/solve.png shows them, DIR/scores.json what they are worth. clean=true: the pictures are clean
ones, to be measured first, by noise of seed=.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels import checkpoint, cli, generation, images, restoration
from genmodels.atomic import make_folder
from genmodels.commands.solve import SolveOptions, solve_files
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import (
    DEVICES,
    check_device,
    check_flags,
    help_text,
    one_model,
    read_options,
    seed_list,
    split_words,
    typed_words,
)
from genmodels.data.source import read_source, with_split
from genmodels.distributed import barrier, pick_device, rank, share
from genmodels.evaluation import clusters
from genmodels.restoration import DenoiseOptions
from genmodels.run import check_output, holds_arrays
from genmodels.sampling.posterior import SolverOptions


@dataclass
class GenerateOptions(Section):
    """What generating takes."""

    num: int = setting(64, "how many images", ge=1)
    seed: int = setting(0, "the first seed", ge=0, lt=2**63)
    seeds: str = setting("", "seeds in place of num and seed: 0-63,100")
    labels: str = setting(
        "", "classes: 3, or 3,5 (seed k gets entry k mod 2), or balanced; empty: random"
    )
    inpaint: str = setting("", "images to complete: a picture, folder, .zip or .npz")
    mask: str = setting(
        "", "one picture, or one for each of them: white (>= 128) = known, black = made"
    )
    out: str = setting("samples", "folder to write to")
    format: str = setting("png", "how images are written", choices=("png", "npz"))
    batch: int = setting(64, "images at a time; changes no image", ge=1)
    precision: str = setting("fp32", "fp32 is without TF32", choices=("fp32", "bf16"))
    device: str = setting("auto", "what computes", choices=DEVICES)
    noise: str = setting(
        "cpu",
        "device of the noise generators; cuda reproduces seeds published for it",
        choices=DEVICES[1:],
    )
    compile: bool = setting(
        False, "torch.compile the network, first of all and untimed; changes images by rounding"
    )
    channels_last: bool = setting(False, "NHWC memory format for the network; likewise")
    ema: bool = setting(True, "the averaged weights; false: the raw ones of a checkpoint")
    vae: str = setting(
        "", "of a model of latents: the VAE that decodes them, a folder or OWNER/NAME on the hub"
    )


@dataclass
class AssignOptions(Section):
    """What cluster= takes."""

    cluster: str = setting("", "assign these images to the model's clusters")
    batch: int = setting(64, "images at a time", ge=1)
    out: str = setting("samples", "folder to write to")
    device: str = setting("auto", "what computes", choices=DEVICES)
    ema: bool = setting(True, "the averaged weights; false: the raw ones of a checkpoint")


MODES: dict[str, Any] = {
    "": GenerateOptions,
    "denoise": DenoiseOptions,
    "cluster": AssignOptions,
    "solve": SolveOptions,
}
ALL_KEYS = list(dict.fromkeys(key for cls in MODES.values() for key in settings_of(cls)))
TITLES = {
    "": "keys:",
    "denoise": "keys of denoise=:",
    "cluster": "keys of cluster=:",
    "solve": "keys of solve=:",
}


def sample(argv: Sequence[str]) -> None:
    """Generate images; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        keys = [help_text(cls, TITLES[mode]) for mode, cls in MODES.items()]
        keys.append(help_text(SolverOptions, "keys of its solvers:"))
        print("\n\n".join([__doc__.strip(), *keys]))
        return

    path = one_model(positionals)
    mode, options, extra = read_options(MODES, words)
    check_device("device", options.device)
    work: dict[str, Any] = {"": generate, "denoise": denoise, "cluster": cluster_images}
    work["solve"] = solve
    work[mode](path, options, extra)


def generate(path: str, options: GenerateOptions, extra: dict[str, str]) -> None:
    """Write the images of some seeds."""
    check_device("noise", options.noise)
    seeds, out = seed_list(options.num, options.seed, options.seeds), Path(options.out)
    generation.check_folder("out", out, seeds if options.format == "png" else None)
    device = pick_device(options.device)
    model = checkpoint.load(path, ema=options.ema, device=device)
    generation.choose_vae(model, options.vae)
    settings = typed_words(extra, model.SAMPLE_OPTIONS, also=ALL_KEYS)
    check_folder(out, [path, options.inpaint, options.mask, *extra.values()], model)
    labels = generation.labels_for(seeds, options.labels, model.classes, model.present)
    checkpoint.load_guide(settings, device)
    settings |= {key: getattr(options, key) for key in ("batch", "precision", "noise")}
    settings |= known_pixels(model, options.inpaint, options.mask)
    settings |= generation.speed_up([model, settings.get("guide")], options, len(seeds))
    if options.format == "npz":
        known = partial(holds_arrays, names=("images", "seeds", "labels"))
        check_output("out", out / "images.npz", earlier=known)
    if options.compile:
        generation.warm_up(model, seeds, labels, **settings)
    write = write_npz if options.format == "npz" else write_pngs
    write(out, model, seeds, labels, settings)
    if rank() == 0:
        chains = f", {model.chains}" if model.chains else ""
        print(f"{len(seeds)} images{chains}, {model.nfe} network evaluations each: {out}")


def denoise(path: str, options: DenoiseOptions, extra: dict[str, str]) -> None:
    """Restore noisy pictures."""
    typed_words(extra, {}, also=ALL_KEYS)  # a method's options mean nothing here
    device = pick_device(options.device)
    models = {}
    for channels, each in checkpoint.paths_by_channels(path).items():
        models[channels] = checkpoint.load(each, ema=options.ema, device=device)
        check_folder(Path(options.out), [str(each)], models[channels])
    restoration.denoise(models, options, Path(options.out))


def solve(path: str, options: SolveOptions, extra: dict[str, str]) -> None:
    """Reconstruct measured pictures."""
    settings = typed_words(extra, settings_of(SolverOptions), also=ALL_KEYS)
    model = checkpoint.load(path, ema=options.ema, device=pick_device(options.device))
    mask = options.operator.partition("mask:")[2]
    check_folder(Path(options.out), [path, options.solve, mask], model)
    solve_files(model, options, settings, Path(options.out), path)


def cluster_images(model_path: str, options: AssignOptions, extra: dict[str, str]) -> None:
    """Write which cluster each image belongs to, and the most certain ones of every cluster."""
    typed_words(extra, {}, also=ALL_KEYS)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    model = checkpoint.load(model_path, ema=options.ema, device=pick_device(options.device))
    if not model.CLUSTERS:
        raise ValueError(f"cluster={options.cluster}: {type(model).__name__} has no clusters")
    path = Path(options.cluster)  # a folder here goes before a data set of its name
    name = str(path.absolute()) if path.exists() else with_split(options.cluster, "test")
    source = read_source(name, trained_on=model.cfg.data)
    check_folder(out, [model_path, options.cluster], model)
    pixels, names = source.pixels, source.names
    if tuple(pixels.shape[1:]) != model.shape:
        raise ValueError(
            f"cluster={options.cluster}: images of shape {tuple(pixels.shape[1:])}, the model "
            f"knows {model.shape}"
        )
    probabilities = clusters.assign(model, pixels, options.batch)
    clusters.write_clusters(out, pixels, names, probabilities)
    sizes = torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1]).tolist()
    print(f"{len(pixels)} images in clusters of {', '.join(map(str, sizes))}: {out}")


def check_folder(out: Path, inputs: Sequence[str], model: Any) -> None:
    """Raise ValueError if the folder to write to is read, or the model's data or a run lie there.

    Args:
        out: the folder.
        inputs: words of the command line that may name what is read.
        model: a method.
    """
    check_output("out", out, [*inputs, model.cfg.data.root], folder=True)


def known_pixels(model: Any, inpaint: str, mask: str) -> dict[str, torch.Tensor]:
    """Return sample()'s known= and mask= of inpaint= and mask=, or nothing if neither is given.

    Raises:
        ValueError: one without the other, a model that does not complete images, a wrong shape.
    """
    if not inpaint and not mask:
        return {}
    if not inpaint or not mask:
        raise ValueError(f"inpaint={inpaint}, mask={mask}: give both")
    if not model.INPAINTS:
        raise ValueError(f"inpaint={inpaint}: {type(model).__name__} does not complete images")
    known, masks = read_alike(inpaint, model), read_alike(mask, model)
    if len(masks) not in (1, len(known)):
        raise ValueError(f"mask={mask}: {len(masks)} pictures for {len(known)}; give 1 or as many")
    return {"known": images.from_uint8(known), "mask": masks >= 128}


def read_alike(path: str, model: Any) -> torch.Tensor:
    """Return uint8 images (N, C, H, W) of the model's shape; grey ones stand for colour.

    Raises:
        ValueError: another size.
    """
    pixels = images.read_images(path, model.shape[0])
    pixels = pixels.expand(-1, model.shape[0], -1, -1) if pixels.shape[1] == 1 else pixels
    if tuple(pixels.shape[1:]) != tuple(model.shape):
        shapes = f"{tuple(pixels.shape[1:])}, the model makes {tuple(model.shape)}"
        raise ValueError(f"{path}: has images of shape {shapes}")
    return pixels


def write_pngs(
    out: Path, model: Any, seeds: list[int], labels: list[int] | None, settings: dict[str, Any]
) -> None:
    """Write OUT/SEED.png, each process its share, then OUT/grid.png of the first 100."""
    indices = share(len(seeds))
    batches = generation.generate(
        model,
        [seeds[i] for i in indices],
        None if labels is None else [labels[i] for i in indices],
        progress=rank() == 0,
        **settings,
    )
    for batch, _, pictures in batches:
        make_folder(out, exist_ok=True)
        for seed, picture in zip(batch, pictures):
            images.write_png(out / f"{seed:06d}.png", picture)
    barrier()
    if rank() == 0:
        channels = generation.picture_shape(model)[0]
        first = [images.read_image(out / f"{seed:06d}.png", channels) for seed in seeds[:100]]
        columns = generation.class_columns(labels and labels[:100])
        images.write_png(out / "grid.png", images.contact_sheet(torch.stack(first), columns))


def write_npz(
    out: Path, model: Any, seeds: list[int], labels: list[int] | None, settings: dict[str, Any]
) -> None:
    """Write OUT/images.npz in the order of the seeds; labels are -1 where they were random."""
    pictures = generation.generate_everywhere(model, seeds, labels, **settings)
    if rank() == 0:
        nhwc = pictures.permute(0, 2, 3, 1).numpy()
        make_folder(out, exist_ok=True)
        known = np.full(len(seeds), -1) if labels is None else np.array(labels)
        images.write_npz(out / "images.npz", images=nhwc, seeds=np.array(seeds), labels=known)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(sample, argv)
