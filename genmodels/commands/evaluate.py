"""Score a model, or a set of images, against real images.

    python evaluate.py MODEL data=NAME[:SPLIT] num=N metrics=fd,kid features=digits [out=FILE.json]
    python evaluate.py images=A reference=B metrics=fd,prc [out=FILE.json]
    python evaluate.py MODEL likelihood=true [data=NAME[:SPLIT]] [num=N] [out=FILE.json]
    python evaluate.py MODEL ood=NAME[:SPLIT],interpolation,noise,constant [num=N] [out=FILE.json]
    python evaluate.py MODEL denoise=FOLDER law=gaussian level=25 [seed=0] [--against bm3d]
    python evaluate.py MODEL cluster=NAME[:SPLIT] [metrics=nmi,acc,ari,ami,fd] [out=FILE.json]
    python evaluate.py stats data=NAME[:SPLIT] features=inception weights=FILE out=STATS.npz
    python evaluate.py selftest [features=digits]

MODEL is a run folder, a .ckpt or an exported folder. A and B are a folder, .zip or .npz of images,
or a data set with a split (digits:test); the split is train if none is named, as in the published
protocols (test for likelihoods, which take its first num= images, and for clusters). B may also be
a file that `stats` wrote, or the mu and sigma of pytorch-fid, EDM or ADM; MODEL takes reference=
too.

denoise= adds noise to clean pictures (neither clipped nor rounded) and scores what the
model restores; blind=true hides the level, ensemble=true adds the mean of 8 orientations beside it.

Prints a table; out= also writes the numbers as JSON, with the keys given, the features and the
versions that reproduce them. Finished parts of scores and stats are kept in OUT.blocks until then:
the same command goes on where it was killed (a likelihood begins anew). Run by torchrun, every
process takes its share.
"""

import time
from pathlib import Path

from genmodels import checkpoint, cli, generation
from genmodels.atomic import write_bytes
from genmodels.config.words import (
    check_choice,
    check_device,
    check_flags,
    help_text,
    joined_flags,
    one_model,
    parse_value,
    seed_list,
    split_words,
    typed_words,
)
from genmodels.distributed import pick_device, rank
from genmodels.evaluation import plots, restoration, selftest
from genmodels.evaluation import scorer as scoring
from genmodels.evaluation.clusters import score_clusters
from genmodels.evaluation.likelihood import score_likelihood
from genmodels.evaluation.ood import score_ood
from genmodels.evaluation.passes import Store, score_pass
from genmodels.evaluation.report import versions, write_report
from genmodels.evaluation.sources import Generated, Pictures, check_shape, read_source, where
from genmodels.metrics import ood
from genmodels.metrics.clustering import CLUSTERING
from genmodels.metrics.features import load_features
from genmodels.metrics.stats import describe, stats_bytes

