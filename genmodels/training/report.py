"""What runs have come to, as one HTML file that needs nothing else: report.html of each run.

Curves from metrics.csv, grids of samples over time, scores, settings, what computed, and the
commands that go on; of several runs side by side. Figures are SVG in the page, pictures are PNG in
it. What cannot be read, of an old run say, is left out.
"""

import csv
import html
import io
import json
import math
import platform
import shlex
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genmodels import cli, images
from genmodels.atomic import write_bytes
from genmodels.checkpoint.cards import in_features
from genmodels.config.load import read_yaml
from genmodels.evaluation.report import machine, versions
from genmodels.foreign import open_plain, read_plain
from genmodels.run import Run

Points = list[tuple[float, float]]  # (step, value)
Lines = dict[str, Points]  # by name

LOSS_BY_SIGMA = "loss_by_sigma"  # what columns of metrics.csv begin with: loss_by_sigma/0.3
POINTS = 300  # of a line in a figure; more are averaged
GRIDS = 6  # of a run that are shown
WIDEST = 640  # pixels of a grid in the page
LARGEST = 1 << 22  # bytes of a JSON that is looked at
LARGEST_TABLE = 1 << 26  # bytes of a metrics.csv
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
MOST_NAMED = 4  # lines of a figure that each have a name in the legend
WIDTH, HEIGHT, LEFT, TOP = 340, 190, 58, 22  # of a figure, and where its axes begin

