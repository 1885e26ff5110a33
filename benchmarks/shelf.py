"""The models of pretrained/: one small model for a method, trained on two CPU cores.

    python -m benchmarks.shelf [NAME ...] [work=runs/shelf] [out=pretrained]
        [results=benchmarks/results] [gallery=docs/gallery.md] [device=cpu]

For each NAME that is not in OUT yet: trains it, or goes on with the training that was stopped;
scores it (RESULTS/shelf_NAME.json); exports it with card, scores and grid. At the end, and alone if
there is no NAME, the page with all of them is written anew. A model is made again once its folder
in OUT is deleted.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import record
from benchmarks.ddo import BASES, go_on
from genmodels import checkpoint, cli
from genmodels.atomic import write_bytes
from genmodels.checkpoint.cards import GRID
from genmodels.commands.evaluate import evaluate
from genmodels.config import check
from genmodels.config.words import check_choice, check_flags, split_words

QUIET = ["trainer.loggers=csv", "trainer.progress=false"]
DIGITS = ("data=digits:test", "num=360", "metrics=nn1,fd,memorised", "features=digits")
FASHION = ("data=fashion_mnist:test", "num=1000", "metrics=fd,nn1", "features=fashion")


class Made(NamedTuple):
    """How a model of the shelf is made and scored.

    Attributes:
        train: words of train.py.
        scores: words of evaluate.py.
        line: what it is, for the page.
        needs: other models of the shelf that it starts from.
    """

    train: tuple[str, ...]
    scores: tuple[str, ...]
    line: str
    needs: str = ""


SHELF = {
    "edm_digits": Made(
        ("configs/edm_digits.yaml",),
        DIGITS,
        "EDM, handwritten digits: the demo's network, trained longer",
    ),
    "edm_fashion": Made(
        (
            "configs/edm_fashion.yaml",
            "data.pad=0",
            "data.batch_size=64",
            "network.channels=[32,64,128]",
            "network.layers=1",
            "network.attention=[2]",
            "network.head_dim=16",
            "network.norm_groups=8",
            "network.dropout=0.05",
            "optim.rampup=64000",
            "optim.decay=cosine",
            "ema.half_life=60000",
            "trainer.max_steps=12000",
            "trainer.max_time=",
            "trainer.compile=false",
            "trainer.channels_last=false",
            "checkpoint.every=200",
            "checkpoint.keep=2",
            "sample.every=1000",
            "eval.loss_every=500",
        ),
        FASHION,
        "EDM, Fashion-MNIST",
    ),
    "edm_fashion_small": Made(
        (
            *BASES["fashion_mnist"],
            # The network of configs/ddo_fashion.yaml.
            "network.channels=[8,16,32]",
            "network.layers=1",
            "network.attention=[]",
            "network.norm_groups=8",
            "network.head_dim=8",
        ),
        FASHION,
        "EDM, Fashion-MNIST, a network too small for it: what ddo_fashion starts from",
    ),
    "ddo_fashion": Made(
        ("configs/ddo_fashion.yaml",),
        FASHION,
        "DDO: edm_fashion_small, finetuned by self-play",
        needs="edm_fashion_small",
    ),
    "gbm_digits": Made(
        ("configs/gbm_digits.yaml",), DIGITS, "GBM: multiplicative diffusion, handwritten digits"
    ),
    "energy_digits": Made(
        ("configs/energy_digits.yaml",),
        DIGITS,
        "Energy matching: one potential, handwritten digits",
    ),
    "gedi_mnist": Made(
        ("configs/gedi_mnist_cpu.yaml",),
        (
            "cluster=mnist:test",
            "data=mnist:test",
            "num=1000",
            "metrics=nmi,acc,fd",
            "features=mnist",
        ),
        "GEDI: clusters and an energy of MNIST; a chain that never found a digit shows noise",
    ),
    "noise2score_grey": Made(
        ("configs/noise2score_grey.yaml",),
        ("denoise={root}/denoise/BSD68", "law=gaussian", "level=25", "blind=true"),
        "Noise2Score: grey pictures of any size restored",
    ),
    "noise2score_colour": Made(
        ("configs/noise2score_colour.yaml",),
        ("denoise={root}/denoise/CBSD68", "law=gaussian", "level=25", "blind=true"),
        "Noise2Score: colour pictures of any size restored",
    ),
}
LICENSE = "apache-2.0"
PAGE = """# Trained models

