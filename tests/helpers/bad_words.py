"""Cases of test_bad_input.py: wrong settings and command lines. Each adds itself to CASES."""

from genmodels.methods import METHODS
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")
DEBUG = str(ROOT / "configs" / "debug.yaml")
CASES = {}


def case(name, command, words, *parts, make=None):
    """Add a case: `words` may name {dir} and {run}; the line has to hold the parts.

    make(folder) or make(folder, run) builds its files in {dir}.
    """
    assert name not in CASES, name
    CASES[name] = (command, words, parts, make)


def config_case(word, *parts):
    words = [DIGITS, DEBUG, *TINY, "out_dir={dir}/runs", word]
    case(word, "train", last_words(words), *parts)


for word, *parts in [
    ("data.batch_size=0", "data.batch_size=0: must be >= 1"),
    ("data.batch_size=1.5", "data.batch_size=1.5: must be a whole number"),
    ("data.batch_size=1e3", "data.batch_size=1e3: must be a whole number; write 1000"),
    ("data.batch_size=0x10", "data.batch_size=0x10: must be a whole number"),
    ("data.pad=-1", "data.pad=-1: must be in [0, 4096]"),
    ("data.holdout=1", "data.holdout=1.0: must be in [0, 1)"),
    ("data.holdout=nan", "data.holdout=nan: must be in [0, 1)"),
    ("data.channels=2", "data.channels=2: must be 0, 1 or 3"),
    ("data.device=tpu", "data.device=tpu: choose from auto, cpu, cuda, disk"),
    ("data.device=disk", "data.device=disk: digits is read whole; convert it"),
    ("data.resolution=-8", "data.resolution=-8: must be >= 0"),
    ("data.crop=square", "data.crop=square: choose from center, lanczos, adm, none"),
    ("data.workers=-1", "data.workers=-1: must be >= 0"),
    ("data.points=0", "data.points=0: must be in [1, 1e+08]"),
    ("data.classes=3", "data.classes=3: digits has 10; leave it out"),
    ("data.shape=1,8", "data.shape=[1, 8]: digits has [1, 8, 8]; leave it out"),
    ("data.labels=maybe", "data.labels=maybe: must be true or false"),
    ("data.name=Digits", "data.name=Digits: ", "choose from digits"),
    ("data.name=", "data.name=: ", "choose from digits"),
    ("data.root.x=1", "data.root.x=: data.root has no keys of its own"),
    ("data..name=digits", "unknown key data.=digits: ", "choose from name"),
    ("optim.lr=nan", "optim.lr=nan: must be > 0"),
    ("optim.lr=inf", "optim.lr=inf: must be > 0 and finite"),
    ("optim.lr=", "optim.lr=: must be a number"),
    ("optim.lr=1,0", "optim.lr=1,0: must be a number"),
    ("optim.clip=-1", "optim.clip=-1.0: must be >= 0"),
    ("optim.decay=linear", "optim.decay=linear: choose from none, cosine, sqrt"),
    ("optim.decay=sqrt", "optim.t_ref=0: optim.decay=sqrt needs a number of steps > 0"),
    ("optim.t_ref=5", "optim.t_ref=5: goes with optim.decay=sqrt alone"),
    ("optim.betas=0.9,x", "optim.betas=x: must be a number"),
    ("ema.half_life=-1", "ema.half_life=-1.0: must be >= 0"),
    ("ema.rampup=-1", "ema.rampup=-1.0: must be >= 0"),
    ("ema.sigma_rel=0.3", "ema.sigma_rel=[0.3]: must be in (0, 0.288675)"),
    ("ema.sigma_rel=0.1", "ema.half_life=20000.0: does not go with ema.sigma_rel"),
    ("ema.snapshot=8", "ema.snapshot=8: goes with ema.sigma_rel alone"),
    ("trainer.devices=0", "trainer.devices=0: must be >= 1"),
    ("trainer.log_every=0", "trainer.log_every=0: must be >= 1"),
    ("trainer.loggers=[mlflow]", "trainer.loggers=['mlflow']: choose from csv, tensorboard, wandb"),
    ("trainer.accelerator=tpu", "trainer.accelerator=tpu: choose from auto, cpu, cuda, mps"),
    ("trainer.max_time=soon", "trainer.max_time=soon: write 90s, 30m, 8h, 2d or DD:HH:MM:SS"),
    ("checkpoint.every=0", "checkpoint.every=0: must be >= 1"),
    ("checkpoint.keep=-1", "checkpoint.keep=-1: must be >= 0"),
    ("sample.num=0", "sample.num=0: must be >= 1"),
    ("eval.num=1", "eval.num=1: must be >= 2"),
    ("seed=9223372036854775808", "seed=9223372036854775808: must be in [0, 2^63)"),
    ("seed=1.0", "seed=1.0: must be a whole number"),
    ("network.channels=[]", "network.channels=[]: "),
    ("network.channels=0,8", "network.channels=[0, 8]: "),
    ("network.channels=a,b", "network.channels=a: must be a whole number"),
    ("network.layers=0", "network.layers=0: must be >= 1"),
    ("network.dropout=2", "network.dropout=2.0: must be in [0, 1)"),
    ("method.sigma_data=0", "method.sigma_data=0.0: must be > 0"),
    ("method.p_std=-1", "method.p_std=-1.0: must be >= 0"),
    ("method.steps=0", "method.steps=0: must be >= 1"),
    ("method.label_dropout=2", "method.label_dropout=2.0: must be in [0, 1]"),
    ("name=a/b", "name=a/b: must be one folder's name"),
    ("init={dir}", "model={dir}: is no run folder"),
]:
    config_case(word, *parts)

