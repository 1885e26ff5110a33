"""Cases of test_bad_input.py: broken, foreign, newer and malicious checkpoints and exports."""

import json
import os
import pickle
import shutil

import torch
from safetensors.torch import load_file, save_file

from genmodels import checkpoint
from tests.helpers.bad_words import DEBUG, DIGITS, case
from tests.helpers.tiny import TINY


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edit(change):
    """Return a maker of {dir}/a.ckpt: the run's checkpoint, changed."""

    def make(folder, run):
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        change(saved)
        torch.save(saved, folder / "a.ckpt")

    return make


def bytes_of(change):
    def make(folder, run):
        blob = (run / "checkpoints" / "last.ckpt").read_bytes()
        (folder / "a.ckpt").write_bytes(change(blob))

    return make


def checkpoint_case(name, make, *parts, command="sample"):
    words = {
        "sample": ["{dir}/a.ckpt", "num=1", "steps=1", "out={dir}/out"],
        "train": [DIGITS, DEBUG, *TINY, "out_dir={dir}/runs", "init={dir}/a.ckpt"],
        "export": ["{dir}/a.ckpt", "out={dir}/out"],
    }[command]
    case(f"ckpt-{name}", command, words, *parts, make=make)


def weights(saved):
    return saved["state_dict"]


def config(saved):
    return saved["hyper_parameters"]["config"]


KEY = "net.net.unet.conv_out.weight"
NOT_OURS = "model={dir}/a.ckpt: not a checkpoint of genmodels ("
checkpoint_case("truncated", bytes_of(lambda b: b[:-1000]), NOT_OURS)
checkpoint_case("half", bytes_of(lambda b: b[: len(b) // 2]), NOT_OURS, command="train")
checkpoint_case("empty", bytes_of(lambda b: b""), NOT_OURS, command="export")
checkpoint_case("text", bytes_of(lambda b: b"hello"), NOT_OURS)
checkpoint_case("zeros", bytes_of(lambda b: bytes(1000)), NOT_OURS)
checkpoint_case("list", lambda f, run: torch.save([1, 2], f / "a.ckpt"), NOT_OURS)
checkpoint_case("tensor", lambda f, run: torch.save(torch.ones(3), f / "a.ckpt"), NOT_OURS)
checkpoint_case("foreign", lambda f, run: torch.save({"model": {}}, f / "a.ckpt"), NOT_OURS)
checkpoint_case(
    "pickle", lambda f, run: (f / "a.ckpt").write_bytes(pickle.dumps(Evil(f / "evil"))), NOT_OURS
)
checkpoint_case(
    "payload", edit(lambda s: s.update(extra=Evil("/tmp/genmodels-evil"))), NOT_OURS, "a call of"
)
checkpoint_case("no-config", edit(lambda s: s.pop("hyper_parameters")), NOT_OURS)
checkpoint_case("no-weights", edit(lambda s: s.pop("state_dict")), NOT_OURS, "state_dict")
checkpoint_case(
    "lacks", edit(lambda s: weights(s).pop(KEY)), f"lacks {KEY} (and 0 more); it does not belong"
)
checkpoint_case(
    "unknown", edit(lambda s: weights(s).update(x=torch.ones(1))), "has the unknown x (and 0 more)"
)
checkpoint_case(
    "shape", edit(lambda s: weights(s).update({KEY: torch.ones(3)})), f"has a wrong shape for {KEY}"
)
checkpoint_case(
    "no-tensor", edit(lambda s: weights(s).update({KEY: "x"})), f"has a wrong shape for {KEY}"
)
checkpoint_case(
    "method",
    edit(lambda s: config(s)["method"].update(name="vae")),
    "does not fit",
    "method.name=vae",
)
checkpoint_case(
    "newer",
    edit(lambda s: config(s)["method"].update(warp=1)),
    "does not fit",
    "unknown key method.w",
)
checkpoint_case(
    "value", edit(lambda s: config(s)["optim"].update(lr="fast")), "does not fit", "optim.lr=fast"
)
checkpoint_case(
    "network", edit(lambda s: config(s)["network"].update(layers=2)), "a.ckpt: lacks net.", "belong"
)


def export_case(name, change, *parts):
    """A case of {dir}/model, an export that `change(folder)` has tampered with."""

    def make(folder, run):
        checkpoint.export(run, folder / "model")
        change(folder / "model")

    words = ["{dir}/model", "num=1", "steps=1", "out={dir}/out"]
    case(f"export-{name}", "sample", words, "model={dir}/model: ", *parts, make=make)


def described(change):
    def tamper(model):
        plain = json.loads((model / "config.json").read_text())
        change(plain)
        (model / "config.json").write_text(json.dumps(plain))

    return tamper


def stored(change):
    def tamper(model):
        state = load_file(model / "model.safetensors")
        change(state)
        save_file(state, model / "model.safetensors")
        described(lambda plain: plain.pop("weights_sha256"))(model)  # as a forger would

    return tamper


def header(model):
    """A safetensors header that claims 2^60 bytes of JSON."""
    blob = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + blob[8:])


def pickled(model):
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil(model / "evil")))


