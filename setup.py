"""Packaging. The kernels live in kernels/ops and install as genmodels.kernels.

A top-level package called "kernels" would overwrite Hugging Face's package of that name, and a
kernels/__init__.py would shadow it for scripts run from the root; so the folder has none, and the
mapping below is the only place that knows where the code lies (tests/test_packaging.py).

kernels/ops/native.c is compiled where there is a compiler. Without one the package is whole all the
same, and slower on a CPU; on Windows it is not tried.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "genmodels/version.py").read_text())[1]
NATIVE = Extension(
    "genmodels.kernels._native",
    ["kernels/ops/native.c"],
    # No contraction, no -march: the bits are the same on every machine, see the file.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-pthread"],
    optional=True,
)


class Wheel(bdist_wheel):
    """A wheel for any Python 3 of a platform: the library knows nothing of Python."""

    def get_tag(self):
        """Return the tags of Python, its interface and the platform."""
        return ("py3", "none", super().get_tag()[2])


setup(
    name="genmodels",
    version=VERSION,
    description="Likelihood-, score- and energy-based image generators: train, sample, benchmark",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The genmodels developers",
    keywords=["generative models", "diffusion", "energy-based models", "denoising", "FID"],
    classifiers=[  # the licence is the line above: setuptools takes no classifier beside it
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["genmodels", "genmodels.*"]),
        "genmodels.configs",
        "genmodels.kernels",
        "genmodels.pretrained",
    ],
    entry_points={"console_scripts": ["genmodels = genmodels.commands.main:main"]},
    ext_modules=[NATIVE] if os.name == "posix" else [],
    cmdclass={"bdist_wheel": Wheel},
    package_dir={
        "genmodels.configs": "configs",
        "genmodels.kernels": "kernels/ops",
        "genmodels.pretrained": "pretrained",
    },
    package_data={
        "genmodels.configs": ["*.yaml"],
        "genmodels.pretrained": ["noise2score_*/*"],  # the others: from a clone
        "genmodels.metrics.features": ["*.safetensors"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "lightning>=2.6.4",  # 2.6.2 and 2.6.3 were compromised releases
        "torchmetrics>=1.9",
        "diffusers>=0.36",
        "accelerate>=1.10",
        "omegaconf>=2.4",
        "safetensors",
        "huggingface_hub",
        "scikit-learn",  # the embedded digits; clustering scores
        "scipy",  # matching clusters with classes
        "pillow",
        "tifffile",
        "numpy",
        "rich",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-xdist",
            "hypothesis",
            "import-linter",
            "mypy",
            "ruff",
            "pre-commit",
            "torch-fidelity>=0.4",
            "setuptools",
            "wheel",
            "nbclient",  # the tutorials, in the slow tests
            "ipykernel",
        ],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1", "nbclient", "ipykernel"],
        "wandb": ["wandb"],
        "hf": ["datasets>=4"],
        "zarr": ["zarr>=3"],  # stacks in OME-Zarr
        "stacks": ["imagecodecs"],  # LZW, Zstandard and others in TIFF; predictors of floats
    },
)
