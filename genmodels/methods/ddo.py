"""DDO: a trained model is sharpened by being the discriminator against a frozen copy of itself.

    r(x) = log p(x) - log p_ref(x)                                p starts at p_ref
    L = -E_data[ log sigmoid(beta r) ] - alpha E_ref[ log sigmoid(-beta r) ]

Where r is free at every x, the minimum is beta r = log(p_data / p_ref) - log alpha. Of a density
known up to a constant, as an energy model's, that makes p ~ p_ref^(1 - 1/beta) p_data^(1/beta):
with beta < 1 far beyond the data, so training stops on the way. `Discriminative` adds the loss to
any method that has `log_ratio`; `DDO` is EDM with it.

A model that is to be sampled with classifier-free guidance needs hidden labels in training
(method.label_dropout). Both networks then see both images of such a row i without their labels,
h_i = 1, and its fake does not count:

    L = mean_i[ -log sigmoid(beta r_i) - alpha (1 - h_i) log sigmoid(-beta r'_i) ]

Reference: Zheng, Chen, Chen et al. 2025, "Direct discriminative optimization: your likelihood-based
visual generative model is secretly a GAN discriminator", arXiv 2503.01103.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genmodels import config, seeding
from genmodels.config import Section, check, setting
from genmodels.methods.base import Batch, GenerativeModule
from genmodels.methods.edm import EDM, EDMConfig

SATURATED = 4.0  # |beta Delta| from which the sigmoid has all but stopped learning


@dataclass
class DiscriminativeConfig(Section):
    """DDO's own settings."""

    PREFIX = "method."

    alphas: list[float] = setting(
        [4.0], "alpha: weight of the fakes; of several, each is tried", gt=0, lt=math.inf
    )
    betas: list[float] = setting(
        [60.0], "beta: steepness; of several, each is tried", gt=0, lt=math.inf
    )
    beta_unit: str = setting(
        "dim",
        "sum: as published, for Delta is a sum over pixels; dim: beta over their number; "
        "std: beta over std(Delta); nats: an older word for sum",
        choices=("dim", "sum", "nats", "std"),
    )
    normalize: bool = setting(False, "divide the loss by max(alpha, 1)")
    rounds: int = setting(1, "rounds of self-play, each of trainer.max_steps steps", ge=1, le=64)
    pool: int = setting(0, "fake images in each round; 0: as many as training images", ge=0)
    shard: int = setting(1000, "fake images in a file of the pool", ge=1)
    search: str = setting(
        "all",
        "all: every pair (alpha, beta) is trained to the end; halving: the worse half of them "
        "ends early, several times, until one is left",
        choices=("all", "halving"),
    )
    patience: int = setting(2, "stop after this many rises of the score in a row; 0: never", ge=0)
    p_stds: list[float] = setting(
        [], "p_std in rounds 1, 2, ...; the last one holds on", gt=0, lt=math.inf
    )
    reference: str = setting("", "sha256 of the reference's weights; filled in")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alphas", "betas"):
            self.check(getattr(self, name), name, "give at least one number")


class Frozen:
    """Holds a model that nobody trains, averages, saves or copies.

    It is no module, so its parameters belong to no optimizer and no checkpoint, and DDP does not
    see it; it survives the deep copy that the weight average is made by.
    """

    def __init__(self, model: GenerativeModule) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self

    def beside(self, model: GenerativeModule) -> GenerativeModule:
        """Return the frozen model on the other one's device and in its mode.

        There is no dropout, but modules that do nothing in training may still change the layout in
        memory, and with it the rounding; Delta would not start at exactly 0.
        """
        return self.model.to(model.device).train(model.training)


