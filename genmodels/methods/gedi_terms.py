"""The terms of GEDI's loss that look at predictions, and the signatures of their collapse.

Logits z are already divided by the temperature, (B, C); p(y | x) = softmax(z). Everything stays in
logarithms: near one-hot predictions keep their gradient.

Reference: Sansone and Manhaeve, TMLR 2025, arXiv 2401.00873; see gedi.py for how they are put
together.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from genmodels.distributed import world

__all__ = [
    "Marginal",
    "collapse",
    "invariance",
    "log_marginal",
    "log_sum",
    "prior_cross_entropy",
    "sum_loss",
]


def invariance(z: Tensor, z_view: Tensor, detach_target: bool = False) -> Tensor:
    """Return CE(p(. | x'), p(. | x)) of each image, (B,); its gradient runs through both.

    With detach_target a constant predictor has no gradient here; without, it is pushed to be sure.
    """
    target = z_view.softmax(dim=1)
    target = target.detach() if detach_target else target
    return z.logsumexp(dim=1) - (target * z).sum(dim=1)


def log_marginal(z: Tensor) -> Tensor:
    """Return log pbar, (C,): the log of the mean prediction over the batch of all processes.

    A log-mean-exp, without a floor: a cluster that dies out keeps its gradient. The mean over the
    processes is taken before the log and carries the gradient (DDP then averages what each adds).
    """
    log_p = z.log_softmax(dim=1).logsumexp(dim=0) - math.log(len(z))
    processes = world()
    if processes == 1:
        return log_p
    top = log_p.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return (all_reduce((log_p - top).exp()) / processes).log() + top


class Marginal:
    """log pbar, (C,), of a batch, or averaged over batches as if they were one.

    Args:
        memory: m in [0, 1): pbar <- m pbar + (1 - m) pbar of the batch; 0: no average.

    Attributes:
        log_ema: log of the average so far, or None; a checkpoint has to hold it.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.log_ema: Tensor | None = None

    def __call__(self, z: Tensor, update: bool = True) -> Tensor:
        """Return log pbar of logits (B, C); the average moves on if `update`.

        Its value is the average's; its gradient is the batch's at the average, not scaled down.
        """
        return self.average(log_marginal(z)) if self.memory and update else log_marginal(z)

    def average(self, log_pbar: Tensor) -> Tensor:
        """Take in a batch's log pbar and return the average's."""
        with torch.no_grad():
            old = log_pbar if self.log_ema is None else self.log_ema.to(log_pbar)
            more = math.log(self.memory), math.log1p(-self.memory)
            self.log_ema = torch.logaddexp(old + more[0], log_pbar + more[1])
        ratio = (log_pbar - self.log_ema).exp()
        return self.log_ema + ratio - ratio.detach()


def prior_cross_entropy(log_pbar: Tensor, prior: Tensor | None = None) -> Tensor:
    """Return CE(p(y), pbar) >= H(p(y)), a scalar; prior (C,), None = uniform."""
    return -log_pbar.mean() if prior is None else -(prior * log_pbar).sum()


def log_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log P(a + b = s) for s = 0..2C-2, (B, 2C-1), of a ~ p, b ~ q, each (B, C)."""
    clusters = log_p.shape[1]
    rest = torch.arange(2 * clusters - 1)[:, None] - torch.arange(clusters)  # b = s - a
    rest = rest.to(log_p.device)
    joint = log_p[:, None] + log_q[:, rest.clamp(0, clusters - 1)]
    return joint.masked_fill((rest < 0) | (rest >= clusters), -math.inf).logsumexp(dim=2)


def sum_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Return -log P(label 2i + label 2i+1) of the pairs of neighbours in the batch, their mean.

    Raises:
        ValueError: an odd number of images.
    """
    if len(z) % 2:
        raise ValueError(
            f"data.batch_size: gives a process {len(z)} images; w_sum pairs them, so the share of "
            "each must be even"
        )
    log_p = z.log_softmax(dim=1)
    return F.nll_loss(log_sum(log_p[0::2], log_p[1::2]), labels[0::2] + labels[1::2])


def collapse(inv: float, prior_gap: float, largest: float, confidence: float, clusters: int) -> str:
    """Return in words which collapse these numbers are the signature of, or "".

    Args:
        inv: invariance term / log C, 1 for uniform predictions.
        prior_gap: prior term - its least value, 0 for a perfect marginal.
        largest: largest entry of pbar.
        confidence: mean of the largest p(y | x); without it, sure predictions that one view flips
            would look uniform, as their cross-entropy has no upper limit.
        clusters: C.
    """
    if clusters > 1 and inv > 0.95 and prior_gap < 0.05 and confidence < 0.1 + 0.9 / clusters:
        return (
            "every prediction is uniform (the invariance term sits at log C); raise w_inv, lower "
            "tau, or let inv_ramp end sooner"
        )
    # The basin of a constant predictor lies at 0.97; a prior that is itself one-sided has no gap.
    if clusters > 1 and largest > 0.9 and prior_gap > 0.3:
        return (
            "one cluster holds nearly everything; raise w_prior_mean, keep w_inv <= w_prior_mean, "
            "start w_inv later (inv_start, inv_ramp), or set detach_target"
        )
    return ""
