"""Images from a model, in batches, on all processes."""

import contextlib

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from genmodels import cli
from genmodels.distributed import process_state
from genmodels.images import to_uint8


class NonFinite(RuntimeError):
    """The model made images that are not numbers."""


@contextlib.contextmanager
def tf32(allowed):
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


def labels_for(seeds, text, classes):
    """Return the label of each seed, a function of the seed alone, or None for random ones.

    Args:
        seeds: whole numbers.
        text: "" (random), "3", "3,5" (seed k gets entry k modulo their number) or "balanced"
            (k modulo the number of classes).
        classes: number of classes of the model.

    Raises:
        ValueError: not one of these forms, or no such class.
    """
    if not text:
        return None
    if not classes:
        raise ValueError(f"labels={text}: this model is unconditional; leave labels out")
    if text == "balanced":
        return [seed % classes for seed in seeds]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < classes for part in parts):
        raise ValueError(f"labels={text}: write balanced, or classes 0..{classes - 1} as 3 or 3,5")
    return [int(parts[seed % len(parts)]) for seed in seeds]


def generate(model, seeds, labels=None, *, batch=64, precision="fp32", progress=True, **options):
    """Yield (seeds, labels or None, uint8 images (B, C, H, W) on the CPU), batch by batch.

    Args:
        model: a method in eval mode.
        seeds: whole numbers, one for each image.
        labels: one for each seed, or None.
        batch: images at a time; changes no image.
        precision: "fp32" (without TF32) or "bf16" (autocast).
        progress: show a bar.
        options: passed on to model.sample.
    """
    bar = tqdm(total=len(seeds), desc="sampling", unit="img", disable=not progress, delay=0.5)
    with bar:  # delayed, so that an option refused by the model leaves one clean line
        for start in range(0, len(seeds), batch):
            own = seeds[start : start + batch]
            own_labels = None if labels is None else labels[start : start + batch]
            too_large = f"batch={batch}: does not fit into memory; try batch={max(1, batch // 4)}"
            with autocast(model.device, precision), tf32(False), cli.fits_memory(too_large):
                x = model.sample(own, own_labels, **options)
            if not torch.isfinite(x).all():
                raise NonFinite(f"seeds {own[0]}..{own[-1]}: the model made non-finite images")
            yield own, own_labels, to_uint8(x).cpu()
            bar.update(len(own))


def generate_all(model, seeds, labels=None, **options):
    """Return (uint8 images (N, C, H, W), labels or None) of all seeds; arguments as generate."""
    seeds = list(seeds)
    parts = [images for _, _, images in generate(model, seeds, labels, **options)]
    return torch.cat(parts), labels


def generate_everywhere(model, seeds, labels=None, **options):
    """Return generate_all's images on every process, each of which makes its share."""
    state = process_state()
    share = slice(state.process_index, None, state.num_processes)
    own_labels = None if labels is None else labels[share]
    if not seeds[share]:
        own = torch.empty(0, *model.shape, dtype=torch.uint8)
    else:
        options |= {"progress": options.get("progress", True) and state.is_main_process}
        own = generate_all(model, seeds[share], own_labels, **options)[0]
    if state.num_processes == 1:
        return own
    shares = gather_object([own.numpy()])
    images = np.empty((len(seeds), *model.shape), np.uint8)
    for rank, part in enumerate(shares):
        images[rank :: state.num_processes] = part
    return torch.from_numpy(images)


def check_folder(key, folder, seeds):
    """Raise ValueError if PNGs of these seeds in this folder would mix with those of others.

    Args:
        key: what errors call the folder.
        folder: a Path.
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
