"""Write a run's page anew: RUN/report.html.

    genmodels report RUN [RUN ...]

A training writes it itself, at its end and after each evaluation. The page needs no network: curves
from metrics.csv, grids over time, scores (also those in RUN/*.json, where `genmodels evaluate
... out=RUN/scores.json` puts them), settings, what computed, and the commands that go on. RUN is a
run folder, or one of runs, whose newest is taken. `genmodels compare` sets several side by side.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from genmodels import cli
from genmodels.config.words import check_flags, split_words
from genmodels.run import Run
from genmodels.training.report import write_report


def report(argv: Sequence[str]) -> None:
    """Write the reports of runs; see the module's docstring."""
    folders, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        print(__doc__.strip())
        return
    for key, text in words.items():
        raise ValueError(f"{key}={text}: report takes no settings; write genmodels report RUN")
    for run in find_runs(folders, 1):
        print(write_report(run))


def find_runs(folders: Sequence[str], least: int) -> list[Run]:
    """Return the runs in folders, of a folder of runs the newest.

    Raises:
        ValueError: fewer than `least`, or no run lies there.
    """
    if len(folders) < least:
        raise ValueError(f"run={' '.join(folders)}: name {least} or more run folders")
    runs = []
    for folder in folders:
        run = Run(Path(folder).expanduser())
        newest = run if run.config.is_file() else Run.newest(run.folder)
        if newest is None:
            raise ValueError(f"run={folder}: no config.yaml there; give the folder of a run")
        runs.append(newest)
    return runs


if __name__ == "__main__":
    sys.exit(cli.run(report))