class Discriminative:
    """The loss of DDO; stands before a method with `log_ratio`, as in DDO(Discriminative, EDM).

    A training batch also holds `fake` (B, C, H, W) and `fake_label` (B,), samples of the reference;
    row i of both sides shares n, and with it noise level and noise. A batch without them gets the
    method's own loss (the held-out images).

    Args:
        cfg: Config whose method has the settings of DiscriminativeConfig.
        reference: the frozen model p_ref, needed for training only.

    Raises:
        ValueError: dropout or reduced precision: Delta is a small difference of large sums.
    """

    NEEDS = ("reference",)

    def __init__(self, cfg: config.Config, reference: GenerativeModule | None = None) -> None:
        super().__init__(cfg)
        why = "DDO's log-ratio is a small difference of large sums"
        precision, tf32 = cfg.trainer.precision, cfg.trainer.tf32
        check(precision == "32-true", "trainer.precision", precision, f"{why}; use 32-true")
        check(not tf32, "trainer.tf32", "true", f"{why}; use false")
        dropout = cfg.network.dropout
        check(not dropout, "network.dropout", dropout, f"{why}; use 0")
        self.frozen = None if reference is None else Frozen(reference)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {diagnostics}) of a batch of real and fake images; see the module.

        Logged are L, mean and standard deviation of Delta on both sides, the share of rows
        that the sign of Delta assigns rightly (0 counts half), the share with |beta Delta| > 4, and
        what the method's log_ratio reports on the real images.
        """
        if "fake" not in batch and not self.training:
            return super().loss(batch)
        check(
            "fake" in batch and self.frozen is not None,
            "reference",
            "none",
            "DDO trains against a frozen model and its samples; train.py init=MODEL hands them in",
        )
        both = {
            "image": torch.cat([batch["image"], batch["fake"]]),
            "label": torch.cat([batch["label"], batch["fake_label"]]),
            "n": torch.cat([batch["n"], batch["n"]]),
        }
        x, cfg, count = both["image"], self.cfg.method, len(batch["n"])
        alpha: Tensor | float = cfg.alphas[0]
        if self.LABEL_DROPOUT and cfg.label_dropout and self.classes and self.training:
            u = seeding.uniform(self.cfg.seed, both["n"], seeding.Stream.LABEL_DROP)
            hidden = u < cfg.label_dropout
            both["label"] = torch.where(hidden, -1, both["label"])
            alpha = torch.where(hidden[:count], 0.0, alpha)
        with torch.autocast(x.device.type, enabled=False):
            delta, rows = self.log_ratio(both, self.frozen.beside(self))
            real, fake = delta.split(count)
            beta = self.steepness(delta.detach())
            loss = ddo_loss(real, fake, alpha, beta)
        if cfg.normalize:
            loss = loss / max(cfg.alphas[0], 1.0)
        logs = {name: row[:count].mean() for name, row in rows.items()}
        return loss, {"loss": loss.detach()} | diagnostics(real, fake, beta) | logs

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Force the weights of a network that wants it, but in the first step.

        There they are the reference's, which load_reference() has forced. A second time moves them
        by 1e-4 of their size, the outputs by rounding, and Delta would not start at exactly 0.
        """
        if self.global_step:
            super().on_train_batch_start(batch, batch_idx)

    def steepness(self, delta: Tensor) -> Tensor | float:
        """Return beta as Delta is multiplied by it, from betas and beta_unit of the method.

        With "std" it is beta over the standard deviation of this batch's Delta (on this process),
        at most beta itself.
        """
        beta, unit = self.cfg.method.betas[0], self.cfg.method.beta_unit
        if unit == "dim":
            return beta / math.prod(self.shape)
        return beta if unit in ("sum", "nats") else beta / delta.std().clamp(min=1.0)


def ddo_loss(real: Tensor, fake: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """Return -mean log sigmoid(beta real) - mean alpha log sigmoid(-beta fake).

    Args:
        real, fake: log-ratios (B,) of data and of the reference's samples.
        alpha: a number > 0, or one for each fake (B,), 0 where it does not count.
        beta: a number > 0.

    Reference: L of the module's docstring; (1 + mean alpha) ln 2 where the ratios are 0.
    """
    return -logsigmoid(beta * real).mean() - (alpha * logsigmoid(-beta * fake)).mean()


def diagnostics(real: Tensor, fake: Tensor, beta: Tensor | float) -> dict[str, Tensor]:
    """Return {name: scalar} of what the discriminator does; arguments as for ddo_loss."""
    real, fake = real.detach(), fake.detach()
    margin = torch.cat([real, -fake])  # > 0 where the sign assigns a row rightly
    return {
        "delta_real": real.mean(),
        "delta_fake": fake.mean(),
        "delta_real_std": real.std(),
        "delta_fake_std": fake.std(),
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "saturated": ((beta * margin).abs() > SATURATED).float().mean(),
    }


@dataclass
class DDOConfig(DiscriminativeConfig, EDMConfig):
    """DDO (Zheng et al. 2025, arXiv 2503.01103) of an EDM."""

    name: str = setting("ddo", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {"augment": 0, "uncertainty": False}
        for name, off in plain.items():
            remedy = f"DDO finetunes the plain model; use {str(off).lower()}"
            self.check(getattr(self, name) == off, name, remedy)


class DDO(Discriminative, EDM):
    """EDM finetuned by DDO: the log-ratio is a difference of weighted denoising losses.

    Its weights, samplers and exports are those of an EDM.

    Args:
        cfg: Config whose method is a DDOConfig.
        reference: an EDM with the same network, frozen here.
    """

    Config = DDOConfig

    def __init__(self, cfg: config.Config, reference: GenerativeModule | None = None) -> None:
        cfg.method.check(
            cfg.method.guidance == 1,
            "guidance",
            "DDO finetunes the plain model, against fakes without guidance; use 1 and give "
            "guidance= to sample.py",
        )
        super().__init__(cfg, reference)
