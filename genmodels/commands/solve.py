"""Inverse problems on files: sample.py solve=.

    y = A x + noise n        A of genmodels/sampling/operators.py, on the [-1, 1] scale of pictures

PATH holds measurements y, or with clean=true clean pictures, which are measured first: picture k
gets the noise of numpy.random.default_rng([seed, k]). Sample j of picture k of K has the seed
seed + j K + k. OUT holds

    0/NAME, 1/NAME, ...    the samples, each file as it came
    mean/NAME              their mean
    spread/NAME            their standard deviation in each pixel, in the unit of the file
    solve.png              rows of (clean,) measurement, samples, mean, spread
    scores.json            a row for each picture, and the means of all
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from genmodels import cli, distributed, generation, images
from genmodels.atomic import write_json
from genmodels.config import Section, check, setting
from genmodels.config.words import DEVICES
from genmodels.images import pictures
from genmodels.images.scale import whole_range
from genmodels.metrics.restoration import LEAST_SIDE, psnr, ssim
from genmodels.sampling.operators import Mask, Operator, named_operator
from genmodels.version import __version__

SHEET = "solve.png"
SCORES = "scores.json"
SHOWN, SHOWN_SAMPLES = 8, 4  # pictures and samples of the sheet


@dataclass
class SolveOptions(Section):
    """What sample.py solve= takes beside the settings of its solvers."""

    solve: str = setting("", "pictures that were measured, to be reconstructed")
    operator: str = setting(
        "",
        "needed: what measured them: inpaint[:right|left|top|bottom|centre|SHARE] (hidden), "
        "mask:FILE (white = known), downsample[:4], bicubic[:4], blur[:2] (pixels, circular), grey",
    )
    noise: float | None = setting(
        None, "needed: standard deviation of y's noise on the [-1, 1] scale; 0: none", ge=0
    )
    clean: bool = setting(False, "the pictures are clean ones: measure them first, and score")
    samples: int = setting(4, "samples of each picture", ge=1)
    seed: int = setting(0, "the first seed", ge=0, lt=2**62)
    labels: str = setting("", "classes of the pictures, as for generating; empty: none")
    batch: int = setting(64, "samples at a time; changes no picture", ge=1)
    out: str = setting("samples", "folder to write to")
    device: str = setting("auto", "what computes", choices=DEVICES)
    ema: bool = setting(True, "the averaged weights; false: the raw ones of a checkpoint")


@dataclass(frozen=True)
class File:
    """A file of pictures.

    Attributes:
        name: of what is written.
        values: (N, H, W, C), as they were read.
        shape: the array's in the file.
        first: number of its first picture among all.
        x: clean pictures on [-1, 1], (N, C, H, W), if it has such.
        y: what was measured of each, float32 (N, ...).
    """

    name: str
    values: np.ndarray
    shape: tuple[int, ...]
    first: int
    x: torch.Tensor | None
    y: torch.Tensor

    def write(self, path: Path, made: np.ndarray) -> None:
        """Write pictures (N, H, W, C), in the unit of its values, as a file of its kind."""
        size = made.shape[1:]
        shape = (len(made), *size) if len(self.shape) == 4 else size
        if len(self.shape) == 2 and size[2] == 1:
            shape = size[:2]
        like = np.zeros(made.shape, self.values.dtype)
        pictures.Picture(self.name, like, shape).write(path, made)


@dataclass(frozen=True)
class Entry:
    """A file that was looked at; its pictures are read again when it is their turn."""

    name: str
    number: int  # of pictures
    read: Callable[[], File]


def solve_files(
    model: Any, options: SolveOptions, settings: dict[str, Any], out: Path, name: str
) -> None:
    """Reconstruct what options.solve names, each process its share, and write it to `out`.

    Args:
        model: a method with SOLVERS.
        options: of the command.
        settings: of SolverOptions, those that were given.
        out: the folder.
        name: of the model, for scores.json.

    Raises:
        ValueError: what the model, the operator or a picture does not go with.
    """
    check(options.operator, "operator", "", "say what measured them: operator=inpaint, say")
    check(options.noise is not None, "noise", "", "say how strong its noise is: noise=0.05, or 0")
    kind, _, mask = options.operator.partition(":")
    known = _read_mask(mask, model) if kind == "mask" and mask else None
    check(model.SOLVERS, "solve", options.solve, f"{type(model).__name__} solves none; edm does")
    operator = named_operator(options.operator, model.shape, known)
    entries = _entries(options, model, operator)
    number = sum(entry.number for entry in entries)
    names = [f"{part}/{entry.name}" for part in _parts(options) for entry in entries]
    _check_out(out, [Path(text) for text in (options.solve, mask) if text], names)
    given = generation.labels_for(range(number), options.labels, model.classes, model.present)
    call = partial(model.solve, operator=operator, noise=options.noise, **settings)
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    shown: list[list[torch.Tensor]] = []
    mine = [entries[i] for i in distributed.share(len(entries))]
    first = distributed.rank() == 0
    with tqdm(
        total=sum(entry.number for entry in mine) * options.samples,
        desc="solving",
        unit="img",
        delay=0.5,
        disable=None if first else True,
    ) as bar:
        for group in _groups(mine, options):
            drawn = _drawn(group, call, given, number, options, bar)
            for file, x in zip(group, drawn.split([len(file.y) for file in group])):
                _write(out, file, x, operator, options)
                rows += _rows(file, x, operator, given)
                for i in range(min(len(x), SHOWN - len(shown))):
                    clean = None if file.x is None else file.x[i]
                    shown.append(sheet_row(x[i], file.y[i], clean))
    nfe = model.nfe
    rows = [row for part in distributed.gather_to_all(rows) for row in part]
    rows.sort(key=lambda row: row["index"])
    if not first:
        return
    cells = [cell for row in shown for cell in row]
    images.write_png(out / SHEET, images.contact_sheet(torch.stack(cells), len(shown[0])))
    scores = _means(rows)
    facts = {
        "metrics": scores,
        "model": name,
        "data": options.solve,
        "num": len(rows),
        "operator": options.operator,
        "noise": options.noise,
        "solver": settings.get("solver") or model.SOLVERS[0],
        "samples": options.samples,
        "seed": options.seed,
        "settings": settings,
        "nfe": nfe,
        "rows": rows,
        "seconds": round(time.monotonic() - started, 2),
        "versions": {"genmodels": __version__, "torch": torch.__version__},
    }
    write_json(out / SCORES, facts)
    _print(rows, scores, options, out, nfe)


def _parts(options: SolveOptions) -> list[str]:
    """Return the folders that are written."""
    return [*map(str, range(options.samples)), "mean", "spread"]


def _read_mask(path: str, model: Any) -> torch.Tensor:
    """Return which pixels a file says are known, bool like the model's pictures."""
    mask = images.read_images(path, model.shape[0])
    check(len(mask) == 1, "operator", f"mask:{path}", f"holds {len(mask)} pictures; make it one")
    mask = mask[0].expand(model.shape[0], -1, -1) if len(mask[0]) == 1 else mask[0]
    shapes = f"is {tuple(mask.shape)}, the model makes {tuple(model.shape)}"
    check(tuple(mask.shape) == tuple(model.shape), "operator", f"mask:{path}", shapes)
    return mask >= 128


