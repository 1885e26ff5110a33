"""GEDI on MNIST over seeds: clusters, generation, out-of-distribution scores; and addition.

    python -m benchmarks.gedi_mnist clusters [seeds=0-2] [config=configs/gedi_mnist.yaml] [num=2000]
        [pictures=docs] [name=gedi_mnist]
    python -m benchmarks.gedi_mnist addition [seeds=0-2] [config=configs/gedi_addition.yaml]

clusters: GEDI and the same without the generative term (no-gen), beside k-means on pixels: NMI,
ACC, ARI, AMI on the test split; Frechet distance, in the in-tree net for MNIST, of num= fresh
chains and of as many entries of the buffer, by the config's min_visits and final; AUROC of test
digits against Fashion-MNIST, noise and constants by three scores; of GEDI's first seed a picture
of the buffer's images, a row for each cluster, in PICTURES. addition: accuracy without matching,
and NMI, after training on sums. Needs GENMODELS_DATA with MNIST and FashionMNIST. Writes
OUT/gedi_mnist.json or gedi_addition.json (name=: another) after each training; an interrupted
command goes on (limit=: trainings at a time, variants=: some of gedi, no-gen, k-means or "sums
alone"). The default config is the reduced one, gedi_mnist_cpu.yaml.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.cluster import MiniBatchKMeans

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import cli, generation, images
from genmodels.commands.train import train
from genmodels.config import DataConfig
from genmodels.config.words import check_flags, parse_seeds, parse_value, split_words
from genmodels.data import load_split
from genmodels.evaluation import clusters
from genmodels.evaluation.scorer import Scorer
from genmodels.metrics import ood
from genmodels.metrics.clustering import clustering_scores

# They choose rows and files, and change no row.
SELECTING = ("out", "name", "seeds", "variants", "limit", "pictures")
OUTSIDE = ("fashion_mnist", "noise", "constant")


def clock():
    """Return (seconds, seconds of CPU time) since some moment."""
    return torch.tensor([time.monotonic(), time.process_time()], dtype=torch.float64)


def passed(started):
    """Return both times since `started`, for a row."""
    seconds, cpu = (clock() - started).tolist()
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def trained(config, words):
    """Return (model, times) of one training."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["trainer.progress=false", "trainer.loggers=csv", "sample.every=0"]
        started = clock()
        run = train(last_words([config, f"out_dir={folder}", "checkpoint.keep=1", *quiet, *words]))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return genmodels.load(run, device=device), passed(started)


def of_clusters(variant, seed, config, words, num, picture=None):
    """Return one row: a training of GEDI or of no-gen, or k-means, and its scores."""
    started = clock()
    test, labels = load_split(DataConfig(name="mnist"), "test")
    if variant == "k-means":
        pixels = (load_split(DataConfig(name="mnist"), "train")[0].flatten(1) / 255).numpy()
        means = MiniBatchKMeans(10, batch_size=4096, n_init=3, random_state=seed).fit(pixels)
        found = means.predict((test.flatten(1) / 255).numpy())
        return clustering_scores(found, labels) | passed(started)
    changed = ["method.w_gen=0"] if variant == "no-gen" else []
    model, times = trained(config, [*words, *changed, f"seed={seed}"])
    probabilities = clusters.assign(model, test, 500)
    sizes = torch.bincount(probabilities.argmax(dim=1), minlength=10)
    row = clustering_scores(probabilities.argmax(dim=1), labels)
    row |= {"sizes": sizes.tolist()} | times
    if variant == "gedi":
        made = {start: generated(model, start, num) for start in ("fresh", "buffer")}
        scorer = Scorer(["fd"], "mnist", reference=test, device=model.device)
        row["fd"] = {start: scorer(pixels)["fd"]["value"] for start, pixels in made.items()}
        if picture:
            draw(model, made["buffer"], picture)
    row["auroc"] = aurocs(model, test[:num])
    return row


