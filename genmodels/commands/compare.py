"""Set several runs side by side in one page: curves, scores, grids, and settings that differ.

    genmodels compare RUN RUN ... [out=compare.html]

Prints the scores as a table too. The page needs no network. RUN is a run folder, or one of runs,
whose newest is taken. The scores of runs are comparable as far as their names say the same: on how
many images, in which features.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.commands.report import find_runs
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.run import check_output
from genmodels.training.report import comparison_page, is_page, score_table


@dataclass
class CompareOptions(Section):
    """What comparing takes."""

    out: str = setting("compare.html", "page to write")

    def __post_init__(self):
        super().__post_init__()
        self.check(self.out.lower().endswith((".html", ".htm")), "out", "must end in .html")


def compare(argv: Sequence[str]) -> None:
    """Write the page of several runs; see the module's docstring."""
    folders, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        print(f"{__doc__.strip()}\n\n{help_text(CompareOptions)}")
        return
    options = CompareOptions(**typed_words(words, settings_of(CompareOptions)))
    runs = find_runs(folders, 2)
    out = Path(options.out).expanduser()
    check_output("out", out, folders, earlier=is_page)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: its folder does not exist; make it first")
    write_bytes(out, comparison_page(runs).encode())
    head, *rows = score_table(runs)
    cli.print_table("the latest scores", head, rows)
    print(out)


if __name__ == "__main__":
    sys.exit(cli.run(compare))
