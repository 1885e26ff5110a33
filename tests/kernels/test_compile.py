"""Each Triton kernel compiled for sm_80 and sm_90 with no GPU present; what ptxas made of it.

For other GPUs, AMD's among them, some kernels are (all of them in the slow tests).

Run as a script in one subprocess per target (TRITON_INTERPRET unset; an assertion inside LLVM would
take the process down), the script prints registers, stack, shared memory and instructions.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from genmodels.kernels import (
    gbm_step,
    langevin_chain,
    langevin_step,
    mala,
    philox,
    resize_normalize,
    tiles,
)
from genmodels.kernels.dispatch import HAS_TRITON, tl, triton

# Bytes of shared memory that a block can have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
OTHERS = {
    "sm_75": 64 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
    "gfx1201": 64 * 1024,
}

# Types by argument name; a name that is nowhere here is a constant.
TYPES = {
    **dict.fromkeys(("out", "y", "grad", "x", "score", "g", "g2", "y2", "out_y", "out_g"), "*fp32"),
    **dict.fromkeys(("log_prob", "log_prob2", "out_log_prob"), "*fp32"),
    **dict.fromkeys(
        ("step", "noise_scale", "tether_scale", "low", "high", "scale", "bias"), "fp32"
    ),
    **dict.fromkeys(("grad_clip", "grad_norm", "variance", "drift", "limit"), "fp32"),
    **dict.fromkeys(("seed", "counter"), "*i64"),
    **dict.fromkeys(("lane", "items", "numel", "groups", "tiles", "parts", "steps", "n"), "i32"),
    **dict.fromkeys(("m", "width", "span", "components", "batch", "height", "start_row"), "i32"),
    **dict.fromkeys([f"{d}_stride" for d in ("image", "channel", "row", "column")], "i32"),
    "ratio": "*fp64",
    "accepted": "*u8",
    "count": "*i32",
    "images": "*u8",
    **dict.fromkeys(("top", "left"), "*i32"),
    **dict.fromkeys(("down", "right", "mean", "std"), "*fp32"),
}
ALIGNED = ("numel", "width")  # sizes that a launch finds divisible by 16

TILE = {"GROUPS": 256, "ROW": True, "PACKED": True, "WIDE": False, "SEED": 1, "COUNTER": 0}
FLAT = {"ROW": False}
STEP = {
    **TILE,
    **dict.fromkeys("ASKCN", -1),
    "NOISE": 2,
    "CLAMP": False,
    "CLIP": False,
    "NORM": 0,
    "PARTS": 1,
    **dict.fromkeys(("tether", "mask", "known", "noise", "norms")),
}
EVERYTHING = {
    "types": {
        **dict.fromkeys(("tether", "known", "norms"), "*fp32"),
        "mask": "*u8",
        **dict.fromkeys(("step", "noise_scale", "tether_scale"), "*fp32"),
        **dict.fromkeys(("grad_clip", "grad_norm"), "*fp32"),
    },
    "constants": {**STEP, **dict.fromkeys("ASKCN", 1), "CLAMP": True, "CLIP": True},
}
BF16 = dict.fromkeys(("out", "y", "grad"), "*bf16")
GBM = {**TILE, **dict.fromkeys("VMS", -1), "NOISE": 2, "noise": None}
MALA = {
    **dict.fromkeys("ASK", 1),
    "SEED": 1,
    "COUNTER": 0,
    "PARTS": 1,
    "STAGE": 0,
    "SPAN": 4096,
    "ROWS": 1,
    "COLUMNS": 4096,
    **dict.fromkeys(("sums", "tether", "mask", "uniform")),
}
MALA_TYPES = {
    **dict.fromkeys(("step", "noise_scale", "tether_scale", "tether"), "*fp32"),
    "mask": "*u8",
}
CHAIN = {"A": -1, "S": -1, "SEED": 1, "COUNTER": 0, "ROWS": 128, "GROUPS": 1, "third": 0.0}
PAIR = {
    "WITHIN": False,
    "OWNER": "y",
    "DEGREE": 3,
    "K": 1,
    "SLOTS": 2,
    "UPCAST": False,
    **dict.fromkeys(("centre", "x2", "y2", "radius2", "by_column")),
}
NORMS = dict.fromkeys(("centre", "x2", "y2"), "*fp32")
RESIZE = {
    "CHANNELS": 3,
    "OUT_HEIGHT": 299,
    "OUT_WIDTH": 299,
    "DOWN": 2,
    "RIGHT": 2,
    "QUANTIZE": False,
    "BLOCK": 512,
}


# The whole list takes minutes on a busy machine; these have every kernel on both targets.
MAIN = (
    "philox_normal",
    "langevin_step",
    "langevin_step bf16",
    "langevin_step all",
    "squares",
    "gbm_step ums flat",
    "mala_accept stage 0",
    "langevin_chain mixture",
    "pairwise polynomial within",
    "pairwise nearest",
    "resize_normalize quantized",
)
# One of each kind, for OTHERS.
FEW = (
    "philox_normal",
    "langevin_step all",
    "gbm_step ums flat",
    "mala_accept stage 1",
    "langevin_chain mixture",
    "pairwise polynomial within",
    "pairwise nearest",
    "pairwise ball",
    "resize_normalize quantized",
)


# One of those whose shape depends on the target; their shared memory differs by a few bytes.
TUNED = ("pairwise polynomial within",)


def cases(target):
    """Yield (name, kernel, types, constants, options) of every kernel in its main shapes."""
    four = {"num_warps": 4}
    eight = {"num_warps": 8}
    fill = {**TILE, "UNIFORM": False}
    yield "philox_normal", philox.fill_kernel, {}, fill, four
    yield "philox_uniform", philox.fill_kernel, {}, {**fill, "UNIFORM": True}, four
    kernel = langevin_step.langevin_kernel
    yield "langevin_step", kernel, {}, STEP, four
    yield "langevin_step flat", kernel, {}, {**STEP, **FLAT}, four
    yield "langevin_step ragged", kernel, {}, {**STEP, **FLAT, "PACKED": False}, four
    yield "langevin_step wide", kernel, {}, {**STEP, "WIDE": True}, four
    yield "langevin_step bf16", kernel, BF16, STEP, four
    types, constants = EVERYTHING["types"], EVERYTHING["constants"]
    yield "langevin_step all", kernel, types, {**constants, "NORM": 2, "PARTS": 64}, four
    row = {**constants, "NORM": 1, "GROUPS": 1024}
    yield "langevin_step row norm", kernel, types, row, {"num_warps": 16}
    one = {**STEP, **FLAT, "PACKED": False, "numel": 1, "groups": 1, "tiles": 1}
    yield "langevin_step of scalars", kernel, {}, one, four
    squares = {"CLIP": True, "LIMIT": -1, "SPAN": 1 << 14, "ROWS": 1, "COLUMNS": 4096}
    yield "squares", langevin_step.squares_kernel, {}, squares, eight
    for form in ("dls", "ums"):
        types = {"flips": "*i32"} if form == "ums" else {}
        constants = {**GBM, "FORM": form, **({} if types else {"flips": None})}
        yield f"gbm_step {form}", gbm_step.gbm_kernel, types, constants, four
    yield (
        "gbm_step ums flat",
        gbm_step.gbm_kernel,
        {"flips": "*i32"},
        {**GBM, **FLAT, "FORM": "ums"},
        four,
    )
    for stage, acc in ((0, tl.float32), (1, tl.float64), (2, tl.float32)):
        types = {**MALA_TYPES, **({"sums": "*fp64"} if stage else {})}
        constants = {**MALA, "STAGE": stage, "ACC": acc}
        if stage:
            constants |= {"PARTS": 16, "SPAN": 1 << 14, "COLUMNS": 1024}
        yield f"mala_accept stage {stage}", mala.accept_kernel, types, constants, eight
    small = {**MALA, "ACC": tl.float32, "ROWS": 256, "COLUMNS": 8, "SPAN": 8}
    yield "mala_accept small", mala.accept_kernel, MALA_TYPES, small, eight
    kernel = langevin_chain.chain_kernel
    for kind, types, tensors in (
        ("gaussian", dict.fromkeys(("first", "second"), "*fp32"), True),
        ("doublewell", dict.fromkeys(("first", "second"), "fp32"), False),
        ("mixture", dict.fromkeys(("first", "second", "third"), "*fp32"), True),
    ):
        constants = {**CHAIN, "KIND": kind, "FIRST": tensors, "SECOND": tensors}
        yield f"langevin_chain {kind}", kernel, types, constants, four
    capability = (int(target[3:]) // 10, 0) if target.startswith("sm_") else None
    (rows, columns, depth, stages), precision = tiles.tuning(capability)
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PRECISION": precision}
    options = {"num_warps": 8, "num_stages": stages}
    both = {"out": "*fp64", "by_column": "*fp32"}
    for name, types, constants in (
        ("polynomial", {"out": "*fp64"}, {}),
        ("polynomial both", both, {}),
        ("polynomial within", both, {"WITHIN": True}),
        ("polynomial bf16", {"out": "*fp64", "x": "*bf16", "y": "*bf16"}, {}),
        ("rbf both", {**both, **NORMS}, {}),
        ("nearest", {"out": "*fp32", **NORMS}, {"K": 5, "SLOTS": 8, "WITHIN": True}),
        ("ball", {"out": "*i64", **NORMS, "radius2": "*fp32"}, {}),
    ):
        constants = {**PAIR, **tile, **constants, "KIND": name.split()[0]}
        yield f"pairwise {name}", tiles.pairwise_kernel, types, constants, options
    yield "resize_normalize", resize_normalize.resize_kernel, {}, RESIZE, four
    quantized = {**RESIZE, "QUANTIZE": True, "DOWN": 5, "RIGHT": 5}
    weights = dict.fromkeys(("down", "right"), "*i32")
    yield "resize_normalize quantized", resize_normalize.resize_kernel, weights, quantized, four


def compile_one(target, kernel, types, constants, options):
    """Return {registers, stack, shared, instructions} of a kernel compiled for a target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = types.get(name) or ("constexpr" if name in constants else TYPES[name])
        signature[name] = kind
        if kind.startswith("*") or (name in ALIGNED and kind != "constexpr"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    binary = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=gpu if amd else GPUTarget("cuda", int(target[3:]), 32),
        options={"enable_fp_fusion": True, **options},
    )
    if amd:
        text = binary.asm["amdgcn"]
        numbers = {
            "registers": "vgpr_count",
            "spills": "vgpr_spill_count",
            "stack": "private_segment_fixed_size",
        }
        found = {
            name: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for name, key in numbers.items()
        }
        return {**found, "shared": binary.metadata.shared, "matrix": "mfma" in text}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    lines = [
        line.split("*/", 1)[1].split()
        for line in code.splitlines()
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)
    ]
    names = [words[1] if words[0].startswith("@") else words[0] for words in lines]
    counts = collections.Counter(".".join(name.rstrip(";").split(".")[:4]) for name in names)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "length": len(names),
        "instructions": counts,
    }


