"""What each crop leaves of a picture: mean, deviation and fine detail of ImageNet photographs.

    python -m benchmarks.crops [root=DATA] [out=benchmarks/results/crops.json] [plot=docs/crops.png]
    python -m benchmarks.crops read=benchmarks/results/crops.json plot=docs/crops.png

In root (else $GENMODELS_DATA) lies imagenet_sample: 1,000 photographs, one of each class, at 64x64
(made by adm from the originals), which are halved here, and the originals of 41 of them, which are
made 64x64. They are read as a training reads them. Mean and deviation are those of `python -m
genmodels.data info`, on the [-1, 1] scale; the gradient's power is the mean square difference of
horizontal neighbours, in grey levels squared; the spectrum is the mean power at each distance from
frequency 0.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record
from genmodels import cli, images
from genmodels.config import DataConfig, Section, setting, settings_of
from genmodels.config.words import split_words, typed_words
from genmodels.data import commands, data_root, load_split

CROPS = ("center", "adm", "lanczos")


@dataclass
class Options(Section):
    """What this command takes."""

    root: str = setting("", "folder with imagenet_sample; empty: $GENMODELS_DATA")
    out: str = setting("", "JSON file to write")
    plot: str = setting("", "PNG file to draw")
    read: str = setting("", "JSON file to draw from, in place of measuring")


def gradient_power(pixels):
    """Return the mean square difference of horizontal neighbours of uint8 images."""
    x = pixels.double()
    return (x[..., 1:] - x[..., :-1]).square().mean().item()


def spectrum(pixels):
    """Return the mean power at frequencies 1 .. side / 2, in cycles per image, of uint8 images."""
    side = pixels.shape[-1]
    power = torch.fft.fft2(pixels.double()).abs().square().mean((0, 1)) / side**2
    axis = torch.fft.fftfreq(side, 1 / side)
    distance = (axis[:, None].square() + axis.square()).sqrt().round().long().flatten()
    sums = torch.zeros(int(distance.max()) + 1, dtype=torch.float64)
    means = sums.index_add(0, distance, power.flatten()) / torch.bincount(distance)
    return means[1 : side // 2 + 1].tolist()


def measure(title, root, side):
    """Return a row for each crop of the pictures in a folder or zip."""
    kind = "zip" if root.suffix == ".zip" else "imagefolder"
    made = {}
    for crop in CROPS:
        cfg = DataConfig(name=kind, root=str(root), resolution=side, crop=crop, holdout=0.0)
        made[crop] = load_split(cfg, "train")[0]
    rows = []
    for crop, pixels in made.items():
        mean, std = images.mean_and_std(pixels)
        off = (pixels.int() - made["lanczos"].int()).abs()
        rows.append(
            {
                "pictures": title,
                "side": side,
                "count": len(pixels),
                "crop": crop,
                "mean": round(mean.item(), 4),
                "std": round(std.item(), 4),
                "gradient_power": round(gradient_power(pixels), 1),
                "off_lanczos": round(off.double().mean().item(), 2),
                "spectrum": [float(f"{power:.4g}") for power in spectrum(pixels)],
            }
        )
    return rows


def rows_of(root):
    """Return the rows of both sets of pictures."""
    sample = root / "imagenet_sample"
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "a.zip"
        commands.convert([str(sample / "imagenet_sample_64.npz")], {"out": str(packed)})
        rows = measure("1,000 at 64x64", packed, 32)
    return rows + measure("originals", sample / "jpeg", 64)


def draw(path, rows):
    """Write the figure: the gradient's power, and the spectrum relative to lanczos."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sets = list(dict.fromkeys((row["pictures"], row["side"], row["count"]) for row in rows))
    for k, crop in enumerate(CROPS):
        own = [row for row in rows if row["crop"] == crop]
        bars = left.bar(
            [place + 0.27 * (k - 1) for place in range(len(sets))],
            [row["gradient_power"] for row in own],
            width=0.25,
            label=crop,
        )
        left.bar_label(bars, fmt="%.0f", fontsize=8)
        base = next(row for row in rows if (row["crop"], row["side"]) == ("lanczos", 64))
        row = next(row for row in own if row["side"] == 64)
        ratio = [a / b for a, b in zip(row["spectrum"], base["spectrum"])]
        right.plot([f / 64 for f in range(1, len(ratio) + 1)], ratio, label=crop)
    names = [f"{count} {name}" if name == "originals" else name for name, _, count in sets]
    left.set_xticks(range(len(sets)), [f"{n}\nto {s[1]}x{s[1]}" for n, s in zip(names, sets)])
    left.set_ylabel("gradient power (grey levels squared)")
    right.set_xlabel("frequency (cycles per pixel), originals to 64x64")
    right.set_ylabel("power, lanczos = 1")
    right.set_ylim(0)
    right.legend(loc="lower left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv):
    """Measure, print the table, write the JSON and the figure."""
    _, words, _ = split_words(argv)
    options = Options(**typed_words(words, settings_of(Options)))
    if options.read:
        rows = json.loads(Path(options.read).read_text())["rows"]
    else:
        with cli.warnings_as_notes():
            rows = rows_of(data_root(DataConfig(root=options.root)))
    columns = ("pictures", "side", "count", "crop", "mean", "std", "gradient_power", "off_lanczos")
    cli.print_table("crops", columns, [[row[column] for column in columns] for row in rows])
    if options.out:
        command = record.command_line("crops", argv, without=("root", "out", "plot", "read"))
        record.write(Path(options.out), command, rows=rows)
    if options.plot:
        draw(options.plot, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