# ---- command line -------------------------------------------------------------------------------
for name, command, words, *parts in [
    ("train-flag", "train", [DIGITS, "--lr=1"], "--lr=1: settings are written lr=..."),
    ("train-word", "train", [DIGITS, "lr"], "config=lr: no such file"),
    ("train-folder", "train", ["{dir}"], "config={dir}: no such file"),
    ("train-resume", "train", ["resume={dir}"], "resume={dir}: no config.yaml there"),
    ("train-resume-lr", "train", ["resume={run}", "optim.lr=1"], "optim.lr=1: cannot change"),
    ("sample-none", "sample", ["num=3"], "model=nothing: name one run folder"),
    ("sample-missing", "sample", ["{dir}/x"], "model={dir}/x: is no run folder, .ckpt file or"),
    ("sample-seeds", "sample", ["{run}", "seeds=1-"], "seeds=1-: '1-' is no seed; write 0-63"),
    ("sample-num", "sample", ["{run}", "num=1e2"], "num=1e2: must be a whole number; write 100"),
    ("sample-key", "sample", ["{run}", "cofig=1"], "unknown key cofig=1: ", "choose from"),
    ("sample-label", "sample", ["{run}", "labels=2"], "labels=2: this model is unconditional"),
    ("evaluate-none", "evaluate", ["metrics=fd"], "images=: give a MODEL and data=, or images="),
    ("evaluate-metric", "evaluate", ["{run}", "metrics=fdd"], "metrics=fdd: choose from"),
    (
        "evaluate-images",
        "evaluate",
        ["images={dir}/x", "reference=digits:test"],
        "images={dir}/x: no such folder, .zip or .npz",
    ),
    (
        "evaluate-empty",
        "evaluate",
        ["images={dir}", "reference=digits:test"],
        "images={dir}: holds no picture",
    ),
    (
        "evaluate-split",
        "evaluate",
        ["{run}", "data=digits:val", "num=4"],
        "split=val: choose from train, test",
    ),
    (
        "evaluate-few",
        "evaluate",
        ["{run}", "data=digits:test", "num=2", "steps=1"],
        "num=2: scores need at least 4 images on each side (2 images, 360 in the",
        "give more",
    ),
    (
        "evaluate-out",
        "evaluate",
        ["{run}", "out={dir}/no/a.json"],
        "out={dir}/no/a.json: its folder does not exist; make it first",
    ),
    (
        "evaluate-shape",
        "evaluate",
        ["{run}", "data=digits:test", "pad=1", "num=4"],
        "data=digits:test: has images of shape (1, 10, 10), the model makes (1, 8, 8)",
    ),
    ("export-usage", "export", [], "usage: python -m genmodels.checkpoint MODEL out=DIR"),
    ("export-out", "export", ["{run}"], "out=: say which folder to make"),
    ("export-exists", "export", ["{run}", "out={dir}"], "out={dir}: exists; delete it or choose"),
    ("data-command", "data", ["convrt", "x"], "command=convrt: choose from info, convert, encode"),
    ("data-hf", "data", ["info", "hf"], "data.name=hf: ", "pip install datasets"),
]:
    case(name, command, words, *parts)

# ---- config files -------------------------------------------------------------------------------
BOTH = "method: {name: edm}\nnetwork: {name: unet}\n"


def file_case(name, text, *parts):
    def make(folder):
        (folder / "a.yaml").write_text(text, encoding="latin1")

    case(f"file-{name}", "train", ["{dir}/a.yaml", "out_dir={dir}/runs"], *parts, make=make)


NOT_YAML = "config={dir}/a.yaml: not YAML: "
for name, text, *parts in [
    ("empty", "", f"method.name=: is missing; choose {', '.join(METHODS)}"),
    ("word", "method: edm", "method=edm: is a section; set method.KEY"),
    ("list", "method: {name: edm}\nnetwork: [1]", "network=[1]: is a section; set network.KEY"),
    (
        "name",
        "method: {name: [edm]}\nnetwork: {name: unet}",
        "method.name=['edm']: ",
        "choose from",
    ),
    ("number", BOTH + "3: 4", "unknown key 3=: choose from name, seed"),
    ("null", BOTH + "data: null", "data=None: is a section; set data.KEY"),
    ("string", BOTH + "data: {batch_size: '8'}", "data.batch_size=8: must be int"),
    ("python", BOTH + "data: !!python/object/apply:os.mkdir ['evil']", NOT_YAML, "constructor"),
    ("recursive", BOTH + "x: &x [*x]", NOT_YAML + "YAML recursive aliases"),
    ("twice", BOTH + "method: {name: edm}", NOT_YAML, "duplicate key method"),
    ("bytes", "\xff\xfe", NOT_YAML, "can't decode byte"),
    ("zeros", "\x00\x00", NOT_YAML, "special characters are not allowed"),
    ("variable", BOTH + "name: ${oc.env:GENMODELS_NOT_SET}", "name: ", "not found"),
]:
    file_case(name, text, *parts)
