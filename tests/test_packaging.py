"""However we are installed: genmodels.kernels is found, Hugging Face's `kernels` not shadowed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import yaml
from PIL import Image

from genmodels.metrics.features.grey_nets import GREY_NETS
from genmodels.version import __version__
from tests.helpers.paths import ROOT

# What a user's process does; the first line takes away the editable install of the test machine.
CHECK = """
import sys
if {isolated}:
    sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    sys.path = [p for p in sys.path if "__editable__" not in p]
import kernels
assert kernels.IS_HUGGING_FACE, kernels
import genmodels
from genmodels.kernels.philox import philox_normal
import genmodels.kernels.philox as module
assert module.__name__ == "genmodels.kernels.philox"
print(genmodels.__file__, module.__file__, philox_normal((3,), 1).tolist())
"""


def run(cwd, path, isolated, code=CHECK):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    # -c puts the working directory first on sys.path, as a script there would
    return subprocess.run(
        [sys.executable, "-c", code.format(isolated=isolated)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A stand-in for the installed `kernels` package of Hugging Face."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("IS_HUGGING_FACE = True\n")
    return folder


def build_wheel(folder, root=ROOT, **environment):
    """Build the wheel of a clone and unpack it, which is how one is installed; return (site, name).

    environment: further variables of the build.
    """
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder,
            root,
        ],
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | environment,
    )
    (built,) = folder.glob("genmodels-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site", built.name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked."""
    site, _ = build_wheel(tmp_path_factory.mktemp("wheel"))
    names = [str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()]
    assert "genmodels/kernels/philox.py" in names
    nets = {f"genmodels/metrics/features/{name}_net.safetensors" for name in (*GREY_NETS, "cifar")}
    assert nets <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"genmodels"}
    return site


def editable():
    """Return whether this interpreter sees genmodels through an editable install."""
    code = "import genmodels.kernels, os; print(os.path.realpath(genmodels.__file__))"
    done = run("/", [], False, code.replace("{", "{{").replace("}", "}}"))
    return done.returncode == 0 and done.stdout.strip().startswith(str(ROOT.resolve()))


CASES = [
    "wheel elsewhere",
    "wheel at the root",
    "editable elsewhere",
    "editable at the root",
    "no install, PYTHONPATH",
]


OPEN = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
from importlib import import_module, metadata, resources
from omegaconf import OmegaConf
import genmodels
from genmodels.metrics.features import load_features
from genmodels.metrics.features.grey_nets import GREY_NETS
for name in (*GREY_NETS, "cifar"):
    load_features(name)
for name in {kernels}:
    import_module("genmodels.kernels." + name)
texts = {{p.name: p.read_text() for p in resources.files("genmodels.configs").iterdir()}}
from genmodels.config.load import read_yaml
from genmodels.config.shipped import MODELS, shipped
assert (shipped(MODELS)["noise2score_grey"] / "model.safetensors").is_file()
assert read_yaml("edm_digits") == OmegaConf.to_container(OmegaConf.create(texts["edm_digits.yaml"]))
(script,) = metadata.distribution("genmodels").entry_points
assert (script.name, script.group) == ("genmodels", "console_scripts")
assert script.load()(["--version"]) == 0
assert all(OmegaConf.create(text) for text in texts.values())
print(*sorted(name for name in texts if name.endswith(".yaml")))
"""


def test_the_wheel_opens_every_net_config_and_kernel(wheel, tmp_path):
    kernels = sorted(p.stem for p in (ROOT / "kernels/ops").glob("*.py") if p.stem != "__init__")
    code = OPEN.replace("{kernels}", repr(kernels))
    done = run(tmp_path, [wheel], True, code)
    assert done.returncode == 0, done.stderr
    said, names = done.stdout.splitlines()
    assert said == f"genmodels {__version__}"
    assert names.split() == sorted(p.name for p in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("case", CASES)
def test_import(case, wheel, hugging_face, tmp_path):
    if case.startswith("editable") and not editable():
        pytest.skip("genmodels is not installed in editable mode here (make test does that)")
    where = ROOT if "root" in case else tmp_path
    path = {"w": [wheel], "e": [], "n": [ROOT]}[case[0]]
    done = run(where, [*path, hugging_face], isolated=not case.startswith("editable"))
    assert done.returncode == 0, done.stderr
    used = done.stdout.split()[0]
    assert used.startswith(str(wheel if case == "wheel elsewhere" else ROOT)), used


NATIVE = """
import os, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import genmodels
from genmodels.kernels import native
from genmodels.kernels.philox import philox_normal
library = native.library()
print(library._name if library else None, *philox_normal((3,), 1)[0].tolist())
"""


def clone_without_library(folder):
    """Copy what a build needs into the folder, without what was compiled."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("genmodels", "kernels", "configs", "pretrained"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="the C is not built there")
@pytest.mark.slow
def test_the_library_is_found_where_it_was_built_and_not_missed_elsewhere(tmp_path):
    """In a wheel, in a clone after a build in place, in a clone without, in a wheel without cc."""
    clone = clone_without_library(tmp_path / "clone")
    (tmp_path / "none").mkdir()
    without, name = build_wheel(tmp_path / "none", clone, CC="/bin/false")
    assert "-py3-none-" in name
    outputs = [run(tmp_path, [site], True, NATIVE).stdout.split() for site in (without, clone)]
    if shutil.which("cc") or shutil.which("gcc"):
        (tmp_path / "some").mkdir()
        site, _ = build_wheel(tmp_path / "some", clone)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=clone, check=True, capture_output=True, timeout=300)
        for place in (site, clone):
            outputs.append(run(tmp_path, [place], True, NATIVE).stdout.split())
            assert outputs[-1][0].startswith(str(place)), outputs[-1]
    assert [output[0] for output in outputs[:2]] == ["None", "None"]
    assert all(output[1:] == outputs[0][1:] for output in outputs)  # the same bits


