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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genmodels import checkpoint, cli, generation
from genmodels.atomic import write_bytes
from genmodels.config import settings_of
from genmodels.config.words import (
    check_device,
    check_flags,
    help_text,
    joined_flags,
    one_model,
    parse_value,
    read_options,
    seed_list,
    split_words,
    typed_words,
)
from genmodels.data import DATASETS
from genmodels.data.source import read_source
from genmodels.distributed import pick_device, rank
from genmodels.evaluation import plots, restoration, selftest
from genmodels.evaluation import scorer as scoring
from genmodels.evaluation.clusters import score_clusters
from genmodels.evaluation.likelihood import score_likelihood
from genmodels.evaluation.ood import score_ood
from genmodels.evaluation.options import (
    ClusterOptions,
    FeatureOptions,
    LikelihoodOptions,
    OodOptions,
    RestorationOptions,
    ScoreOptions,
    SelftestOptions,
    StatsOptions,
)
from genmodels.evaluation.passes import Store, score_pass
from genmodels.evaluation.report import versions, write_report
from genmodels.evaluation.sources import Generated, Pictures, check_shape, reading_options
from genmodels.metrics.clustering import CLUSTERING
from genmodels.metrics.features import Features, load_features
from genmodels.metrics.stats import describe, stats_bytes

# What each kind of evaluation takes; a word of this name asks for it, the first one if several do.
MODES: dict[str, Any] = {
    "likelihood": LikelihoodOptions,
    "denoise": RestorationOptions,
    "ood": OodOptions,
    "cluster": ClusterOptions,
    "": ScoreOptions,
}
COMMANDS: dict[str, Any] = {"stats": StatsOptions, "selftest": SelftestOptions}
ALL_KEYS = list(dict.fromkeys(key for cls in MODES.values() for key in settings_of(cls)))
Result = tuple[dict[str, Any], dict[str, Any], str]  # scores, facts for the report, title
FILES = ("out", "save_images", "plot")  # what is written; they change no number


def evaluate(argv: Sequence[str]) -> int:
    """Run one evaluation; see the module's docstring."""
    positionals, words, flags = split_words(joined_flags(argv, "against"))
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(help_page())
        return 0
    if positionals[:1] in (["stats"], ["selftest"]):
        return run_command(positionals, words)

    mode, clustering, words = read_mode(words)
    mode, options, rest = read_options(MODES, words, mode)
    check_files(options)
    check_device("device", options.device)
    if positionals:
        one_model(positionals)
    if mode == "":
        check_scores(options, bool(positionals))
    elif not positionals:
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")
    started, device = time.monotonic(), pick_device(options.device)
    model = checkpoint.load(positionals[0], device=device) if positionals else None
    taken = {}
    if model and mode in ("", "likelihood"):
        taken = model.LIKELIHOOD_OPTIONS if mode else model.SAMPLE_OPTIONS
    # An empty word of another kind of evaluation is no field of these options.
    given = {key: getattr(options, key, "") for key in words if key not in (*rest, *FILES)}
    extra = typed_words(rest, taken, also=ALL_KEYS)
    given |= extra
    with cli.warnings_as_notes() as warned:
        scores, facts, title = measure(mode, model, options, extra, clustering, device)
    if rank() != 0:
        return 0
    name = positionals[0] if positionals else options.images
    print_scores(f"{name} {title}", scores)
    scorer = facts.pop("scorer", None)
    if options.out:
        seed = getattr(options, "seed", 0)
        facts |= {"seed": seed, "device": device.type, "options": given}
        write_report(options.out, scores, started, model=name, warnings=warned, **facts)
        Store.clear(options.out)
        print(f"written: {options.out}")
    if scorer and options.plot:
        plots.draw_scores(options.plot, scorer)
        print(f"written: {options.plot}")
    return 0


def help_page() -> str:
    """Return the docstring and the keys of every kind of evaluation."""
    keys = [help_text(ScoreOptions, "keys:")]
    for mode, cls in MODES.items():
        if mode in ("likelihood", "denoise"):
            keys.append(help_text(cls, f"keys of {mode}=:"))
        elif mode:
            keys.append(f"keys of {mode}= alone: {', '.join(settings_of(cls))}")
    keys += [f"keys of {name}: {', '.join(settings_of(cls))}" for name, cls in COMMANDS.items()]
    return "\n\n".join([__doc__.strip(), *keys])


