import dataclasses
import math

import pytest
from omegaconf import OmegaConf

import train
from genmodels.config import Config, load_config, seconds, to_plain
from genmodels.config.words import describe, parse_value
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from tests.helpers.paths import ROOT

DIGITS = ROOT / "configs" / "edm_digits.yaml"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def load(*overrides, sources=(DIGITS,)):
    return load_config(sources, overrides, methods=METHODS, networks=NETWORKS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    sources = [DIGITS, path] if path.stem == "debug" else [path]
    cfg = load(sources=sources)
    assert cfg.name == sources[0].stem
    assert "Command:" in path.read_text() and path.read_text().startswith("# ")


def test_later_sources_and_words_win():
    debug = ROOT / "configs" / "debug.yaml"
    assert load(sources=[DIGITS, debug]).data.batch_size == 8
    assert load(sources=[debug, DIGITS]).data.batch_size == 128
    cfg = load("data.batch_size=4", "optim.betas=0.5,0.9", sources=[DIGITS, debug])
    assert cfg.data.batch_size == 4 and cfg.optim.betas == [0.5, 0.9]
    assert isinstance(cfg, Config) and dataclasses.is_dataclass(cfg.method)


def test_round_trip_through_yaml_is_exact(tmp_path):
    cfg = load("optim.lr=1e-4", "method.churn_max=inf", "seed=123456789012345")
    OmegaConf.save(OmegaConf.create(to_plain(cfg)), tmp_path / "a.yaml")
    assert load(sources=[tmp_path / "a.yaml"]) == cfg
    assert load(sources=[to_plain(cfg)]) == cfg


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e-4", float, 1e-4),
        ("3", float, 3.0),
        ("inf", float, math.inf),
        ("3", list[int], [3]),
        ("3,5", list[int], [3, 5]),
        ("[3, 5]", list[int], [3, 5]),
        ("[]", list[int], []),
        ("", list[str], []),
        ("12:30", str, "12:30"),  # YAML 1.1 reads 750
        ("null", str, "null"),
        ("1e-4", str, "1e-4"),
        ("", str, ""),
        ("yes", bool, True),
        ("False", bool, False),
    ],
)
def test_words_are_read_by_the_schemas_type(text, kind, value):
    parsed = parse_value("key", text, kind)
    assert parsed == value and type(parsed) is type(value)


BAD_WORDS = {
    "method.p_meen=1": "unknown key method.p_meen=1: did you mean method.p_mean?",
    "methd.p_mean=1": "did you mean method?",
    "data.nam=x": "did you mean data.name?",
    "trainer.max_steps=1e5": "trainer.max_steps=1e5: must be a whole number; write 100000",
    "trainer.max_steps=ten": "trainer.max_steps=ten: must be a whole number",
    "trainer.max_steps=0": "trainer.max_steps=0: must be >= 1",
    "trainer.max_steps=": "trainer.max_steps=: must be a whole number",
    "trainer.max_time=12:30": "trainer.max_time=12:30: write 90s, 30m, 8h, 2d or DD:HH:MM:SS",
    "trainer.precision=16": "trainer.precision=16: choose from 32-true, bf16-mixed",
    "trainer.compile=maybe": "trainer.compile=maybe: must be true or false",
    "trainer.accumulate=3": "data.batch_size=128: must be a multiple of",
    "optim.lr=fast": "optim.lr=fast: must be a number",
    "optim.lr=-1": "optim.lr=-1.0: must be > 0",
    "optim.betas=0.9": "optim.betas=[0.9]: must be two numbers",
    "method.name=emd": "method.name=emd: did you mean edm?",
    "network.name=resnet": "network.name=resnet: ",
    "method.sigma_min=100": "method.sigma_min=100.0: must be in (0, sigma_max=80.0)",
    "method.sampler=hein": "method.sampler=hein: choose from",
    "network.attention=5": "network.attention=[5]: must be levels 0..1",
    "network.channels=60,64": "must divide network.channels=[60, 64]; network.norm_groups=4 ",
    "data=digits": "data=: is a section; set data.KEY=value",
    "data.name.x=1": "data.name.x=: data.name has no keys of its own",
    "data.name=digit": "data.name=digit: choose from digits",
    "seed=-1": "seed=-1: must be in [0, 2^63)",
    "data.shape=3,8,8": "data.shape=[3, 8, 8]: digits has [1, 8, 8]",
    "init=nowhere": "model=nowhere: is no run folder",
    "data.name=mnist": "data.root=",
    "optim.betas=2,3": "optim.betas=[2.0, 3.0]: must be in [0, 1)",
    "optim.eps=0": "optim.eps=0.0: must be > 0",
    "optim.weight_decay=-1": "optim.weight_decay=-1.0: must be >= 0",
    "optim.rampup=-100": "optim.rampup=-100: must be >= 0",
    "method.p_mean=nan": "method.p_mean=nan: must be finite",
    "method.rho=0": "method.rho=0.0: must be > 0",
    "method.guidance=2": "method.guidance=2.0: needs a conditional model",
    "trainer.strategy=foo": "trainer.strategy=foo: choose from auto, ddp",
    "trainer.devices=3": "must be a multiple of trainer.devices x accumulate = 3",
    "name=../../elsewhere": "name=../../elsewhere: must be one folder's name",
    "name=${x}": "name=${x}: write the value itself",
}


