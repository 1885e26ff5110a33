import json
import math
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import genmodels
import train
from genmodels import checkpoint, cli
from genmodels.checkpoint.exports import main as export_main
from genmodels.checkpoint.models import file_sha256
from tests.helpers.faults import bits_of_records, bits_of_the_rest, flip
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    return checkpoint.export(tiny_run, tmp_path_factory.mktemp("exports") / "digits")


def test_run_checkpoint_and_export_are_the_same_model(tiny_run, exported):
    run = genmodels.load(tiny_run)
    assert not run.training
    for path in (tiny_run / "checkpoints" / "step-00000004.ckpt", exported):
        other = genmodels.load(path)
        assert other.cfg.network == run.cfg.network and other.cfg.method == run.cfg.method
        assert torch.equal(other.sample(range(2), steps=3), run.sample(range(2), steps=3))


def test_state_dict_is_the_ema_and_raw_weights_are_there_too(tiny_run):
    saved = checkpoint.read_checkpoint(tiny_run / "checkpoints" / "last.ckpt")
    name = "net.net.unet.conv_in.weight"
    assert torch.equal(genmodels.load(tiny_run).state_dict()[name], saved["state_dict"][name])
    raw = genmodels.load(tiny_run, ema=False).state_dict()[name]
    assert torch.equal(raw, saved["current_model_state"][name])
    assert not torch.equal(raw, saved["state_dict"][name])


def test_an_infinity_of_the_config_is_text_that_any_json_reader_takes(exported):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (exported / "config.json").read_text()
    method = json.loads(text, parse_constant=refuse)["config"]["method"]
    assert method["guidance_max"] == "inf"
    assert checkpoint.load(exported).cfg.method.guidance_max == math.inf


def test_half_export_is_half_the_size_and_close(tiny_run, exported, tmp_path):
    half = checkpoint.export(tiny_run, tmp_path / "half", half=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, exported)]
    assert 0.4 < sizes[0] / sizes[1] < 0.7
    images = [genmodels.load(path).sample(range(2), steps=3) for path in (half, exported)]
    torch.testing.assert_close(*images, rtol=0, atol=0.02)


def test_model_card_names_data_terms_and_training(exported):
    card = (exported / "README.md").read_text()
    for words in ("CC BY 4.0", "4 steps of 8 images", "unconditional", "genmodels sample"):
        assert words in card
    config = json.loads((exported / "config.json").read_text())["config"]
    assert config["out_dir"] == "runs" and config["init"] == config["data"]["root"] == ""


def test_model_card_counts_the_steps_made_and_names_the_weights(train_tiny, tmp_path):
    run = train_tiny("trainer.max_steps=3", "checkpoint.every=1", "ema.half_life=0")
    early = run / "checkpoints" / "step-00000002.ckpt"
    card = (checkpoint.export(early, tmp_path / "early") / "README.md").read_text()
    assert "2 steps of 8 images" in card and "Raw weights" in card