def _entries(options: SolveOptions, model: Any, operator: Operator) -> list[Entry]:
    """Return all files, each looked at.

    Raises:
        ValueError: as _read.
    """
    shape = tuple(operator(torch.zeros(1, *model.shape)).shape[1:])
    wanted = tuple(model.shape) if options.clean else shape
    entries: list[Entry] = []
    first = 0
    for name, reader in pictures.find_pictures(Path(options.solve), key="solve").items():
        read = partial(_read, name, reader, first, options, operator, wanted)
        entries.append(Entry(name, len(read().y), read))
        first += entries[-1].number
    return entries


def _read(
    name: str,
    reader: Callable[[], pictures.Planes],
    first: int,
    options: SolveOptions,
    operator: Operator,
    wanted: tuple[int, ...],
) -> File:
    """Return a file, read and measured.

    Args:
        name: of what is written.
        reader: opens it.
        first: number of its first picture among all.
        options: of the command.
        operator: A.
        wanted: shape of its pictures.

    Raises:
        ValueError: a stack, or pictures of another shape than the operator measures.
    """
    with contextlib.closing(reader()) as picture, cli.name_in_errors(picture.name):
        one = len(picture) == 1 or not picture.is_stack
        one = one and not name.endswith(".zarr")
        check(one, "solve", options.solve, "is a stack of planes; save each alone")
        scale = whole_range(picture.dtype)
        planes = torch.stack([scale.tensor(picture.plane(k)) for k in range(len(picture))])
        if planes.shape[1] == 1 < wanted[0]:  # grey ones stand for colour
            planes = planes.expand(-1, wanted[0], -1, -1)
        says = "the model makes" if options.clean else f"operator={options.operator} measures"
        fits = tuple(planes.shape[1:]) == wanted
        check(fits, "solve", options.solve, f"is of {tuple(planes.shape[1:])}, {says} {wanted}")
        values = np.stack([picture.plane(k) for k in range(len(picture))])
    measures = options.clean or isinstance(operator, Mask)  # what stands in hidden pixels goes
    x, y = planes if options.clean else None, operator(planes) if measures else planes
    if options.clean and options.noise:
        rngs = [np.random.default_rng([options.seed, first + k]) for k in range(len(y))]
        n = np.stack([rng.standard_normal(y.shape[1:]) for rng in rngs])
        y = (y.double() + options.noise * torch.from_numpy(n)).float()
    return File(name, values, getattr(picture, "shape", ()), first, x, y)


