"""What the grids of a training cost, and its report: CPU seconds beside those of its steps.

python -m benchmarks.pictures out=OUT.json [configs=NAME,...] [steps=5]

Every config that a CPU trains takes some steps and draws one grid, on one thread; the share is that
of all grids in all of its steps. The report is that of a run with a line for each of 8,000 steps
and 80 grids. CPU time, so that a busy machine changes little.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from benchmarks import record
from genmodels import checkpoint, cli, generation, images
from genmodels.config import load_config, save_config
from genmodels.config.words import check_flags, split_words
from genmodels.data import ImageDataModule
from genmodels.data.patches import NoisyDataModule
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.run import Run
from genmodels.training.callbacks import EARLY, small_batch
from genmodels.training.report import write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = (
    "edm_digits,edm2_digits,gbm_digits,cdrl_digits,cdrl_toy,energy_digits,energy_fashion,"
    "gbm_fashion,gbm_mnist,gedi_mnist_cpu,gedi_addition,gedi_circles,gedi_moons,edm2_fashion,"
    "noise2score_bsd400"
)
CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.compile=false")


class Steps(L.Callback):
    """Takes the CPU seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, *args):
        """Start."""
        self.began = time.process_time()

    def on_train_batch_end(self, *args):
        """End."""
        self.seconds.append(time.process_time() - self.began)


def cost(name, steps):
    """Return the seconds of a step and of a grid of a config, and the share of its grids."""
    cfg = load_config([ROOT / f"configs/{name}.yaml"], CPU, methods=METHODS, networks=NETWORKS)
    data = (NoisyDataModule if cfg.data.noise.law else ImageDataModule)(cfg.data, cfg.seed)
    model, taken = checkpoint.build(cfg), Steps()
    model.prepare(data)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[taken],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        inference_mode=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, datamodule=data)
    model.eval()
    began = time.process_time()
    labels, columns = generation.class_grid(model, cfg.sample.num)
    if model.ANY_SIZE:
        pictures = data.preview(model, cfg.sample.num)
    else:
        seeds, batch = range(len(labels or range(cfg.sample.num))), small_batch(model.shape)
        pictures = generation.generate_all(model, seeds, labels, batch=batch, progress=False)
    images.png_bytes(images.contact_sheet(pictures, columns))
    grid, step = time.process_time() - began, statistics.median(taken.seconds)
    last, every = cfg.trainer.max_steps, cfg.sample.every
    grids = last // every + (every > EARLY)
    return {
        "config": name,
        "step_seconds": round(step, 4),
        "grid_seconds": round(grid, 3),
        "images": len(pictures),
        "grids": grids,
        "share": round(grids * grid / (last * step), 4),
    }


def cost_of_report():
    """Return the seconds of a large run's report, and its size."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.make_folders()
        config = [ROOT / "configs/edm_digits.yaml"]
        save_config(load_config(config, methods=METHODS, networks=NETWORKS), run.config)
        columns = ["step", *(f"train/{k}" for k in range(8)), "val/loss", "eval/fd_1000"]
        values = torch.rand(8000, 10, generator=generator).tolist()
        rows = [",".join([str(k + 1), *(f"{v:.6g}" for v in row)]) for k, row in enumerate(values)]
        run.metrics.write_text("\n".join([",".join(columns), *rows, ""]))
        sheet = torch.randint(0, 256, (3, 520, 520), generator=generator, dtype=torch.uint8)
        for k in range(80):
            images.write_png(run.samples / f"step-{100 * k:08d}.png", sheet)
        began = time.process_time()
        size = write_report(run).stat().st_size
        return {"seconds": round(time.process_time() - began, 3), "bytes": size}


def main(argv):
    """Run it; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals or "out" not in words:
        print(__doc__.strip())
        return
    torch.set_num_threads(1)
    out, steps = Path(words.pop("out")), int(words.pop("steps", 5))
    names = words.pop("configs", CONFIGS).split(",")
    if words:
        raise ValueError(f"{min(words)}: no such key; see --help")
    command, rows, report = record.command_line("pictures", argv), [], cost_of_report()
    for name in names:
        rows.append(cost(name, steps))
        print(rows[-1], flush=True)
        record.write(out, command, seed=0, report=report, rows=rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
