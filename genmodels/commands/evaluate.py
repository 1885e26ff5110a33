"""Score a model, or a set of images, against real images.

    python evaluate.py MODEL data=NAME[:SPLIT] num=N metrics=fd,kid features=digits [out=FILE.json]
    python evaluate.py images=A reference=B metrics=fd,prc [out=FILE.json]
    python evaluate.py images=A,B,C reference=D metrics=fd,kid [out=FILE.json] [table=FILE.md]
    python evaluate.py RUN sigma_rel=0.05,0.1,0.15 metrics=fd [out=FILE.json] [plot=FILE.png]
    python evaluate.py MODEL likelihood=true [data=NAME[:SPLIT]] [num=N] [out=FILE.json]
    python evaluate.py MODEL ood=NAME[:SPLIT],interpolation,noise,constant [num=N] [out=FILE.json]
    python evaluate.py MODEL denoise=FOLDER law=gaussian level=25 [seed=0] [--against bm3d]
    python evaluate.py MODEL cluster=NAME[:SPLIT] [metrics=nmi,acc,ari,ami,fd] [out=FILE.json]
    python evaluate.py stats data=NAME[:SPLIT] features=inception weights=FILE out=STATS.npz
    python evaluate.py selftest [features=digits]

MODEL is a run folder (or one of runs: its newest), a .ckpt, an exported folder, the name of a
model that comes along, or OWNER/NAME on the Hugging Face hub.

A and B are a folder, .zip or .npz of images, or a data set with a split (digits:test); the split
is train if none is named, as in the published protocols (test for likelihoods, which take its first
num= images, and for clusters). reference= may also be a file that `stats` wrote, the mu and sigma
of pytorch-fid, EDM or ADM, EDM2's .pkl, or the URL of one (https://, hf://); MODEL takes reference=
too.

features=inception,dinov2 scores with both and makes a model's images once.

Several MODELs, or several sets images=A,B,C, are scored against one reference, which is read once:
one table, the best by the first metric first, and how far the others are from it. With sigma_rel=
the sets are averages of a RUN's weights, one of each relative width.

denoise= adds noise to clean pictures (neither clipped nor rounded) and scores what the
model restores; blind=true hides the level, ensemble=true adds the mean of 8 orientations beside it.

Prints a table; out= also writes the numbers as JSON, with the keys given, the features and the
versions that reproduce them (the table alone, where it ends in .csv or .md). Finished parts of
scores and stats are kept in OUT.blocks until then: the same command goes on where it was killed (a
likelihood begins anew). Run by torchrun, every process takes its share.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genmodels import checkpoint, cli, generation
from genmodels.atomic import write_bytes
from genmodels.checkpoint.inert_pickle import load_arrays
from genmodels.config import settings_of
from genmodels.config.words import (
    check_device,
    check_flags,
    help_text,
    joined_flags,
    one_model,
    parse_value,
    read_options,
    split_words,
    typed_words,
)
from genmodels.data import DATASETS
from genmodels.data.source import read_source
from genmodels.distributed import pick_device, rank
from genmodels.evaluation import plots, restoration, selftest
from genmodels.evaluation import scorer as scoring
from genmodels.evaluation.clusters import score_clusters
from genmodels.evaluation.comparison import Row, short_names, shown
from genmodels.evaluation.likelihood import score_likelihood
from genmodels.evaluation.ood import score_ood
from genmodels.evaluation.options import (
    ClusterOptions,
    LikelihoodOptions,
    OodOptions,
    RestorationOptions,
    ScoreOptions,
    SelftestOptions,
    StatsOptions,
)
from genmodels.evaluation.passes import Store, score_pass
from genmodels.evaluation.report import is_report, versions, write_report, write_table
from genmodels.evaluation.sets import (
    Result,
    Set,
    compare_sets,
    image_names,
    named_features,
    score_images,
    sets_of,
    width_names,
)
from genmodels.evaluation.sources import Pictures, reading_options
from genmodels.metrics.clustering import CLUSTERING
from genmodels.metrics.stats import is_statistics, stats_bytes
from genmodels.run import check_output, holds_arrays

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
# What is written, which changes no number, and how an earlier one is known.
FILES: dict[str, Callable[[Path], bool]] = {
    "out": is_report,
    "save_images": partial(holds_arrays, names=("images", "seeds")),
    "plot": plots.is_drawn,
    "table": is_report,
    "keep": lambda path: True,  # it is read first, and refused if it is none
}


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
    check_files(options, positionals, words)
    check_device("device", options.device)
    alone = mode or getattr(options, "ood", []) or getattr(options, "cluster", "")
    if positionals and (alone or len(positionals) == 1):
        one_model(positionals)
    widths = options.sigma_rel if mode == "" else []
    if mode == "":
        check_scores(options, width_names(positionals, widths))
    elif not positionals:
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")
    started, device = time.monotonic(), pick_device(options.device)
    positionals = [str(checkpoint.newest_run(path)) for path in positionals]
    sets: dict[str, Set] = {}
    with cli.warnings_as_notes() as of_averages:
        sets = averaged_sets(positionals, widths, device) if widths else {}
    models = {name: each.model for name, each in sets.items()}
    models = models or {path: checkpoint.load(path, device=device) for path in positionals}
    for model in models.values() if mode == "" else ():
        generation.choose_vae(model, options.vae)
    if mode == "" and "metrics" not in words and tells_memorised(options, models.values()):
        options.metrics = [*options.metrics, "memorised"]
    saved = getattr(options, "save_images", "")
    if models and saved and not saved.endswith(".npz"):
        roots = [model.cfg.data.root for model in models.values()]
        check_output("save_images", saved, roots, folder=True)
    extra = method_words(rest, list(models.values()), mode)
    # An empty word of another kind of evaluation is no field of these options.
    given = {key: getattr(options, key, "") for key in words if key not in (*rest, *FILES)}
    facts = {"seed": getattr(options, "seed", 0), "device": device.type, "options": given | extra}
    sets = sets or (sets_of(options, models) if mode == "" else {})
    if sets and models:
        extra = dict(extra)
        checkpoint.load_guide(extra, device)
    with cli.warnings_as_notes() as warned:
        if len(sets) > 1:
            rows, more = compare_sets(sets, options, extra, device, load_arrays)
        else:
            name = next(iter(models)) if models else options.images
            scores, more, title = measure(
                mode, models.get(name), options, extra, clustering, device
            )
            num = more["num"] if isinstance(more.get("num"), int) else 0
            rows, more = [Row(name, num, scores)], {"model": name, "title": title} | more
            more |= sets[name].average if name in sets else {}
    if rank() == 0:
        write_results(options, rows, {**more, "warnings": of_averages + warned, **facts}, started)
    return 0


def tells_memorised(options: ScoreOptions, models: Iterable[Any]) -> bool:
    """Return whether what a model has memorised is told unasked: it may, and its data are known."""
    names = {(options.data or model.cfg.data.name).partition(":")[0] for model in models}
    known = all(name in DATASETS and DATASETS[name].shape for name in names)
    return known and not options.reference and any(model.MEMORISES for model in models)


def averaged_sets(
    paths: Sequence[str], widths: Sequence[float], device: torch.device
) -> dict[str, Set]:
    """Return {name: Set} of each average of the runs; all models are in memory at once.

    Raises:
        ValueError: a run that kept no averages, see checkpoint.ema.
    """
    from genmodels.checkpoint.ema import averaged_models

    names, sets = iter(width_names(paths, widths)), {}
    for path in paths:
        for width, model, line in averaged_models(path, widths):
            average = {"run": path, "sigma_rel": width, "average": line}
            name = next(names)
            sets[name] = Set(name, copy.deepcopy(model).to(device), average)
    return sets


def method_words(rest: dict[str, str], models: Sequence[Any], mode: str) -> dict[str, Any]:
    """Return the words that are options of the methods, each of which has to take them.

    Raises:
        ValueError: an unknown key, or a value that is not of its type.
    """
    values: dict[str, Any] = {}
    for model in models or [None]:
        taken = {}
        if model and mode in ("", "likelihood"):
            taken = model.LIKELIHOOD_OPTIONS if mode else model.SAMPLE_OPTIONS
        values = typed_words(rest, taken, also=ALL_KEYS)
    return values


def write_results(options: Any, rows: Sequence[Row], facts: dict[str, Any], started: float) -> None:
    """Write the files that were asked for and print the table.

    Args:
        options: of the command.
        rows: one for each set of images.
        facts: of the report, and "title" and "scorer" of a single set.
        started: when the command began.
    """
    title, scorer = facts.pop("title", ""), facts.pop("scorer", None)
    table = getattr(options, "table", "")
    written = []  # before anything is printed: whoever reads that may be gone
    if options.out and not is_table(options.out):
        scores = rows[0].scores if len(rows) == 1 else {}
        write_report(options.out, scores, started, **facts)
        written.append(options.out)
    for path in (options.out, table):
        if is_table(path):
            write_table(path, rows)
            written.append(path)
    if len(rows) > 1:
        print_rows(rows, facts)
    else:
        print_scores(f"{rows[0].name} {title}", rows[0].scores)
    print_classes(facts.get("per_class", {}))
    for path in written:
        print(f"written: {path}")
    if options.out:
        Store.clear(options.out)
    if getattr(options, "plot", ""):
        if scorer:
            plots.draw_scores(options.plot, scorer)
        elif all(row.average for row in rows):
            plots.draw_widths(options.plot, rows)
        elif len(rows) > 1:
            plots.draw_comparison(options.plot, rows, short_names([row.name for row in rows]))
        print(f"written: {options.plot}")


def is_table(path: str) -> bool:
    """Return whether a file is to hold the table alone."""
    return path.lower().endswith((".csv", ".md"))


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


def check_files(
    options: Any, positionals: Sequence[str], words: dict[str, str], command: str = ""
) -> None:
    """Raise ValueError for a file that could not be written, or is something else already.

    Args:
        options: of the evaluation.
        positionals, words: of the command line; what is not written is read, if it is a path.
        command: one of COMMANDS, or "".
    """
    outputs = {key: getattr(options, key, "") for key in FILES}
    read = [*positionals, *(text for key, text in words.items() if key not in FILES)]
    for key, path in outputs.items():
        if not path:
            continue
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{key}={path}: its folder does not exist; make it first")
        folder = key == "save_images" and not path.endswith(".npz")
        if Path(path).is_dir() and not folder:
            raise ValueError(f"{key}={path}: is a folder; name a file in it")
        earlier = is_statistics if command == "stats" else FILES[key]
        check_output(key, path, read, folder=folder, earlier=earlier)
        for other in FILES:
            if other != key and outputs[other] == path:
                raise ValueError(f"{key}={path}: is {other}= too; give each a name of its own")


def check_reading(options: Any) -> None:
    """Raise ValueError for words that say nothing of what is read.

    root= and pad= are for data sets by name, channels=, resolution= and crop= for files.
    """
    sources = [getattr(options, key, "") for key in ("data", "reference")]
    sources = [source for source in (*sources, *image_names(options.images)) if source]
    named = [source.partition(":")[0] in DATASETS for source in sources]
    for key in ("channels", "resolution"):
        if all(named) and getattr(options, key):
            raise ValueError(
                f"{key}={getattr(options, key)}: is for images in files, not for data sets by "
                "name; leave it out"
            )
    if any(named):
        return
    for key, unread in (("root", ""), ("pad", -1)):
        value = getattr(options, key)
        if value != unread:
            raise ValueError(
                f"{key}={value}: is for data sets by name, not for files; leave it out"
            )


def check_scores(options: ScoreOptions, models: Sequence[str]) -> None:
    """Raise ValueError for what can be told of scores of images from the words alone."""
    check_device("noise", options.noise)
    names = list(models) or image_names(options.images)
    metrics = [scoring.METRICS[name] for name in scoring.expand_metrics(options.metrics)]
    if options.equal and not any(metric.equal for metric in metrics):
        changed = ", ".join(name for name, metric in scoring.METRICS.items() if metric.equal)
        raise ValueError(f"equal=true: changes metrics={changed} only; add it, or leave equal out")
    if options.plot and len(names) < 2 and not any(metric.drawn for metric in metrics):
        raise ValueError(f"plot={options.plot}: nothing to draw; add metrics=fd or prc")
    if models and options.images:
        raise ValueError(f"images={options.images}: give a MODEL or images=, not both")
    if not models and not (options.images and options.reference):
        raise ValueError("images=: give a MODEL and data=, or images= and reference=")
    if not models:
        check_reading(options)
    for name in names:
        if not name or names.count(name) > 1:
            key = "model" if models else "images"
            raise ValueError(f"{key}={','.join(names)}: names {name or 'nothing'} twice; once each")
    if len(models) > 1 and options.save_images:
        raise ValueError(
            f"save_images={options.save_images}: holds the images of one MODEL; name one"
        )
    check_alone(options, names)
    for key in ("sigma_rel", "seeds", "labels", "save_images", "vae", "compile", "channels_last"):
        value = getattr(options, key)
        if options.images and value:
            text = "true" if value is True else value
            text = ",".join(map(str, value)) if key == "sigma_rel" else text
            raise ValueError(f"{key}={text}: images= are there already; leave it out")


def check_alone(options: ScoreOptions, names: Sequence[str]) -> None:
    """Raise ValueError for what is of one set of images, or of one kind of features, alone."""
    if len(names) > 1 and options.per_class:
        raise ValueError("per_class=true: is for one set of images or one MODEL; name one")
    alone = {"per_class": options.per_class, "plot": len(names) < 2 and options.plot}
    for key, value in alone.items():
        if value and len(image_names(options.features)) > 1:
            raise ValueError(
                f"{key}={value}: is of one kind of features, not of features={options.features}; "
                "name one"
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
        more, facts, title = score_images(model, options, extra, device, load_arrays)
        scores |= more
    if getattr(options, "ood", []):
        more, ood_facts, title = score_ood(model, options)
        scores, facts = scores | more, facts | ood_facts
    return scores, facts, title


def print_rows(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Print the table of several sets, and how far each is from the first."""
    names = dict(zip([row.name for row in rows], short_names([row.name for row in rows])))
    metrics = list(rows[0].scores)
    features = facts["features"]
    several = [each["name"] for each in features] if isinstance(features, list) else []
    title = f"against {facts['data']}, features {' and '.join(several) or features['name']}: "
    cli.print_table(
        f"{title}{facts['order']} by {facts['sorted_by']}",
        ("set", "images", *metrics),
        [[names[r.name], r.num, *(shown(r.scores[m]) for m in metrics)] for r in rows],
    )
    best, lines = rows[0].name, list[list[object]]()
    for row in rows[1:]:
        entries = [d for d in facts["differences"] if (d["first"], d["second"]) == (best, row.name)]
        # As they stand in the table: this set less the best one.
        turned = [shown({**d, "value": -d["value"]}) for d in entries]
        lines.append([names[row.name], "yes" if entries[0]["paired"] else "no", *turned])
    cli.print_table(f"less {names[best]}", ("set", "paired", *metrics), lines)