UNREADABLE = "model.safetensors cannot be read ("
export_case("json", lambda m: (m / "config.json").write_text("{"), "config.json is not one of")
export_case("list", lambda m: (m / "config.json").write_text("[]"), "config.json is not one of")
export_case("format", described(lambda d: d.pop("genmodels_format")), "config.json is not one of")
export_case(
    "newer",
    described(lambda d: d.update(genmodels_format=3)),
    "export format 3, this version",
    "upgrade genmodels",
)
export_case(
    "words", described(lambda d: d.update(genmodels_format="new")), "config.json is not one of"
)
export_case(
    "config", described(lambda d: d.update(config=[])), "its config does not fit this version"
)
export_case(
    "method", described(lambda d: d["config"]["method"].update(name="gan")), "method.name=gan"
)
export_case("lacks", stored(lambda s: s.pop(KEY)), f"lacks {KEY} (and 0 more); it does not belong")
export_case(
    "shape", stored(lambda s: s.update({KEY: torch.ones(3)})), f"has a wrong shape for {KEY}"
)
export_case("no-file", lambda m: (m / "model.safetensors").unlink(), UNREADABLE)
export_case("truncated", lambda m: os.truncate(m / "model.safetensors", 5000), UNREADABLE)
export_case("empty", lambda m: (m / "model.safetensors").write_bytes(b""), UNREADABLE)
export_case("header", header, UNREADABLE)
export_case("pickle", pickled, UNREADABLE)


def resume_case(name, spoil, *parts):
    def make(folder, run):
        shutil.copytree(run, folder / "run")
        spoil(folder / "run")

    words = ["resume={dir}/run", "trainer.max_steps=9"]
    case(f"resume-{name}", "train", words, *parts, make=make)


def swap(old, new):
    def spoil(run):
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))

    return spoil


LAST = "checkpoints/last.ckpt"


def cut_all(run):
    """Cut every checkpoint of a run: where one is whole, it is taken."""
    for path in (run / "checkpoints").iterdir():
        cut = path.read_bytes()[:5000]
        path.unlink()  # last.ckpt and the latest step are one file
        path.write_bytes(cut)


resume_case("truncated", cut_all, f"model={{dir}}/run/{LAST}: not a check")
resume_case(
    "config", lambda r: (r / "config.yaml").write_text("a: ["), "config={dir}/run/config.yaml: not"
)
resume_case(
    "edited", swap("p_mean: -1.2", "p_mean: 0.5"), "method.p_mean=0.5: ", "put that back into"
)
resume_case(
    "metrics", lambda r: (r / "metrics.csv").write_text("step\nx\n"), "metrics.csv: ", "delete"
)
