"""Models on the hub: pushed to, and loaded from, a stand-in of its HTTP API on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

import genmodels
from genmodels import cli
from genmodels.checkpoint import export, hub
from genmodels.checkpoint import push as pushing
from genmodels.commands.main import main
from genmodels.methods import EDM
from tests.helpers.hub import served
from tests.helpers.paths import ROOT
from tests.helpers.processes import together
from tests.helpers.runs import assert_same
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")


@pytest.fixture
def server(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with served(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def model():
    return genmodels.build(DIGITS, *TINY).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("exports") / "tiny", license="mit")


def fetched(server):
    """Return which files the client has asked for since the last time."""
    files = {line.rsplit("/", 1)[1] for line in server.asked if "/resolve/" in line}
    server.asked.clear()
    return files


def put(server, name, folder, private=False):
    """Put a folder there as if somebody else had; return the commit's sha."""
    server.repos.setdefault(name, {"private": private, "commits": []})
    return server.commit(name, {file.name: file.read_bytes() for file in folder.iterdir()})


def test_a_run_is_pushed_and_loaded_by_its_name(server, tiny_run, capsys, monkeypatch):
    argv = ["push", str(tiny_run), "to=alice/digits", "license=cc-by-4.0", "samples=1"]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {server.url}/alice/digits"
    first, files = server.files("alice/digits")
    assert set(files) == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert not server.repos["alice/digits"]["private"]
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card and 'genmodels.load("alice/digits")' in card
    server.asked.clear()
    run, loaded = genmodels.load(tiny_run), genmodels.load("alice/digits")
    assert fetched(server) == {"config.json", "model.safetensors"}
    assert_same(run.state_dict(), loaded.state_dict())
    assert not loaded.training

    other = genmodels.build(DIGITS, *TINY, "seed=5")
    assert other.push_to_hub("alice/digits", samples=0) == f"{server.url}/alice/digits"
    latest = server.files("alice/digits")[1]
    assert latest["model.safetensors"] != files["model.safetensors"]

    def weights(name):
        return (hub.fetch(name) / "model.safetensors").read_bytes()

    assert weights("alice/digits") == latest["model.safetensors"]
    assert weights(f"alice/digits@{first}") == files["model.safetensors"]
    again = EDM.from_pretrained("alice/digits", revision=first)
    assert_same(again.state_dict(), run.state_dict())
    # What was fetched once is there without a connection.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert weights("alice/digits") == latest["model.safetensors"]


def test_commands_take_a_name_of_the_hub(server, exported, tmp_path, capsys):
    put(server, "bob/tiny", exported)
    assert main(["sample", "bob/tiny", "num=2", "steps=2", f"out={tmp_path / 'images'}"]) == 0
    assert (tmp_path / "images" / "000001.png").is_file()
    assert main(["export", "bob/tiny", f"out={tmp_path / 'copy'}", "samples=0"]) == 0
    weights = [(at / "model.safetensors").read_bytes() for at in (tmp_path / "copy", exported)]
    assert weights[0] == weights[1]


def test_training_starts_from_a_commit_of_the_hub(server, exported, capsys):
    """From its weights, and with its network: of this commit, whatever comes later."""
    sha = put(server, "bob/tiny", exported)
    argv = ["train", "edm_digits", "init=bob/tiny", "--print"]
    assert main(argv) == 0
    said = capsys.readouterr()
    printed = yaml.safe_load(said.out)
    assert printed["init"].endswith(sha) and genmodels.load(printed["init"]).shape == (1, 8, 8)
    assert printed["network"]["channels"] == [16, 16] and "init=bob/tiny: brings" in said.err


