"""Three sets of digits against the held-out ones: the picture of the README.

    python -m benchmarks.evaluation_sets [out=benchmarks/results] [picture=docs/evaluation_sets.png]

The sets, of 360 images each: training digits, the same with noise of standard deviation 20 of 255,
and draws of a Gaussian with the pixels' mean and covariance; seed 0. Runs evaluate.py on them;
writes OUT/evaluation_sets.json and the picture.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import record
from genmodels import cli, images
from genmodels.commands.evaluate import evaluate
from genmodels.config import DataConfig
from genmodels.config.words import check_flags, split_words
from genmodels.data import load_split

COUNT, SEED = 360, 0


def sets():
    """Return {name: uint8 images (360, 1, 8, 8)}."""
    random = np.random.default_rng(SEED)
    pixels, _ = load_split(DataConfig(name="digits"), "train")
    pixels = torch.as_tensor(pixels)
    real = pixels[torch.from_numpy(random.permutation(len(pixels))[:COUNT])]
    noisy = real + torch.from_numpy(random.normal(0, 20, real.shape))
    flat = pixels.flatten(1).double().numpy()
    drawn = random.multivariate_normal(flat.mean(0), np.cov(flat.T), COUNT, method="eigh")
    drawn = torch.from_numpy(drawn).view_as(real)
    made = {"real": real, "noisy": noisy, "gaussian": drawn}
    return {key: x.round().clamp(0, 255).to(torch.uint8) for key, x in made.items()}


def measure(argv):
    """Make the sets, score them, draw; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if names or flags or words.keys() - {"out", "picture"}:
        print(__doc__.strip())
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, pixels in sets().items():
            (Path(folder) / name).mkdir()
            for i, image in enumerate(pixels):
                images.write_png(Path(folder) / name / f"{i:06d}.png", image)
        given = ",".join(f"{folder}/{name}" for name in ("real", "noisy", "gaussian"))
        scores = Path(folder) / "sets.json"
        evaluate(
            [
                f"images={given}",
                "reference=digits:test",
                "metrics=fd,kid,prc",
                "features=digits",
                f"out={scores}",
                f"plot={words.get('picture', 'docs/evaluation_sets.png')}",
            ]
        )
        rows = json.loads(scores.read_text())["sets"]
    result = {row["name"].rpartition("/")[2]: row["metrics"] for row in rows}
    record.write(
        Path(words.get("out", "benchmarks/results")) / "evaluation_sets.json",
        record.command_line("evaluation_sets", argv, ("out", "picture")),
        seed=SEED,
        count=COUNT,
        seconds=round(time.monotonic() - started, 1),
        sets=result,
    )


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
