"""Score a model, or a set of images, against real images.

    python evaluate.py MODEL data=NAME[:SPLIT] num=N metrics=fd,nn1 features=digits [out=FILE.json]
    python evaluate.py images=A reference=B metrics=fd [out=FILE.json]
    python evaluate.py MODEL likelihood=true [data=NAME[:SPLIT]] [num=N] [out=FILE.json]
    python evaluate.py MODEL cluster=NAME[:SPLIT] [metrics=nmi,acc,ari,ami,fd] [out=FILE.json]
    python evaluate.py MODEL ood=NAME[:SPLIT],interpolation,noise,constant [num=N] [out=FILE.json]

MODEL is a run folder, a .ckpt or an exported folder. A and B are a folder, .zip or .npz of images,
or a data set with a split (digits:test); the split is train if none is named, as in the published
protocols (test for likelihoods, which take its first num= images, and for clusters). Prints a
table; out= also writes the numbers as JSON, with the keys given, the features and the versions that
reproduce them.
"""

import math
import sys
import time
from pathlib import Path

from genmodels import benchmark, checkpoint, cli, clusters, images, likelihood
from genmodels.config import DataConfig
from genmodels.data import DATASETS, load_split
from genmodels.metrics import ood
from genmodels.metrics.clustering import CLUSTERING, clustering_scores
from genmodels.metrics.ood import SYNTHETIC, synthetic