def test_paths_go_before_names_of_the_hub(server, exported, tmp_path):
    put(server, "bob/tiny", exported)
    Path("bob").mkdir()
    with pytest.raises(ValueError, match=r"model=bob/tiny: is no run folder.*$"):
        genmodels.load("bob/tiny")
    assert not server.asked
    assert genmodels.load("hf://bob/tiny").shape == (1, 8, 8)
    with pytest.raises(ValueError, match="is no run folder"):
        genmodels.load(Path("carol/tiny"))
    for text in (
        "a",
        "a/b/c",
        "../a",
        "/a/b",
        "~/a",
        ".a/b",
        "a/b@",
        "a/last.ckpt",
        "a b/c",
        "C:/a",
    ):
        assert hub.repository(text) is None, text
    assert hub.repository("a/b.c@refs/pr/1") == ("a/b.c", "refs/pr/1")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("alice/nothing", "the hub shows no such repository: mind the name; if it is private, log"),
        ("bob/secret", "the hub shows no such repository: mind the name; if it is private, log in"),
        ("bob/tiny@v9", "its repository on the hub has no such revision"),
        ("bob/bare", "that repository of the hub has no model.safetensors: no export of genmodels"),
        ("bob/pickles", "that repository of the hub has no config.json: no export of genmodels"),
        ("bob/bad--name", "that is no name for the hub: write OWNER/NAME"),
        ("bob/damaged", "model.safetensors has another sha256 than config.json says"),
        ("bob/other", "config.json is not one of genmodels' exports"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line(server, exported, name, line, tmp_path, capsys):
    put(server, "bob/tiny", exported)
    put(server, "bob/secret", exported, private=True)
    content = {file.name: file.read_bytes() for file in exported.iterdir()}
    weights, settings = content["model.safetensors"], content["config.json"]
    for repo, files in {
        "bob/bare": {"config.json": settings},
        "bob/pickles": {"pytorch_model.bin": b"\x80\x04"},
        "bob/damaged": {"config.json": settings, "model.safetensors": weights[:-1] + b"\x7f"},
        "bob/other": {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights},
    }.items():
        server.repos[repo] = {"private": False, "commits": []}
        server.commit(repo, files)
    assert main(["sample", name, "num=1", f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model=") and line in error and error.count("\n") == 1, error
    assert "pytorch_model.bin" not in fetched(server)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_it_is_one_line(server, offline, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for argv in (["sample", "bob/tiny", "num=1"], ["train", "edm_digits", "init=bob/tiny"]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model=bob/tiny: is no run folder, .ckpt file or exported")
        assert "the hub cannot be reached" in error and error.count("\n") == 1, error
    assert not list(Path().iterdir())


def test_refused_pushes_leave_nothing(server, exported, monkeypatch, capsys):
    def refused(words, line, token="hf_alice"):
        monkeypatch.setenv("HF_TOKEN", token)
        before = {name: list(repo["commits"]) for name, repo in server.repos.items()}
        assert main(["push", str(exported), *words]) == 2
        error = capsys.readouterr().err
        assert line in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert {name: repo["commits"] for name, repo in server.repos.items()} == before
        assert not list(Path().iterdir())

    put(server, "alice/public", exported)
    refused([], "usage: genmodels push MODEL to=OWNER/NAME")
    refused(["to=alice"], "to=alice: write OWNER/NAME")
    refused(["to=alice/a@main"], "to=alice/a@main: write OWNER/NAME")
    refused(["to=bob/tiny"], "to=bob/tiny: the hub refuses it (403): log in with")
    refused(["to=alice/tiny"], "to=alice/tiny: the hub refuses it (401): log in", token="hf_none")
    refused(["to=alice/public", "private=true"], "to=alice/public: is there and public; make it")
    refused(["to=alice/a", "license=mit"], "license=mit: an exported folder goes as it is")
    refused(["to=alice/a", "license=My Own"], "license=My Own: is written in small letters")
    assert list(server.repos) == ["alice/public"]
    server.writes = False
    refused(["to=alice/public"], "to=alice/public: the hub refuses it (403)")


def test_a_card_that_the_hub_does_not_take_is_not_pushed(server, model):
    with pytest.raises(ValueError, match=r'to=alice/a: the hub does not take it .*"license" must'):
        model.push_to_hub("alice/a", license="mine", samples=0)
    assert not server.repos["alice/a"]["commits"]


def test_an_export_goes_as_it_is_and_nothing_else_of_its_folder(server, exported, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(exported, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    (folder / "notes.txt").write_text("for me alone")
    told = '# mine\n\ngenmodels sample mine num=4\nmodel = genmodels.load("mine")\nmine, all mine\n'
    assert pushing.renamed(told, "mine", "alice/m") == (
        "# alice/m\n\ngenmodels sample alice/m num=4\n"
        'model = genmodels.load("alice/m")\nmine, all mine\n'
    )
    assert main(["push", str(folder), "to=alice/mine", "private=true"]) == 0
    assert server.repos["alice/mine"]["private"]
    _, files = server.files("alice/mine")
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert files["README.md"] == (folder / "README.md").read_bytes()
    # Again, of a repository that is private already; a broken export does not go.
    assert pushing.push(folder, "alice/mine", private=True)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        pushing.push(folder, "alice/mine")
    assert len(server.repos["alice/mine"]["commits"]) == 2
    # What the hub's cache holds has no card: it gets one.
    assert pushing.push("alice/mine", "alice/again") == f"{server.url}/alice/again"
    assert set(server.files("alice/again")[1]) == set(files)


def test_saved_and_read_as_other_models_of_the_hub_are(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "saved", half=True)
    assert folder == tmp_path / "saved"
    for cls in (EDM, genmodels.METHODS["edm"]):
        read = cls.from_pretrained(folder)
        assert type(read) is EDM and not read.training
    for name, value in read.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"saved: exists; delete it"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is of EDM; write EDM\.from_pretrained"):
        genmodels.METHODS["cdrl"].from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["out_dir"] == "runs"


def test_of_two_processes_the_first_one_fetches(server, exported, tmp_path):
    put(server, "bob/tiny", exported)
    argv = ["bob/tiny", "num=4", "steps=2", "device=cpu", f"out={tmp_path / 'images'}"]
    ended = together(argv, tmp_path / "texts", script="sample")
    assert [end.code for end in ended] == [0, 0], ended
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
    gets = [line for line in server.asked if line.startswith("GET ") and "resolve" in line]
    assert sorted(line.rsplit("/", 1)[1] for line in gets) == ["config.json", "model.safetensors"]
    assert len([line for line in server.asked if "/revision/" in line]) == 1  # what main is today
    ended = together(["bob/none", *argv[1:]], tmp_path / "more", script="sample")
    assert [end.code for end in ended] == [2, 2], ended
    assert all("the hub shows no such repository" in end.text for end in ended)


def test_a_full_disk_is_not_the_hub_s(server, exported, monkeypatch, capsys, tmp_path):
    put(server, "bob/tiny", exported)

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "blob"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert cli.run(lambda _: genmodels.load("bob/tiny"), []) == 2
    assert "No space left on device; free some space" in capsys.readouterr().err
    assert export(exported, tmp_path / "still works").is_dir()


@pytest.mark.slow
def test_the_command_asks_where_hf_endpoint_says(server, exported, tiny_run, tmp_path):
    """In processes of its own: nothing of the client is patched there."""
    home = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*words):
        argv = [sys.executable, "-m", "genmodels", *map(str, words)]
        return subprocess.run(argv, cwd=ROOT, env=home, capture_output=True, text=True, timeout=300)

    done = run("push", tiny_run, "to=alice/digits", "private=true", "samples=2")
    assert done.returncode == 0, done.stderr
    assert "note: license=: the card says that none is stated" in done.stderr
    assert server.repos["alice/digits"]["private"]
    done = run("evaluate", "alice/digits", "data=digits:test", "num=64", "metrics=fd", "device=cpu")
    assert done.returncode == 0 and "alice/digits" in done.stdout, done.stderr
    done = run("sample", "alice/digit", "num=1", f"out={tmp_path / 'images'}")
    assert done.returncode == 2 and "the hub shows no such repository" in done.stderr
    assert (tmp_path / "home" / "hub" / "models--alice--digits").is_dir()