def _check_out(out: Path, sources: Sequence[Path], names: Sequence[str]) -> None:
    """Raise ValueError if these names written to `out` would mix with other pictures.

    Args:
        out: the folder.
        sources: what is read.
        names: of what is written, PART/NAME.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    parts = {out.resolve() / name.partition("/")[0] for name in names}
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"out={out}: lies in the folder of the pictures; name one outside")
        if parts & {source.resolve(), *source.resolve().parents}:
            raise ValueError(f"out={out}: holds {source}, which is read; name another")
    kept = [path for path in out.rglob("*") if path.suffix.lower() in pictures.KEPT]
    there = {str(path.relative_to(out)) for path in kept} - {SHEET}
    if strange := sorted(there - set(names)):
        raise ValueError(
            f"out={out}: holds {len(strange)} other pictures ({strange[0]}, ...); name an empty "
            "folder or delete them"
        )


def _groups(entries: Sequence[Entry], options: SolveOptions) -> Iterator[list[File]]:
    """Yield files that together make a batch, or more; no others are in memory."""
    group: list[File] = []
    for entry in entries:
        group.append(entry.read())
        if sum(len(each.y) for each in group) * options.samples >= options.batch:
            yield group
            group = []
    if group:
        yield group


def _drawn(
    group: Sequence[File],
    call: Any,
    labels: list[int] | None,
    number: int,
    options: SolveOptions,
    bar: Any,
) -> torch.Tensor:
    """Return samples (N, samples, C, H, W) on [-1, 1] of the pictures of these files."""
    pairs = [
        (file.y[i], file.first + i)
        for file in group
        for i in range(len(file.y))
        for _ in range(options.samples)
    ]
    seeds = [options.seed + (n % options.samples) * number + k for n, (_, k) in enumerate(pairs)]
    made, batch = [], options.batch
    too_large = f"batch={batch}: does not fit into memory; try batch={max(1, batch // 4)}"
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        theirs = None if labels is None else [labels[k] for _, k in some]
        with generation.tf32(False), cli.fits_memory(too_large):
            x = call(
                torch.stack([y for y, _ in some]), seeds=seeds[start : start + batch], labels=theirs
            )
        if not torch.isfinite(x).all():
            raise generation.NonFinite(f"seeds {seeds[start]}...: the solver left finite numbers")
        made.append(x.cpu())
        bar.update(len(some))
    x = torch.cat(made)
    return x.reshape(-1, options.samples, *x.shape[1:])


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation over samples, (N, C, H, W); 0 of one."""
    return x.std(dim=1) if x.shape[1] > 1 else torch.zeros_like(x[:, 0])


def _write(
    out: Path, file: File, x: torch.Tensor, operator: Operator, options: SolveOptions
) -> None:
    """Write samples, mean and spread of a file's pictures."""
    scale = whole_range(file.values.dtype)

    def pixels(image: torch.Tensor) -> np.ndarray:
        return scale.from_image(image.clamp(-1, 1).movedim(1, -1).numpy())

    made = {str(j): pixels(x[:, j]) for j in range(options.samples)}
    made["mean"] = pixels(x.double().mean(dim=1))
    if isinstance(operator, Mask) and not options.noise:  # the values themselves, of floats too
        known = operator.known.expand(x.shape[2:]).movedim(0, -1).numpy()
        made = {part: np.where(known, file.values, values) for part, values in made.items()}
    made["spread"] = _spread(x).movedim(1, -1).numpy() * ((scale.white - scale.black) / 2)
    for part, values in made.items():
        file.write(out / part / file.name, values)


