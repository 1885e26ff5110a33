"""Generate images, score them, write the report: the work of the scripts and callbacks."""

import contextlib
import json
import time

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import genmodels
from genmodels import cli
from genmodels.images import to_uint8, write_bytes
from genmodels.metrics.features import extract, load_features
from genmodels.metrics.frechet import Moments, frechet_distance
from genmodels.metrics.manifold import memorised, nn1, nn1_sides
from genmodels.metrics.resampling import resampled


def process_state():
    """Return accelerate's PartialState: one process, or the ranks of torchrun."""
    # Without cpu= every CPU rank takes itself for the only one.
    return PartialState(cpu=not torch.cuda.is_available())


def pick_device(name):
    """Return this process's device of that name; "auto" is a GPU if there is one."""
    own = process_state().device
    return own if name in ("auto", own.type) else torch.device(name)


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
    autocast = contextlib.nullcontext()
    if precision == "bf16":
        autocast = torch.autocast(model.device.type, torch.bfloat16)
    bar = tqdm(total=len(seeds), desc="sampling", unit="img", disable=not progress, delay=0.5)
    with bar:  # delayed, so that an option refused by the model leaves one clean line
        for start in range(0, len(seeds), batch):
            own = seeds[start : start + batch]
            own_labels = None if labels is None else labels[start : start + batch]
            too_large = f"batch={batch}: does not fit into memory; try batch={max(1, batch // 4)}"
            with autocast, tf32(False), cli.fits_memory(too_large):
                x = model.sample(own, own_labels, **options)
            if not torch.isfinite(x).all():
                raise RuntimeError(f"seeds {own[0]}..{own[-1]}: the model made non-finite images")
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


def _fd(generated, reference):
    first, second = Moments(), Moments()
    first.update(generated)
    second.update(reference)
    return float(frechet_distance(first, second))


def _in_blocks(metric):
    """Return the metric as a mean over blocks of generated rows as large as the reference.

    Rows are shuffled first (torch.randperm, seed 0): files come sorted by class.
    """

    def mean(generated, reference):
        generator = torch.Generator().manual_seed(0)
        generated, reference = (
            rows[torch.randperm(len(rows), generator=generator)] for rows in (generated, reference)
        )
        size = min(len(generated), len(reference))
        blocks = generated.split(size)
        scores = [metric(block, reference[:size]) for block in blocks if len(block) == size]
        return sum(scores) / len(scores)

    return mean


# name -> what it is, for --help; Scorer computes them.
METRICS = {
    "fd": "Frechet distance of the features",
    "nn1": "1-nearest-neighbour two-sample accuracy, 0.5 = indistinguishable",
    "nn1_fake": "its share of generated images known as such; below 0.5: they crowd the real ones",
    "nn1_real": "its share of real images known as such; above 0.5: the generated lie elsewhere",
    "memorised": "share nearer to a training image than 95 % of held-out ones are; 0.05 = none",
}


def check_metrics(metrics):
    """Raise ValueError for a name that is no metric."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics={name}: choose from {', '.join(METRICS)}")


class Scorer:
    """Scores generated images against fixed reference images; the reference is prepared once.

    Args:
        metrics: names out of METRICS.
        features: name out of features.FEATURES, or a TorchScript file.
        reference: uint8 images (N, C, H, W).
        train, held_out: uint8 images, for `memorised`.
        equal: compare sets of equal size: `fd` too is the mean over blocks of generated images as
            large as the reference (nn1 always is).
        resamples: random halves behind each error bar; 0 = no error bars.
        weights, device: of the feature network.

    Raises:
        ValueError: an unknown metric, too few images, or what the features refuse.
    """

    def __init__(self, metrics, features, *, reference, train=None, held_out=None, equal=False,
                 resamples=0, weights=None, device="cpu"):  # fmt: skip
        check_metrics(metrics)
        if "memorised" in metrics and (train is None or held_out is None):
            raise ValueError("metrics=memorised: needs a data set with a training and a test split")
        self.features = load_features(features, weights, device)
        self.metrics, self.resamples = metrics, resamples
        self.reference = extract(self.features, reference)
        self.functions = {
            "fd": _in_blocks(_fd) if equal else _fd,
            "nn1": _in_blocks(nn1),
            "nn1_fake": _in_blocks(lambda a, b: nn1_sides(a, b)[0]),
            "nn1_real": _in_blocks(lambda a, b: nn1_sides(a, b)[1]),
        }
        if "memorised" in metrics:
            train, held_out = extract(self.features, train), extract(self.features, held_out)
            self.functions["memorised"] = lambda rows, _: memorised(rows, train, held_out)

    def __call__(self, generated, seed=0):
        """Return {metric: {"value": v, "stderr": s}} of uint8 images (N, C, H, W)."""
        if len(generated) < 4 or len(self.reference) < 4:
            counts = f"{len(generated)} images, {len(self.reference)} in the reference"
            raise ValueError(
                f"num={len(generated)}: scores need at least 4 on each side ({counts})"
            )
        rows = extract(self.features, generated)
        scores = {}
        for name in self.metrics:
            if self.resamples:
                result = resampled(
                    self.functions[name], rows, self.reference, times=self.resamples, seed=seed
                )
                scores[name] = {"value": result.value, "stderr": result.stderr}
            else:
                scores[name] = {"value": self.functions[name](rows, self.reference)}
        return scores


def versions():
    """Return the versions that bear on a result."""
    import diffusers
    import lightning

    packages = (genmodels, torch, lightning, diffusers, np)
    return {package.__name__: package.__version__ for package in packages}


def write_report(path, scores, started, **facts):
    """Write the JSON of an evaluation, all or nothing: metrics, facts, seconds, versions."""
    report = {"metrics": scores} | facts
    report |= {"seconds": round(time.monotonic() - started, 2), "versions": versions()}
    write_bytes(path, json.dumps(report, indent=1).encode())
