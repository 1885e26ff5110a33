"""Power-function averages of the weights while training, and the files of them."""

from typing import Any

import lightning as L
import torch

from genmodels.checkpoint.ema import drop_later, exponent, share_of_step, write_average
from genmodels.run import Run
from genmodels.training.callbacks import EMA


class PowerEMA(EMA):
    """Averages of several relative widths; the first is the model's, kept as EMA keeps its own.

    After optimizer step n, ema <- lerp(ema, weights, 1 - (1 - 1 / n)^(g + 1)). The other averages
    are float32 and lie in the checkpoint as `more_averages`, so that a resume is exact. All of them
    are written to the run every `every` steps and at the end of the training.

    Args:
        widths: sigma_rel of each average.
        run: where the files go.
        every: optimizer steps between files; 0: none.

    Reference: Karras et al. 2024, arXiv 2312.02696, equation 127.
    """

    def __init__(self, widths: list[float], run: Run, every: int) -> None:
        super().__init__(half_life=0, rampup=0, batch_size=1)
        self.widths = widths
        self.run = run
        self.every = every
        self.more: list[dict[str, torch.Tensor]] = []  # of widths[1:], by the parameter's name

    def decay(self, step: int) -> float:
        """Return the weight of the first average in the update after `step` optimizer steps."""
        return 1 - share_of_step(step + 1, exponent(self.widths[0]))

    @torch.no_grad()
    def _average(self, averages: Any, weights: Any, num_averaged: Any) -> None:
        share = share_of_step(self._latest_update_step + 1, exponent(self.widths[0]))
        torch._foreach_lerp_(averages, weights, share)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the averages; a checkpoint that is loaded fills them."""
        super().setup(trainer, pl_module, stage)
        self.more = [
            {name: p.detach().float().clone() for name, p in pl_module.named_parameters()}
            for _ in self.widths[1:]
        ]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Move the averages to the model's device."""
        super().on_fit_start(trainer, module)
        self.more = [
            {name: average.to(module.device) for name, average in more.items()}
            for more in self.more
        ]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Delete files of later steps, which a killed run has left."""
        if trainer.is_global_zero:
            drop_later(self.run, trainer.global_step)

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in the weights after an optimizer step, and write the averages if it is due."""
        step = trainer.global_step
        stepped = step > self._latest_update_step
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if not stepped:
            return
        weights = dict(module.named_parameters())
        for width, more in zip(self.widths[1:], self.more):
            share = share_of_step(step, exponent(width))
            current = [weights[name].detach().float() for name in more]
            torch._foreach_lerp_(list(more.values()), current, share)
        due = self.every and (step % self.every == 0 or step == trainer.max_steps)
        if due and trainer.is_global_zero:
            first = dict(self.module.named_parameters())
            for width, state in zip(self.widths, [first, *self.more]):
                write_average(self.run, step, width, state)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages."""
        super().on_save_checkpoint(trainer, module, checkpoint)
        checkpoint["more_averages"] = {
            f"{width:g}": more for width, more in zip(self.widths[1:], self.more)
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the averages."""
        super().on_load_checkpoint(trainer, module, checkpoint)
        for width, more in zip(self.widths[1:], self.more):
            for name, average in checkpoint["more_averages"][f"{width:g}"].items():
                more[name].copy_(average)
