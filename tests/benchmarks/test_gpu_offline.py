"""The script for a GPU without a network: its stages, its wheels, its bundle."""

import json
import sys
import zipfile

import pytest

from benchmarks import gpu_offline

FAILS = "print('seen'); raise SystemExit(3)"
SLEEPS = "import time; print('begun', flush=True); time.sleep(60)"


@pytest.fixture
def bundle(tmp_path):
    """Wheels of a module that is here, of one that is not and of a file that is not."""
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    for name, file in (("json", "json/__init__.py"), ("absent", "absent/__init__.py")):
        with zipfile.ZipFile(folder / f"wheels/{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file, "VALUE = 7\n")
            wheel.writestr(f"{name}-1.dist-info/METADATA", "")
    with zipfile.ZipFile(folder / "wheels/single-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent_file.py", "VALUE = 8\n")
    return folder


def test_a_stage_that_fails_or_is_late_does_not_stop_the_next(bundle, tmp_path, monkeypatch):
    """What was not there before can be imported in a stage; the record is written after each."""
    seen = f"import json; print(len(json.load(open({str(tmp_path / 'out/gpu_kernels.json')!r}))"
    seen += "['stages']))"
    imports = (
        "import absent, absent_file, json; print(absent.VALUE, absent_file.VALUE, json.dumps(1))"
    )
    words = {"fails": FAILS, "late": SLEEPS, "counts": seen, "imports": imports, "starved": ""}
    limits = {"late": 0.5, "starved": -1}
    monkeypatch.setattr(
        gpu_offline,
        "stages",
        lambda *_: [
            (name, ["-S", "-c", code], limits.get(name, 20)) for name, code in words.items()
        ],
    )
    out = tmp_path / "out"
    assert gpu_offline.main(["kernels", f"out={out}", f"bundle={bundle}"]) == 1
    record = json.loads((out / "gpu_kernels.json").read_text())
    assert record["unpacked"] == ["absent-1-py3-none-any.whl", "single-1-py3-none-any.whl"]
    stages = {stage["name"]: stage for stage in record["stages"]}
    codes = {name: stage["code"] for name, stage in stages.items()}
    late = {"late": "late", "counts": 0, "imports": 0, "starved": "no time left"}
    assert codes == {"fails": 3} | late
    tails = [stages[name]["tail"] for name in ("fails", "late", "counts", "imports")]
    assert tails == [["seen"], ["begun"], ["2"], ["7 8 1"]]
    assert stages["late"]["seconds"] < 10


@pytest.mark.parametrize("part", ["kernels", "training"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stages_start_what_is_there_and_leave_time_for_the_last(part, device, tmp_path):
    stages = gpu_offline.stages(part, tmp_path, device)
    for name, words, limit in stages:
        assert limit > 0 and words[0] in ("-m", "-c")
        if words[1].startswith("benchmarks."):
            assert (gpu_offline.ROOT / (words[1].replace(".", "/") + ".py")).is_file(), name
        files = [word for word in words if word.endswith((".py", ".yaml"))]
        for file in files:
            assert (gpu_offline.ROOT / file.removeprefix("overlay=")).is_file(), file
    assert sum(limit for *_, limit in stages[:-1]) <= 300 - gpu_offline.RESERVE - 60


def test_the_packing_list(tmp_path, monkeypatch):
    """What a machine with PyTorch has stays out; another folder's files are not mixed in."""
    (tmp_path / "data/FashionMNIST/raw").mkdir(parents=True)
    (tmp_path / "data/FashionMNIST/raw/train-labels-idx1-ubyte.gz").write_bytes(b"1")
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path / "data"))
    run, commands = gpu_offline.subprocess.run, []

    def download(command, **options):
        if command[0] != sys.executable:
            return run(command, **options)
        commands.append(command)
        for name in ("diffusers", "torch", "nvidia_nccl_cu13", "hf_xet", "zipp"):
            path = tmp_path / f"bundle/wheels/{name}-1-py3-none-any.whl"
            path.write_bytes(b"")
        return None

    if not (gpu_offline.ROOT / ".git").exists():
        pytest.skip("packs what git tracks: needs a clone, and this is none")
    monkeypatch.setattr(gpu_offline.subprocess, "run", download)
    out = tmp_path / "bundle"
    assert gpu_offline.main(["pack", f"out={out}"]) == 0
    assert [p.name.split("-")[0] for p in sorted((out / "wheels").iterdir())] == [
        "diffusers",
        "zipp",
    ]
    assert commands[0][-3:] == ["diffusers", "omegaconf", "pytest"]
    assert (out / "data/FashionMNIST/raw/train-labels-idx1-ubyte.gz").read_bytes() == b"1"
    assert (out / "repo/benchmarks/report.py").is_file() and not (out / "repo/.git").exists()
    assert gpu_offline.main(["pack", f"out={out}"]) == 2


def test_wrong_words_are_refused(tmp_path, capsys):
    for words, text in (
        (["kernels"], "out=: name a folder"),
        (["kernels", "out=a", "colour=3"], "colour=: not known"),
        (["training", f"out={tmp_path}", f"bundle={tmp_path}"], "holds no wheels/"),
        (["other"], "pack out=BUNDLE"),
    ):
        assert gpu_offline.main(words) == 2
        assert text in capsys.readouterr().out
