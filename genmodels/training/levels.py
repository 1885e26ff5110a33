"""What a training has logged of its loss by noise level, and the law of levels that it suggests."""

import math
import statistics

from genmodels.config import Config
from genmodels.methods.by_level import suggested_law
from genmodels.run import Run
from genmodels.training.report import LOSS_BY_SIGMA
from genmodels.training.saver import read_table


def late_profile(run: Run) -> dict[float, float]:
    """Return {sigma: loss per element}, means over the lines in the last quarter of the steps.

    Raises:
        ValueError: metrics.csv cannot be read.
    """
    rows = {
        step: {
            float(column.partition("/")[2]): float(cell)
            for column, cell in row.items()
            if column.startswith(f"{LOSS_BY_SIGMA}/")
        }
        for step, row in read_table(run.metrics).items()
    }
    last = max((step for step, row in rows.items() if row), default=0)
    late = [row for step, row in rows.items() if row and step > 0.75 * last]
    levels = sorted({sigma for row in late for sigma in row})
    return {sigma: statistics.fmean(row[sigma] for row in late if sigma in row) for sigma in levels}


def lines_about(cfg: Config, run: Run) -> list[str]:
    """Return what to print of the loss by noise level at the end of a training; [] if nothing.

    Only of a law of noise levels that is a choice: method.p_mean and method.p_std.

    Args:
        cfg: of the run.
        run: whose metrics.csv says it.
    """
    profile = late_profile(run) if getattr(cfg.method, "precond", "") == "edm" else {}
    if not profile:
        return []
    cells = (f"{sigma:.2g}: {loss:.3g}" for sigma, loss in profile.items())
    lines = [f"loss by sigma (1 before training): {', '.join(cells)}"]
    law = suggested_law(profile)
    if law and all(map(math.isfinite, law)):
        mean, std = law
        lines.append(
            f"it has fallen where ln sigma is {mean:.2g} +- {std:.2g}; trained at "
            f"{cfg.method.p_mean:.2g} +- {cfg.method.p_std:.2g}. To try: "
            f"method.p_mean={mean:.2f} method.p_std={std:.2f}"
        )
    return lines