USED = """
import genmodels, genmodels.kernels
print(genmodels.__file__, genmodels.kernels.__file__, sep="\\n")
"""
PIPELINE = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("pipeline")
images = pipeline(batch_size=2, class_labels=[3, 4], num_inference_steps=2).images
print([image.size for image in images])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel; what it depends on is borrowed from this one's."""
    folder = tmp_path_factory.mktemp("installed")
    build_wheel(folder)
    (built,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location"]
    command = [sys.executable, "-m", "pip", "--python", python, *install, built]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    # Only now: pip would see the editable install. A path in a .pth runs no .pth of there.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "env/bin"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="scripts lie elsewhere there")
def test_the_installed_command_does_it_all(installed, tmp_path):
    """Outside of any clone: train, go on, sample, restore, evaluate, export, load in diffusers."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def ended(program, *words):
        command = [installed / program, *words]
        settings = {"capture_output": True, "text": True, "timeout": 600}
        return subprocess.run(command, cwd=tmp_path, env=environment, **settings)

    def done(program, *words):
        process = ended(program, *words)
        assert process.returncode == 0, (words, process.stdout, process.stderr)
        return process.stdout

    for path in done("python", "-c", USED).split():
        assert path.startswith(str(installed.parent)), path
    quick = ["trainer.progress=false", "trainer.accelerator=cpu"]
    output = done("genmodels", "train", "edm_digits", "trainer.max_steps=20", *quick)
    run = output.splitlines()[-1].removeprefix("run: ")
    assert (
        run.startswith("runs/edm_digits/") and (tmp_path / run / "checkpoints/last.ckpt").exists()
    )
    done("genmodels", "sample", "runs/edm_digits", "num=4", "steps=4", "out=samples")
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4
    words = ["data=digits:test", "metrics=fd", "features=digits", "num=40", "steps=2"]
    done("genmodels", "evaluate", "runs/edm_digits", *words, "resamples=2", "out=scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["model"] == run and scores["metrics"]["fd"]["value"] > 0

    mistake = ended("genmodels", "sample", "runs/edm_digits", "num=0")
    assert (mistake.returncode, mistake.stderr) == (2, "error: num=0: must be >= 1\n")
    done("genmodels", "export", "runs/edm_digits", "out=shared")
    output = done("genmodels", "sample", "shared", "num=4", "steps=4", "out=again")
    for k in range(4):
        one, two = (Image.open(tmp_path / d / f"{k:06d}.png") for d in ("samples", "again"))
        assert one.tobytes() == two.tobytes()
    done("genmodels", "export", "shared", "out=pipeline", "format=diffusers")
    assert done("python", "-c", PIPELINE).splitlines()[-1] == "[(8, 8), (8, 8)]"

    Image.effect_noise((48, 40), 30).save(tmp_path / "noisy.png")
    done("genmodels", "sample", "noise2score_grey", "denoise=noisy.png", "level=30", "out=restored")
    assert Image.open(tmp_path / "restored/noisy.png").size == (48, 40)

    (tmp_path / "my.yaml").write_text(done("genmodels", "config", "edm_digits"))
    words = ["my.yaml", "debug", "sample.every=0", *quick]  # two processes start the command anew
    output = done("python", "-m", "genmodels", "train", *words, "trainer.devices=2")
    run = output.splitlines()[-1].removeprefix("run: ")
    assert run.startswith("runs/my/")
    done("genmodels", "train", *words, "trainer.devices=2", "out_dir=other")
    done("genmodels", "train", f"resume={run}", "trainer.progress=false")


@pytest.mark.slow
def test_diffusers_imports_beside_our_folder(hugging_face):
    """A kernels/__init__.py at the root would break this where Hugging Face's kernels is wanted."""
    done = run(ROOT, [hugging_face], False, "from diffusers import UNet2DModel")
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_without_triton(tmp_path):
    """Where triton is not installed (macOS, Windows) everything still imports."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    code = "import genmodels.checkpoint; from genmodels.kernels import philox"
    done = run(ROOT, [tmp_path, ROOT], False, code)
    assert done.returncode == 0, done.stderr


def test_a_second_clone_has_its_own_kernels(hugging_face, tmp_path):
    """Even where another clone is installed in editable mode."""
    clone = tmp_path / "clone"
    for name in ("genmodels", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", clone)
    done = run(clone, [hugging_face], isolated=False)
    assert done.returncode == 0, done.stderr
    package, kernel, *_ = done.stdout.split()
    assert package.startswith(str(clone)) and kernel.startswith(str(clone))


def test_the_workflow_tries_the_oldest_and_the_python_that_setup_allows():
    """A floor that is raised in setup.py has to be raised there too."""
    setup = (ROOT / "setup.py").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    rows = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    (oldest,) = (row for row in rows if row["versions"] == "oldest")
    floors = dict(re.findall(r'"(torch|torchvision|triton)>=([\d.]+)', setup))
    asked = dict(re.findall(r"(\w+)==([\d.]+)\.\*", oldest["packages"]))
    assert asked == floors and len(floors) == 3
    python = re.search(r'python_requires=">=([\d.]+)"', setup)[1]
    assert oldest["python"] == min((row["python"] for row in rows), key=version) == python
    assert {row["python"] for row in rows} >= set(re.findall(r"Python :: (3\.\d+)", setup))


def version(text):
    return tuple(map(int, text.split(".")))