def read_mode(words: dict[str, str]) -> tuple[str, list[str], dict[str, str]]:
    """Return (the kind of evaluation, the clustering scores asked for, the words without them).

    Beside clusters or ood= images are scored only if metrics= asks for it; then ood= and cluster=
    are words of scoring images.

    Args:
        words: {key: text}.
    """
    if "likelihood" in words:
        words = words | {"likelihood": likelihood_word(words["likelihood"])}
    asked = [name for name in MODES if name and words.get(name)]
    mode = asked[0] if asked else ""
    if mode not in ("ood", "cluster"):
        return mode, [], words
    metrics = parse_value("metrics", words.get("metrics", ""), list[str])
    wanted = metrics if "metrics" in words else CLUSTERING
    clustering = [name for name in wanted if name in CLUSTERING and words.get("cluster")]
    others = [name for name in metrics if name not in clustering]
    if others or ("metrics" in words and not clustering):
        words = words | {"metrics": ",".join(others)}
        mode = ""
    return mode, clustering, words


def likelihood_word(text: str) -> str:
    """Return likelihood= as "true", "" or the name of a kind."""
    try:
        return "true" if parse_value("likelihood", text or "false", bool) else ""
    except ValueError:
        return text


def check_files(options: Any) -> None:
    """Raise ValueError for a file that could not be written."""
    for key in FILES:
        path = getattr(options, key, "")
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{key}={path}: its folder does not exist; make it first")
        if path and Path(path).is_dir() and key != "save_images":
            raise ValueError(f"{key}={path}: is a folder; name a file in it")


def check_reading(options: Any) -> None:
    """Raise ValueError for root= and pad= where no data set is read: they say nothing of files."""
    sources = [getattr(options, key, "") for key in ("data", "images", "reference")]
    if any(source.partition(":")[0] in DATASETS for source in sources):
        return
    for key, unset in (("root", ""), ("pad", -1)):
        value = getattr(options, key)
        if value != unset:
            raise ValueError(
                f"{key}={value}: is for data sets by name, not for files; leave it out"
            )


def check_scores(options: ScoreOptions, has_model: bool) -> None:
    """Raise ValueError for what can be told of scores of images from the words alone."""
    check_device("noise", options.noise)
    metrics = [scoring.METRICS[name] for name in scoring.expand_metrics(options.metrics)]
    if options.equal and not any(metric.equal for metric in metrics):
        changed = ", ".join(name for name, metric in scoring.METRICS.items() if metric.equal)
        raise ValueError(f"equal=true: changes metrics={changed} only; add it, or leave equal out")
    if options.plot and not any(metric.drawn for metric in metrics):
        raise ValueError(f"plot={options.plot}: nothing to draw; add metrics=fd or prc")
    if has_model and options.images:
        raise ValueError(f"images={options.images}: give a MODEL or images=, not both")
    if not has_model and not (options.images and options.reference):
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")
    if not has_model:
        check_reading(options)
    for key in ("num", "seeds", "labels", "save_images"):
        if options.images and getattr(options, key):
            raise ValueError(
                f"{key}={getattr(options, key)}: images= scores all its images; leave it out"
            )


def measure(
    mode: str,
    model: Any,
    options: Any,
    extra: dict[str, Any],
    clustering: list[str],
    device: torch.device,
) -> Result:
    """Return (scores, facts, title) of one evaluation.

    Args:
        mode: one of MODES.
        model: a method, or None.
        options: of the mode.
        extra: options of the method.
        clustering: clustering scores asked for.
        device: where to compute.
    """
    scores: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    title = ""
    if getattr(options, "cluster", ""):
        scores, facts, title = score_clusters(model, options, clustering)
    if mode == "likelihood":
        return score_likelihood(model, options, extra)
    if mode == "denoise":
        return restoration.score_restoration(model, options, device)
    if mode == "":
        more, facts, title = score_images(model, options, dict(extra), device)
        scores |= more
    if getattr(options, "ood", []):
        more, ood_facts, title = score_ood(model, options)
        scores, facts = scores | more, facts | ood_facts
    return scores, facts, title


