"""Averages of any width after the training, from the few that it kept (post-hoc EMA).

A power-function average of the weights w(t) at time T is

    integral over [0, T] of p(t) w(t) dt,    p(t) = (g + 1) t^g / T^(g + 1),

of relative width sigma_rel, the standard deviation of p over T. A training keeps two of them every
so often in RUN/ema; the sum of such files whose profile is nearest to that of another width is
nearly the average of that width.

    python -m genmodels.checkpoint ema RUN sigma_rel=0.1[,0.15,...] [step=N] [out=DIR]

Reference: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from genmodels.atomic import write_bytes
from genmodels.checkpoint.cards import model_card
from genmodels.checkpoint.exports import check_new, write_export
from genmodels.checkpoint.models import load, model_path
from genmodels.config import Section, check, setting, settings_of
from genmodels.config.words import typed_words
from genmodels.run import Run

WIDEST = 12**-0.5  # sigma_rel of the plain mean, g = 0


class Average(NamedTuple):
    """A file of a run: the average of width sigma_rel at an optimizer step."""

    step: int
    sigma_rel: float
    path: Path


def exponent(sigma_rel: float) -> float:
    """Return g of a relative width, 0 < sigma_rel < 12^-0.5: sigma_rel^2 (g + 2)^2 (g + 3) = g + 1.

    Reference: equation 123 of the paper, as a cubic in g.
    """
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def share_of_step(step: int, g: float) -> float:
    """Return the weight of the newest weights in the average after `step` >= 1 optimizer steps.

    1 - (1 - 1 / step)^(g + 1): then step i of n counts (i / n)^(g + 1) - ((i - 1) / n)^(g + 1).
    """
    return -math.expm1((g + 1) * math.log1p(-1 / step)) if step > 1 else 1.0


def profile_products(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Return <p_a, p_b> = integral of p_a p_b dt for profiles a of the first, b of the second.

    Args:
        first, second: (T, g) of each profile.

    Returns:
        float64 (len(first), len(second)).
    """
    ta, ga = np.array(first, dtype=np.float64).T[:, :, None]
    tb, gb = np.array(second, dtype=np.float64).T[:, None, :]
    late = np.maximum(ta, tb)
    power = np.where(ta < tb, gb, ga)  # of the later one: it goes on behind the earlier one's end
    ratio = np.minimum(ta, tb) / late
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * ratio**power / late


