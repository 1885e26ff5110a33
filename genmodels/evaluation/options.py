"""What each kind of evaluation takes: the keys of evaluate.py, each with its meaning and limits."""

from dataclasses import dataclass

from genmodels.config import Section, setting
from genmodels.config.schema import LARGEST_PAD
from genmodels.config.words import DEVICES
from genmodels.evaluation.scorer import metrics_help
from genmodels.images import CROPS
from genmodels.metrics.clustering import CLUSTERING
from genmodels.metrics.ood import SYNTHETIC
from genmodels.restoration import RestoreOptions


@dataclass
class FeatureOptions(Section):
    """The network that turns images into features."""

    features: str = setting(
        "pixels", "pixels, digits, fashion, inception, ... or a TorchScript file"
    )
    weights: str = setting(
        "", "file of the feature network's weights; download: fetch the published"
    )
    sha256: str = setting("", "what the hash of the weights must begin with")
    weights_are_code: bool = setting(
        False, "a TorchScript file in features= or weights= may run: it is a program"
    )
    resize: str = setting("", "of features=inception: tf1 (FID's, the default) or clean")
    mode: str = setting(
        "exact",
        "exact: fp32, deterministic; fast: lower precision, compiled",
        choices=("exact", "fast"),
    )
    device: str = setting("auto", "what computes", choices=DEVICES)


@dataclass
class SelftestOptions(FeatureOptions):
    """selftest."""

    features: str = setting("digits", "as for scores of images")


@dataclass
class ReadOptions(Section):
    """Where data lie and how they are read."""

    root: str = setting(
        "", "where the data lie; empty: as in training, else $GENMODELS_DATA, else ./data"
    )
    pad: int = setting(
        -1,
        "background pixels on each side of the data; -1: as in training, else 0",
        ge=-1,
        le=LARGEST_PAD,
    )


@dataclass
class FileOptions(Section):
    """What becomes of images in files: folders, zips, npz and npy, on either side."""

    channels: int = setting(
        0,
        "images in files become grey (1) or RGB (3); 0: as they are, grey among colour as colour",
        ge=0,
        le=3,
    )
    resolution: int = setting(
        0, "images in files are cropped and resized to this side; 0: they are of one size", ge=0
    )
    crop: str = setting("center", "how, as data.crop of training", choices=CROPS)

    def __post_init__(self):
        super().__post_init__()
        self.check(self.channels != 2, "channels", "must be 1 or 3, or 0 to leave them")
        self.check(
            self.resolution or self.crop == "center", "crop", "needs resolution=SIDE; give it too"
        )


@dataclass
class StatsOptions(FeatureOptions, FileOptions, ReadOptions):
    """stats."""

    data: str = setting("", "data set whose statistics are taken, NAME or NAME:SPLIT")
    images: str = setting("", "images in its place")
    feature_batch: int = setting(
        0, "images in one call of the feature network; 0: its own choice", ge=0, le=10**6
    )
    rows: bool = setting(
        False, "keep the features of every image too, for kid, prc and other scores against it"
    )
    out: str = setting("", "npz to write")

    def __post_init__(self):
        super().__post_init__()
        self.check(self.out.endswith(".npz"), "out", "stats writes a file; name it, out=STATS.npz")
        self.check(
            self.data or self.images, "data", "name a data set, NAME or NAME:SPLIT, or images=PATH"
        )
        self.check(
            not (self.data and self.images),
            "data",
            "images= takes its place; leave one of them out",
        )


@dataclass
class LikelihoodOptions(ReadOptions):
    """likelihood=."""

    likelihood: str = setting(
        "",
        "bits per dimension of data= under the model: true for every kind it has, or one (ode, "
        "bound, ais)",
    )
    data: str = setting("", "NAME or NAME:SPLIT; empty: the test images of the model's own data")
    num: int = setting(0, "how many images; 0: all", ge=0)
    seed: int = setting(
        0, "of the dequantisation and of the method's own randomness", ge=0, lt=2**63
    )
    batch: int = setting(64, "images at a time", ge=1)
    device: str = setting("auto", "what computes", choices=DEVICES)
    out: str = setting("", "JSON file to write")


@dataclass
class RestorationOptions(RestoreOptions):
    """denoise=."""

    denoise: str = setting(
        "",
        "clean pictures: a picture, folder, .zip or .npy; noise is added, then taken away again",
    )
    blind: bool = setting(False, "the model is not told the level")
    against: str = setting("", "bm3d, told law and level (pip install bm3d)")
    num: int = setting(0, "how many pictures; 0: all", ge=0)
    seed: int = setting(0, "of the noise", ge=0, lt=2**63)
    precision: str = setting("fp32", "fp32 is without TF32", choices=("fp32", "bf16"))
    device: str = setting("auto", "what computes", choices=DEVICES)
    out: str = setting("", "JSON file to write")


