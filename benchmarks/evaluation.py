"""Speed of an evaluation: images to features, and the root term, beside torch-fidelity, clean-fid.

    python -m benchmarks.evaluation [device=auto|cpu|cuda] [images=N] [dim=2048] [seconds=60]
                                    [out=benchmarks/results/evaluation_DEVICE.json]

All networks carry the same seeded random weights (random_state of features/inception.py), which
changes no speed. Variants take turns in one run; on a CPU one thread's CPU time counts, so that
neighbours disturb little, and the ratios are what to read. Rows whose library is not installed say
so. clean-fid's network is a download, so only its resize and its root are timed.
"""

import functools
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric

from benchmarks import record, timing
from genmodels import cli
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import check_flags, split_words, typed_words
from genmodels.metrics.features import extract, inception, load_features, mode_difference
from genmodels.metrics.frechet import Moments, frechet_distance


@dataclass
class Options(Section):
    """What this command takes."""

    device: str = setting("auto", "")
    images: int = setting(0, "0 = 32 on a CPU, 2048 on a GPU")
    dim: int = setting(2048, "")
    seconds: float = setting(60.0, "")
    out: str = setting("", "")


MISSING = "clean-fid is not installed: pip install clean-fid"


def pictures(count, size=32):
    """Return seeded uint8 images (N,3,H,W), smooth with noise."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.normal(size=(count, 3, 8, 8)))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    noisy = smooth + 0.2 * torch.from_numpy(random.normal(size=(count, 3, size, size)))
    return (128 + 60 * noisy).clamp(0, 255).to(torch.uint8)


def networks(device):
    """Return our Features in both modes, and torch-fidelity's network, with the same weights."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights are no FID
        path = Path(folder) / "inception.pth"
        torch.save(inception.random_state(0), path)
        fast = load_features("inception", path, device, mode="fast")
        names = ["2048", "logits_unbiased"]
        theirs = FeatureExtractorInceptionV3("", names, feature_extractor_weights_path=path)
    return fast.exact, fast, theirs.to(device)


def pass_rows(device, count, seconds):
    """Time uint8 images to 2048 features and logits."""
    exact, fast, theirs = networks(device)
    images = pictures(count).to(device)

    @torch.no_grad()
    def referee(batch):
        return torch.cat([theirs(part)[0].cpu() for part in images.split(batch)])

    def ours(features):
        return extract(features, images, outputs=features.outputs)["features"]

    batch = exact.batch
    variants = {
        "torch-fidelity": lambda: referee(batch),
        "torch-fidelity, batch 64": lambda: referee(64),  # its default
        "ours, exact": lambda: ours(exact),
        "ours, fast": lambda: ours(fast),
    }
    if batch == 64 or count <= batch:
        del variants["torch-fidelity, batch 64"]
    truth, rows = referee(batch).double(), ours(exact).double()
    spread = (truth - truth.mean(0)).norm()
    facts = {
        "images": count,
        "batch": batch,
        "fast_dtype": str(fast.net.fc.weight.dtype).removeprefix("torch."),
        "exact_against_torch_fidelity": float((rows - truth).norm() / spread),
        "fast_against_exact": mode_difference(fast, images.cpu(), min(count, 256)),
    }
    return facts | rates(variants, device, seconds, count, "torch-fidelity")


def resize_rows(device, count, seconds):
    """Time the clean preprocessing alone: uint8 images to 299 x 299 floats."""
    images = pictures(count)
    arrays = list(images.permute(0, 2, 3, 1).numpy())
    on_device = images.to(device)

    def ours():
        for part in on_device.split(16 if device == "cpu" else 256):
            inception.prepare(part, "clean", torch.float32)

    variants = {"ours": ours}
    try:
        from cleanfid.resize import build_resizer
    except ImportError:
        return {"images": count, "skipped": MISSING} | rates(variants, device, seconds, count)
    resizer = build_resizer("clean")

    def theirs():
        return np.stack([resizer(array) for array in arrays])

    variants["clean-fid"] = theirs
    ours_grey = 128 + 128 * inception.prepare(on_device[:8], "clean", torch.float32).cpu()
    gap = np.abs(theirs()[:8].transpose(0, 3, 1, 2) - ours_grey.numpy()).max()
    facts = {"images": count, "difference_in_grey_levels": float(gap)}
    return facts | rates(variants, device, seconds, count, "clean-fid")


