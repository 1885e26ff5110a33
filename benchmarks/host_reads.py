"""How often the host waits for the device: values read in a training step and in a sampler.

python -m benchmarks.host_reads out=OUT.json [before=REVISION]

Every method trains for some steps, small, on the device of benchmarks/stand_in.py, which needs a
compiler and no GPU; reads are counted in steps that are not logged and in one that is. Samplers
make two images. With before= the same is counted of the code of a revision.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import record, stand_in
from genmodels.config.words import check_flags, split_words

ROOT = Path(__file__).resolve().parent.parent
UNET = (
    "network.channels=[8]",
    "network.norm_groups=4",
    "network.layers=1",
    "network.attention=[]",
    "network.head_dim=8",
)
# name: (config, words)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "edm": ("edm_digits", UNET),
    "edm_unet": (
        "edm_cifar10",
        (
            "data.name=digits",
            "network.channels=8",
            "network.multipliers=[1]",
            "network.blocks=1",
            "network.attention=[]",
            "method.sigma_data=0.7",
        ),
    ),
    "gbm": ("gbm_digits", UNET),
    "cdrl": (
        "cdrl_digits",
        (
            "network.width=8",
            "method.levels=2",
            "method.steps=2",
            "method.initializer_channels=8",
        ),
    ),
    "gedi": ("gedi_moons", ("network.width=8", "method.buffer=64", "method.chain_steps=2")),
    "ddo": (
        "ddo_digits",
        (
            *UNET,
            "method.alphas=[4]",
            "method.betas=[60]",
            "method.rounds=1",
            "method.pool=32",
            "eval.num=32",
        ),
    ),
    "energy_matching": (
        "energy_digits",
        ("network.width=8", "method.main_start=2", "method.chain_steps=2"),
    ),
    "interpolant": ("interpolant_digits", UNET),
    "meco": ("meco_digits", ("network.width=8", "method.flow_layers=2", "method.flow_width=8")),
    "noise2score": (
        "noise2score_bsd400",
        ("data.patch=8", "network.channels=[4]", "network.blocks=[1]"),
    ),
}
COMMON = (
    "data.batch_size=8",
    "trainer.max_steps=8",
    "trainer.log_every=7",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.compile=false",
    "trainer.channels_last=false",
    "trainer.loggers=[csv]",
    "checkpoint.every=1000",
    "sample.every=0",
    "eval.loss_every=0",
    "eval.every=0",
    "optim.clip=1",
)
QUIET, DUE = (3, 6), (6, 7)  # first step, and the one after the last: steps 4 to 6, and 7
# name: (method, options of sample())
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "edm heun": ("edm", {}),
    "edm heun, churn": ("edm", {"churn": 20.0}),
    "edm euler": ("edm", {"sampler": "euler"}),
    "edm dpmpp_2m": ("edm", {"sampler": "dpmpp_2m"}),
    "edm, VP schedule": ("edm", {"schedule": "vp", "scaled": True}),
    "gbm dls": ("gbm", {}),
    "gbm ode": ("gbm", {"sampler": "ode"}),
    "interpolant heun": ("interpolant", {}),
    "interpolant sde": ("interpolant", {"sampler": "sde"}),
    "meco": ("meco", {"steps": 2}),
    "cdrl": ("cdrl", {}),
    "gedi fresh": ("gedi", {"start": "fresh", "steps": 2}),
    "gedi buffer": ("gedi", {"start": "buffer", "steps": 2}),
}


def trainer_on_stand_in(watches: dict[tuple[int, int], stand_in.Watch]) -> Any:
    """Return what stands for lightning.Trainer: one on the device that watches some steps."""
    import lightning as L
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            """Accept any."""

    class Watching(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
            for (first, end), watch in list(watches.items()):
                if i == end:  # once: a self-play has several fits
                    watches.pop((first, end)).__exit__(None, None, None)
                if i == first:
                    watch.__enter__()

    real, device = L.Trainer, torch.device(stand_in.NAME, 0)

    def trainer(**options: Any) -> Any:
        options.pop("accelerator")
        options["strategy"] = SingleDeviceStrategy(device=device, accelerator=Accelerator())
        options["callbacks"] = [Watching(), *options["callbacks"]]
        return real(**options)

    return trainer


def words_of(name: str, folder: Path) -> list[str]:
    """Return the command line that trains a case, in a folder."""
    config, words = CASES[name]
    extra = [f"out_dir={folder}"]
    if name == "noise2score":
        from genmodels.images import write_png

        for k in range(3):
            pixels = torch.randint(256, (1, 16, 16), generator=torch.Generator().manual_seed(k))
            (folder / "pictures").mkdir(exist_ok=True)
            write_png(folder / f"pictures/{k}.png", pixels.to(torch.uint8))
        extra += [f"data.root={folder / 'pictures'}", "data.name=imagefolder", "data.holdout=0.4"]
    return [f"configs/{config}.yaml", *words, *COMMON, *extra]


def counted(watch: stand_in.Watch, steps: int = 1) -> dict[str, Any]:
    """Return what a watch saw, for each step."""
    facts: dict[str, Any] = {}
    for kind in ("reads", "copies", "mixed"):
        counter = getattr(watch, kind)
        facts[kind] = round(sum(counter.values()) / steps, 2)
        facts[f"{kind}_where"] = {" @ ".join(k): v / steps for k, v in counter.most_common()}
    return facts


def train(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return (the run, {"quiet": what was seen in a step not logged, "due": in a logged one})."""
    import lightning as L

    from genmodels.commands.train import train as train_command
    from genmodels.data import ImageDataModule
    from genmodels.data.patches import NoisyDataModule

    stand_in.install()
    device = torch.device(stand_in.NAME)
    words = words_of(name, folder)
    if name == "ddo":
        with contextlib.redirect_stdout(io.StringIO()):
            plain = [w for w in words if not w.startswith(("method.", "configs/", "eval."))]
            start = train_command(["configs/edm_digits.yaml", *plain, "eval.loss_every=0"])
        words.append(f"init={start}")
    quiet, due = stand_in.Watch(), stand_in.Watch()
    watches = {QUIET: quiet, DUE: due}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(L, "Trainer", trainer_on_stand_in(watches)),
        mock.patch.object(ImageDataModule, "_device", lambda self: device),
        mock.patch.object(NoisyDataModule, "_device", lambda self: device, create=True),
    ):
        run = train_command(words)
    return run, {"quiet": counted(quiet, QUIET[1] - QUIET[0]), "due": counted(due)}