@pytest.mark.parametrize("word", BAD_WORDS)
def test_bad_word_is_one_line_and_exit_2(word, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("GENMODELS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert train.main([str(DIGITS), f"out_dir={tmp_path}/runs", "data.labels=false", word]) == 2
    errors = capsys.readouterr().err
    assert BAD_WORDS[word] in errors
    assert errors.count("\n") == 1 and errors.startswith("error: ")
    assert not list(tmp_path.iterdir()), "something was written"


BAD_FILES = {
    "a: [1": "not YAML",
    "- 1": "must hold key: value pairs",
    "methods: {name: edm}": f"method.name=: is missing; choose {', '.join(METHODS)}",
    "method: {name: edm}\nnetwork: {name: unet}\ndatta: {}": "did you mean data?",
    "method: {name: edm}\nnetwork: {name: unet}\ndata: 3": "data=3: is a section",
    "method: {name: edm}\nnetwork: {name: unet}\noptim: {lr: fast}": "optim.lr=fast: must be float",
    "method: {name: edm}\nnetwork: {name: unet}\ntrainer: {max_steps: 1e+5}": "write 100000",
    "method: {name: edm}\nnetwork: {name: unet}\ntrainer: {max_time: 12:30}": "str; quote it",
    "method: {name: edm}\nnetwork: {name: unet}\nname: null": "name=None: must be str",
    "method: {name: edm}\nnetwork: {name: unet, channels: 3}": "must be a list of int",
    "method: {name: edm}\nnetwork: {name: unet}\nseed: true": "seed=True: must be int",
    "method: {name: edm}\nnetwork: {name: unet}\noptim: {lr: inf}": "must be > 0 and finite",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file_is_one_line_and_exit_2(text, capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert train.main([str(path), f"out_dir={tmp_path}/runs"]) == 2
    errors = capsys.readouterr().err
    assert BAD_FILES[text] in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nosuch.yaml"], "config=nosuch.yaml: no such file"),
        (["configs/edm_digit.yaml"], "did you mean edm_digits?"),
        (["seed=1"], "config=: name a file"),
        (["resume=nowhere"], "resume=nowhere: no config.yaml there"),
        ([str(DIGITS), "resume=nowhere"], "brings its own config"),
        ([str(DIGITS), "--max_steps=3"], "--max_steps=3: settings are written max_steps=..."),
    ],
)
def test_bad_command_line(argv, message, capsys):
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err


def test_resume_refuses_what_would_make_another_run(tiny_run, capsys):
    for word in ("optim.lr=1", "data.batch_size=4", "method.p_mean=0", "seed=3"):
        assert train.main([f"resume={tiny_run}", word]) == 2
        assert f"start a new run with init={tiny_run}" in capsys.readouterr().err


def test_settings_of_scores_that_are_not_made_are_told(capsys, tmp_path):
    words = [str(DIGITS), "configs/debug.yaml", f"out_dir={tmp_path}", "eval.metrics=nn1"]
    assert train.main(words) == 0
    assert "note: eval.metrics= is not used: eval.every=0 scores nothing" in capsys.readouterr().out


def test_a_word_without_its_value_and_minus_h_are_understood(capsys):
    assert train.main(["edm_digits", "optim.lr"]) == 2
    assert "to change a setting write optim.lr=VALUE" in capsys.readouterr().err
    assert train.main(["-h"]) == 0
    assert "every key" in capsys.readouterr().out


def test_what_the_machine_lacks_is_said_before_anything_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("genmodels.training.fit.find_spec", lambda name: None)
    for words, message in (
        (["trainer.accelerator=cuda"], "trainer.accelerator=cuda: no CUDA device here"),
        (["trainer.loggers=wandb"], "trainer.loggers=wandb: not installed"),
        (["eval.every=1", "eval.metrics=fdd"], " eval.metrics=fdd: choose from fd"),
        (["eval.every=1", "eval.features=x"], " eval.features must be one of"),
        (
            ["eval.every=1", "eval.features=inception"],
            " eval.weights= is missing: eval.features=inception needs a file",
        ),
        (
            ["eval.every=1", "eval.features=inception", "eval.weights=nowhere.pth"],
            " eval.weights=nowhere.pth cannot be read",
        ),
    ):
        assert train.main([str(DIGITS), f"out_dir={tmp_path}/runs", *words]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_resume_refuses_a_config_edited_by_hand(train_tiny, capsys):
    run = train_tiny("trainer.max_steps=2")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.5"))
    assert train.main([f"resume={run}"]) == 2
    assert "optim.lr=0.5: " in capsys.readouterr().err


def test_print_shows_the_resolved_config_and_trains_nothing(capsys, tmp_path):
    assert train.main([str(DIGITS), "--print", "optim.lr=0.5", f"out_dir={tmp_path}"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.optim.lr == 0.5 and shown.method.p_mean == -1.2
    assert not list(tmp_path.iterdir())


def test_help_names_every_key(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out

    def named(cls, prefix):
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(item.type):
                named(item.type, f"{prefix}{item.name}.")
            elif prefix:
                assert f"{prefix}{item.name}=" in shown
                assert item.metadata["doc"]

    named(Config, "")
    for item in dataclasses.fields(METHODS["edm"].Config):
        assert f"method.{item.name}=" in shown
    assert describe(METHODS, NETWORKS) in shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90s", 90),
        ("1.5m", 90),
        ("2h", 7200),
        ("1d", 86400),
        ("01:00:00:01", 86401),
        ("00:01:30", 90),
        ("", math.inf),
    ],
)
def test_seconds(text, value):
    assert seconds(text) == value
