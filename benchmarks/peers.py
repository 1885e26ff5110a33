"""A Frechet distance of two folders of PNG beside torch-fidelity, pytorch-fid and clean-fid.

    python -m benchmarks.peers [images=300,3000] [only=ours,torch-fidelity,...] [size=32]
                               [out=benchmarks/results/peers_cpu.json]

All carry the same seeded random Inception weights, in the layout that each of them reads, so that
values can be compared offline. Every contestant runs in a process of its own, on one thread, from
folders of PNG to the number: its CPU and wall seconds begin after its imports, its memory is what
the process holds at most beyond what it held then. pytorch-fid resizes on another grid than FID's
own code and clean-fid by Pillow's bicubic, so their values differ; ours is run with both of FID's
and clean-fid's resize. What is not installed says so: pip install torch-fidelity pytorch-fid
clean-fid. Finished rows are kept: images=3000 only=clean-fid adds one.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.evaluation import pictures
from genmodels import cli, images
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import check_flags, split_words, typed_words
from genmodels.metrics.features import inception

SEED = 0


@dataclass
class Options(Section):
    """What this command takes."""

    images: list[int] = setting([300, 3000], "in each of the two folders")
    only: list[str] = setting([], "contestants; empty: all")
    size: int = setting(32, "pixels of a side", ge=8)
    out: str = setting("benchmarks/results/peers_cpu.json", "")


def _ours(first: str, second: str, weights: str, resize: str) -> Callable[[], float]:
    from genmodels.data.source import read_source
    from genmodels.evaluation.scorer import Scorer
    from genmodels.evaluation.sources import Pictures
    from genmodels.metrics.features import load_features

    def distance() -> float:
        features = load_features("inception", weights, resize=resize)
        reference = Pictures(read_source(second).pixels)
        scores = Scorer(["fd"], features, reference=reference)(Pictures(read_source(first).pixels))
        return scores["fd"]["value"]

    return distance


def ours(first: str, second: str, weights: str) -> Callable[[], float]:
    """Return our distance, with its error bar where there are enough images."""
    return _ours(first, second, weights, "tf1")


def ours_clean(first: str, second: str, weights: str) -> Callable[[], float]:
    """Return ours with clean-fid's resize."""
    return _ours(first, second, weights, "clean")


def torch_fidelity(first: str, second: str, weights: str) -> Callable[[], float]:
    """Return torch-fidelity's."""
    import torch_fidelity as library

    def distance() -> float:
        found = library.calculate_metrics(
            input1=first,
            input2=second,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=weights,
            fid=True,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,  # no worker processes
        )
        return float(found["frechet_inception_distance"])

    return distance


def pytorch_fid(first: str, second: str, weights: str) -> Callable[[], float]:
    """Return pytorch-fid's."""
    from pytorch_fid import fid_score
    from pytorch_fid import inception as net

    net.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)

    def distance() -> float:
        paths = [first, second]
        return float(fid_score.calculate_fid_given_paths(paths, 50, "cpu", 2048, num_workers=0))

    return distance


def clean_fid(first: str, second: str, weights: str) -> Callable[[], float]:
    """Return clean-fid's, mode clean, on its own port of the network."""
    from cleanfid import fid
    from cleanfid import inception_pytorch as net

    net.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)

    def distance() -> float:
        model = net.InceptionV3(output_blocks=[3], resize_input=False).eval()

        @torch.no_grad()
        def features(x: torch.Tensor) -> torch.Tensor:
            # As its mode clean does before its own network; this port doubles and subtracts 1.
            return model(((x - 128) / 128 + 1) / 2)[0].squeeze(-1).squeeze(-1)

        found = fid.compare_folders(
            first,
            second,
            features,
            mode="clean",
            num_workers=0,
            batch_size=32,
            device=torch.device("cpu"),
            verbose=False,
        )
        return float(found)

    return distance