def sample(run: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what was seen while a model made two images."""
    import genmodels

    stand_in.install()
    model = genmodels.load(run, device=stand_in.NAME)
    model.sample([0, 1], **options)  # what is made once
    with stand_in.Watch() as watch:
        model.sample([0, 1], **options)
    return counted(watch)


def measure() -> dict[str, Any]:
    """Return {"training": {case: seen}, "sampling": {sampler: seen}}; of a failure the error."""
    training, sampling, runs = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            (Path(folder) / name).mkdir()
            try:
                runs[name], training[name] = train(name, Path(folder) / name)
            except Exception as error:
                training[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        for name, (method, options) in SAMPLERS.items():
            if method in runs:
                try:
                    sampling[name] = sample(runs[method], options)
                except Exception as error:
                    sampling[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"training": training, "sampling": sampling}


def measure_revision(revision: str) -> dict[str, Any]:
    """Return measure() of the package as it was, by the watch of today."""
    code = "import json; from benchmarks import host_reads as h; print(json.dumps(h.measure()))"
    with tempfile.TemporaryDirectory() as folder:
        parts = ("genmodels", "kernels", "configs")
        archive = subprocess.run(
            ["git", "archive", revision, *parts], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{revision}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, Any]) -> str:
    """Return the counts as a markdown table."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (1 + len(rows)) + "|"]

    def cell(seen: dict[str, Any] | None) -> str:
        if not seen or "error" in seen:
            return "-"
        return f"{seen['reads']:g}"

    for name in CASES:
        found = [part["training"].get(name, {}) for part in rows.values()]
        for kind, words in (("quiet", "a step"), ("due", "a logged step")):
            cells = [cell(seen if "error" in seen else seen.get(kind)) for seen in found]
            lines.append(f"| {name}, {words} | {' | '.join(cells)} |")
    for name in SAMPLERS:
        cells = [cell(part["sampling"].get(name)) for part in rows.values()]
        lines.append(f"| {name}, two images | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Run it; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals or "out" not in words:
        print(__doc__.strip())
        return
    out, before = Path(words.pop("out")), words.pop("before", "")
    if words:
        raise ValueError(f"{min(words)}: no such key; see --help")
    if not stand_in.has_compiler():
        raise ValueError("there is no C++ compiler here, or no ninja")
    rows = {f"at {before}": measure_revision(before)} if before else {}
    rows["now"] = measure()
    record.write(
        out, record.command_line("host_reads", argv), table=table(rows).splitlines(), rows=rows
    )
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
