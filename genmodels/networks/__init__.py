"""Networks: one file each. NETWORKS maps network.name to its class."""

from genmodels.networks.base import Network
from genmodels.networks.denoiser import Denoiser, N2SUNet
from genmodels.networks.ebm import EBM
from genmodels.networks.edm2_unet import EDM2UNet
from genmodels.networks.edm_unet import EDMUNet
from genmodels.networks.encoder import Perceptron, ResNet8
from genmodels.networks.mlp import MLP, MLPMap
from genmodels.networks.potential import Potential
from genmodels.networks.unet import UNet

__all__ = ["NETWORKS"]

# A class here is a Network with `Config` (a NetworkConfig), `__init__(cfg, shape, classes)` and
# `forward(x, noise, labels=None, augment=None) -> (B, C, H, W)`: x (B, C, H, W), noise (B,) the
# encoded noise level, labels int64 (B,) with -1 = none, augment (B, 9) where supported. Energies
# (ENERGY = True) return f = -E, (B,), higher = likelier. Encoders (ENCODER = True) have
# `forward(x) -> (B, width)` and the attribute width.
NETWORKS: dict[str, type[Network]] = {
    "unet": UNet,
    "edm_unet": EDMUNet,
    "edm2_unet": EDM2UNet,
    "ebm": EBM,
    "mlp": MLP,
    "mlp_map": MLPMap,
    "potential": Potential,
    "resnet8": ResNet8,
    "perceptron": Perceptron,
    "denoiser": Denoiser,
    "n2s_unet": N2SUNet,
}