MARK = '<meta name="generator" content="genmodels">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
code, pre { font: 13px/1.5 ui-monospace, monospace; background: #f4f4f4; padding: .1em .3em }
pre { padding: .8em; overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #e5e5e5 }
.row { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0 }
figure img { max-width: 340px; width: 100%; image-rendering: pixelated } figcaption { color: #666 }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
"""


class Story(NamedTuple):
    """What was read of a run.

    Attributes:
        run: its folder.
        settings: {key: value} of its config.
        curves: {figure: {line: points}} of its metrics.csv.
        noted: what note_training wrote.
    """

    run: Run
    settings: dict[str, str]
    curves: dict[str, Lines]
    noted: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> "Story":
        """Read a run; what cannot be read is empty."""
        return cls(run, _settings(run), read_curves(run.metrics), _read_json(run.training))

    @property
    def grids(self) -> dict[str, Path]:
        """The pictures on the way, by their names."""
        return {path.name: path for path in sorted(self.run.samples.glob("*.png"))}

    @property
    def step(self) -> float:
        """The last step that a line or a checkpoint reaches."""
        every = [points for lines in self.curves.values() for points in lines.values()]
        saved = [_number(path.stem.removeprefix("step-")) or 0.0 for path in self.run.steps()]
        return max([*saved, *(x for points in every for x, _ in points)], default=0.0)


def update(run: Run, seconds: float | None = None, processes: int = 1) -> None:
    """Write the run's report; what goes wrong is a warning, for it ends no training.

    Args:
        run: of this process alone, or of the first of several.
        seconds: of the training that has ended; None: it goes on.
        processes: that trained.
    """
    try:
        if seconds is not None:
            note_training(run, seconds, processes)
        write_report(run)
    except Exception as error:
        warnings.warn(f"{run.report}: not written ({' '.join(str(error).split())})", stacklevel=1)


def write_report(run: Run) -> Path:
    """Write the run's report.html, all or nothing, and return its path."""
    write_bytes(run.report, run_page(run).encode())
    return run.report


def note_training(run: Run, seconds: float, processes: int) -> None:
    """Write down what computed a run, for its report: RUN/training.json.

    Args:
        run: the run.
        seconds: that this training took; those of the trainings before it are added.
        processes: how many trained.
    """
    before = _number(_read_json(run.training).get("seconds")) or 0.0
    noted = {
        "machine": machine() + (f", {processes} processes" if processes > 1 else ""),
        "versions": {"python": platform.python_version()} | versions(),
        "seconds": round(seconds + before, 1),
        "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_bytes(run.training, (json.dumps(noted, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------------
# Pages


def run_page(run: Run) -> str:
    """Return the report of one run."""
    story = Story.of(run)
    name = story.settings.get("name", run.folder.parent.name)
    figures = "".join(draw(figure, lines) for figure, lines in story.curves.items())
    grids = "".join(_picture(path) for path in _spread([*story.grids.values()], GRIDS))
    every = "\n".join(f"{key} = {value}" for key, value in story.settings.items())
    parts = [
        ("Training", _table([["", ""], *facts(story).items()])),
        ("Go on", f"<pre>{html.escape(cli.as_called(_commands(story)))}</pre>"),
        ("Curves", f'<div class="row">{figures}</div>' if figures else ""),
        ("Grids", f'<div class="row">{grids}</div>' if grids else ""),
        ("Scores", _table([["", "value"], *scores(story).items()])),
        ("Settings", f"<details><summary>all</summary><pre>{html.escape(every)}</pre></details>"),
    ]
    return _page(f"{name}, {run.folder.name}", parts)


def comparison_page(runs: Sequence[Run]) -> str:
    """Return a page with several runs side by side: curves, scores, grids, settings that differ."""
    names, stories = _names(runs), [Story.of(run) for run in runs]
    drawn: dict[str, Lines] = {}
    colours: dict[str, str] = {}
    legend = ""
    for number, (name, story) in enumerate(zip(names, stories)):
        colour = COLOURS[number % len(COLOURS)]
        legend += f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}<br>\n'
        for figure, lines in story.curves.items():
            for line, points in lines.items():
                label = f"{name} {line}".strip()
                drawn.setdefault(figure, {})[label] = points
                colours[label] = colour
    figures = "".join(draw(figure, lines, colours) for figure, lines in drawn.items())
    head = ["", *names]
    differing = _side_by_side([story.settings for story in stories], differing=True)
    parts = [
        ("Runs", legend + _table([head, *_side_by_side([facts(story) for story in stories])])),
        ("Curves", f'<div class="row">{figures}</div>' if figures else ""),
        ("Scores", _table([head, *_side_by_side([scores(story) for story in stories])])),
        ("Grids", _grids_side_by_side(stories, names)),
        ("Settings that differ", _table([head, *differing])),
    ]
    return _page(f"{len(runs)} runs", parts)


def score_table(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    """Return the latest scores of runs as a table: its head, then a row for each score."""
    rows = _side_by_side([scores(Story.of(run)) for run in runs])
    return [("score", *_names(runs)), *rows]


def is_page(path: Path) -> bool:
    """Return whether a file is one of the pages made here."""
    try:
        with open_plain(path) as file:
            return MARK.encode() in file.read(400)
    except OSError:
        return False


def _page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    sections = "".join(f"<h2>{heading}</h2>\n{body}\n" for heading, body in parts if body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{sections}</body></html>\n"
    )


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table, the first row its head; "" if there is no other."""
    head, *body = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{row}</tr>\n" for row in body)
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>\n{lines}</table>" if body else ""


def _side_by_side(
    tables: Sequence[Mapping[str, Any]], differing: bool = False
) -> list[tuple[Any, ...]]:
    """Return a row (key, value in each table) for every key, or for those whose values differ."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, *(table.get(key, "") for table in tables)) for key in keys]
    return [row for row in rows if not differing or len({str(cell) for cell in row[1:]}) > 1]


def _names(runs: Sequence[Run]) -> list[str]:
    """Return what to call the runs: as little of their paths as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if length > 1 and len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path[-2:])} ({k + 1})" for k, path in enumerate(parts)]


# ------------------------------------------------------------------------------------------------
# Curves


def read_curves(path: Path) -> dict[str, Lines]:
    """Return {figure: {line: points}} of a metrics.csv, empty if it cannot be read.

    train/loss and val/loss share the figure "loss", all losses by noise level another; DDO's
    candidates share that of a metric.
    """
    try:
        text = _read_small(path, LARGEST_TABLE).decode(errors="replace")
        rows = list(csv.DictReader(io.StringIO(text)))
    except (OSError, csv.Error):
        return {}
    figures: dict[str, Lines] = {}
    for row in rows:
        step = _number(row.get("step"))
        played = "round" in row
        name = f"round {row.get('round')}, alpha {row.get('alpha')}, beta {row.get('beta')}"
        for column, cell in row.items():
            value = _number(cell)
            if column in ("step", "round", "alpha", "beta") or step is None or value is None:
                continue
            split, _, rest = str(column).partition("/")
            figure, line = (column, name) if played else (rest or split, split if rest else "")
            if split == LOSS_BY_SIGMA:
                figure, line = "loss by sigma", rest
            figures.setdefault(str(figure), {}).setdefault(line, []).append((step, value))
    return dict(sorted(figures.items(), key=lambda item: item[0] != "loss"))


def draw(title: str, lines: Lines, colours: Mapping[str, str] | None = None) -> str:
    """Return a figure as SVG; its values on a log scale where they span more than a factor of 50.

    Args:
        title: above it.
        lines: what to draw; held-out losses are dashed.
        colours: by the line's name; None: one after the other.
    """
    thin = {name: _thinned(points) for name, points in lines.items()}
    values = [y for points in thin.values() for _, y in points]
    last = max((x for points in thin.values() for x, _ in points), default=1) or 1
    low, high = min(values, default=0.0), max(values, default=1.0)
    log = low > 0 and high > 50 * low
    scale: Callable[[float], float] = math.log if log else float
    bottom, height = scale(low), (scale(high) - scale(low)) or 1.0
    right, under = WIDTH - 8, HEIGHT - 20

    def place(x: float, y: float) -> str:
        across = LEFT + x / last * (right - LEFT)
        return f"{across:.1f},{under - (scale(y) - bottom) / height * (under - TOP):.1f}"

    marks = []
    for k in range(4):
        up, y = bottom + k / 3 * height, under - k / 3 * (under - TOP)
        value = math.exp(up) if log else up
        marks.append(
            f'<path d="M{LEFT},{y:.1f}H{right}" stroke="#e5e5e5"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    drawn, legend, many = [], [], len(thin) > MOST_NAMED
    for number, (name, points) in enumerate(thin.items()):
        own = COLOURS[number % len(COLOURS)]
        if many:  # noise levels, say: from blue to red, of which the legend names the ends
            own = f"hsl({240 - 240 * number / (len(thin) - 1):.0f} 75% 45%)"
        colour = (colours or {}).get(name, own)
        dashed = ' stroke-dasharray="5 3"' if name.split()[-1:] == ["val"] else ""
        path = " ".join(place(x, y) for x, y in points)
        shape = f'<polyline points="{path}" fill="none" stroke-width="1.5"'
        if len(points) == 1:
            across, down = path.split(",")
            shape = f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"'
        hint = f"<title>{html.escape(name)}</title>"
        drawn.append(f'{shape} stroke="{colour}"{dashed}>{hint}</{shape[1:].split()[0]}>')
        if name and not colours and (not many or number in (0, len(thin) - 1)):
            legend.append(f'<tspan fill="{colour}"> {html.escape(name)}</tspan>')
    note = ", log scale" if log else ""
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(marks)}{"".join(drawn)}'
        f'<text x="{LEFT}" y="13">{html.escape(title)}{note}{"".join(legend)}</text>'
        f'<text x="{right}" y="{HEIGHT - 5}" text-anchor="end">step {last:g}</text></svg>'
    )


def _thinned(points: Points) -> Points:
    """Return at most POINTS points: means over neighbours."""
    size = -(-len(points) // POINTS) or 1
    parts = [points[k : k + size] for k in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------
# Pictures


def _spread(things: Sequence[Any], count: int) -> list[Any]:
    """Return `count` of the things, evenly spaced, the first and the last among them."""
    if len(things) <= count:
        return list(things)
    return [things[round(k * (len(things) - 1) / (count - 1))] for k in range(count)]


def _picture(path: Path | None) -> str:
    """Return a picture with its name as a figure, a smaller copy of a large one; "" of None."""
    if path is None:
        return ""
    number = path.stem.removeprefix("step-")
    caption = f"step {int(number)}" if number.isdecimal() else html.escape(path.stem)
    try:
        picture = images.read_image(path)
    except (OSError, ValueError) as error:
        return f"<figure><figcaption>{caption}: {html.escape(str(error))}</figcaption></figure>"
    data = b64encode(images.png_bytes(_narrow(picture))).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _narrow(picture: torch.Tensor) -> torch.Tensor:
    """Return a picture (C, H, W) at most WIDEST pixels wide: means over whole pixels."""
    factor = -(-picture.shape[-1] // WIDEST)
    if factor == 1:
        return picture
    pool = torch.nn.functional.avg_pool2d
    return pool(picture[None].float(), factor, ceil_mode=True)[0].round().to(torch.uint8)


def _grids_side_by_side(stories: Sequence[Story], names: Sequence[str]) -> str:
    """Return a table of grids: a column for each run, a row for each of some steps of all runs."""
    every = [story.grids for story in stories]
    common = sorted(set.intersection(*(set(grids) for grids in every)))
    rows: list[list[Path | None]] = []
    rows += [[grids[name] for grids in every] for name in _spread(common, 3)]
    newest = [max(grids.values(), key=lambda path: path.name, default=None) for grids in every]
    if any(newest) and newest not in rows:
        rows.append(newest)
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ["".join(f"<td>{_picture(path)}</td>" for path in row) for row in rows]
    return f"<table><tr>{head}</tr>\n<tr>{'</tr><tr>'.join(lines)}</tr></table>"


# ------------------------------------------------------------------------------------------------
# Scores, settings, facts


def scores(story: Story) -> dict[str, str]:
    """Return {what: value} of a run: the last of each curve of scores, and of reports beside it."""
    found: dict[str, str] = {}
    for figure, lines in story.curves.items():
        for line in [name for name in ("val", "eval") if name in lines]:
            step, value = lines[line][-1]
            found[f"{line}/{figure}"] = f"{value:.5g} (step {step:g})"
    folder = story.run.folder
    for path in sorted([*folder.glob("*.json"), *folder.glob("round-*/state.json")]):
        report, where = _read_json(path), path.name
        tables: Any = {"": report.get("metrics")}
        if path.name == "state.json":  # of a round of DDO
            where, tables = path.parent.name, report.get("final")
        features, num = report.get("features"), report.get("num")
        features = str(features.get("name", "")) if isinstance(features, dict) else ""
        of = f"of {num}" if isinstance(num, int) else ""
        for model, metrics in tables.items() if isinstance(tables, dict) else ():
            for name, entry in metrics.items() if isinstance(metrics, dict) else ():
                entry = entry if isinstance(entry, dict) else {}
                number, error = (_number(entry.get(key)) for key in ("value", "stderr"))
                if number is not None:
                    bar = "" if error is None else f" ± {error:.2g}"
                    name = in_features(name, features)
                    found[" ".join(filter(None, (where, model, name, of)))] = f"{number:.5g}{bar}"
    return found


def _read_small(path: Path, most: int) -> bytes:
    """Return the bytes of a file, b"" of a larger one than `most`; see read_plain."""
    return read_plain(path) if path.stat().st_size <= most else b""


def _read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, {} if that is nothing to be read."""
    try:
        found = json.loads(_read_small(path, LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(run: Run) -> dict[str, str]:
    """Return {key: value} of the run's config."""
    try:
        return dict(_flat(read_yaml(run.config)))
    except (OSError, ValueError):
        return {}


def _flat(plain: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in plain.items():
        nested = isinstance(value, dict)
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", str(value))]
    return rows


def facts(story: Story) -> dict[str, str]:
    """Return what is known of how a run was trained."""
    noted, known = story.noted, story.noted.get("versions")
    seconds = _number(noted.get("seconds"))
    speed = story.curves.get("images_per_second", {}).get("train", [])
    return {
        "folder": str(story.run.folder),
        "step": f"{story.step:g} of {story.settings.get('trainer.max_steps', '?')}",
        "time": "not recorded" if seconds is None else f"{seconds / 60:.1f} minutes",
        "images per second": f"{speed[-1][1]:.4g}" if speed else "not recorded",
        "ended": str(noted.get("ended", "not recorded")),
        "machine": str(noted.get("machine", "not recorded")),
        "versions": ", ".join(f"{name} {version}" for name, version in known.items())
        if isinstance(known, dict)
        else "not recorded",
    }


def _commands(story: Story) -> str:
    """Return the commands that go on from a run, as in a clone."""
    settings, run = story.settings, shlex.quote(str(story.run.folder))
    steps, rounds = (_number(settings.get(key)) for key in ("trainer.max_steps", "method.rounds"))
    longer = f"resume={run} trainer.max_steps={2 * (steps or 0):.0f}"
    if rounds:  # DDO's, of max_steps each
        longer = f"resume={run} method.rounds={rounds + 1:.0f}"
    elif settings.get("optim.decay") == "cosine":  # its end was fixed when it began
        config = shlex.quote(str(story.run.config))
        longer = f"{config} init={run} trainer.max_steps={2 * (steps or 0):.0f}"
    if law := settings.get("data.noise.law"):
        made = f"denoise=PICTURES law={law} level=auto out=restored"
        scored = f"denoise=CLEAN law={law} level=LEVEL out={run}/scores.json"
    else:
        labels = " labels=balanced" if settings.get("data.labels") == "True" else ""
        points = " format=npz" if settings.get("data.shape") == "[2, 1, 1]" else ""
        made = f"num=100{labels}{points} out=made"
        scored = (
            f"data={settings.get('data.name')} num=1000 metrics=fd,nn1 "
            f"features={settings.get('eval.features', 'pixels')} out={run}/scores.json"
        )
    return "\n".join(
        [
            f"python train.py resume={run}    # go on, if it was stopped",
            f"python train.py {longer}    # longer",
            f"python sample.py {run} {made}",
            f"python evaluate.py {run} {scored}",
            f"genmodels report {run}    # this page anew, with the scores",
        ]
    )
