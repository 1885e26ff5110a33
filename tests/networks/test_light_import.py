"""Naming a network costs little: what builds one is imported where it is built."""

import subprocess
import sys


def test_networks_are_imported_without_what_builds_them():
    code = "import sys, genmodels.networks; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    heavy = {"diffusers", "torchvision", "lightning", "accelerate", "triton", "scipy", "sklearn"}
    assert "genmodels.networks.unet" in loaded and not heavy & loaded