def run(target, names):
    """Print {case: result or error} as JSON."""
    results = {}
    for name, *case in cases(target):
        if name not in names:
            continue
        try:
            results[name] = compile_one(target, *case)
        except Exception as error:
            results[name] = {"error": repr(error)[-2000:]}
    print(json.dumps(results))


def compile_all(names, folder, targets=tuple(SHARED)):
    """Return {target: what run prints}."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    env["TRITON_CACHE_DIR"] = str(folder)
    results = {}
    for target in targets:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, target, *names],
            capture_output=True,
            text=True,
            env=env,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results[target] = json.loads(done.stdout.splitlines()[-1])
    return results


def check_limits(target, name, result):
    """Assert what a compiled kernel must keep to: registers, stack, shared memory, wide loads."""
    assert "error" not in result, result["error"]
    instructions = result["instructions"]
    products = name.startswith("pairwise")
    assert result["registers"] <= (255 if products else 128)
    assert result["stack"] <= 64
    assert result["shared"] <= SHARED[target]

    def has(pattern):
        return any(re.match(pattern, instruction) for instruction in instructions)

    if name.startswith(("philox_normal", "gbm_step")) or (
        name.startswith("langevin_step") and not re.search("bf16|ragged|scalars", name)
    ):
        assert has(r"STG\.E\.128") and (name.startswith("philox") or has(r"LDG\.E\.128"))
    if name == "langevin_step bf16":  # four elements of two bytes
        assert has(r"STG\.E\.64") and has(r"LDG\.E\.64")
    if name.startswith("mala_accept stage") or name == "squares":
        assert has(r"LDG\.E\.128")
    if name == "mala_accept stage 1":
        assert has("DADD")  # compiled with accumulate=torch.float64
    if products:
        assert has(r"HGMMA" if target == "sm_90" else r"HMMA")
        assert has(r"LDGSTS\.E\.BYPASS\.128")  # tiles arrive by 128-bit asynchronous copies


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_all(MAIN, tmp_path_factory.mktemp("triton"))


NAMES = [name for name, *_ in cases("sm_90")] if HAS_TRITON else []


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("target", SHARED)
def test_kernel_compiles_within_limits(compiled, target, name):
    check_limits(target, name, compiled[target][name])


def check_other(target, name, result):
    """Assert that a kernel can run on a target: it compiles, and its memory fits."""
    assert "error" not in result, (target, name, result["error"])
    assert result["shared"] <= OTHERS[target], (target, name)
    if target.startswith("gfx9"):  # the matrix cores' own float32, and registers for all
        assert result["spills"] == 0 and result["registers"] <= 256
        assert result["matrix"] == name.startswith("pairwise")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("sm_120", TUNED),  # all else it compiles as sm_90 does
        *(pytest.param(t, FEW, marks=pytest.mark.slow) for t in OTHERS),
    ],
)
def test_kernels_compile_for_other_gpus(tmp_path, target, names):
    results = compile_all(names, tmp_path, [target])[target]
    assert set(results) == set(names)
    for name, result in results.items():
        check_other(target, name, result)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_every_shape_compiles_within_limits(tmp_path):
    assert set(MAIN) < set(NAMES)
    for target, results in compile_all(NAMES, tmp_path, (*SHARED, *OTHERS)).items():
        assert set(results) == set(NAMES)
        check = check_limits if target in SHARED else check_other
        for name, result in results.items():
            check(target, name, result)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("target", SHARED)
def test_noise_is_cheap_enough_for_the_memory(compiled, target):
    """Instructions per element, everything counted: 80 still keep pace with 12 bytes on an H200."""
    for name, limit in (("langevin_step", 65), ("langevin_step bf16", 70), ("philox_normal", 60)):
        assert compiled[target][name]["length"] / 8 <= limit  # 8 elements a thread, no loops


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