def run_command(positionals: Sequence[str], words: dict[str, str]) -> int:
    """Run stats or selftest; return the exit code."""
    command, *others = positionals
    if others:
        raise ValueError(f"{others[0]}: {command} takes key=value words only; leave it out")
    _, options, extra = read_options(COMMANDS | MODES, words, command)
    typed_words(extra, {}, also=settings_of(COMMANDS[command]))
    check_files(options, (), words, command)
    if command == "stats":
        check_reading(options)
    check_device("device", options.device)
    device = pick_device(options.device)
    with cli.warnings_as_notes():
        return (write_stats if command == "stats" else self_test)(options, device)


def write_stats(options: StatsOptions, device: torch.device) -> int:
    """Write the statistics file of a data set; return the exit code."""
    features, source = named_features(options, device), options.data or options.images
    key = "data" if options.data else "images"
    pictures = Pictures(read_source(source, key=key, **reading_options(options)).pixels)
    kept = [options.rows] if options.rows else []
    parts = Store.of(options.out, "stats", pictures, features, *kept)
    batch = options.feature_batch or None
    scored = score_pass(pictures, features, batch=batch, store=parts, rows=options.rows, whole=True)
    if rank() == 0:
        facts: dict[str, Any] = {"data": source, "data_sha256": pictures.identity()}
        facts |= {"shape": pictures.shape}
        facts |= {"versions": versions()}
        data = stats_bytes(scored.moments(), features, rows=scored.rows, **facts)
        write_bytes(options.out, data)
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


def print_classes(classes: dict[str, Any]) -> None:
    """Print a row for each class, if they were scored by themselves."""
    if not classes:
        return
    metrics = list(next(iter(classes.values()))["metrics"])
    rows = [
        (name, of["num"], of["reference_num"], *(shown(of["metrics"][m]) for m in metrics))
        for name, of in classes.items()
    ]
    cli.print_table("each class by itself", ("class", "images", "real", *metrics), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(evaluate, argv)