def generated(model, start, num):
    """Return num generated images, uint8."""
    options = {"start": start, "batch": 500, "progress": False}
    return generation.generate_all(model, range(num), **options)


def draw(model, pixels, path):
    """Write 20 generated images of each cluster, a row for each; black where there are fewer."""
    found = clusters.assign(model, pixels, 500).argmax(dim=1)
    shown = torch.zeros(model.clusters, 20, *pixels.shape[1:], dtype=torch.uint8)
    for cluster in range(model.clusters):
        members = pixels[found == cluster][:20]
        shown[cluster, : len(members)] = members
    images.write_png(path, images.grid(shown.flatten(0, 1), 20))


def aurocs(model, inside):
    """Return {set: {score: AUROC}}, the digits being the positive class."""
    scores, found = ood.image_scores(model, inside, 250), {}
    for name in OUTSIDE:
        if name in ood.SYNTHETIC:
            other = ood.synthetic(name, inside)
        else:
            other = load_split(DataConfig(name=name), "test")[0][: len(inside)]
        theirs = ood.image_scores(model, other, 250)
        found[name] = {key: ood.ood_metrics(scores[key], theirs[key])["auroc"] for key in scores}
    return found


def of_addition(variant, seed, config, words, num, picture=None):
    """Return one row: digits learnt from sums; clusters are digits, so nothing is matched."""
    changed = ["method.w_gen=0"] if variant == "no-gen" else []
    changed += ["method.w_inv=0", "method.w_prior_mean=0"] if variant == "sums alone" else []
    changed += ["method.w_gen=0"] if variant == "sums alone" else []
    model, times = trained(config, [*words, *changed, f"seed={seed}"])
    test, labels = load_split(DataConfig(name="mnist"), "test")
    found = clusters.assign(model, test, 500).argmax(dim=1)
    return (
        {
            "accuracy": float((found == labels).float().mean()),
            "sums": float(
                (found[0::2] + found[1::2] == labels[0::2] + labels[1::2]).float().mean()
            ),
        }
        | clustering_scores(found, labels)
        | times
    )


# command -> (config, function of a row, its variants)
COMMANDS = {
    "clusters": ("configs/gedi_mnist_cpu.yaml", of_clusters, ("gedi", "no-gen", "k-means")),
    "addition": ("configs/gedi_addition.yaml", of_addition, ("gedi", "no-gen", "sums alone")),
}


def measure(argv):
    """Run one command; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or len(positionals) != 1 or positionals[0] not in COMMANDS:
        print(__doc__.strip())
        return
    config, measure_row, variants = COMMANDS[positionals[0]]
    config = words.pop("config", config)
    name = "gedi_mnist" if positionals[0] == "clusters" else "gedi_addition"
    name = words.pop("name", name)
    out = Path(words.pop("out", "benchmarks/results")) / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    seeds, num = parse_seeds(words.pop("seeds", "0-2")), int(words.pop("num", 2000))
    limit, pictures = int(words.pop("limit", 10**9)), Path(words.pop("pictures", "docs"))
    variants = parse_value("variants", words.pop("variants", ""), list[str]) or variants
    changed = [f"{key}={text}" for key, text in words.items()]
    command = record.command_line("gedi_mnist", argv, SELECTING)
    rows = record.rows(out, command)
    known = {(row["variant"], row["seed"]) for row in rows}
    todo = [(v, seed) for seed in seeds for v in variants if (v, seed) not in known]
    for variant, seed in todo[:limit]:
        drawn = (variant, seed) == ("gedi", seeds[0]) and positionals[0] == "clusters"
        picture = pictures / "gedi_mnist.png" if drawn else None
        row = measure_row(variant, seed, config, changed, num, picture)
        rows.append({"variant": variant, "seed": seed} | row)
        record.write(out, command, config=config, num=num, rows=rows)
        print(json.dumps(rows[-1]), flush=True)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
