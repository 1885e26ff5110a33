"""Composed energies: one density out of several conditional ones of one network.

    f = f(y, none) + sum_i w_i [ F_i - f(y, none) ]
    F_i = f(y, c), or s^2 logsumexp_c f(y, c) / s^2 over the classes of an OR

A positive w is AND, a negative one NOT; one class with w = 1 + g is classifier-free guidance of
weight g. f / s^2 is a log-density, so at each noise level this is a density again wherever it can
be normalised, prod_i (p(y | c_i) / p(y))^w_i p(y). A map g(x) composes linearly with the same
weights; where classes are joined by OR one of them is taken for it, for a mean would lie between
them.

References: Du, Li and Mordatch 2020, arXiv 2004.06030 (AND, OR, NOT of energies); Ho and Salimans
2022, arXiv 2207.12598 (guidance); Liu et al. 2022, arXiv 2206.01714 (linear form).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genmodels.config import check
from genmodels.sampling.recovery import Rung

__all__ = ["Blend", "Term", "blend_of", "parse_compose"]


class Term(NamedTuple):
    """One term: the classes (several = OR) and the signed weight."""

    classes: tuple[int, ...]
    weight: float


def parse_compose(text: str, classes: int) -> list[Term]:
    """Return the Terms of "3:1.5,5|6:1.0,!7:0.5": class, OR of classes, ! for NOT, :weight (1).

    Raises:
        ValueError: another form, an unknown class, or a NOT with a weight above 1: its density
            would be the less normalisable the larger the weight.
    """
    check(classes, "compose", text, "this model is unconditional")
    terms = []
    for part in text.split(","):
        names, _, weight = part.strip().partition(":")
        sign = -1.0 if names.startswith("!") else 1.0
        names = names.removeprefix("!").split("|")
        valid = all(name.strip().isdecimal() and int(name) < classes for name in names)
        check(
            valid,
            "compose",
            text,
            f"{part.strip()!r} is no term; write 3, 3:1.5, 3|5 or !7:0.5 "
            f"with classes 0..{classes - 1}",
        )
        try:
            size = float(weight or 1)
        except ValueError:
            size = math.nan
        check(size > 0 and math.isfinite(size), "compose", text, "weights must be > 0")
        check(sign > 0 or size <= 1, "compose", text, "the weight of a NOT must be <= 1")
        terms.append(Term(tuple(int(name) for name in names), sign * size))
    return terms


@dataclass(eq=False)
class Blend:
    """Evaluations (columns) and how they combine, for N images.

    Attributes:
        labels: int64 (M, N), one row for each evaluation; None for an unconditional model.
        groups: which rows belong to each term.
        weights: one for each term.
        chosen: int64 (len(groups), N), the row that stands for each term in a map.
    """

    labels: Tensor | None
    groups: tuple[tuple[int, ...], ...] = ((0,),)
    weights: tuple[float, ...] = (1.0,)
    chosen: Tensor | None = None
    latest: tuple = (None, None, None)  # a rung, and it and the labels for all evaluations

    @property
    def evaluations(self) -> int:
        """Network evaluations for each image."""
        return 1 if self.labels is None else len(self.labels)

    def _evaluate(
        self, function: Callable[..., Tensor], y: Tensor, rung: Rung, *more: Any
    ) -> Tensor:
        """Return the values of all evaluations, (M, N, ...)."""
        if self.labels is None:
            return function(y, rung, None, *more)[None]
        m = len(self.labels)
        if self.latest[0] is not rung:  # the same tensors all along a chain: see fixed_weights()
            several = type(rung)(*(value.repeat(m) for value in rung))
            self.latest = (rung, several, self.labels.flatten())
        values = function(y.repeat(m, 1, 1, 1) if m > 1 else y, *self.latest[1:], *more)
        return values.reshape(m, len(y), *values.shape[1:])

    def energy(
        self,
        f: Callable[[Tensor, Rung, Tensor | None, torch.dtype], Tensor],
        y: Tensor,
        rung: Rung,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the composed f, (N,) in `dtype`, with one backward through all evaluations.

        Args:
            f: callable (y, rung, labels, dtype) -> (N,), the log-density times s^2.
            y: (N, C, H, W).
            rung: Rung of (N,) tensors.
        """
        temperature = rung.s.to(dtype) ** 2
        f = self._evaluate(f, y, rung, dtype)
        total = 0.0
        for rows, weight in zip(self.groups, self.weights):
            if len(rows) == 1:
                total = total + weight * f[rows[0]]
            else:
                scaled = f[list(rows)] / temperature
                total = total + weight * temperature * torch.logsumexp(scaled, dim=0)
        return total

    def map(
        self, function: Callable[[Tensor, Rung, Tensor | None], Tensor], x: Tensor, rung: Rung
    ) -> Tensor:
        """Return the linearly composed value of a map function(x, rung, labels), like x."""
        values = self._evaluate(function, x, rung)
        if self.labels is None:
            return values[0]
        image = torch.arange(len(x), device=x.device)
        rows = zip(self.chosen, self.weights)
        return sum(weight * values[row, image] for row, weight in rows)


def blend_of(terms: Sequence[Term] | float, labels: Tensor | None, choice: Tensor) -> Blend:
    """Return the Blend of these terms, or of the labels alone.

    Args:
        terms: Terms; or a number, the guidance g of each image's own label.
        labels: int64 (N,), -1 = none, or None for an unconditional model.
        choice: uniforms in [0, 1), (N,): which class of an OR a map takes.
    """
    if labels is None:
        return Blend(None)
    if isinstance(terms, (int, float)):
        rows, groups, weights = [labels], [(0,)], [1.0 + terms]
    else:
        rows, groups, weights = [], [], []
        for term in terms:
            groups.append(tuple(range(len(rows), len(rows) + len(term.classes))))
            rows += [torch.full_like(labels, c) for c in term.classes]
            weights.append(term.weight)
    rest = 1.0 - sum(weights)
    if rest != 0:
        groups.append((len(rows),))
        rows.append(torch.full_like(labels, -1))
        weights.append(rest)
    chosen = [group[0] + (choice * len(group)).long() for group in groups]
    return Blend(torch.stack(rows), tuple(groups), tuple(weights), torch.stack(chosen))
