"""Images from a model, in batches, on all processes."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from genmodels import cli, distributed
from genmodels.images import to_uint8
from genmodels.images.autoencoder import decoder_of


class NonFinite(RuntimeError):
    """The model made images that are not numbers."""


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions (cuDNN's default is to allow)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return a context that computes in bfloat16 where precision is "bf16"; "fp32": as it is."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def choose_vae(model: Any, name: str) -> None:
    """Let a model's latents be decoded by another VAE than its config names.

    Args:
        model: a method.
        name: of the VAE, a folder or OWNER/NAME on the hub; "": its own.

    Raises:
        ValueError: the model makes pictures, or the VAE cannot be loaded or is of other latents.
    """
    settings = model.cfg.data.vae
    if name and not settings.mean:
        raise ValueError(f"vae={name}: this model makes pictures, no latents; leave it out")
    settings.name = name or settings.name
    picture_shape(model)


def picture_shape(model: Any) -> tuple[int, ...]:
    """Return (C, H, W) of the pictures that generate() makes.

    Raises:
        ValueError: latents whose VAE cannot be loaded.
    """
    decoder = decoder_of(model.cfg.data.vae, model.device)
    return tuple(model.shape) if decoder is None else decoder.picture_shape(tuple(model.shape))


def to_pictures(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a model has made as uint8 pictures (B, C, H, W), on the CPU.

    Args:
        model: a method.
        x: (B, C, h, w) as model.sample returns them: images in [-1, 1], or latents, which the VAE
            of its config decodes.

    Raises:
        ValueError: latents whose VAE cannot be loaded.
    """
    decoder = decoder_of(model.cfg.data.vae, model.device)
    return to_uint8(x).cpu() if decoder is None else decoder(x.float())


def labels_for(
    seeds: Sequence[int], text: str, classes: int, present: Sequence[int] = ()
) -> list[int] | None:
    """Return the label of each seed, a function of the seed alone, or None for random ones.

    Args:
        seeds: whole numbers.
        text: "" (random), "3", "3,5" (seed k gets entry k modulo their number) or "balanced"
            (k modulo the number of classes).
        classes: number of classes of the model.
        present: those that it saw images of; empty: all.

    Raises:
        ValueError: not one of these forms, or no such class.
    """
    if not text:
        return None
    if not classes:
        raise ValueError(f"labels={text}: this model is unconditional; leave labels out")
    if text == "balanced":
        drawn = present or range(classes)
        return [drawn[seed % len(drawn)] for seed in seeds]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < classes for part in parts):
        raise ValueError(f"labels={text}: write balanced, or classes 0..{classes - 1} as 3 or 3,5")
    empty = [part for part in parts if present and int(part) not in present]
    if empty:
        raise ValueError(
            f"labels={text}: class {int(empty[0])} had no training image; choose from "
            f"{', '.join(map(str, present))}"
        )
    return [int(parts[seed % len(parts)]) for seed in seeds]