# name -> (function that makes a distance, the module it needs)
CONTESTANTS: dict[str, tuple[Callable[..., Callable[[], float]], str]] = {
    "ours": (ours, "genmodels"),
    "torch-fidelity": (torch_fidelity, "torch_fidelity"),
    "pytorch-fid": (pytorch_fid, "pytorch_fid"),
    "ours-clean": (ours_clean, "genmodels"),
    "clean-fid": (clean_fid, "cleanfid"),
}


def run_one(name: str, first: str, second: str, weights: str) -> dict[str, Any]:
    """Return {value, cpu_seconds, seconds, memory_mb} of one contestant in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distance = CONTESTANTS[name][0](first, second, weights)
    # What libraries import late is not counted either.
    import scipy.linalg  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, spent = time.monotonic(), time.process_time()
    value = distance()
    return {
        "value": value,
        "cpu_seconds": time.process_time() - spent,
        "seconds": time.monotonic() - started,
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024,
    }


def in_a_process(name: str, *paths: str) -> dict[str, Any]:
    """Return run_one's answer from a process of its own."""
    code = (
        "import json, sys; from benchmarks.peers import run_one; "
        "print('\\n' + json.dumps(run_one(*sys.argv[1:])))"
    )
    words = [sys.executable, "-c", code, name, *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it failed"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(argv: list[str]) -> None:
    """Time every contestant, print the table, write the JSON; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals:
        print(__doc__.strip())
        return
    options = Options(**typed_words(words, settings_of(Options)))
    unknown = set(options.only).difference(CONTESTANTS)
    if unknown:
        raise ValueError(f"only={unknown.pop()}: choose from {', '.join(CONTESTANTS)}")
    torch.set_num_threads(1)
    # A stopped command, or one for other contestants or counts, goes on behind the rows it finds.
    command = record.command_line("peers", argv, ["out", "only", "images"])
    rows = [row for row in record.rows(Path(options.out), command) if "error" not in row]
    finished = {(row["name"], row["images"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/inception.pth"
        torch.save(inception.random_state(SEED), weights)
        for count in options.images:
            sides = [f"{folder}/{side}{count}" for side in ("made", "real")]
            both = pictures(2 * count, options.size)
            both[:count] = (both[:count].float() * 0.9 + 10).byte()
            for side, pixels in zip(sides, both.split(count)):
                Path(side).mkdir()
                for number, picture in enumerate(pixels):
                    images.write_png(f"{side}/{number:05d}.png", picture)
            for name, (_, module) in CONTESTANTS.items():
                if (options.only and name not in options.only) or (name, count) in finished:
                    continue
                if importlib.util.find_spec(module) is None:
                    found: dict[str, Any] = {"error": f"pip install {name}"}
                else:
                    found = in_a_process(name, *sides, weights)
                rows.append({"name": name, "images": count} | found)
                print(rows[-1], file=sys.stderr, flush=True)
                _write(options.out, command, rows)
    columns = ("value", "cpu_seconds", "memory_mb", "speed_over_torch_fidelity")
    table = []
    for row in rows:
        numbers = [f"{row[c]:.6g}" if c in row else "" for c in columns]
        table.append([f"{row['name']}, {row['images']}", *numbers, row.get("error", "")])
    cli.print_table("two folders of so many images", ("", *columns, ""), table)


def _write(path: str, command: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows, each with its ratios to torch-fidelity's where that has run."""
    base = {r["images"]: r for r in rows if r["name"] == "torch-fidelity" and "error" not in r}
    for row in rows:
        if row["images"] in base and "error" not in row:
            own = base[row["images"]]
            row["speed_over_torch_fidelity"] = own["cpu_seconds"] / row["cpu_seconds"]
            row["memory_over_torch_fidelity"] = row["memory_mb"] / max(1e-9, own["memory_mb"])
    record.write(
        path,
        command,
        seed=SEED,
        weights="seeded random, the same for all",
        timed="CPU time of one thread, imports not counted; memory beyond that after them",
        peers={name: _version(name) for name in CONTESTANTS if not name.startswith("ours")},
        rows=rows,
    )


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