def weights_of(
    averages: Sequence[tuple[float, float]], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Return (the weight of each average, their profile's error) for the width at a step.

    The weights make |sum of weights p - p*| smallest, and are scaled to sum 1; the error is that
    distance over |p*|.

    Args:
        averages: (step, sigma_rel) of those there are, none later than `step`.
        step: time of the target.
        sigma_rel: its width.
    """
    profiles = [(time, exponent(width)) for time, width in averages]
    target = [(step, exponent(sigma_rel))]
    gram, right = profile_products(profiles, profiles), profile_products(profiles, target)[:, 0]
    size = float(profile_products(target, target)[0, 0])
    x = np.linalg.solve(gram, right)
    x /= x.sum()
    square = x @ gram @ x - 2 * x @ right + size
    return x, math.sqrt(max(square, 0.0) / size)


def average_path(run: Run, step: int, sigma_rel: float) -> Path:
    """Return where an average of a run lies: ema/step-00001000-0.050.safetensors."""
    width = f"{sigma_rel:.3f}" if round(sigma_rel, 3) == sigma_rel else f"{sigma_rel:g}"
    return run.averages / f"step-{step:08d}-{width}.safetensors"


def write_average(run: Run, step: int, sigma_rel: float, state: Mapping[str, torch.Tensor]) -> None:
    """Write an average of a run, float32, all or nothing."""
    run.averages.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    facts = {"average": f"step={step} sigma_rel={sigma_rel}"}  # one: several have no fixed order
    write_bytes(average_path(run, step, sigma_rel), save(tensors, facts))


def averages_of(run: Run) -> list[Average]:
    """Return the averages that lie in a run, in the order of their steps and widths."""
    found = []
    for path in run.averages.glob("step-*.safetensors"):
        _, step, width = path.stem.split("-", 2)
        found.append(Average(int(step), float(width), path))
    return sorted(found)


def drop_later(run: Run, step: int) -> None:
    """Delete the averages of later steps: a training that goes on from `step` makes them again."""
    for average in averages_of(run):
        if average.step > step:
            average.path.unlink()


def reconstruct(
    run: Run, widths: Sequence[float], step: int = 0
) -> tuple[int, Iterator[tuple[dict[str, torch.Tensor], int, float]]]:
    """Return (step, an iterator over (parameters, files used, profile error) of each width).

    Each file is read once, tensor by tensor; there is one float32 sum for each width.

    Args:
        run: a training that kept averages.
        widths: sigma_rel of each target.
        step: of the targets, at which the run kept an average; 0: its last one.

    Raises:
        ValueError: a width out of range, no averages, none at that step, a broken file.
    """
    for width in widths:
        check(0 < width < WIDEST, "sigma_rel", width, f"must be in (0, {WIDEST:.4f})")
    found = averages_of(run)
    check(found, "model", run.folder, "has no averages; it was trained without ema.sigma_rel")
    step, steps = step or found[-1].step, sorted({average.step for average in found})
    near = min(steps, key=lambda other: abs(other - step))
    check(step in steps, "step", step, f"no average was kept then; the nearest is at {near}")
    used = [average for average in found if average.step <= step]
    solved = [weights_of([average[:2] for average in used], step, width) for width in widths]
    sums: list[dict[str, torch.Tensor]] = [{} for _ in widths]
    for k, average in enumerate(used):
        try:
            with safe_open(average.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name).float()
                    for total, (weights, _) in zip(sums, solved):
                        if name not in total:
                            total[name] = torch.zeros_like(tensor)
                        total[name].add_(tensor, alpha=float(weights[k]))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model={average.path}: cannot be read ({error})") from None
    return step, ((total, len(used), error) for total, (_, error) in zip(sums, solved))


def averaged_models(
    path: Path | str, widths: Sequence[float], step: int = 0
) -> Iterator[tuple[float, Any, str]]:
    """Yield (sigma_rel, the run's model with that average, a line about it) for each width.

    The buffers are those of the run's last checkpoint.

    Args:
        path: run folder.
        widths, step: see reconstruct.

    Raises:
        ValueError: see reconstruct; no run.
    """
    run = Run(Path(path).expanduser())
    step, averages = reconstruct(run, widths, step)
    model = load(run.folder)
    for width, (state, count, error) in zip(widths, averages):
        lacking = [name for name, _ in model.named_parameters() if name not in state]
        check(not lacking, "model", run.averages, f"lacks {lacking[:1]}; not of this run")
        model.load_state_dict(state, strict=False)
        if error > 0.01:
            warnings.warn(
                f"sigma_rel={width:g}: its profile is met to {100 * error:.2g} % only by the "
                f"{count} averages that the run has up to step {step}",
                stacklevel=2,
            )
        line = (
            f"EMA of relative width sigma_rel={width:g} at step {step}, from {count} files "
            f"(predicted profile error {error:.2g})"
        )
        yield width, model, line


@dataclass
class AverageOptions(Section):
    """What python -m genmodels.checkpoint ema takes."""

    sigma_rel: list[float] = setting([], "relative widths of the averages to make", gt=0, lt=WIDEST)
    step: int = setting(0, "optimizer step at which the run kept an average; 0: the last", ge=0)
    out: str = setting(
        "", "folder to make, of several widths with a folder for each; default: in RUN"
    )


def write_averages(positionals: Sequence[str], words: dict[str, str]) -> None:
    """Export averages of a run; see the module."""
    options = AverageOptions(**typed_words(words, settings_of(AverageOptions)))
    usage = "usage: python -m genmodels.checkpoint ema RUN sigma_rel=0.1[,0.15,...] [out=DIR]"
    if len(positionals) != 1:
        raise ValueError(usage)
    options.check(options.sigma_rel, "sigma_rel", usage)
    run, widths = Run(model_path(positionals[0])), options.sigma_rel
    last = max((average.step for average in averages_of(run)), default=0)
    options.step = options.step or last
    default = run.folder / "exports"
    outs = [
        Path(options.out)
        if options.out and len(widths) == 1
        else Path(options.out or default) / average_path(run, options.step, width).stem
        for width in widths
    ]
    for out in outs:
        check_new(out)
    models = averaged_models(run.folder, widths, options.step)
    for out, (_, model, line) in zip(outs, models):
        card = model_card(model, out.name, options.step, line)
        # The chains that a run keeps (GEDI) are those of its end.
        made = write_export(model, out, card, chains=options.step == last)
        print(f"exported: {made}")
