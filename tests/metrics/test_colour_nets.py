"""The in-tree net of colour images: its file, its batch norms folded in, what it knows."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from genmodels.metrics.features import extract, load_features
from genmodels.metrics.features.colour_nets import (
    CIFAR_SHA256,
    ColourNet,
    cifar_file,
    colour_net,
    folded,
)


def test_batch_norms_are_folded_into_the_convolutions():
    """Against torch's own batch norm in eval mode, with statistics of its own."""
    torch.manual_seed(0)
    net = ColourNet(norms=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(folded(net)(images), net.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_shipped_file_is_the_one_that_is_named():
    data = cifar_file().read_bytes()
    features = load_features("cifar")
    assert features.sha256 == CIFAR_SHA256 == hashlib.sha256(data).hexdigest()
    assert features.dim == 128 and len(data) < 3_000_000
    with safe_open(cifar_file(), "pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card["accuracy_exact_1017_test"] >= 0.88 and card["seed"] == 0
    assert "JPEG" in card["data"]
    with pytest.raises(ValueError, match="^weights=: sha256 is "):
        colour_net(data[:-1] + b"\0")


def test_it_takes_colour_of_32_pixels_alone():
    features = load_features("cifar")
    rows = extract(features, torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert rows.shape == (3, 128) and rows.dtype == torch.float32
    with pytest.raises(ValueError, match="features=cifar takes images of shape"):
        extract(features, torch.zeros(3, 1, 28, 28, dtype=torch.uint8))


def test_it_knows_the_exact_test_pictures():
    path = Path(os.environ.get("GENMODELS_DATA", "data")) / "cifar10/cifar10_exact_subset.npz"
    if not path.is_file():
        pytest.skip("needs GENMODELS_DATA with cifar10/cifar10_exact_subset.npz")
    with np.load(path) as file:
        images = torch.from_numpy(file["test_images"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["all_test_labels"][: len(images)].astype(np.int64))
        assert (file["test_indices"] == np.arange(len(images))).all()
    features = load_features("cifar")
    with torch.no_grad():
        found = features.net.logits(extract(features, images)).argmax(dim=1)
    assert (found == labels).double().mean() >= 0.88
