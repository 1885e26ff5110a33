"""Features: from uint8 images to rows, by a named and hashed net."""

from genmodels.metrics.features.extractors import FEATURES, load_features
from genmodels.metrics.features.grey_nets import DIGITS_SHA256
from genmodels.metrics.features.rows import (
    Features,
    check_rows,
    extract,
    feature_rows,
    mode_difference,
)

__all__ = [
    "DIGITS_SHA256",
    "FEATURES",
    "Features",
    "check_rows",
    "extract",
    "feature_rows",
    "load_features",
    "mode_difference",
]