def _unit(image: torch.Tensor) -> np.ndarray:
    """Return a picture (C, H, W) on [-1, 1] as (H, W, C) on [0, 1], clipped, float64."""
    return ((image.double() + 1) / 2).clamp(0, 1).movedim(0, -1).numpy()


def picture_scores(
    x: torch.Tensor, y: torch.Tensor, operator: Operator, clean: torch.Tensor | None = None
) -> dict[str, float]:
    """Return the scores of samples of one picture.

    consistency is the root mean square of A x - y over samples and measured values: of draws of
    the posterior it is the noise. spread is that of the samples about their mean, on [0, 1]. Of a
    clean picture also the PSNR of the mean, of a sample and of A^+ y, and SSIM of the mean.

    Args:
        x: (samples, C, H, W) on [-1, 1].
        y: what was measured, without a batch.
        operator: A.
        clean: (C, H, W) on [-1, 1].
    """
    left = operator(x) - y
    if isinstance(operator, Mask):
        left = (x - y)[:, operator.known.expand(x.shape[1:])]
    spread = _spread(x[None]).double()
    scores = {
        "consistency": float(left.double().square().mean().sqrt()),
        "spread": float(spread.square().mean().sqrt()) / 2,
    }
    if clean is not None:
        truth, mean = _unit(clean), _unit(x.mean(dim=0))
        scores["psnr"] = psnr(mean, truth)
        scores["psnr_sample"] = float(np.mean([psnr(_unit(each), truth) for each in x]))
        scores["psnr_pinv"] = psnr(_unit(operator.pull(y[None], 0.0)[0]), truth)
        if min(truth.shape[:2]) >= LEAST_SIDE:
            scores["ssim"] = ssim(mean, truth)
    return scores


def _rows(
    file: File, x: torch.Tensor, operator: Operator, labels: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Return the rows of a file's pictures, of samples x (N, samples, C, H, W)."""
    rows = []
    for i, y in enumerate(file.y):
        name = f"{file.name}[{i}]" if len(file.y) > 1 else file.name
        clean = None if file.x is None else file.x[i]
        row: dict[str, Any] = {"index": file.first + i, "image": name}
        if labels is not None:
            row["label"] = labels[file.first + i]
        rows.append(row | picture_scores(x[i], y, operator, clean))
    return rows


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {metric: {"value": mean over pictures}}."""
    keys = [key for key in rows[0] if key not in ("index", "image", "label")]
    return {key: {"value": float(np.mean([row[key] for row in rows]))} for key in keys}


def sheet_row(
    x: torch.Tensor, y: torch.Tensor, clean: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return (clean,) measurement, samples, mean and spread as uint8 cells (3, H, W).

    The spread is brightened until its largest is white. Arguments as for picture_scores.
    """
    size = tuple(x.shape[-2:])
    measured = functional.interpolate(y[None], size, mode="nearest")[0]
    spread = _spread(x[None])[0]
    shown = spread / max(float(spread.max()), 1e-9) * 2 - 1
    cells = [] if clean is None else [clean]
    cells += [measured, *x[:SHOWN_SAMPLES], x.mean(dim=0), shown]
    return [images.to_uint8(cell).expand(3, -1, -1) for cell in cells]


def _print(
    rows: Sequence[dict[str, Any]],
    scores: dict[str, dict[str, float]],
    options: SolveOptions,
    out: Path,
    nfe: int,
) -> None:
    """Print the table of the pictures, of clean ones, and a line about all."""
    if options.clean:
        shown = {"psnr_pinv": "pseudo-inverse", "psnr": "PSNR of mean", "psnr_sample": "of sample"}
        shown |= {"ssim": "SSIM"} if "ssim" in rows[0] else {}
        shown |= {"spread": "spread", "consistency": "|Ax-y|"}
        mean = {key: score["value"] for key, score in scores.items()} | {"image": "mean"}
        lines = [
            [row["image"], *(f"{row[key]:{'.2f' if 'psnr' in key else '.4f'}}" for key in shown)]
            for row in (*rows, mean)
        ]
        title = f"{options.solve}: {options.operator}, noise {options.noise:g}"
        cli.print_table(title, ["picture", *shown.values()], lines)
    left = scores["consistency"]["value"]
    print(
        f"{len(rows)} pictures, {options.samples} samples each, {nfe} network evaluations, "
        f"|Ax-y| {left:.3g} of noise {options.noise:g}: {out}"
    )
