"""One number per item, shaped to meet the items: what every formula on a batch needs."""

import torch

__all__ = ["over_items"]


def over_items(values: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Return one value per item, (B,), as (B, 1, ..., 1), to broadcast over a state (B, ...)."""
    return values.reshape(-1, *[1] * (state.dim() - 1))
