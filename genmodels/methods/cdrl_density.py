"""What a trained CDRL says of an image: its energy, scores of how usual it is, its likelihood.

    log p(x) = f(y, 0) / s_1^2 - log Z + D log sqrt(a_1),   y = sqrt(a_1) x

is the density of the lowest noise level, sin(phi_0) = 0.0075 on the scale of [-1, 1]. Training asks
for the conditionals p(y | x_1) only, not for this marginal.

References: as in genmodels/methods/cdrl.py and genmodels/sampling/ais.py.
"""

import dataclasses
import math

import torch

from genmodels.networks.ebm import fixed_weights
from genmodels.sampling.ais import bound_log_z
from genmodels.sampling.composition import blend_of
from genmodels.sampling.langevin import frozen

__all__ = ["energy", "log_prob", "ood_scores"]


def lowest(model, x):
    """Return (y, Level of pair 1) of images x, (B, C, H, W) in [-1, 1]; no gradient attached."""
    level = model.schedule.at(torch.ones(len(x), dtype=torch.int64, device=x.device))
    return (level.scale.reshape(-1, 1, 1, 1) * x.detach()).float(), level


def energy(model, x, labels):
    """Return -f / s_1^2, float64 (B,): minus the log density but for a constant."""
    y, level = lowest(model, x)
    return -model.f(y, level, labels, torch.float64) / level.s.double() ** 2


def ood_scores(model, x, labels):
    """Return {name: float32 (B,)}; see CDRL.ood_scores."""
    y, level = lowest(model, x)
    with torch.enable_grad(), frozen(model.net):
        y.requires_grad_(True)
        f = model.f(y, level, labels, torch.float64)
        (grad,) = torch.autograd.grad(f.sum(), y)
    total, zero = 0.0, torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.no_grad():
        for t in range(1, model.schedule.levels + 1):
            level = model.schedule.at(zero + t)
            _, y = model.pair(x.float(), zero, level)
            total = total + model.f(y, level, labels, torch.float64)
    scores = {
        "f": f.detach(),
        "f_levels": total / model.schedule.levels,
        "grad_norm": -grad.flatten(1).norm(dim=1),
    }
    return {name: value.float() for name, value in scores.items()}


@torch.no_grad()
def log_prob(model, x, labels, kind, settings):
    """Return bounds on log p(x) in nats, float64 (B,).

    Annealed importance sampling bounds Z once for each label, from below (kind="ais_upper") or from
    above ("ais_lower": its chains start at samples refined by MALA; that these are exact samples is
    an assumption).

    Args:
        settings: AISOptions.
    """
    own = torch.full((len(x),), -1, device=x.device) if labels is None else labels
    log_z = {int(c): _log_z(model, int(c), kind, settings) for c in own.unique()}
    log_z = torch.tensor([log_z[int(c)] for c in own], dtype=torch.float64, device=x.device)
    scale = float(model.schedule.exact.scale[1])
    return -energy(model, x, labels) - log_z + math.prod(model.shape) * math.log(scale)


def _log_z(model, label, kind, settings):
    """Return the bound on log Z of a label that bounds log p from the side of `kind`."""
    versions = tuple(p._version for p in model.net.parameters())
    key = (label, kind, *dataclasses.astuple(settings), versions)
    if key in model.log_z:
        return model.log_z[key]
    settings = dataclasses.asdict(settings)
    keys = torch.arange(settings.pop("ais_chains"), device=model.device)
    labels = torch.full_like(keys, label) if model.classes else None
    blend = blend_of(0.0, labels, torch.zeros(len(keys), device=model.device))
    y, level, f = model.draw(keys, blend, model.cfg.method)
    s2, noise = level.s.double() ** 2, float(level.scale[0] * level.sin_clean[0]) ** 2
    with fixed_weights(model.net), frozen(model.net):
        bound = bound_log_z(
            lambda y: f(y, level, torch.float64) / s2,
            y,
            keys,
            above=kind == "ais_lower",
            variance=float(s2[0]),
            noise=noise,
            **settings,
        )
    model.log_z[key] = bound.log_z
    return bound.log_z
