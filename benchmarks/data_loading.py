"""How fast the training stream reads images from disk, against images in memory (CPU).

    python -m benchmarks.data_loading [out=benchmarks/results/data.json] [num=2000 side=64]

The same random images (smooth, 3 channels) lie in memory, in an .npy, in a .zip and in a folder.
The streams take turns, a few batches each; a round gives each one's images per second of wall time,
its ratio to memory, and this process's CPU time for an image (all of it without workers). Reported
are medians over the rounds. Files were written just before, so that the system has them cached:
what is measured is decoding and copying, not the disk. On a busy machine trust the CPU time.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import record, timing
from genmodels import cli, images
from genmodels.config import DataConfig, Section, setting, settings_of
from genmodels.config.words import split_words, typed_words
from genmodels.data import TrainStream, commands, load_split


@dataclass
class Options(Section):
    """What this command takes."""

    out: str = setting("", "JSON file to write")
    num: int = setting(2000, "images")
    side: int = setting(64, "pixels")
    batch: int = setting(128, "images in a batch")
    rounds: int = setting(9, "how often each stream has its turn")
    seed: int = setting(0, "of the images and the order")


def make(folder, num, side, seed):
    """Write the images as .npy, .zip and folder; return {name: DataConfig}."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 8, 8, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noise = 0.02 * torch.randn(smooth.shape, generator=rng)
    pixels = images.to_uint8(2 * (smooth + noise) - 1)
    np.save(folder / "a.npy", pixels.permute(0, 2, 3, 1).numpy())
    commands.convert([str(folder / "a.npy")], {"out": str(folder / "a.zip")})
    tree = images.Tree(folder / "a.zip")
    for name in tree.names:
        (folder / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "a" / name).write_bytes(tree.read_bytes(name))
    roots = {"npy": "a.npy", "zip": "a.zip", "imagefolder": "a"}
    return {
        name: DataConfig(name=name, root=str(folder / root), holdout=0.0, device="disk")
        for name, root in roots.items()
    }


def streams(configs, options):
    """Return {what: endless iterator of batches}."""
    settings = (options.seed, options.batch, lambda: 0)
    memory = load_split(DataConfig(**vars(configs["npy"]) | {"device": "cpu"}), "train")
    found = {"memory": iter(TrainStream(*memory, *settings))}
    for name, cfg in configs.items():
        for workers in (0, 1, 2):
            stream = TrainStream(*load_split(cfg, "train"), *settings, workers=workers)
            found[f"{name}, {workers} workers"] = iter(stream)
    return found


def rate(iterator, batches):
    """Return (images per second of wall time, CPU microseconds an image) over these batches."""
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    for _ in range(batches):
        count += len(next(iterator)["n"])
    return count / (time.perf_counter() - start), 1e6 * (time.process_time() - cpu) / count


def main(argv):
    """Measure, print the table, write the JSON."""
    _, words, _ = split_words(argv)
    options = Options(**typed_words(words, settings_of(Options)))
    started = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = streams(make(Path(folder), options.num, options.side, options.seed), options)
        for iterator in found.values():
            rate(iterator, 6)  # starts the workers and empties what they read ahead
        samples = {name: [] for name in found}
        for _ in range(options.rounds):
            for name, iterator in found.items():
                # Long enough that batches read ahead while the others had their turn do not count.
                samples[name].append(rate(iterator, 20))
    rows = []
    for name, pairs in samples.items():
        ratios = [a[0] / b[0] for a, b in zip(pairs, samples["memory"])]
        rates, cpu = zip(*pairs)
        rows.append(
            {
                "stream": name,
                "images_per_second": round(statistics.median(rates)),
                "of_memory": round(statistics.median(ratios), 3),
                "cpu_us_per_image": round(statistics.median(cpu), 1),
            }
        )
    title = "{num} images of {side} x {side}, batch {batch}".format(**asdict(options))
    cli.print_table(
        title,
        ("stream", "images/s", "of memory", "CPU us/image here"),
        [tuple(row.values()) for row in rows],
    )
    if options.out:
        command, seconds = record.command_line("data_loading", argv), time.monotonic() - started
        record.write(
            options.out,
            command,
            options=asdict(options),
            machine=timing.machine("cpu"),
            rows=rows,
            seconds=round(seconds, 1),
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
