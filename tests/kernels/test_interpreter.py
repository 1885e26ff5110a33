"""Each Triton kernel, run by Triton's interpreter on the CPU, against its torch reference.

Run as a script in one subprocess (TRITON_INTERPRET must be set before triton is imported); the
script prints a verdict per check.
"""

import json
import os
import subprocess
import sys
import traceback
from importlib.metadata import version

import pytest

from genmodels.kernels.dispatch import HAS_TRITON, INTERPRETING
from tests.helpers import interpreter_features, interpreter_memory, interpreter_steps

# range() over a tensor takes int() of an array of one element, which numpy 2.4 no longer allows.
CANNOT_LOOP = (
    HAS_TRITON
    and version("triton").startswith("3.6.")
    and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)
)
CHECKS = {
    name.removeprefix("check_"): check
    for module in (interpreter_steps, interpreter_memory, interpreter_features)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def run_checks():
    """Print {check: "" or what went wrong} as JSON."""
    assert INTERPRETING
    verdicts = {}
    for name, check in CHECKS.items():
        os.environ["GENMODELS_KERNELS"] = "triton"
        try:
            check()
            verdicts[name] = ""
        except Exception:
            verdicts[name] = traceback.format_exc()[-2000:]
    print(json.dumps(verdicts))


@pytest.fixture(scope="module")
def verdicts():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", CHECKS)
def test_kernel_equals_reference(verdicts, name):
    if CANNOT_LOOP and "only 0-dimensional arrays can be converted" in verdicts[name]:
        pytest.skip("the interpreter of triton 3.6 cannot loop with numpy 2.4; with 2.3 it can")
    assert verdicts[name] == "", verdicts[name]


if __name__ == "__main__":
    run_checks()