def root_rows(device, dim, seconds):
    """Time a Frechet distance from given moments."""
    random = np.random.default_rng(0)
    stats = []
    for shift in (0.0, 0.1):
        rows = random.normal(size=(2 * dim, dim)) * np.linspace(0.1, 1, dim) + shift
        stats.append({"mu": rows.mean(0), "sigma": np.cov(rows.T)})
    moments = [
        Moments.from_stats(
            torch.from_numpy(s["mu"]).to(device), torch.from_numpy(s["sigma"]).to(device), 2 * dim
        )
        for s in stats
    ]
    variants = {
        "ours": lambda: float(frechet_distance(*moments)),
        "torch-fidelity": lambda: fid_statistics_to_metric(*stats, False)[
            "frechet_inception_distance"
        ],
    }
    facts = {"dim": dim}
    try:
        from cleanfid.fid import frechet_distance as clean

        arguments = [s[key] for s in stats for key in ("mu", "sigma")]
        variants["clean-fid"] = functools.cache(lambda: _timed(lambda: clean(*arguments)))
    except ImportError:
        facts["skipped"] = MISSING
    values = {name: variant() for name, variant in variants.items()}
    once = values.pop("clean-fid", None)
    variants.pop("clean-fid", None)
    result = facts | rates(variants, device, seconds, 1, "ours")
    if once:
        values["clean-fid"], spent = once
        result["variants"]["clean-fid"] = {"seconds": spent, "samples": 1}
        result["ratios"]["clean-fid"] = spent / result["variants"]["ours"]["seconds"]
    return result | {"values": values}


def _timed(function):
    """Return (result, CPU seconds) of one call."""
    started = time.process_time()
    return function(), time.process_time() - started


def rates(variants, device, seconds, count, base=None):
    """Return the time of each variant and, against `base`, its ratio."""
    measured = timing.measure(variants, device, seconds)
    result = {}
    for name, entry in measured.items():
        if "error" in entry:
            result[name] = entry
            continue
        result[name] = {
            "seconds": entry["median"] / 1e3,
            "low": entry["low"] / 1e3,
            "high": entry["high"] / 1e3,
            "samples": len(entry["samples"]),
        }
        if count > 1:
            result[name]["images_per_second"] = count / result[name]["seconds"]
    facts = {"variants": result}
    if base and "seconds" in result[base]:
        own = result[base]["seconds"]
        faster = base != "ours"  # else: how many times slower than ours
        facts["ratios"] = {
            name: own / entry["seconds"] if faster else entry["seconds"] / own
            for name, entry in result.items()
            if name != base and "seconds" in entry
        }
        facts["ratios_are"] = f"speed over that of {base}" if faster else "time over ours"
    return facts


def measure(argv):
    """Time everything, print the table, write the JSON; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals:
        print(__doc__.strip())
        return
    options = Options(**typed_words(words, settings_of(Options)))
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    count = options.images or (32 if device == "cpu" else 2048)
    started, seconds = time.monotonic(), options.seconds
    rows = {
        "pass": pass_rows(device, count, seconds),
        "clean resize": resize_rows(device, max(64, count), seconds / 10),
        "root": root_rows(device, options.dim, seconds / 2),
    }
    for what, row in rows.items():
        table = [
            (
                name,
                f"{e.get('images_per_second', 0):.1f}",
                f"{e.get('seconds', 0):.3f}",
                f"{row.get('ratios', {}).get(name, 1):.2f}",
                e.get("error", ""),
            )
            for name, e in row["variants"].items()
        ]
        title = f"{what}; {row.get('ratios_are', '')}"
        cli.print_table(title, ("", "images/s", "seconds", "ratio", ""), table)
    timed = "CPU time of one thread" if device == "cpu" else "wall time by events"
    out = options.out or f"benchmarks/results/evaluation_{device}.json"
    record.write(
        out,
        record.command_line("evaluation", argv, ["out"]),
        machine=timing.machine(device),
        seed=0,
        device=device,
        timed=f"{timed}, medians",
        wall_seconds=round(time.monotonic() - started, 1),
        rows=rows,
    )
    print(f"written: {out}")


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