def class_grid(model: Any, num: int) -> tuple[list[int] | None, int | None]:
    """Return (labels, columns) of a grid of about `num` images with a class in each column.

    Every class has the same number of images, and they are `num` or fewer; few classes have several
    columns each. Of more classes than `num`, or than four times the side of a square, as many as
    make a square are shown, evenly spaced. Without classes it is (None, None).

    Args:
        model: a method; the classes that it saw images of are shown.
        num: images in the grid, > 0.
    """
    if not model.classes or model.CLUSTERS:
        return None, None
    shown, side = list(model.present or range(model.classes)), max(1, round(num**0.5))
    count = len(shown) if len(shown) <= min(num, 4 * side) else side
    shown = [shown[k * len(shown) // count] for k in range(count)]
    row = [label for label in shown for _ in range(max(1, round(side / count)))]
    return row * max(1, num // len(row)), len(row)


def class_columns(labels: Sequence[int] | None) -> int | None:
    """Return how many columns keep each label in columns of its own, None if it recurs otherwise.

    That is a multiple of the labels' period, near a square.
    """
    period = len(set(labels or ()))
    if not labels or any(label != labels[k % period] for k, label in enumerate(labels)):
        return None
    return period * max(1, round(len(labels) ** 0.5 / period))


def generate(
    model: Any,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    precision: str = "fp32",
    progress: bool = True,
    fill: bool = False,
    decode: bool = True,
    **options: Any,
) -> Iterator[tuple[Sequence[int], Sequence[int] | None, torch.Tensor]]:
    """Yield (seeds, labels or None, uint8 images (B, C, H, W) on the CPU), batch by batch.

    Latents are decoded by the VAE that the model's config names.

    Args:
        model: a method in eval mode.
        seeds: whole numbers, one for each image.
        labels: one for each seed, or None.
        batch: images at a time; changes no image.
        precision: "fp32" (without TF32) or "bf16" (autocast).
        progress: show a bar.
        fill: of a compiled network, fill up a batch that is the only one too. A last batch always
            is, with images made once more and dropped: another size would be compiled anew.
        decode: false yields latents in place of pictures, float32, as the model makes them.
        options: passed on to model.sample.

    Raises:
        NonFinite: the model made images that are not numbers.
        ValueError: an option that the model refuses, a batch that does not fit into memory, or
            latents whose VAE cannot be loaded.
    """
    if decode:
        picture_shape(model)  # before hours of sampling
    size = batch if fill else min(batch, len(seeds))
    bar = tqdm(total=len(seeds), desc="sampling", unit="img", disable=not progress, delay=0.5)
    with bar:  # delayed, so that an option refused by the model leaves one clean line
        for start in range(0, len(seeds), batch):
            some = seeds[start : start + batch]
            their_labels = None if labels is None else labels[start : start + batch]
            too_large = f"batch={batch}: does not fit into memory; try batch={max(1, batch // 4)}"
            with autocast(model.device, precision), tf32(False), cli.fits_memory(too_large):
                x = _sample(model, some, their_labels, size, options)
                if not torch.isfinite(x).all():
                    raise NonFinite(
                        f"seeds {some[0]}..{some[-1]}: the model made non-finite images"
                    )
                pictures = to_pictures(model, x) if decode else x.float().cpu()
            yield some, their_labels, pictures
            bar.update(len(some))


def _sample(
    model: Any,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    size: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return model.sample's images; a compiled network makes `size` of them: it knows no other."""
    more = size - len(seeds)
    if more <= 0 or "compile" not in model.faster:
        return model.sample(seeds, labels, **options)
    labels = None if labels is None else [*labels, *[labels[0]] * more]
    return model.sample([*seeds, *[seeds[0]] * more], labels, **options)[: len(seeds)]


def speed_up(models: Sequence[Any], options: Any, count: int) -> dict[str, Any]:
    """Do what a command's compile= and channels_last= ask for; return more settings of generate().

    Those keep a compiled network to one size of batch.

    Args:
        models: to speed up; a None among them is passed over.
        options: of the command, with batch, compile and channels_last.
        count: images of all processes together.

    Raises:
        ValueError: channels_last=true for a network without images inside.
    """
    for model in filter(None, models):
        if options.channels_last and all(p.ndim != 4 for p in model.net.parameters()):
            name = model.cfg.network.name
            raise ValueError(
                f"channels_last=true: network.name={name} has no convolution; leave it out"
            )
        model.speed_up(compile=options.compile, channels_last=options.channels_last)
    if not options.compile:
        return {}
    return {"batch": min(options.batch, math.ceil(count / distributed.world())), "fill": True}


def warm_up(
    model: Any, seeds: Sequence[int], labels: Sequence[int] | None = None, **settings: Any
) -> float:
    """Make this process's first batch, drop it, say so and return its seconds.

    Args:
        model: with a compiled network, which is compiled in this.
        seeds, labels: of all processes' images, as for generate.
        settings: of generate, with those that speed_up returns.

    Raises:
        ValueError: the images come without the network, or torch cannot compile here.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    started, first = time.monotonic(), distributed.share(len(seeds))[: settings["batch"]]
    some = [seeds[i] for i in first]
    theirs = None if labels is None else [labels[i] for i in first]
    try:
        for _ in generate(model, some, theirs, **{**settings, "progress": False}):
            if not model.nfe:
                raise ValueError(
                    "compile=true: these images come without the network; leave it out"
                )
    except BackendCompilerFailed as error:  # no C++ compiler on a CPU, for one
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(
            f"compile=true: torch cannot compile here ({reason}); leave it out"
        ) from None
    seconds = time.monotonic() - started
    if distributed.rank() == 0:
        print(f"compile: warmed up in {seconds:.1f} s with {settings['batch']} images, not timed")
    return seconds


def generate_all(
    model: Any, seeds: Sequence[int], labels: Sequence[int] | None = None, **options: Any
) -> torch.Tensor:
    """Return the images (N, C, H, W) of all seeds, on the CPU; arguments as for generate."""
    parts = [images for _, _, images in generate(model, seeds, labels, **options)]
    return torch.cat(parts) if parts else torch.empty(0, *picture_shape(model), dtype=torch.uint8)


def generate_everywhere(
    model: Any, seeds: Sequence[int], labels: Sequence[int] | None = None, **options: Any
) -> torch.Tensor:
    """Return generate_all's images on every process, each of which makes its share."""
    share = distributed.share(len(seeds))
    shown = options.pop("progress", True) and distributed.rank() == 0
    with distributed.together():
        images = generate_all(
            model,
            [seeds[i] for i in share],
            None if labels is None else [labels[i] for i in share],
            progress=shown,
            **options,
        )
    return distributed.gather_rows(images, len(seeds))


def check_folder(key: str, folder: Path, seeds: Sequence[int] | None) -> None:
    """Raise ValueError if PNGs of these seeds in this folder would mix with those of others.

    Args:
        key: what errors call the folder.
        folder: where the PNGs would go; it need not exist.
        seeds: whole numbers; None: no PNGs are meant.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}={folder}: is a file; name a folder")
    if seeds is None:
        return
    asked = {f"{seed:06d}" for seed in seeds}
    numbered = folder.glob("[0-9]*.png")
    strange = sorted(p.name for p in numbered if p.stem.isdecimal() and p.stem not in asked)
    if strange:
        raise ValueError(
            f"{key}={folder}: holds images of {len(strange)} other seeds ({strange[0]}, ...); "
            "name an empty folder or delete them"
        )
