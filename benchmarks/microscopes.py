"""Restoring a camera's noise: a model of Gaussian noise told and not told it, filters, BM3D.

    python -m benchmarks.microscopes [model=pretrained/noise2score_grey] [only=scenes] [num=4]
        [side=256] [seed=0] [bm3d=true] [out=benchmarks/results]

Pictures of 16 bits, made here: blobs and lines without grain (scenes), and photographs of Set12, a
square of `side` from the middle of each, scaled to PEAK counts of light times the gain. Each gets
the noise of a camera of some gain and read noise over an offset of 100. Restored with

    noisy      nothing
    filter     the best Gaussian filter of .5 to 3 pixels for this very picture
    bm3d       BM3D behind the generalised Anscombe transform, told the truth (if it is installed)
    told       the model, told gain, offset and read noise
    ensemble   the same, ensemble=8
    found      the model, law=poisson-gaussian with nothing told
    auto       law=auto

PSNR has the light's peak. Rows are appended to OUT/microscopes.json, one for each picture and
camera, with the relative error of the deviation found at the mean brightness; what is there is
kept. The table of means is printed, and written as OUT/microscopes.md.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

import genmodels
from benchmarks import record
from benchmarks.noise2score import pictures_in
from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.config import check
from genmodels.config.words import check_flags, parse_value, split_words
from genmodels.images import pictures
from genmodels.metrics.restoration import bm3d, load_bm3d
from genmodels.noise.poisson_gaussian import PoissonGaussian, sample
from genmodels.noise.stabilise import CAMERA, stabilised
from genmodels.restoration import AskedNoise, find_noise, restore_values

OFFSET = 100.0
# (peak of the light in the file's unit, gain, read noise): photons 30 to 400 at gains 1.5 to 4, and
# a well filled well and a very dark one.
CAMERAS = ((4400, 1.0, 2.0), (1600, 4.0, 3.0), (400, 2.0, 3.0), (150, 1.5, 2.0), (60, 2.0, 2.0))
CAMERAS += ((30, 5.0, 5.0),)
WIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
DEFAULTS = {
    "model": "pretrained/noise2score_grey",
    "only": "",
    "num": "4",
    "side": "256",
    "seed": "0",
    "bm3d": "true",
    "out": "benchmarks/results",
}


def scene(seed: int, side: int) -> np.ndarray:
    """Return blobs and lines on a dark ground, float64 (side, side) on [0, 1], brightest 1."""
    rng = np.random.default_rng([7, seed])
    rows, columns = np.mgrid[:side, :side]
    x = np.full((side, side), 0.04)
    for _ in range(side // 8):
        (top, left), width = rng.uniform(0, side, 2), rng.uniform(1.5, side / 14)
        bump = np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / (2 * width**2))
        x += rng.uniform(0.1, 0.8) * bump
    for _ in range(6):
        angle, (top, left) = rng.uniform(0, np.pi), rng.uniform(0, side, 2)
        across = np.cos(angle) * (rows - top) + np.sin(angle) * (columns - left)
        x += rng.uniform(0.2, 0.5) * np.exp(-(across**2) / (2 * rng.uniform(0.8, 2) ** 2))
    return x / x.max()


def clean_pictures(kind: str, num: int, side: int) -> dict[str, np.ndarray]:
    """Return {name: clean picture on [0, 1]} of a kind, scenes or Set12."""
    if kind == "scenes":
        return {f"scene {k}": scene(k, side) for k in range(num)}
    readers = list(pictures.find_pictures(pictures_in("Set12")).items())[:num]
    found = {}
    for name, read in readers:
        x = read().plane(0)[..., 0] / 255
        top, left = ((size - side) // 2 if size > side else 0 for size in x.shape)
        found[name] = x[top : top + side, left : left + side]
    return found


def bm3d_behind(y: np.ndarray, noise: PoissonGaussian, black: float, white: float) -> np.ndarray:
    """Return BM3D's estimate of a picture in its unit, told its noise.

    As the model's: pixels in which the noise is Gaussian, on [0, 1] from the darkest to the
    brightest, and back without bias.
    """
    domain = stabilised(CAMERA, noise.scaled(black, white))
    w = domain.forward(torch.from_numpy((y - black) / (white - black))).numpy()
    low, span = float(w.min()), float(np.ptp(w))
    clean = bm3d(((w - low) / span)[..., None], "gaussian", domain.level / span)[..., 0]
    x = domain.inverse(torch.from_numpy(clean * span + low)).numpy()
    return x * (white - black) + black


def measured(
    model: genmodels.methods.base.GenerativeModule,
    x: np.ndarray,
    camera: tuple[float, float, float],
    rng: np.random.Generator,
    with_bm3d: bool,
) -> dict[str, float | str]:
    """Return the row of one picture under the noise of one camera."""
    peak, gain, read = camera
    clean = peak * x + OFFSET
    y = np.round(sample(peak * x, gain, OFFSET, read, rng)).clip(0, 65535)
    black, white = np.quantile(y, [0.001, 0.999])

    def score(estimate: np.ndarray) -> float:
        return float(-10 * np.log10(np.mean((estimate - clean) ** 2) / peak**2))

    told = AskedNoise(CAMERA, gain=gain, offset=OFFSET, read=read)
    truth = PoissonGaussian.of_camera(gain, OFFSET, read)
    asked = {"told": told, "found": AskedNoise(CAMERA), "auto": AskedNoise("auto")}
    row: dict[str, float | str] = {"noisy": score(y)}
    filtered = {width: score(gaussian_filter(y, width)) for width in WIDTHS}
    width = max(filtered, key=filtered.__getitem__)
    row |= {"filter": filtered[width], "filter_width": width}
    file = {"limits": (0, 65535), "step": 1}
    for key, noise_asked in asked.items():
        noise = find_noise(model, [y], noise_asked, black, white, **file)
        row[key] = score(restore_values(model, y, noise, black, white, clip=False))
        if key == "told":
            eight = restore_values(model, y, noise, black, white, clip=False, ensemble=8)
            row["ensemble"] = score(eight)
        else:
            row[f"{key}_law"] = noise.law
        if key == "found":
            mean = float(clean.mean())
            if isinstance(noise.level, PoissonGaussian):
                deviation = noise.level.deviation(mean)
                row |= {"gain_found": noise.level.gain, "black_found": noise.level.black}
            else:
                deviation = noise.level * (white - black) / 255
            row["deviation_error"] = deviation / truth.deviation(mean) - 1
    if with_bm3d:
        started = time.process_time()
        row["bm3d"] = score(bm3d_behind(y, truth, black, white))
        row["bm3d_cpu_seconds"] = time.process_time() - started
    return row


COLUMNS = ("noisy", "filter", "bm3d", "told", "ensemble", "found", "auto")


def table(rows: list[dict]) -> str:
    """Return the means over the pictures of each kind and camera, as Markdown."""
    head = [
        "pictures",
        "peak, gain, read",
        *COLUMNS,
        "deviation, mean / worst error",
        "under filter",
    ]
    lines = [head, ["---"] * len(head)]
    for group in dict.fromkeys((row["set"], *row["camera"]) for row in rows):
        part = [row for row in rows if (row["set"], *row["camera"]) == group]
        errors = np.abs([row["deviation_error"] for row in part])
        cells = [f"{group[0]} ({len(part)})", ", ".join(f"{v:g}" for v in group[1:])]
        for key in COLUMNS:
            values = [row[key] for row in part if key in row]
            cells.append(f"{np.mean(values):.2f}" if values else "")
        cells.append(f"{100 * errors.mean():.1f} / {100 * errors.max():.1f} %")
        below = [row["image"] for row in part if row["found"] < row["filter"]]
        lines.append([*cells, ", ".join(below) or "none"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run(argv: list[str]) -> None:
    """Measure what the words ask for; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals:
        print(__doc__.strip())
        return
    for key in words:
        check(key in DEFAULTS, key, words[key], f"choose from {', '.join(DEFAULTS)}")
    told = DEFAULTS | words
    num, side, seed = (parse_value(key, told[key], int) for key in ("num", "side", "seed"))
    with_bm3d = parse_value("bm3d", told["bm3d"], bool)
    if with_bm3d:
        load_bm3d()
    model = genmodels.load(told["model"])
    path = Path(told["out"]) / "microscopes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [f"{key}={value}" for key, value in words.items()]
    command = record.command_line("microscopes", shown, without=("out", "only"))
    rows = record.rows(path, command)
    done = {(row["image"], *row["camera"]) for row in rows}
    for kind in ("scenes", "Set12"):
        if told["only"] not in ("", kind):
            continue
        for index, (name, x) in enumerate(clean_pictures(kind, num, side).items()):
            for k, camera in enumerate(CAMERAS):
                if (name, *camera) in done:
                    continue
                rng = np.random.default_rng([seed, index, k])
                row = {"set": kind, "image": name, "camera": list(camera), "offset": OFFSET}
                rows.append(row | measured(model, x, camera, rng, with_bm3d))
                record.write(path, command, seed=seed, threads=torch.get_num_threads(), rows=rows)
    write_bytes(path.with_suffix(".md"), table(rows).encode())
    print(table(rows))


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