def test_build_is_a_function_of_the_seed():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (genmodels.build(DIGITS, *TINY).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = genmodels.build(DIGITS, *TINY, "seed=1").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_init_starts_from_the_ema(tiny_run, exported, train_tiny):
    for source in (tiny_run, exported):
        model = genmodels.build(DIGITS, *TINY)
        assert checkpoint.init_weights(model, source) == []
        theirs = genmodels.load(source).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    run = train_tiny(f"init={tiny_run}", "trainer.max_steps=1", "optim.lr=1e-12")
    key = "net.net.unet.conv_in.weight"
    torch.testing.assert_close(
        genmodels.load(run).state_dict()[key], theirs[key], rtol=0, atol=1e-9
    )


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_init(tiny_run, train_tiny):
    words = (f"init={tiny_run}", "trainer.max_steps=2")
    whole = train_tiny(*words)
    killed = train_tiny(*words)
    for path in (killed / "checkpoints").iterdir():
        path.unlink()
    assert train.main([f"resume={killed}"]) == 0
    states = [genmodels.load(run, ema=False).state_dict() for run in (whole, killed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_init_into_a_conditional_model_starts_the_labels_fresh(tiny_run):
    model = genmodels.build(DIGITS, *TINY, "data.labels=true")
    fresh = checkpoint.init_weights(model, tiny_run)
    assert fresh == ["net.net.unet.class_embedding.weight"]


def test_init_from_a_diffusers_unet_folder(tmp_path):
    from diffusers import UNet2DModel

    source = genmodels.build(DIGITS, *TINY, "seed=9")
    source.net.net.unet.save_pretrained(tmp_path / "unet")
    assert isinstance(UNet2DModel.from_pretrained(tmp_path / "unet"), UNet2DModel)
    model = genmodels.build(DIGITS, *TINY)
    checkpoint.init_weights(model, tmp_path / "unet")
    theirs = source.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


def test_init_from_another_network_names_the_first_difference(tiny_run):
    model = genmodels.build(DIGITS, *TINY, "network.channels=[16,32]")
    with pytest.raises(ValueError, match=r"init=.*: net\.net\.unet\.\S+ is \(16.* there and \(32"):
        checkpoint.init_weights(model, tiny_run)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def broken(exported, tiny_run, folder):
    """Yield (path, what the error must say) for models that must be refused."""

    def export(name, change):
        copy = folder / name
        shutil.copytree(exported, copy)
        change(copy)
        return copy

    def edit_config(copy, change):
        description = json.loads((copy / "config.json").read_text())
        change(description)
        (copy / "config.json").write_text(json.dumps(description))

    def as_older(copy):  # an export from before weights_sha256
        edit_config(copy, lambda description: description.pop("weights_sha256"))

    def reshape(copy):
        as_older(copy)
        state = load_file(copy / "model.safetensors")
        key = sorted(state)[0]
        save_file(state | {key: torch.zeros(1)}, copy / "model.safetensors")

    def drop(copy):
        as_older(copy)
        state = load_file(copy / "model.safetensors")
        state.pop(sorted(state)[0])
        save_file(state, copy / "model.safetensors")

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    yield folder / "nowhere", "is no run folder, .ckpt file or exported folder"
    yield export("truncated", lambda c: truncate(c / "model.safetensors")), "cannot be read"
    yield export("absent", lambda c: (c / "model.safetensors").unlink()), "cannot be read"
    yield export("no json", lambda c: (c / "config.json").write_text("{")), "not one of genmodels"
    newer = lambda d: d.update(genmodels_format=99)  # noqa: E731
    yield export("newer", lambda c: edit_config(c, newer)), "upgrade genmodels"
    unknown = lambda d: d["config"]["method"].update(name="gan")  # noqa: E731
    yield export("unknown", lambda c: edit_config(c, unknown)), "method.name=gan: choose from edm"
    typo = lambda d: d["config"]["method"].update(p_meen=1)  # noqa: E731
    yield export("typo", lambda c: edit_config(c, typo)), "did you mean method.p_mean?"
    end = 8 * (exported / "model.safetensors").stat().st_size - 8000
    yield export("flipped", lambda c: flip(c / "model.safetensors", end)), "another sha256"
    yield export("shape", reshape), "has a wrong shape for"
    yield export("missing", drop), "lacks"
    cut = folder / "cut.ckpt"
    shutil.copy(tiny_run / "checkpoints" / "last.ckpt", cut)
    truncate(cut)
    yield cut, "not a checkpoint of genmodels"
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    yield folder / "other.ckpt", "not a checkpoint of genmodels"
    torch.save({"hyper_parameters": Attack()}, folder / "attack.ckpt")
    yield folder / "attack.ckpt", "not a checkpoint of genmodels"
    (folder / "raw.ckpt").write_bytes(pickle.dumps(Attack()))
    yield folder / "raw.ckpt", "not a checkpoint of genmodels"


def test_broken_models_are_refused_in_one_line(exported, tiny_run, tmp_path, monkeypatch, capsys):
    import sample

    monkeypatch.chdir(tmp_path)
    cases = list(broken(exported, tiny_run, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for path, message in cases:
        assert sample.main([str(path), f"out={tmp_path}/out"]) == 2, path
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1, errors
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, no attack carried out


def test_flipped_bits_of_a_checkpoint_are_noticed(tiny_run, tmp_path):
    """In its records every one; between them, where zip keeps what torch does not look at, some."""
    whole = checkpoint.read_checkpoint(tiny_run)
    path = tmp_path / "flipped.ckpt"
    for bit in bits_of_records(tiny_run / "checkpoints" / "last.ckpt", 24, seed=0):
        shutil.copy(tiny_run / "checkpoints" / "last.ckpt", path)
        flip(path, bit)
        with pytest.raises(ValueError, match=r"model=.*: not a checkpoint of genmodels"):
            checkpoint.read_checkpoint(path)
    for bit in bits_of_the_rest(tiny_run / "checkpoints" / "last.ckpt", 24, seed=0):
        shutil.copy(tiny_run / "checkpoints" / "last.ckpt", path)
        flip(path, bit)
        try:
            found = checkpoint.read_checkpoint(path)
        except ValueError:
            continue
        assert_same(found, whole)  # no harm


def test_older_exports_have_no_sha256_and_load(exported, tmp_path):
    copy = tmp_path / "older"
    shutil.copytree(exported, copy)
    description = json.loads((copy / "config.json").read_text())
    assert description.pop("weights_sha256") == file_sha256(copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(description))
    assert_same(genmodels.load(copy).state_dict(), genmodels.load(exported).state_dict())


def test_export_command(tiny_run, tmp_path, capsys):
    out = tmp_path / "model"
    assert cli.run(export_main, [str(tiny_run), f"out={out}"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    assert cli.run(export_main, [str(tiny_run), f"out={out}"]) == 2
    assert "exists; delete it" in capsys.readouterr().err
    assert cli.run(export_main, [str(tiny_run)]) == 2
    assert cli.run(export_main, []) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_checkpoint_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path, writer = tmp_path / "a.ckpt", checkpoint.AtomicCheckpointIO()
    writer.save_checkpoint({"a": 1}, path)

    def fail(*args):
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.save_checkpoint({"a": 2}, path)
    monkeypatch.undo()
    assert torch.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_import_genmodels_is_light():
    """`import genmodels` alone must not pull in torch (a command line's --help should be quick)."""
    import subprocess
    import sys

    code = "import sys, genmodels; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert set(genmodels.METHODS) >= {"edm"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        genmodels.nothing  # noqa: B018


def test_resume_of_a_finished_run_says_so(tiny_run, capsys):
    assert train.main([f"resume={tiny_run}"]) == 0
    assert "run: " in capsys.readouterr().out


def test_half_export_keeps_buffers_whole(tmp_path):
    words = (
        "network.name=edm_unet",
        "network.kind=ncsnpp",
        "network.channels=32",
        "network.multipliers=[1]",
        "network.blocks=1",
        "network.attention=[]",
    )
    source = {"method": {"name": "edm"}, "network": {"name": "edm_unet"}}
    model = genmodels.build([source], *words)
    path = checkpoint.write_export(model, tmp_path / "model", "card", half=True)
    theirs, buffers = genmodels.load(path).state_dict(), dict(model.named_buffers())
    assert any("frequencies" in name for name in buffers)
    for name, value in buffers.items():
        assert torch.equal(theirs[name], value), name