SCHEMA = {
    "data": (str, "", "data set the model is scored against, NAME or NAME:SPLIT"),
    "images": (str, "", "images to score in place of a model's"),
    "reference": (str, "", "what they are scored against"),
    "likelihood": (bool, False, "bits per dimension of data= under the model, every kind it has"),
    "ood": (
        list[str],
        [],
        "sets to tell from the model's own test images by its scores: AUROC, "
        f"AUPR, FPR95; data sets or {', '.join(SYNTHETIC)}",
    ),
    "metrics": (list[str], ["fd"], "; ".join(f"{k}: {v}" for k, v in benchmark.METRICS.items())),
    "features": (str, "pixels", "pixels, digits, or a TorchScript file"),
    "weights": (str, "", "file of the feature network's weights"),
    "num": (int, 0, "images to generate; 0: as many as the reference has"),
    "seed": (int, 0, "first seed of the images, and seed of the error bars"),
    "seeds": (str, "", "seeds in place of num and seed: 0-63,100"),
    "labels": (str, "", "classes, as in sample.py"),
    "equal": (bool, False, "fd as the mean over blocks as large as the reference, as nn1 is"),
    "resamples": (int, 100, "random halves behind each error bar; 0: none"),
    "save_images": (str, "", "also write the generated images to this .npz"),
    "cluster": (str, "", "score the model's clusters of this data set against its classes"),
    "root": (
        str,
        "",
        "where the data lie; empty: as in training, else $GENMODELS_DATA, else ./data",
    ),
    "pad": (int, -1, "background pixels on each side of the data; -1: as in training, else 0"),
    "batch": (int, 64, "images at a time; changes no image"),
    "precision": (str, "fp32", "fp32 (without TF32) or bf16"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "noise": (str, "cpu", "device of the noise generators, as in sample.py"),
    "out": (str, "", "JSON file to write"),
}

FILES = ("out", "save_images")  # what is written; they change no number


def evaluate(argv):
    """Run one evaluation; see the module's docstring."""
    positionals, words, flags = cli.split_words(argv)
    cli.check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(cli.help_text(__doc__, SCHEMA))
        return
    common = {key: words.pop(key) for key in list(words) if key in SCHEMA}
    options = cli.typed_words(common, SCHEMA)
    check(options, positionals)
    state, started = benchmark.process_state(), time.monotonic()
    device = benchmark.pick_device(options["device"])
    model = checkpoint.load(positionals[0], device=device) if positionals else None
    if model and options["ood"]:
        return score_ood(model, positionals[0], options, common, words, started)
    if model and options["likelihood"]:
        return score_likelihood(model, positionals[0], options, common, words, started)
    clustered = {}
    if options["cluster"]:
        clustered = score_clusters(model, options, "metrics" in common)
        if not options["metrics"]:
            name = positionals[0]
            return report_clusters(clustered, name, model, options, common, started)
    extra = cli.typed_words(words, model.SAMPLE_OPTIONS if model else {}, also=SCHEMA)
    given = {key: (options | extra)[key] for key in [*common, *words] if key not in FILES}
    checkpoint.load_guide(extra, device)
    if model:
        source = options["data"] or model.cfg.data.name
        reference, sets = read_source(source, options, model.cfg.data)
        check_shape(source, reference, model)
    else:
        source = options["reference"]
        reference, sets = read_source(source, options)
    scorer = benchmark.Scorer(
        options["metrics"], options["features"], reference=reference, equal=options["equal"],
        resamples=options["resamples"], weights=options["weights"] or None, device=device, **sets,
    )  # fmt: skip
    if model:
        pictures = generate(model, options, extra, len(reference))
    else:
        pictures, _ = read_source(options["images"], options)
    if state.is_main_process:
        scores = clustered | scorer(pictures, options["seed"])
        name = positionals[0] if model else options["images"]
        report(scores, options, started, scorer.features, model=name, data=source,
               num=len(pictures), reference_num=len(reference), device=device.type,
               options=given)  # fmt: skip


def check(options, positionals):
    """Raise ValueError for what can be told from the words alone, before any work."""
    cli.check_choice("precision", options["precision"], ("fp32", "bf16"))
    cli.check_device("device", options["device"], ("auto", "cpu", "cuda", "mps"))
    cli.check_device("noise", options["noise"], ("cpu", "cuda", "mps"))
    for key in FILES:
        if options[key] and not Path(options[key]).absolute().parent.is_dir():
            raise ValueError(f"{key}={options[key]}: its folder does not exist; make it first")
        if options[key] and Path(options[key]).is_dir():
            raise ValueError(f"{key}={options[key]}: is a folder; name a file in it")
    if options["resamples"] < 0 or options["resamples"] == 1:
        raise ValueError(f"resamples={options['resamples']}: must be >= 2, or 0 for no error bars")
    if positionals:
        cli.one_model(positionals)
    elif not (options["images"] and options["reference"]):
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")


def score_likelihood(model, name, options, common, words, started):
    """Report the bits per dimension of real images under the model, every kind it offers."""
    if not model.LIKELIHOODS:
        raise ValueError(f"likelihood=true: {type(model).__name__} has no likelihood; leave it out")
    extra = cli.typed_words(words, model.LIKELIHOOD_OPTIONS, also=SCHEMA)
    source = options["data"] or model.cfg.data.name
    source = source if ":" in source else f"{source}:test"
    pixels, labels = read_labelled(source, options, model.cfg.data)
    num = min(options["num"] or len(pixels), len(pixels))
    check_shape(source, pixels, model)
    given = {key: value for key, value in extra.items() if value is not None}
    scores, rows = {}, [{"index": i} for i in range(num)]
    for kind in model.LIKELIHOODS:
        bits = likelihood.bits_per_dim(
            model, pixels[:num], labels[:num] if model.classes else None, kind=kind,
            seed=options["seed"], batch=options["batch"], **given,
        )  # fmt: skip
        metric = likelihood.metric_name(kind)
        stderr = float(bits.std() / num**0.5) if num > 1 else math.nan
        scores[metric] = {"value": float(bits.mean()), "stderr": stderr}
        for row, value in zip(rows, bits.tolist()):
            row[metric] = value
    if benchmark.process_state().is_main_process:
        written = {key: (options | extra)[key] for key in [*common, *words] if key not in FILES}
        cli.print_table(
            f"{name} on {source}: {num} images, bits per dimension",
            ("metric", "value", "standard error"),
            [
                (k, *("-" if v is None else f"{v:.4f}" for v in s.values()))
                for k, s in scores.items()
            ],
        )
        if options["out"]:
            benchmark.write_report(options["out"], scores, started, model=name, data=source,
                                   num=num, seed=options["seed"], device=model.device.type,
                                   options=written, rows=rows)  # fmt: skip
            print(f"written: {options['out']}")


def score_clusters(model, options, chosen):
    """Return the clustering scores asked for, and leave the other metrics in the options.

    Args:
        model: a method that clusters.
        options: of the command line.
        chosen: whether metrics= was given; if not, all clustering scores are meant.
    """
    if model is None or not hasattr(model, "cluster"):
        kind = "no model" if model is None else type(model).__name__
        raise ValueError(f"cluster={options['cluster']}: {kind} has no clusters; leave it out")
    wanted = [name for name in options["metrics"] if name in CLUSTERING] if chosen else CLUSTERING
    options["metrics"] = [name for name in options["metrics"] if chosen and name not in CLUSTERING]
    benchmark.check_metrics(options["metrics"])
    source = options["cluster"]
    source = options["cluster"] = source if ":" in source else f"{source}:test"
    pixels, labels = read_labelled(source, options, model.cfg.data)
    check_shape(source, pixels, model)
    found = clusters.assign(model, pixels, options["batch"]).argmax(dim=1)
    return {k: {"value": v} for k, v in clustering_scores(found, labels, wanted).items()}


def report_clusters(scores, name, model, options, common, started):
    """Print the table of clustering scores alone and write the JSON."""
    rows = [(key, f"{score['value']:.4f}") for key, score in scores.items()]
    cli.print_table(f"{name}: clusters of {options['cluster']}", ("metric", "value"), rows)
    if options["out"]:
        written = {key: options[key] for key in common if key not in FILES}
        benchmark.write_report(options["out"], scores, started, model=name, data=options["cluster"],
                               seed=options["seed"], device=model.device.type, options=written,
                               rows=[])  # fmt: skip
        print(f"written: {options['out']}")


def score_ood(model, name, options, common, words, started):
    """Report how well each of the model's scores tells its test images from those of other sets."""
    cli.typed_words(words, {}, also=SCHEMA)
    if not hasattr(model, "ood_scores"):
        raise ValueError(f"ood={','.join(options['ood'])}: {type(model).__name__} has no scores")
    own = model.cfg.data.name
    train = ood.first(read_labelled(f"{own}:train", options, model.cfg.data)[0], 2000)
    inside = ood.first(read_labelled(f"{own}:test", options, model.cfg.data)[0], options["num"])
    pixels = {"inside": inside, "train": train}
    for source in options["ood"]:
        if source in SYNTHETIC:
            pixels[source] = synthetic(source, inside, options["seed"])
        else:
            other, _ = read_source(source if ":" in source else f"{source}:test", options,
                                   model.cfg.data)  # fmt: skip
            check_shape(source, other, model)
            pixels[source] = ood.first(other, options["num"])
    scores = {key: ood.image_scores(model, value, options["batch"]) for key, value in
              pixels.items()}  # fmt: skip
    found = ood.compare(scores, options["ood"])
    if benchmark.process_state().is_main_process:
        rows = [(key, f"{score['value']:.4f}") for key, score in found.items()]
        cli.print_table(f"{name}: {len(inside)} test images of {own} inside", ("metric", "value"),
                        rows)  # fmt: skip
        if options["out"]:
            given = {key: options[key] for key in common if key not in FILES}
            nums = {key: len(value) for key, value in pixels.items()}
            benchmark.write_report(options["out"], found, started, model=name, data=own, num=nums,
                                   seed=options["seed"], device=model.device.type, options=given,
                                   rows=[])  # fmt: skip
            print(f"written: {options['out']}")


def check_shape(source, reference, model):
    """Raise ValueError unless the model makes images of the reference's shape (C, H, W)."""
    real, made = tuple(reference.shape[1:]), tuple(model.shape)
    if real != made:
        raise ValueError(
            f"data={source}: has images of shape {real}, the model makes {made}; name a set of "
            "that shape, or pad= background around it"
        )


def generate(model, options, extra, reference_num):
    """Return the model's images, uint8 (N, C, H, W), on every process."""
    seeds = cli.seed_list(options | {"num": options["num"] or reference_num})
    labels = benchmark.labels_for(seeds, options["labels"], model.classes)
    settings = {key: value for key, value in extra.items() if value is not None}
    settings |= {key: options[key] for key in ("batch", "precision", "noise")}
    pictures = benchmark.generate_everywhere(model, seeds, labels, **settings)
    if options["save_images"] and benchmark.process_state().is_main_process:
        images.write_npz(options["save_images"], images=pictures.permute(0, 2, 3, 1).numpy())
    return pictures


def report(scores, options, started, features, /, **facts):
    """Print the table and write the JSON."""
    rows = [(key, *(f"{score[k]:.4f}" for k in score)) for key, score in scores.items()]
    rows = [(*row, "-") if len(row) < 2 + bool(options["resamples"]) else row for row in rows]
    title = "{model} against {data}: {num} images, features ".format(**facts) + features.name
    columns = ("metric", "value", "standard error")[: 2 + bool(options["resamples"])]
    cli.print_table(title, columns, rows)
    if options["out"]:
        described = {"name": features.name, "sha256": features.sha256, "resize": features.resize}
        facts |= {"features": described, "seed": options["seed"], "rows": []}
        benchmark.write_report(options["out"], scores, started, **facts)
        print(f"written: {options['out']}")


def read_source(source, options, trained_on=None):
    """Return (images, {"train": ..., "held_out": ...} where the source is a data set with splits).

    Args:
        source: NAME, NAME:SPLIT, or the path of a folder, .zip or .npz.
        options: of the command line; root= and pad= say how to read a data set.
        trained_on: DataConfig of the model, used for its own data set.
    """
    name, _, split = source.partition(":")
    if trained_on is not None and name == trained_on.name:
        cfg = DataConfig(**vars(trained_on))
    elif name in DATASETS:
        cfg = DataConfig(name=name)
    else:
        return images.read_images(source), {}
    cfg.root = options["root"] or cfg.root
    cfg.pad = cfg.pad if options["pad"] < 0 else options["pad"]
    sets = {}
    if "memorised" in options["metrics"]:
        sets = {"train": load_split(cfg, "train")[0], "held_out": load_split(cfg, "test")[0]}
    return load_split(cfg, split or "train")[0], sets


def read_labelled(source, options, trained_on):
    """Return (images, labels) of a data set NAME:SPLIT; arguments as read_source."""
    name, _, split = source.partition(":")
    cfg = DataConfig(**vars(trained_on)) if name == trained_on.name else DataConfig(name=name)
    cfg.root = options["root"] or cfg.root
    cfg.pad = cfg.pad if options["pad"] < 0 else options["pad"]
    return load_split(cfg, split)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
