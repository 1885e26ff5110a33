"""What every method shares: the Lightning side of training, and labels of generated images."""

import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from genmodels import config, seeding
from genmodels.config import check, to_plain
from genmodels.methods.batches import OwnLoop
from genmodels.methods.by_level import LossByLevel
from genmodels.methods.solving import solve
from genmodels.networks import NETWORKS
from genmodels.networks.ebm import power_iteration
from genmodels.networks.edm2_unet import normalise_weights
from genmodels.sampling.posterior import Denoiser, Measured

if TYPE_CHECKING:
    from genmodels.data import ImageDataModule

Batch = dict[str, Tensor]
Labels = int | Sequence[int] | Tensor | None
Callback = Callable[[int, Tensor], object]


LARGEST_PIXEL = 1e18  # in magnitude; the square of a larger one is infinite in float32


def _of_moderate_size(x: Tensor) -> Tensor:
    """Return whether all pixels are finite and small enough to be squared, a scalar tensor."""
    return (x.abs() < LARGEST_PIXEL).all()


def _checkpoint(name: str) -> Any:
    """Return a module of genmodels.checkpoint, for what a user asks of a model."""
    return importlib.import_module(f"genmodels.checkpoint.{name}")


class GenerativeModule(L.LightningModule):
    """A LightningModule whose subclass is one method.

    A subclass sets `Config`, builds its networks in __init__ and defines

        loss(batch) -> (scalar to minimise, {name: scalar to log})
        sample(seeds, labels=None, **options) -> images in [-1, 1], float32 (N, C, H, W)

    and, where the method has them, denoise, score and energy, and what the attributes below
    promise. loss begins with `batch = self.as_batch(batch)`; from there on a batch is a dict:
    `image` float32 (B, C, H, W) in [-1, 1], `label` int64 (B,) with -1 = none, `n` int64 (B,) the
    images' positions in the training stream, from which everything random about them is drawn.

    Args:
        cfg: Config with data.shape and data.classes filled in.
    """

    Config: type

    # What a method can do: commands, training and evaluation ask these, by name and nothing else.
    # A method says where it differs from the defaults (Noise2Score, whose law is a setting, when
    # it is built).
    #
    # declared             promises
    # NEEDS                these keyword arguments of __init__ beyond cfg, e.g. ("reference",)
    # ENERGY               its network is an energy, (B,) for (B, C, H, W)
    # LABEL_DROPOUT        method.label_dropout > 0 hides that share of labels in training
    # LATENTS              it learns latents as well as pictures (data.name=latents)
    # P_STD                method.p_std is the spread of ln sigma in training
    # OF_WEIGHTS           these settings of the method say what its weights mean, beside network.*:
    #                      init= brings them along
    # RETRIES              method.retry = 1, 2, ... goes on after a divergence with other noise
    # BY_PROCESS           what of its training is drawn for each process or micro-batch and not for
    #                      each image, in words: it differs after a resume on other devices
    # SAMPLE_OPTIONS       sample() takes these beyond seeds and labels: see settings_of
    # INPAINTS             sample() takes known= and mask=
    # LIKELIHOODS          log_prob() of these kinds: "ode" first where there is one, then bounds
    # LIKELIHOOD_OPTIONS   log_prob() takes these beyond kind and seeds, as SAMPLE_OPTIONS
    # CLUSTERS             cluster(x) -> p(cluster | x), (B, C)
    # OOD_SCORES           ood_scores(x) -> {name: (B,)}, higher = more like the training data
    # SOURCES              data.source= may name images that it starts from: batches hold `source`
    # DENOISE_LAWS         restore() of noise of these laws: {law: what its level is}
    # ANY_SIZE             restore() of pictures of any size; it is trained on patches of such, and
    #                      has noisy_state, noise_level, nearest_level, check_level, treatment
    # ESTIMATORS           method.estimator may be set to these for restore()
    # SOLVERS              solve() by these, the first where none is named: see denoiser, posterior
    NEEDS: tuple[str, ...] = ()
    ENERGY: bool = False
    LABEL_DROPOUT: bool = False
    LATENTS: bool = False
    P_STD: bool = False
    OF_WEIGHTS: tuple[str, ...] = ()
    RETRIES: bool = False
    BY_PROCESS: tuple[str, ...] = ()
    SAMPLE_OPTIONS: ClassVar[dict[str, dataclasses.Field]] = {}
    INPAINTS: bool = False
    LIKELIHOODS: tuple[str, ...] = ()
    LIKELIHOOD_OPTIONS: ClassVar[dict[str, dataclasses.Field]] = {}
    CLUSTERS: bool = False
    MEMORISES: bool = False  # scores of it are told with the share of memorised images
    OOD_SCORES: bool = False
    SOURCES: bool = False
    DENOISE_LAWS: ClassVar[dict[str, str]] = {}
    ANY_SIZE: bool = False
    ESTIMATORS: tuple[str, ...] = ()
    SOLVERS: tuple[str, ...] = ()

    def __init__(self, cfg: config.Config) -> None:
        super().__init__()
        kind = "an energy" if self.ENERGY else "a denoiser"
        fitting = [name for name, net in NETWORKS.items() if net.ENERGY == self.ENERGY]
        check(
            cfg.network.name in fitting,
            "network.name",
            cfg.network.name,
            f"method.name={cfg.method.name} needs {kind}: {', '.join(fitting)}",
        )
        half = [name for name, net in NETWORKS.items() if net.HALF]
        check(
            cfg.trainer.precision != "16-mixed" or cfg.network.name in half,
            "trainer.precision",
            cfg.trainer.precision,
            f"is for network.name={', '.join(half)}; use 32-true for {cfg.network.name}",
        )
        cfg.data.noise.check(
            self.ANY_SIZE or not cfg.data.noise.law,
            "law",
            f"method.name={cfg.method.name} makes its own noise; leave it out",
        )
        cfg.data.check(
            self.SOURCES or not cfg.data.source,
            "source",
            f"method.name={cfg.method.name} starts from noise; leave it out",
        )
        check(
            self.LATENTS or not cfg.data.vae.mean,
            "data.name",
            cfg.data.name,
            f"method.name={cfg.method.name} learns no latents; edm, ddo, interpolant do",
        )
        self.cfg = cfg
        self.shape: tuple[int, ...] = tuple(cfg.data.shape)
        self.classes: int = cfg.data.classes if cfg.data.labels else 0
        # The classes that random labels are drawn from, where others have no image; else empty.
        self.present: list[int] = cfg.data.present if cfg.data.labels else []
        self.nfe = 0  # network evaluations for each image in the latest sample()
        self.chains = ""  # where the images of the latest sample() came from, if it has chains
        self.faster: list[str] = []  # what speed_up() has done
        self.nonfinite = 0  # steps skipped in a row, on a CPU
        self.skips: Skips | None = None  # the same on a device
        self.stopped: Tensor | None = None  # on a device: whether no further step is taken
        # Of the micro-batch in training: whether values may be read on the host, what was to be
        # logged, and its number from the start of the run, over all processes.
        self.due = True
        self.latest: dict[str, Tensor] = {}
        self.micro_batch: int | None = None
        self.own_loop = OwnLoop()
        self.by_level: LossByLevel | None = None  # of methods that draw a noise level
        self.save_hyperparameters({"config": to_plain(cfg)})

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (scalar to minimise, {name: scalar to log}); see the class."""
        raise NotImplementedError

    def as_batch(self, batch: Any) -> Batch:
        """Return a batch as loss takes it, from that of anybody's loop.

        Args:
            batch: images x, (x, labels), or {"image": x, "label": ..., "n": ...}. x is float32
                (B, C, H, W) on [-1, 1], labels are int64 (B,). Without n every image gets another
                position at each call, from torch's generator.

        Raises:
            ValueError: bytes, another shape, pixels far outside [-1, 1] (looked at once), labels
                that do not fit.
        """
        if self.trained_here():
            return batch
        self.check_weights()
        found = self.own_loop.batch(self, batch)
        if self._trainer is None and self.training:
            self.micro_batch = self.own_loop.steps - 1
        return found

    def trained_here(self) -> bool:
        """Return whether it is in a Trainer with this package's data, not in anybody's own loop."""
        if getattr(self._trainer, "datamodule", None) is None:
            return False
        from genmodels.data import ImageDataModule

        return isinstance(self.trainer.datamodule, ImageDataModule)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return what the method makes of images: denoise() where it has it, else energy()."""
        own = "denoise" if hasattr(self, "denoise") else "energy"
        return getattr(self, own)(x, *arguments, **options)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Return the method in a .ckpt with its averaged weights, as Lightning's; see there.

        genmodels.load also reads runs and exports, checks the file and returns it in eval mode.

        Raises:
            ValueError: it is no checkpoint of this class, or was written by a newer version.
        """
        from genmodels.data import fill_in
        from genmodels.foreign import load_torch
        from genmodels.methods import METHODS

        saved = load_torch(checkpoint_path)
        parameters = saved.get("hyper_parameters") if isinstance(saved, Mapping) else None
        plain = parameters.get("config") if isinstance(parameters, Mapping) else None
        check(plain, "checkpoint_path", checkpoint_path, "is no checkpoint of this package")
        cfg = config.load_config([plain], methods=METHODS, networks=NETWORKS)
        fill_in(cfg.data)
        method = METHODS[cfg.method.name]
        check(
            issubclass(method, cls),
            "checkpoint_path",
            checkpoint_path,
            f"is of {method.__name__}; write {method.__name__}.load_from_checkpoint",
        )
        load = super(GenerativeModule, method).load_from_checkpoint
        return load(checkpoint_path, *args, **{"cfg": cfg, "weights_only": True} | options)

    # What users of the hub's libraries look for at a model. It is done by genmodels.checkpoint,
    # which stands above: no method calls these, and nothing is imported before a user does.

    @classmethod
    def from_pretrained(
        cls, path: Any, *, revision: str | None = None, ema: bool = True, device: Any = "cpu"
    ) -> Any:
        """Return a trained model of this class in eval mode; see genmodels.load.

        Args:
            path: run folder, .ckpt file, exported folder, or OWNER/NAME on the Hugging Face hub.
            revision: branch, tag or commit there; None: its newest.
            ema, device: as of genmodels.load.

        Raises:
            ValueError: see genmodels.load; it is of another class.
        """
        model = _checkpoint("models").load(
            path if revision is None else f"{path}@{revision}", ema=ema, device=device
        )
        name = type(model).__name__
        check(isinstance(model, cls), "model", path, f"is of {name}; write {name}.from_pretrained")
        return model

    def save_pretrained(
        self,
        folder: Any,
        *,
        license: str = "",
        scores: Any = "",
        samples: int = 0,
        half: bool = False,
    ) -> Any:
        """Write the model as a new folder that from_pretrained and genmodels.load read; return it.

        Args:
            folder: to make; must not exist.
            license: of the model, as the hub writes it: "apache-2.0"; "": the card says none.
            scores: JSON of evaluate.py to show on the card.
            samples: images of a grid beside the card; -1: 16 if they take less than a minute.
            half: store float16.

        Raises:
            ValueError: the folder exists, or the scores cannot be read.
        """
        options = {"license": license, "scores": scores, "samples": samples, "half": half}
        return _checkpoint("exports").save_model(self, folder, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str = "",
        scores: Any = "",
        samples: int = -1,
        half: bool = False,
    ) -> str:
        """Put the model into a repository of the Hugging Face hub, made if need be; return its URL.

        Args:
            repo_id: OWNER/NAME.
            private: nobody else is to see it.
            token: of the hub; None: that of `hf auth login` or HF_TOKEN.
            license, scores, samples, half: as of save_pretrained.

        Raises:
            ValueError: no connection, not logged in, not allowed.
        """
        options = {"license": license, "scores": scores, "samples": samples, "half": half}
        push = _checkpoint("push").push_model
        return push(self, repo_id, private=private, token=token, **options)

    def sample(self, seeds: Sequence[int], labels: Labels = None, **options: Any) -> Tensor:
        """Return generated images in [-1, 1], float32 (N, C, H, W); see the class."""
        raise NotImplementedError

    def solve(
        self,
        y: Tensor,
        operator: Any,
        *,
        noise: float,
        seeds: Sequence[int] | None = None,
        labels: Labels = None,
        unit: bool = False,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return samples of p(x | y), y = A x + noise n, float32 (N, C, H, W), not clipped.

            half = Mask(known)                                    # genmodels.sampling.operators
            x = model.solve(half(image), half, noise=0, seeds=range(8))

        Picture k depends on seeds[k] and its y alone. Where noise is 0 and pixels are hidden
        (Mask), the others are those of y bit for bit.

        Args:
            y: what was measured of pictures on [-1, 1], (1 or N, ...); one is of all seeds.
            operator: A, see as_operator of genmodels/sampling/operators.py: one of that file, an
                object with __call__ and adjoint, or deepinv's linear physics.
            noise: standard deviation of the noise of y, >= 0.
            seeds: N whole numbers; None: 0, 1, ... for each of y.
            labels: classes of a conditional model: None (none), one int, or N ints.
            unit: y was measured of pictures on [0, 1], as deepinv's are; noise counts there, and
                so does the result.
            callback: called as callback(i, x) after each step.
            options: solver, steps, eta, lam, mix, zeta, step: SolverOptions of
                genmodels/sampling/posterior.py, where the equations stand.

        Raises:
            ValueError: an option out of range or of another solver, a solver or labels that the
                model does not have, an operator without adjoint, a y of another shape.
        """
        return solve(
            self,
            y,
            operator,
            noise=noise,
            seeds=seeds,
            labels=labels,
            unit=unit,
            callback=callback,
            **options,
        )

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """Return the model as a denoiser in its own state, for solve(); it counts self.nfe.

        Args:
            labels: int64 (N,), -1 = none, of a conditional model.
        """
        raise NotImplementedError

    def posterior(
        self,
        measured: Measured,
        keys: Tensor,
        labels: Tensor | None,
        *,
        steps: int,
        step: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return pictures (N, C, H, W) drawn from energy and measurement together, for solve().

        Args:
            measured: what is known of each.
            keys: int64 (N,), the pictures' seeds. labels: int64 (N,), -1 = none; or None.
            steps: Metropolis-adjusted steps on the exact sum of energies, at the end.
            step: factor on their size.
            callback: called as callback(i, x) after each.
        """
        raise NotImplementedError

    def prepare(self, data: "ImageDataModule") -> str:
        """Fit what comes from the training data before the first step; return words to print.

        What is fitted must be buffers: they are saved with the weights and found again on resume.

        Args:
            data: the run's ImageDataModule.
        """
        return ""

    def speed_up(self, *, compile: bool = False, channels_last: bool = False) -> None:
        """Compile the network, and lay its weights out as NHWC; its values change by rounding."""
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compile:
            self.net.compile()
        asked = {"compile": compile, "channels_last": channels_last}
        self.faster = [name for name, done in asked.items() if done]

    def learned_from(self) -> str:
        """Return what the model card says of the training beyond the data set, or nothing."""
        return ""

    def kept_chains(self) -> dict[str, Tensor]:
        """Return tensors that an export holds beside the weights, by name; {}: none."""
        return {}

    def take_chains(self, state: Mapping[str, Tensor]) -> None:
        """Take over what kept_chains() gave.

        Raises:
            ValueError: they are not this model's.
        """
        raise ValueError("its method keeps no chains")

    def log_prob(
        self, x: Tensor, labels: Tensor | None = None, *, kind: str, seeds: Tensor, **options: Any
    ) -> Tensor:
        """Return log densities in nats, float64 (B,), of images on the [-1, 1] scale.

        Args:
            x: (B, C, H, W), float32 or float64; uint8 data are made continuous by the caller.
            labels: int64 (B,) of a conditional model, -1 = none; or None.
            kind: one of LIKELIHOODS.
            seeds: (B,) int64: image k's own randomness depends on seeds[k] alone.
            options: see LIKELIHOOD_OPTIONS.
        """
        raise NotImplementedError

    def log_ratio(
        self, batch: Batch, reference: "GenerativeModule"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (log p(x) - log p_reference(x), {name: diagnostic}), float32 (B,) each.

        What DDO trains through. Exact, exact up to a constant (an energy), or (EDM) in its place a
        weighted difference of bounds, of one draw for each image. What is random is a function of
        (seed, n) alone and the same for both models: a model against itself gives exactly 0.

        Args:
            batch: as for loss; several rows may share one n, and with it the randomness.
            reference: a frozen model of this class; no gradient goes through it.
        """
        raise NotImplementedError

    def method_with(self, options: Mapping[str, Any], allowed: Sequence[str]) -> Any:
        """Return the method's config with the given options of sample() in place of its own.

        Args:
            options: {key: value}; None leaves the config's own value.
            allowed: keys that may be given.

        Raises:
            ValueError: another key, or a value that the config refuses.
        """
        for key in options:
            check(key in allowed, key, options[key], f"choose from {', '.join(allowed)}")
        given = {key: value for key, value in options.items() if value is not None}
        try:
            return dataclasses.replace(self.cfg.method, **given)
        except ValueError as error:
            # Who calls sample() writes steps=, not method.steps=.
            raise ValueError(str(error).removeprefix(self.cfg.method.PREFIX)) from None

    def image_labels(
        self, generators: seeding.ImageGenerators, labels: Labels = None
    ) -> Tensor | None:
        """Return the labels of generated images, int64 (N,), or None for an unconditional model.

        Args:
            generators: ImageGenerators; the random classes are drawn even if labels are given, so
                that the noise after them is the same.
            labels: None (a random class for each image), one int, or N ints.

        Raises:
            ValueError: a label out of range, a wrong number of labels, an unconditional model.
        """
        self.check_weights()
        count = len(generators.generators)
        if not self.classes:
            if labels is not None:
                raise ValueError(f"labels={labels}: this model is unconditional; leave labels out")
            return None
        drawn = generators.randint(len(self.present) or self.classes, device=self.device)
        if self.present:
            drawn = torch.tensor(self.present, device=self.device)[drawn]
        if labels is None:
            return drawn
        labels = self.given_labels(labels, count)
        self.check_labels(labels)
        return labels

    def given_labels(self, labels: Labels, count: int) -> Tensor:
        """Return labels that the user gave, one int or `count`, as int64 (count,).

        Raises:
            ValueError: a label out of range, a wrong number of labels.
        """
        try:
            labels = torch.as_tensor(labels, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"labels={labels!r}: must be whole numbers") from None
        check(not labels.is_floating_point(), "labels", labels.tolist(), "must be whole numbers")
        labels = labels.to(torch.int64).reshape(-1)
        if len(labels) not in (1, count):
            raise ValueError(f"labels={labels.tolist()}: give 1 or {count}, one for each seed")
        if labels.min() < -1 or labels.max() >= self.classes:
            raise ValueError(f"labels={labels.tolist()}: must be in 0..{self.classes - 1}, -1 none")
        return labels.expand(count)

    @property
    def unlabelled(self) -> bool:
        """Whether it knows images without a class: it has no classes, or saw some hidden."""
        return not self.classes or (self.LABEL_DROPOUT and self.cfg.method.label_dropout > 0)

    def check_labels(self, labels: Tensor | None, remedy: str = "give labels") -> None:
        """Raise ValueError for labels that the network would misread.

        A network with classes has an embedding of no class, trained by hidden labels alone.

        Args:
            labels: of images, int64 (B,), -1 = none; or None.
            remedy: ends the line about images without a class.
        """
        if labels is not None:
            check(self.classes, "labels", "given", "this model is unconditional; leave them out")
            check(
                (labels < self.classes).all(),
                "labels",
                int(labels.max()),
                f"must be in 0..{self.classes - 1}, -1 none",
            )
        labelled = labels is not None and (labels >= 0).all()
        check(
            labelled or self.unlabelled,
            "labels",
            "",
            "this model was trained with a class for "
            f"every image and knows no image without; {remedy}",
        )

    def check_finite(self, x: Tensor, sigma: Tensor | float = 1.0, key: str = "sigma") -> None:
        """Raise ValueError for images or noise levels that no denoiser or energy has an answer to.

        For denoise(), score() and energy() as a user calls them: it waits for the device once.
        Samplers call the network itself, which does not look; so may whoever has to (vmap, say).

        Args:
            x: images, (B, C, H, W).
            sigma: their noise level, a scalar or (B,).
            key: what the method calls it.
        """
        check(
            x.is_floating_point(),
            "image",
            x.dtype,
            "must be float32; of bytes x.float() / 127.5 - 1",
        )
        self.check_weights()
        level = torch.as_tensor(sigma, device=x.device)
        good = torch.stack([(level > 0).all() & level.isfinite().all(), _of_moderate_size(x)])
        of_level, of_image = good.tolist()
        check(of_level, key, "", "must be finite and > 0")
        check(of_image, "image", "", f"its pixels must be finite, below {LARGEST_PIXEL:g}")

    def check_weights(self) -> None:
        """Raise ValueError after half() or double(): methods compute in float32, or by autocast."""
        dtype = next((p.dtype for p in self.parameters()), torch.float32)
        check(
            dtype == torch.float32,
            "weights",
            dtype,
            "must be float32: call float(); for half precision torch.autocast or precision=bf16",
        )

    def anywhere(self, decision: bool) -> bool:
        """Return whether it holds on any process; all of them have to ask at the same time.

        A process that stopped alone would leave the others waiting for it.
        """
        if self._trainer is None:
            return decision
        return self.trainer.strategy.reduce_boolean_decision(decision, all=False)

    def on_train_start(self) -> None:
        """Warn where somebody's own Trainer ends elsewhere than the config's schedules."""
        if self.trained_here() or not self.follows_length():
            return
        steps, mine = self.trainer.estimated_stepping_batches, self.cfg.trainer.max_steps
        if steps != mine:
            warnings.warn(
                f"trainer.max_steps={mine}: schedules of this config end there, and the Trainer at "
                f'{steps}; write build(..., "trainer.max_steps={steps}")',
                stacklevel=2,
            )

    def follows_length(self) -> bool:
        """Return whether anything in training goes by trainer.max_steps."""
        return self.cfg.optim.decay == "cosine"

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Force the weights of a network that wants it, once for each optimizer step."""
        if NETWORKS[self.cfg.network.name].FORCED and not batch_idx % self.micro_batches:
            normalise_weights(self)

    @property
    def micro_batches(self) -> int:
        """How many make an optimizer step: in somebody's own Trainer what that says."""
        return getattr(self._trainer, "accumulate_grad_batches", self.cfg.trainer.accumulate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch; dropout is keyed by (seed, micro-step, rank).

        What is logged is this rank's last micro-batch, not a mean over all of them. Nothing is
        read on the host, and nothing logged, in a step that is not due.
        """
        parts = self.micro_batches
        micro_step = self.global_step * parts + batch_idx % parts
        self.due = self.step_is_due() and (batch_idx + 1) % parts == 0
        self.micro_batch = micro_step * self.trainer.world_size + self.global_rank
        seed = seeding.torch_seed(self.cfg.seed, micro_step, self.global_rank)
        seeding.seed_torch(seed, self.device)
        loss, self.latest = self.loss(batch)
        self.log_due("train/", self.latest, prog_bar=True)
        return loss

    def step_is_due(self) -> bool:
        """Return whether this optimizer step is logged or saved, or the last one."""
        step, trainer = self.global_step + 1, self.trainer
        periods = (trainer.log_every_n_steps, self.cfg.checkpoint.every)
        return step == trainer.max_steps or any(p and step % p == 0 for p in periods)

    def log_due(self, prefix: str, values: Mapping[str, Tensor], prog_bar: bool = False) -> None:
        """Log scalars if it is due, brought to the host in one copy.

        Lightning looks at what it has for the bar at every step, so it gets nothing on a device.
        """
        if self.due and values:
            host = torch.stack([value.detach() for value in values.values()]).cpu().unbind()
            names = (prefix + name for name in values)
            self.log_dict(dict(zip(names, host)), prog_bar=prog_bar)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on held-out images, with noise that is the same every time."""
        batch = self.as_batch(batch)
        _, logs = self.loss(batch)
        logs = {f"val/{name}": value for name, value in logs.items()}
        self.log_dict(logs, batch_size=len(batch["n"]), sync_dist=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; override for several lrs."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> tuple[list, list]:
        """Return Adam (AdamW with weight decay) with the lr ramp of EDM, in images."""
        cfg = self.cfg.optim
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=cfg.lr,
            betas=tuple(cfg.betas),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=self.device.type != "cpu" or None,  # it can be told on the device to do nothing
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then one power iteration of an energy's spectral norms for the new weights.

        DRL's released network iterates in every call in place of that.
        """
        super().optimizer_step(*args, **kwargs)
        if self.ENERGY:
            power_iteration(self)

    def lr_factor(self, step: int) -> float:
        """Return the factor on lr for this optimizer step: optim.rampup, then optim.decay.

        It rises linearly from 0 over the images of rampup; cosine falls to 0 at trainer.max_steps,
        sqrt as 1 / sqrt(max(step / t_ref, 1)).

        Reference: of sqrt, Karras et al. 2023, arXiv 2312.02696 (t_ref in table 6).
        """
        cfg = self.cfg.optim
        factor = min(step * self.cfg.data.batch_size / cfg.rampup, 1.0) if cfg.rampup else 1.0
        if cfg.decay == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * min(step / self.cfg.trainer.max_steps, 1.0)))
        if cfg.decay == "sqrt":
            factor /= math.sqrt(max(step / cfg.t_ref, 1.0))
        return factor

    def ema_half_life(self, step: int) -> float:
        """Return the half-life of the weight average, in images, after `step` optimizer steps."""
        return self.cfg.ema.half_life

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each parameter group's norm to optim.clip; skip the step if it is not finite.

        The gradient_clip_val of somebody's own Trainer holds too.

        Too many such steps in a row stop the run. On a device the decision falls there, and is
        read when it is due.

        Returning None from training_step would break DDP; so the gradients are dropped here.

        Raises:
            FloatingPointError: trainer.max_nonfinite skipped steps in a row.
        """
        limits = [self.cfg.optim.clip, gradient_clip_val]
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), limits.pop())
        limit = min(filter(None, limits), default=math.inf)
        clip = torch.nn.utils.clip_grad_norm_
        norm = torch.stack(
            [clip(group["params"], limit) for group in optimizer.param_groups]
        ).norm()
        if norm.device.type != "cpu":
            self._decide_on_device(optimizer, norm)
        elif torch.isfinite(norm):
            self.nonfinite = 0
            self.log_due("train/", {"grad_norm": norm})
        else:
            self.nonfinite += 1
            self.print(f"step {self.global_step}: gradient norm is {norm.item()}; step skipped")
            optimizer.zero_grad(set_to_none=True)
            self._stop_if_too_many(self.nonfinite, "the last")

    def _decide_on_device(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Let the optimizer skip its step, without asking, if the norm is not finite."""
        bad = ~torch.isfinite(norm)
        self.skips = self.skips or Skips(norm.device)
        self.skips.count(bad)
        if self.stopped is not None:
            bad = bad | self.stopped
        # What a GradScaler sets: the fused optimizer leaves weights and state as they are.
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        if not self.due:
            return
        row, longest, skipped = self.skips.read()
        if skipped:
            self.print(f"step {self.global_step}: {skipped} steps skipped, of non-finite gradients")
            self._stop_if_too_many(longest, "read")
        if not row:
            self.log_due("train/", {"grad_norm": norm})

    def _stop_if_too_many(self, in_a_row: int, word: str) -> None:
        """Raise FloatingPointError after too many skipped steps in a row."""
        limit = self.cfg.trainer.max_nonfinite
        if in_a_row >= limit:
            logged = {f"train/{name}": float(value) for name, value in self.latest.items()}
            raise FloatingPointError(
                f"trainer.max_nonfinite={limit}: that many steps in a row "
                f"had non-finite gradients, {word} at step {self.global_step} with {logged}"
            )

    def stop_on_device(self, fault: Tensor) -> bool:
        """Take no further step if `fault`, a bool on the device, ever holds; return whether to end.

        True only where it is due, and then on all processes.
        """
        self.stopped = fault if self.stopped is None else self.stopped | fault
        return self.due and self.anywhere(bool(self.stopped))


class Skips:
    """Steps skipped for their gradients, counted on the device.

    Attributes:
        counts: int32 (3,): in a row up to now; the longest row and all, since the last read().
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int32, device=device)

    def count(self, skipped: Tensor) -> None:
        """Add a step; `skipped` is a bool on the device."""
        row, longest, total = self.counts.unbind()
        row = (row + 1) * skipped
        self.counts = torch.stack([row, torch.maximum(longest, row), total + skipped])

    def read(self) -> tuple[int, int, int]:
        """Return (in a row, the longest row, all), the last two since the read before."""
        row, longest, total = self.counts.tolist()  # waits for the device
        self.counts = torch.stack(
            [self.counts[0], self.counts[0], torch.zeros_like(self.counts[0])]
        )
        return row, longest, total