def score_images(
    model: Any, options: ScoreOptions, extra: dict[str, Any], device: torch.device
) -> Result:
    """Return (scores, facts, title) of the images of a model or a folder."""
    if model:
        checkpoint.load_guide(extra, device)
    features = named_features(options, device)
    source = options.reference or options.data or model.cfg.data.name
    reference, meta, sets = scoring.read_reference(
        source,
        features,
        scoring.need_splits(options.metrics),
        **reading_options(options, model),
    )
    pictures: Generated | Pictures
    if model:
        check_shape(source, meta.get("shape"), model)
        pictures = generated(model, options, extra, meta.get("num"))
    else:
        pictures = Pictures(read_source(options.images, **reading_options(options)).pixels)
        check_sizes(options.images, pictures.shape, meta.get("shape"), features)
    kept: list[Any] = list(scoring.tables_to_keep(options.metrics, options.equal))
    scorer = scoring.Scorer(
        options.metrics,
        features,
        reference=reference,
        equal=options.equal,
        resamples=options.resamples,
        batch=options.feature_batch or None,
        progress=True,
        num=len(pictures),
        store=Store.of(options.out, "reference", reference, features, kept),
        **sets,
    )
    parts = None
    if not options.save_images.endswith(".npz"):  # whose images are held, not stored
        kept += [scorer.moments.mean.tolist(), options.save_images]
        parts = Store.of(options.out, "images", pictures, features, kept)
    scores = scorer(pictures, options.seed, store=parts, curve=bool(options.plot))
    if isinstance(pictures, Generated) and options.save_images:
        pictures.write_npz()
    facts = {"data": source, "num": len(pictures), "reference_num": meta.get("num")}
    fast = scoring.fast_difference(features, reference, pictures)
    facts |= {"features": describe(features) | fast, "stages": scorer.seconds, "rows": []}
    facts |= {"scorer": scorer}
    mode = "" if features.mode == "exact" else f", mode {features.mode}"
    title = f"against {source}: {len(pictures)} images, features {features.name}{mode}"
    return scores, facts, title


def check_sizes(
    source: str,
    shape: tuple[int, ...],
    reference_shape: Sequence[int] | None,
    features: Features,
) -> None:
    """Raise ValueError if pixels are to be compared of images of two shapes (C, H, W)."""
    alike = not reference_shape or shape == tuple(reference_shape)
    if not alike and features.dim is None and features.resize == "none":
        raise ValueError(
            f"images={source}: have shape {shape}, the reference {tuple(reference_shape or ())}: "
            f"features={features.name} needs equal ones"
        )


def generated(
    model: Any, options: ScoreOptions, extra: dict[str, Any], reference_num: int | None
) -> Generated:
    """Return the model's images as a source that makes them when they are read."""
    if not (options.num or options.seeds or reference_num):
        raise ValueError("num=0: this reference does not say how many images it has; give num=")
    seeds = seed_list(options.num or reference_num or 1, options.seed, options.seeds)
    labels = generation.labels_for(seeds, options.labels, model.classes, model.present)
    settings = extra | {key: getattr(options, key) for key in ("batch", "precision", "noise")}
    return Generated(model, seeds, labels, save=options.save_images, **settings)


def named_features(options: FeatureOptions, device: torch.device) -> Features:
    """Return the features that the options name."""
    return load_features(
        options.features,
        options.weights or None,
        device,
        mode=options.mode,
        resize=options.resize or None,
        sha256=options.sha256 or None,
        weights_are_code=options.weights_are_code,
    )


def run_command(positionals: Sequence[str], words: dict[str, str]) -> int:
    """Run stats or selftest; return the exit code."""
    command, *others = positionals
    if others:
        raise ValueError(f"{others[0]}: {command} takes key=value words only; leave it out")
    _, options, extra = read_options(COMMANDS | MODES, words, command)
    typed_words(extra, {}, also=settings_of(COMMANDS[command]))
    check_files(options)
    if command == "stats":
        check_reading(options)
    check_device("device", options.device)
    device = pick_device(options.device)
    with cli.warnings_as_notes():
        return (write_stats if command == "stats" else self_test)(options, device)


def write_stats(options: StatsOptions, device: torch.device) -> int:
    """Write the statistics file of a data set; return the exit code."""
    features, source = named_features(options, device), options.data or options.images
    pictures = Pictures(read_source(source, **reading_options(options)).pixels)
    parts = Store.of(options.out, "stats", pictures, features)
    moments = score_pass(
        pictures, features, batch=options.feature_batch or None, store=parts
    ).moments()
    if rank() == 0:
        facts = {"data": source, "data_sha256": pictures.identity(), "shape": pictures.shape}
        write_bytes(options.out, stats_bytes(moments, features, versions=versions(), **facts))
        Store.clear(options.out)
        print(f"written: {options.out} ({len(pictures)} images, features {features.name})")
    return 0


def self_test(options: SelftestOptions, device: torch.device) -> int:
    """Print the table of the self-test; return 1 if a line of it failed."""
    rows = selftest.checks(named_features(options, device))
    cli.print_table("self-test", ("what", "found", "expected", ""), rows)
    return int(any(row[-1] != "pass" for row in rows))


def print_scores(title: str, scores: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    rows = [
        (key, f"{score['value']:.5g}", f"{score['stderr']:.2g}" if "stderr" in score else "")
        for key, score in scores.items()
    ]
    cli.print_table(title, ("metric", "value", "standard error"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(evaluate, argv)