@dataclass
class ClusterOptions(ReadOptions):
    """cluster=."""

    cluster: str = setting(
        "",
        "score the model's clusters of this data set against its classes: "
        f"metrics={','.join(CLUSTERING)}",
    )
    metrics: list[str] = setting(["fd"], metrics_help())
    batch: int = setting(64, "images at a time; changes no image", ge=1)
    device: str = setting("auto", "what computes", choices=DEVICES)
    out: str = setting("", "JSON file to write")


@dataclass
class OodOptions(ClusterOptions):
    """ood=."""

    ood: list[str] = setting(
        [],
        "sets to tell from the model's own test images by its scores: AUROC, AUPR, FPR95; data "
        f"sets or {', '.join(SYNTHETIC)}",
    )
    num: int = setting(
        0,
        "images to generate, or of each set (of images=, drawn by seed=); 0: as many as there are",
        ge=0,
    )
    seed: int = setting(0, "first seed of the images, and seed of the error bars", ge=0, lt=2**63)


@dataclass
class ScoreOptions(OodOptions, FeatureOptions, FileOptions):
    """Scores of a model's images, or of images in files."""

    features: str = setting(
        "pixels",
        "pixels, digits, fashion, inception, ... or a TorchScript file; A,B: each of them, "
        "with weights=A,B and sha256=A,B",
    )
    data: str = setting("", "data set the model is scored against, NAME or NAME:SPLIT")
    images: str = setting("", "images to score in place of a model's: A, or A,B,C in one table")
    reference: str = setting(
        "", "what they are scored against: images, or statistics (.npz, .pkl), a path or a URL"
    )
    sigma_rel: list[float] = setting(
        [],
        "score a run's averages of these relative widths, each a set (a run with ema.sigma_rel)",
        gt=0,
        lt=12**-0.5,
    )
    seeds: str = setting("", "seeds in place of num and seed: 0-63,100")
    labels: str = setting("", "classes, as in sample.py")
    equal: bool = setting(False, "fd as the mean over blocks as large as the reference, as nn1 is")
    per_class: bool = setting(
        False, "also score each class by itself, where both sides have classes"
    )
    resamples: int = setting(
        100, "random halves behind the error bars of nn1 and memorised; 0: none"
    )
    save_images: str = setting(
        "", "also write the generated images to this .npz, or to a folder as PNG"
    )
    feature_batch: int = setting(
        0, "images in one call of the feature network; 0: its own choice", ge=0, le=10**6
    )
    precision: str = setting("fp32", "fp32 is without TF32", choices=("fp32", "bf16"))
    noise: str = setting(
        "cpu", "device of the noise generators, as in sample.py", choices=DEVICES[1:]
    )
    vae: str = setting("", "of a MODEL of latents: the VAE that decodes them, as in sample.py")
    compile: bool = setting(False, "torch.compile the MODEL's network, as in sample.py")
    channels_last: bool = setting(False, "NHWC memory format for the MODEL's network")
    plot: str = setting(
        "", "PNG to draw the distance against 1/n in, of several sets their scores with error bars"
    )
    table: str = setting("", ".csv or .md to write the table to (as out= does with such a name)")
    keep: str = setting(
        "", "npz to keep features in: later commands with the same images need no pass"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            self.resamples == 0 or self.resamples >= 2,
            "resamples",
            "must be >= 2, or 0 for no error bars",
        )
        for key in ("compile", "channels_last"):
            self.check(
                not (getattr(self, key) and (self.cluster or self.ood)),
                key,
                "is for images that a MODEL makes; give cluster= and ood= a command of their own",
            )
        self.check(
            not self.table or self.table.lower().endswith((".csv", ".md")),
            "table",
            "name a .csv or .md",
        )
        self.check(
            not (self.keep and self.save_images),
            "keep",
            "images whose features are kept are not made again; leave save_images= out",
        )
        self.check(
            not (self.sigma_rel and (self.cluster or self.ood)),
            "sigma_rel",
            "is for images that a MODEL makes; give cluster= and ood= a command of their own",
        )
        self.check(
            len({f"{width:g}" for width in self.sigma_rel}) == len(self.sigma_rel),
            "sigma_rel",
            "names a width twice",
        )
        self.check(
            not (self.data and self.reference),
            "data",
            "reference= takes its place; leave one of them out",
        )
