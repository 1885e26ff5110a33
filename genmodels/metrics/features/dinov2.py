"""DINOv2 ViT-L/14 for FD-DINOv2: the network of timm, the weights as published by Meta.

Reference: Oquab et al. 2023, arXiv 2304.07193 (network); Stein et al. 2023, arXiv 2306.04675 (its
use for scores).
"""

from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from genmodels.kernels.resize_normalize import resize_normalize
from genmodels.metrics.features.inception import rgb

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
NAME = "vit_large_patch14_dinov2"
SIZE, PATCH = 224, 14
MEAN = [255 * value for value in (0.485, 0.456, 0.406)]  # of ImageNet, in grey levels
STD = [255 * value for value in (0.229, 0.224, 0.225)]


def load_timm() -> ModuleType:
    """Return timm.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("features=dinov2 needs timm: pip install timm") from None
    return timm


class DINOv2(nn.Module):
    """The class token (B,1024) of uint8 images (B,1 or 3,H,W), resized to 224 as Pillow does."""

    def __init__(self):
        super().__init__()
        self.vit = load_timm().create_model(NAME, pretrained=False, img_size=SIZE, num_classes=0)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a published state dict, its position embeddings brought to 16 x 16 patches.

        Raises:
            ValueError: the state dict of another network.
        """
        state = {key: value for key, value in state.items() if key != "mask_token"}
        if "pos_embed" in state:
            state["pos_embed"] = position_embeddings(state["pos_embed"], SIZE // PATCH)
        try:
            self.vit.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:120]
            raise ValueError(f"weights=: not DINOv2 ViT-L/14 as published: {reason}") from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the class token after the last norm."""
        x = resize_normalize(
            rgb(images),
            SIZE,
            mode="bicubic",
            quantize=True,
            mean=MEAN,
            std=STD,
            dtype=self.vit.cls_token.dtype,
        )
        return self.vit(x.contiguous())


def position_embeddings(embedding: torch.Tensor, side: int) -> torch.Tensor:
    """Return position embeddings (1,1+side^2,D) from (1,1+n^2,D), bicubic as DINOv2's own code.

    It asks for a scale of (side + 0.1) / n, which shifts the grid a little against asking for the
    size, and does not smooth.
    """
    token, grid = embedding[:, :1], embedding[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return embedding
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([token, grid.flatten(2).mT.to(token)], dim=1)
