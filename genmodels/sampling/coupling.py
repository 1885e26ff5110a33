"""Which point of the source goes to which image of a batch: optimal transport within it."""

import torch
from torch import Tensor

__all__ = ["couple"]


def couple(noise: Tensor, data: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the permutation p that makes sum |noise[p] - data|^2 smallest, int64 (B,).

    Within each class where labels are given: noise is dealt to the classes first, so that each
    class starts at N(0, I), as its sampling does. Exact (linear assignment, O(B^3)); the pairs
    depend on the whole batch.

    Args:
        noise, data: (B, ...), independent.
        labels: int64 (B,), or None.

    Reference: Pooladian et al. 2023, arXiv 2304.14772 (couplings of minibatches).
    """
    from scipy.optimize import linear_sum_assignment  # takes a while, and few need it

    order = torch.arange(len(data), device=data.device)
    kinds = torch.zeros_like(order) if labels is None else labels
    for kind in kinds.unique():
        rows = (kinds == kind).nonzero()[:, 0]
        cost = torch.cdist(data[rows].flatten(1).double(), noise[rows].flatten(1).double()) ** 2
        chosen = linear_sum_assignment(cost.cpu().numpy())[1]
        order[rows] = rows[torch.as_tensor(chosen, device=data.device)]
    return order
