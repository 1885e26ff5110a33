"""Scores for sets of images: features -> moments or neighbours -> a number with an error bar.

Images enter as uint8 (N,C,H,W); a feature extractor turns them into (N,D) rows; everything after
that works on rows alone, so a new feature net or a new score needs no change elsewhere.
"""

from genmodels.metrics.errorbars import Resampled, resampled
from genmodels.metrics.features import (
    FEATURES,
    Features,
    extract,
    feature_rows,
    load_features,
    mode_difference,
)
from genmodels.metrics.features.grey_nets import DIGITS_SHA256
from genmodels.metrics.frechet import Frechet, Moments, frechet_distance
from genmodels.metrics.manifold import memorised, nn1, nn1_sides

__all__ = [
    "DIGITS_SHA256",
    "FEATURES",
    "Features",
    "Frechet",
    "Moments",
    "Resampled",
    "extract",
    "feature_rows",
    "frechet_distance",
    "load_features",
    "memorised",
    "mode_difference",
    "nn1",
    "nn1_sides",
    "resampled",
]
