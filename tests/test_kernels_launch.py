"""Launches go through Triton's own binder and compile for sm_90, with a driver that is not there.

The interpreter and ahead-of-time tests bypass the binder, which refuses argument names of its own
and specialises integers; here only the start of the compiled kernel is left out.
"""

import os
import subprocess
import sys

import pytest
import torch

CASES = ("philox", "langevin", "langevin tensors", "gbm", "mala", "chain", "pairwise", "resize")


def pretend():
    """Stand in for an H100's driver, and let every launch end after compiling."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        launcher_cls = utils = None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    class Properties:
        multi_processor_count = 132

    driver.set_active(Driver())
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        return original(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: Properties


def launch():
    """Print a line for each case that fails to bind or compile."""
    pretend()
    from genmodels.kernels import (
        gbm_step,
        langevin_chain,
        langevin_step,
        mala,
        pairwise,
        philox,
        resize_normalize,
    )

    ops = (gbm_step, langevin_chain, langevin_step, mala, pairwise, philox, resize_normalize)
    for op in ops:
        op.use_triton = lambda *args, **kwargs: True
    y, g, seeds, one = torch.randn(3, 5), torch.randn(3, 5), torch.arange(3), torch.tensor(0.1)
    p, x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.randn(17, 20)
    cases = {
        "philox": lambda: philox.philox_normal((5,), seeds),
        "langevin": lambda: langevin_step.langevin_step(y, g, step=0.1, seed=1),
        "langevin tensors": lambda: langevin_step.langevin_step(
            y, g.half(), step=one, tether=y, tether_scale=0.1, mask=y > 0, clamp=(-1, 1),
            grad_clip=1.0, grad_norm=1.0, seed=seeds, counter=2**40,
        ),
        "gbm": lambda: gbm_step.gbm_step(y, g, variance=one, form="ums", seed=2**31),
        "mala": lambda: mala.mala_accept(y, y + 1, g, g, y[:, 0], y[:, 0], step=0.1, seed=1),
        "chain": lambda: langevin_chain.langevin_chain(
            y, langevin_chain.Gaussian(), steps=1, step=0.1, seed=seeds
        ),
        "pairwise": lambda: pairwise.polynomial_sums(x, x),
        "resize": lambda: resize_normalize.resize_normalize(p, (5, 4), mode="tf1"),
    }  # fmt: skip
    assert tuple(cases) == CASES
    for name, case in cases.items():
        try:
            case()
            print(f"{name}: fine")
        except Exception as error:
            print(f"{name}: {type(error).__name__} {str(error)[-300:]!r}")


@pytest.fixture(scope="module")
def lines():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_launch(lines, name):
    assert lines[name] == "fine"


if __name__ == "__main__":
    launch()
