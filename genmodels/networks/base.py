"""What methods ask of every network, with what holds where a network does not say otherwise."""

from torch import nn

from genmodels.config import Section
from genmodels.networks.precond import Uncertainty

__all__ = ["Network", "NetworkConfig"]


class Network(nn.Module):
    """A network of NETWORKS: see there for what it defines."""

    ENERGY: bool = False  # its output is f = -E, (B,), higher = likelier
    ENCODER: bool = False  # its output is features, (B, width)
    HALF: bool = False  # it keeps within float16's range: trainer.precision=16-mixed
    FORCED: bool = False  # its weights are normalised before each optimizer step (EDM2)
    UNCERTAINTY: type[nn.Module] = Uncertainty  # what method.uncertainty=true adds to it


class NetworkConfig(Section):
    """The settings of a network; those here are no settings unless a network has them as such."""

    PREFIX = "network."

    dropout = 0.0
    augment = False