SCHEMA = {
    "data": (str, "", "data set the model is scored against, NAME or NAME:SPLIT"),
    "images": (str, "", "images to score in place of a model's"),
    "reference": (str, "", "what they are scored against: images, or an npz of statistics"),
    "likelihood": (
        str,
        "",
        "bits per dimension of data= under the model: true for every kind it "
        "has, or one (ode, bound, ais)",
    ),
    "ood": (
        list[str],
        [],
        "sets to tell from the model's own test images by its scores: AUROC, "
        f"AUPR, FPR95; data sets or {', '.join(ood.SYNTHETIC)}",
    ),
    "cluster": (
        str,
        "",
        "score the model's clusters of this data set against its classes: "
        f"metrics={','.join(CLUSTERING)}",
    ),
    **restoration.SCHEMA,
    "metrics": (
        list[str],
        ["fd"],
        "; ".join(f"{k}: {v}" for k, v in scoring.METRICS.items())
        + "; prc: precision and recall; density comes with coverage",
    ),
    "features": (str, "pixels", "pixels, digits, fashion, inception, ... or a TorchScript file"),
    "weights": (str, "", "file of the feature network's weights; download: fetch the published"),
    "sha256": (str, "", "what the hash of the weights must begin with"),
    "resize": (str, "", "of features=inception: tf1 (FID's, the default) or clean"),
    "mode": (str, "exact", "exact: fp32, deterministic; fast: lower precision, compiled"),
    "num": (int, 0, "images to generate; 0: as many as the reference has"),
    "seed": (int, 0, "first seed of the images, and seed of the error bars"),
    "seeds": (str, "", "seeds in place of num and seed: 0-63,100"),
    "labels": (str, "", "classes, as in sample.py"),
    "equal": (bool, False, "fd as the mean over blocks as large as the reference, as nn1 is"),
    "resamples": (int, 100, "random halves behind the error bars of nn1 and memorised; 0: none"),
    "save_images": (str, "", "also write the generated images to this .npz, or to a folder as PNG"),
    "root": (
        str,
        "",
        "where the data lie; empty: as in training, else $GENMODELS_DATA, else ./data",
    ),
    "pad": (int, -1, "background pixels on each side of the data; -1: as in training, else 0"),
    "batch": (int, 64, "images generated at a time; changes no image"),
    "feature_batch": (int, 0, "images in one call of the feature network; 0: its own choice"),
    "precision": (str, "fp32", "fp32 (without TF32) or bf16"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "noise": (str, "cpu", "device of the noise generators, as in sample.py"),
    "plot": (str, "", "PNG to draw the distance against 1/n in"),
    "out": (str, "", "JSON file to write; of stats: the npz"),
}

FILES = ("out", "save_images", "plot")  # what is written; they change no number
# The keys that other commands than scoring take; any other would be ignored, and is refused.
NETWORK = ("features", "weights", "sha256", "resize", "mode", "device")
TAKEN = {
    "stats": (*NETWORK, "data", "images", "root", "pad", "feature_batch", "out"),
    "selftest": NETWORK,
    "likelihood=true": (
        "likelihood",
        "data",
        "num",
        "seed",
        "root",
        "pad",
        "batch",
        "device",
        "out",
    ),
    "denoise=": (*restoration.SCHEMA, "num", "seed", "precision", "device", "out"),
    "ood=": ("ood", "cluster", "metrics", "num", "seed", "root", "pad", "batch", "device", "out"),
    "cluster=": ("cluster", "metrics", "root", "pad", "batch", "device", "out"),
}
# What scores a model in place of its images: (model, options, options of the method, device) ->
# (scores, facts, title), by the key that asks for it; and where the method says what it takes.
WORK = {
    "likelihood": (score_likelihood, "LIKELIHOOD_OPTIONS"),
    "ood": (score_ood, "SAMPLE_OPTIONS"),
    "denoise": (restoration.score, ""),
}


def evaluate(argv):
    """Run one evaluation; see the module's docstring."""
    argv = joined_flags(argv, "against")
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(help_text(__doc__, SCHEMA))
        return 0
    command = positionals.pop(0) if positionals[:1] in (["stats"], ["selftest"]) else ""
    common = {key: words.pop(key) for key in list(words) if key in SCHEMA}
    options = typed_words(common, SCHEMA)
    options["likelihood"] = kinds_word(options["likelihood"])
    if command == "selftest" and "features" not in common:
        options["features"] = "digits"
    clustering = split_metrics(options, "metrics" in common)
    check_words(common, options, positionals, command)
    check(options, positionals, command)
    device = pick_device(options["device"])
    if command:
        typed_words(words, {}, also=SCHEMA)
        with cli.told_warnings():
            return (write_stats if command == "stats" else self_test)(options, device)
    started = time.monotonic()
    model = checkpoint.load(positionals[0], device=device) if positionals else None
    mode = next((key for key in WORK if options[key]), "")
    work, taken = WORK.get(mode, (score_images, "SAMPLE_OPTIONS"))
    made = scores_images(common, options)
    taken = taken if made or mode == "likelihood" else ""
    extra = typed_words(words, getattr(model, taken, {}), also=SCHEMA)
    given = {key: (options | extra)[key] for key in [*common, *words] if key not in FILES}
    with cli.told_warnings() as told:
        scores, facts, title = score_clusters(model, options, clustering)
        if mode == "ood" and made:
            scores |= score_images(model, options, dict(extra), device)[0]  # asked for beside it
        if options["metrics"] or mode:
            more, facts, title = work(model, options, extra, device)
            scores |= more
    if rank() != 0:
        return 0
    name = positionals[0] if positionals else options["images"]
    print_scores(f"{name} {title}", scores)
    scorer = facts.pop("scorer", None)
    if options["out"]:
        facts |= {"seed": options["seed"], "device": device.type, "options": given}
        write_report(options["out"], scores, started, model=name, warnings=told, **facts)
        Store.clear(options["out"])
        print(f"written: {options['out']}")
    if options["plot"] and scorer:
        plots.draw(options["plot"], scorer)
        print(f"written: {options['plot']}")
    return 0


def kinds_word(text):
    """Return likelihood= as "true", "" or the name of a kind."""
    try:
        return "true" if parse_value("likelihood", text or "false", bool) else ""
    except ValueError:
        return text


def split_metrics(options, chosen):
    """Return the clustering scores asked for and leave the others in the options.

    Args:
        options: of the command line.
        chosen: whether metrics= was given; if not, all clustering scores and no others are meant.
    """
    if not options["cluster"]:
        return []
    asked = options["metrics"] if chosen else CLUSTERING
    options["metrics"] = [name for name in asked if name not in CLUSTERING]
    return [name for name in asked if name in CLUSTERING]


def scores_images(common, options):
    """Return whether images are scored, beside clusters or ood= only if metrics= asks for it."""
    return bool(options["metrics"]) and ("metrics" in common or not options["ood"])


def check_words(common, options, positionals, command):
    """Raise ValueError for a word that would be ignored."""
    asked = (word for word in TAKEN if options.get(word.partition("=")[0]))
    work = command or next(asked, "")
    if work in ("ood=", "cluster=") and scores_images(common, options):
        work = ""  # images are scored too, and take every key
    for key, text in common.items():
        if key not in TAKEN.get(work, SCHEMA):
            raise ValueError(f"{key}={text}: {work} does not take it; leave it out")
        if text and key in restoration.SCHEMA and not options["denoise"]:
            raise ValueError(f"{key}={text}: needs denoise=FOLDER; leave it out")
    if command and positionals:
        raise ValueError(f"{positionals[0]}: {command} takes key=value words only; leave it out")
    other = "reference" if command != "stats" else "images"
    if options["data"] and options[other]:
        raise ValueError(f"data={options['data']}: {other}= takes its place; leave one of them out")
    if options["equal"] and "fd" not in options["metrics"]:
        raise ValueError("equal=true: changes metrics=fd only; add it, or leave equal out")
    drawn = {"fd", "fd_inf", "fid", "fid_inf", "precision", "recall"}
    asked = scoring.expand(options["metrics"]) if options["metrics"] else ()
    if options["plot"] and not drawn & set(asked):
        raise ValueError(f"plot={options['plot']}: nothing to draw; add metrics=fd or prc")


def check(options, positionals, command):
    """Raise ValueError for what can be told from the words alone, before any work."""
    check_choice("precision", options["precision"], ("fp32", "bf16"))
    check_choice("mode", options["mode"], ("exact", "fast"))
    check_device("device", options["device"], ("auto", "cpu", "cuda", "mps"))
    check_device("noise", options["noise"], ("cpu", "cuda", "mps"))
    if options["metrics"] or not options["cluster"]:
        scoring.expand(options["metrics"])
    for key in FILES:
        if options[key] and not Path(options[key]).absolute().parent.is_dir():
            raise ValueError(f"{key}={options[key]}: its folder does not exist; make it first")
        if options[key] and Path(options[key]).is_dir() and key != "save_images":
            raise ValueError(f"{key}={options[key]}: is a folder; name a file in it")
    for key, least in (("seed", 0), ("num", 0), ("batch", 1), ("feature_batch", 0), ("pad", -1)):
        if options[key] < least:
            raise ValueError(f"{key}={options[key]}: must be >= {least}")
    if options["resamples"] < 0 or options["resamples"] == 1:
        raise ValueError(f"resamples={options['resamples']}: must be >= 2, or 0 for no error bars")
    if command == "stats" and not options["out"].endswith(".npz"):
        raise ValueError(f"out={options['out']}: stats writes a file; name it, out=STATS.npz")
    if command == "stats" and not (options["data"] or options["images"]):
        raise ValueError("data=: name a data set, NAME or NAME:SPLIT, or images=PATH")
    if positionals and not command:
        one_model(positionals)
        if options["images"]:
            raise ValueError(f"images={options['images']}: give a MODEL or images=, not both")
    elif not command and not (options["images"] and options["reference"]):
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")
    for key in ("num", "seeds", "labels", "save_images"):
        if options["images"] and options[key]:
            raise ValueError(f"{key}={options[key]}: images= scores all its images; leave it out")


def score_images(model, options, extra, device):
    """Return (scores, facts, title) of the images of a model or a folder."""
    checkpoint.load_guide(extra, device)
    features = load(options, device)
    source = options["reference"] or options["data"] or model.cfg.data.name
    reference, meta, sets = scoring.read_reference(
        source, features, "memorised" in options["metrics"], **where(options, model)
    )
    if model:
        check_shape(source, meta.get("shape"), model)
        pictures = generated(model, options, extra, meta.get("num"))
    else:
        pictures = Pictures(read_source(options["images"], **where(options))[0])
        check_sizes(options["images"], pictures.shape, meta.get("shape"), features)
    kept = list(scoring.tables(options["metrics"], options["equal"]))
    scorer = scoring.Scorer(
        options["metrics"],
        features,
        reference=reference,
        equal=options["equal"],
        resamples=options["resamples"],
        batch=options["feature_batch"] or None,
        progress=True,
        num=len(pictures),
        store=Store.of(options["out"], "reference", reference, features, kept),
        **sets,
    )
    parts = None
    if not options["save_images"].endswith(".npz"):  # whose images are held, not stored
        kept += [scorer.moments.mean.tolist(), options["save_images"]]
        parts = Store.of(options["out"], "images", pictures, features, kept)
    scores = scorer(pictures, options["seed"], store=parts, curve=bool(options["plot"]))
    if model and options["save_images"]:
        pictures.write_npz()
    facts = {"data": source, "num": len(pictures), "reference_num": meta.get("num")}
    fast = scoring.fast_difference(features, reference, pictures)
    facts |= {"features": describe(features) | fast, "stages": scorer.seconds, "rows": []}
    facts |= {"scorer": scorer}
    mode = "" if features.mode == "exact" else f", mode {features.mode}"
    title = f"against {source}: {len(pictures)} images, features {features.name}{mode}"
    return scores, facts, title


def check_sizes(source, shape, real, features):
    """Raise ValueError if pixels are to be compared of images of two shapes (C, H, W)."""
    if real and features.dim is None and features.resize == "none" and shape != tuple(real):
        raise ValueError(
            f"images={source}: have shape {shape}, the reference {tuple(real)}: "
            f"features={features.name} needs equal ones"
        )


def generated(model, options, extra, reference_num):
    """Return the model's images as a source that makes them when they are read."""
    if not (options["num"] or options["seeds"] or reference_num):
        raise ValueError("num=0: this reference does not say how many images it has; give num=")
    seeds = seed_list(options | {"num": options["num"] or reference_num or 1})
    labels = generation.labels_for(seeds, options["labels"], model.classes)
    settings = {key: value for key, value in extra.items() if value is not None}
    settings |= {key: options[key] for key in ("batch", "precision", "noise")}
    return Generated(model, seeds, labels, save=options["save_images"], **settings)


def load(options, device):
    """Return the features that the options name."""
    return load_features(
        options["features"],
        options["weights"] or None,
        device,
        mode=options["mode"],
        resize=options["resize"] or None,
        sha256=options["sha256"] or None,
    )


def write_stats(options, device):
    """Write the statistics file of a data set; return the exit code."""
    features, source = load(options, device), options["data"] or options["images"]
    pictures = Pictures(read_source(source, **where(options))[0])
    parts = Store.of(options["out"], "stats", pictures, features)
    found = score_pass(pictures, features, batch=options["feature_batch"] or None, store=parts)
    if rank() == 0:
        facts = {"data": source, "data_sha256": pictures.identity(), "shape": pictures.shape}
        data = stats_bytes(found.moments(), features, versions=versions(), **facts)
        write_bytes(options["out"], data)
        Store.clear(options["out"])
        print(f"written: {options['out']} ({len(pictures)} images, features {features.name})")
    return 0


def self_test(options, device):
    """Print the table of the self-test; return 1 if a line of it failed."""
    rows = selftest.checks(load(options, device))
    cli.print_table("self-test", ("what", "found", "expected", ""), rows)
    return int(any(row[-1] != "pass" for row in rows))


def print_scores(title, scores):
    """Print the table."""
    rows = [
        (key, f"{score['value']:.5g}", f"{score['stderr']:.2g}" if "stderr" in score else "")
        for key, score in scores.items()
    ]
    cli.print_table(title, ("metric", "value", "standard error"), rows)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(evaluate, argv)
