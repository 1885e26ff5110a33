"""Every launch goes through Triton's own binder with CUDA tensors that are not there.

The interpreter and the ahead-of-time tests bypass the binder, which refuses argument names of its
own and specialises integers. Here the public functions run on fake CUDA tensors (shapes, strides
and devices without data), up to the first stage of the compiler. So a launch must bind, its grid
must be legal, its tensors must lie on the current device, and nothing may look at a value: that
would wait for the device, and cannot be captured in a graph.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers import launch_cases
from tests.helpers.launch_cases import LAUNCHES, Device

OPS = (
    "philox",
    "langevin_step",
    "gbm_step",
    "mala",
    "langevin_chain",
    "pairwise",
    "resize",
    "batch",
    "samplers",
    "graph",
    "captured",
)


def pretend():
    """Stand in for the driver of an H100, and note what is launched."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        launcher_cls = utils = None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return Device.current

        def get_current_stream(self, device=0):
            return 0

    class Properties:
        multi_processor_count = 132

    driver.set_active(Driver())
    run, add_stages = JITFunction.run, CUDABackend.add_stages

    def checked_run(self, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {torch.device("cuda", Device.current)}
        assert 1 <= grid[0] < 2**31 and all(1 <= size < 2**16 for size in grid[1:]), grid
        LAUNCHES.append((self.__name__, kwargs))
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def first_stage(self, stages, *args):
        add_stages(self, stages, *args)
        for name in list(stages)[1:]:
            del stages[name]
        made = {"name": "kernel", "shared": 0, "cluster_dims": (1, 1, 1)}
        stages["cubin"] = lambda module, metadata: metadata.update(made) or b""

    JITFunction.run, CUDABackend.add_stages = checked_run, first_stage
    torch.cuda.device = Device
    torch.autograd.grad = lambda output, y: (torch.empty_like(y),)  # its engine asks the driver
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: Properties


def describe(case):
    """Return the call of a case, tensors by shape and dtype."""
    words = [*case.args, *case.keywords.items()]
    return f"{case.func.__name__}" + "".join(
        f" {tuple(w.shape)} {w.dtype}" if hasattr(w, "shape") else f" {w}" for w in words
    )


def launch():
    """Print a line for each op: "fine: NUMBER of launches", or the first case that fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    pretend()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for op in OPS:
            verdict, before = "", len(LAUNCHES)
            for case in getattr(launch_cases, f"{op}_cases")():
                count = len(LAUNCHES)
                try:
                    case()
                    assert len(LAUNCHES) > count, "nothing was launched"
                except Exception as error:
                    verdict = f"{describe(case)}: {type(error).__name__} {str(error)[-600:]!r}"
                    break
            print(f"{op}: {verdict or f'fine: {len(LAUNCHES) - before} launches'}")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    for name in ("TRITON_INTERPRET", "GENMODELS_KERNELS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("op", OPS)
def test_launch(lines, op):
    assert lines[op].startswith("fine"), lines[op]


if __name__ == "__main__":
    launch()