Small models that come with a clone, each trained on two CPU cores.
`python -m benchmarks.shelf NAME` does all of it: training, scores, card and picture.
The terms of the data stand on the cards. Where a model is asked for, its name is enough:

```
python sample.py edm_digits num=64 out=samples
```

{entries}"""


def measure(argv):
    """Make models; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    work, out = Path(words.pop("work", "runs/shelf")), Path(words.pop("out", "pretrained"))
    results = Path(words.pop("results", "benchmarks/results"))
    gallery = Path(words.pop("gallery", "docs/gallery.md"))
    device = words.pop("device", "cpu")
    for name in names:
        check_choice("model", name, SHELF)
    check(not words, next(iter(words), ""), "", "is none of work, out, results, gallery, device")
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (out / name).exists():
            print(f"{out / name}: is there")
        else:
            make(name, work, out, results, device)
    write_bytes(gallery, page(out, results, gallery).encode())
    print(f"written: {gallery}")


def make(name, work, out, results, device):
    """Train, score and export one model of the shelf."""
    made, begun = SHELF[name], time.process_time()
    check(
        not made.needs or (out / made.needs).exists(),
        "model",
        name,
        f"starts from {made.needs}; make that first",
    )
    start = [f"init={out / made.needs}"] if made.needs else []
    run = go_on([*made.train, *start, *QUIET, f"trainer.accelerator={device}"], work / name)
    scores = work / name / "scores.json"
    # What is scored is what is shipped: the weights in half precision.
    draft = work / name / "export"
    if not draft.exists():
        checkpoint.export(run, draft, half=True)
    root = os.environ.get("GENMODELS_DATA", "data")
    told = [word.format(root=root) for word in made.scores]
    evaluate([str(draft), *told, f"device={device}", f"out={scores}"])
    # Not a folder of this machine.
    report = json.loads(scores.read_text().replace(root, "$GENMODELS_DATA")) | {"model": name}
    record.write(
        results / f"shelf_{name}.json",
        f"python -m benchmarks.shelf {name}",
        seed=checkpoint.load(draft).cfg.seed,
        train=["train.py", *made.train, *start],
        evaluate=["evaluate.py", name, *(w.format(root="$GENMODELS_DATA") for w in made.scores)],
        cpu_seconds_of_this_call=round(time.process_time() - begun, 1),
        report=report,
    )
    checkpoint.export(run, out / name, half=True, license=LICENSE, scores=scores, samples=-1)
    drawn = sorted((Path(run) / "samples").glob("step-*.png"))
    if not (out / name / GRID).is_file() and drawn:
        # A model that restores pictures has no grid of seeds: held-out patches, noisy and restored,
        # as they were drawn in training. (An export never takes them: they may be private.)
        write_bytes(out / name / GRID, drawn[-1].read_bytes())
        card = out / name / "README.md"
        shown = f"\n![held-out patches, noisy and restored]({GRID})\n\n| metric"
        write_bytes(card, card.read_text().replace("\n| metric", shown, 1).encode())


def page(out, results, gallery):
    """Return the page of the models that are there."""
    entries = []
    up = "../" * (len(gallery.parts) - 1)
    for name, made in SHELF.items():
        if not (out / name).is_dir():
            continue
        entries.append(f"## {name}\n\n{made.line} ([card]({up}{out / name}/README.md)).\n")
        entries.append(scores_line(results / f"shelf_{name}.json", up))
        if (out / name / GRID).is_file():
            entries.append(f"![{name}]({up}{out / name}/{GRID})\n")
    return PAGE.format(entries="\n".join(entries)).rstrip() + "\n"


def scores_line(path, up):
    """Return a sentence on a model's scores, "" if they are not there."""
    if not path.is_file():
        return ""
    told = json.loads(path.read_text())
    report = told["report"]
    parts = []
    for name, score in report["metrics"].items():
        error = f" +- {score['stderr']:.2g}" if score.get("stderr") else ""
        parts.append(f"{name} {score['value']:.4g}{error}")
    return (
        f"Scores: {', '.join(parts)}\n(`{' '.join(told['evaluate'])}`;\n[all of it]({up}{path})).\n"
    )


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
