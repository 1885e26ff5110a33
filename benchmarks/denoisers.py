"""A model of Gaussian noise beside BM3D on the test sets of the papers, in one table.

    python -m benchmarks.denoisers [model=pretrained/noise2score_grey] [ensemble=8] [only=Set12]
        [against=true] [seed=0] [out=benchmarks/results]

BSD68 under Gaussian noise of 15, 25 and 50, Set12 under 25 and 50, Poisson noise of 0.01 and 0.05,
Gamma noise of 100 and 50: the model told the level, as one pass and as the mean of several, and not
told it; BM3D told it, behind a transform of the noise where it is not Gaussian. Each row is what
evaluate.py denoise= says. BM3D's of OUT/noise2score_bm3d_SET_LAW_LEVEL.json are taken from there,
for the noise is the same; others want the package bm3d. Rows are appended to OUT/denoisers.json;
what is there is kept, so that a killed command goes on. The table is printed, and written as
OUT/denoisers.md.

Set12's 04.png is one of the photographs in CBSD400 and Train400; the means are over all twelve, and
`without` leaves it out.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.noise2score import pictures_in
from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.commands import evaluate
from genmodels.config import check
from genmodels.config.words import check_flags, parse_value, split_words

CONDITIONS = (
    *(("BSD68", "gaussian", level) for level in (15, 25, 50)),
    *(("Set12", "gaussian", level) for level in (25, 50)),
    *(("Set12", "poisson", level) for level in (0.01, 0.05)),
    *(("Set12", "gamma", level) for level in (100, 50)),
)
TRAINED_ON = {"Set12": "04.png"}
DEFAULTS = {
    "model": "pretrained/noise2score_grey",
    "ensemble": "8",
    "only": "",
    "against": "true",
    "seed": "0",
    "out": "benchmarks/results",
}


def evaluated(words: list[str]) -> dict[str, Any]:
    """Return the report of evaluate.py with these words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        if code := evaluate.main([*words, f"out={path}"]):
            raise RuntimeError(f"evaluate.py failed with {code}")
        return json.loads(path.read_text())


def measured(
    folder: str, law: str, level: float, options: dict[str, str], known: Path
) -> dict[str, Any]:
    """Return the row of a set and a noise.

    Args:
        folder, law, level: the set and the noise.
        options: the command's words.
        known: the report of an earlier evaluation beside BM3D, if it is there.
    """
    words = [options["model"], f"denoise={pictures_in(folder)}", f"law={law}", f"level={level:g}"]
    words.append(f"seed={options['seed']}")
    against = parse_value("against", options["against"], bool)
    earlier = json.loads(known.read_text()) if known.is_file() and options["seed"] == "0" else None
    now = against and earlier is None
    plain = evaluated(
        [*words, f"ensemble={options['ensemble']}", *(["--against", "bm3d"] if now else [])]
    )
    blind = evaluated([*words, "blind=true"])
    row = {"set": folder, "law": law, "level": level}
    keys = {"noisy": "psnr_noisy", "ours": "psnr", "ensemble": "psnr_ensemble", "ssim": "ssim"}
    row |= {key: plain["metrics"][name]["value"] for key, name in keys.items()}
    row |= {"found": blind["metrics"]["psnr"]["value"]}
    row |= {"level_error": blind["metrics"]["level_error"]["value"]}
    row["megapixels_per_second"] = plain["restoring"]["megapixels_per_second"]
    pictures = {each["image"]: each["psnr"] for each in plain["rows"]}
    row["pictures"] = pictures
    if folder in TRAINED_ON:
        rest = [value for name, value in pictures.items() if name != TRAINED_ON[folder]]
        row["without"] = float(np.mean(rest))
    if against:
        theirs = earlier or plain
        row |= {"bm3d": theirs["metrics"]["psnr_bm3d"]["value"]}
        row["bm3d_from"] = known.name if earlier else "this run"
        if folder in TRAINED_ON:
            each = [r["psnr_bm3d"] for r in theirs["rows"] if r["image"] != TRAINED_ON[folder]]
            row["bm3d_without"] = float(np.mean(each))
    return row


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    columns = ("noisy", "bm3d", "ours", "ensemble", "found", "without", "bm3d_without")
    lines = [("set", "noise", *columns, "level error"), ("---",) * (len(columns) + 3)]
    for row in rows:
        cells = [f"{row[key]:.2f}" if key in row else "" for key in columns]
        error = f"{100 * row['level_error']:.1f} %"
        lines.append((row["set"], f"{row['law']} {row['level']:g}", *cells, error))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run(argv: list[str]) -> None:
    """Measure what the words ask for; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals:
        print(__doc__.strip())
        return
    for key in words:
        check(key in DEFAULTS, key, words[key], f"choose from {', '.join(DEFAULTS)}")
    options = DEFAULTS | words
    out = Path(options["out"])
    path = out / "denoisers.json"
    out.mkdir(parents=True, exist_ok=True)
    shown = [f"{key}={value}" for key, value in words.items()]
    command = record.command_line("denoisers", shown, without=("out", "only"))
    rows = record.rows(path, command)
    for folder, law, level in CONDITIONS:
        there = any((r["set"], r["law"], r["level"]) == (folder, law, level) for r in rows)
        if there or options["only"] not in ("", folder):
            continue
        known = out / f"noise2score_bm3d_{folder.lower()}_{law}_{level:g}.json"
        rows.append(measured(folder, law, level, options, known))
        record.write(
            path, command, seed=int(options["seed"]), threads=torch.get_num_threads(), rows=rows
        )
    write_bytes(path.with_suffix(".md"), table(rows).encode())
    print(table(rows))


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
