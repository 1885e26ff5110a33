"""The shape of the house: what `make lint` does not see of it (pyproject.toml has the contract)."""

import ast
import re
import subprocess
import sys

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "genmodels"
SHIMS = {"importers", "diffusers_export", "__main__"}  # two lines each, for `python -m`
SCRIPTS = ("train", "sample", "evaluate")


def imported(path):
    """Yield the dotted names that a file imports, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = {"ops": "genmodels.kernels", "benchmarks": "benchmarks"}[path.parent.name]
            yield f"{package}.{node.module or node.names[0].name}"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms():
    """Return {room: files}: the children of genmodels, each script, kernels, benchmarks."""
    found = {"genmodels": [PACKAGE / "__init__.py"]}
    for path in PACKAGE.iterdir():
        if path.is_dir() and list(path.glob("*.py")):
            found[f"genmodels.{path.name}"] = list(path.rglob("*.py"))
        elif path.suffix == ".py" and path.stem not in SHIMS | {"__init__"}:
            found[f"genmodels.{path.stem}"] = [path]
    found["genmodels.kernels"] = list((ROOT / "kernels/ops").glob("*.py"))
    found["benchmarks"] = list((ROOT / "benchmarks").glob("*.py"))
    return found | {name: [ROOT / f"{name}.py"] for name in SCRIPTS}


def room_of(name, known):
    """Return the room that a dotted name lies in, or None."""
    parts = name.split(".")
    return next((r for r in (".".join(parts[:2]), parts[0]) if r in known), None)


def floors(graph):
    """Return {room: floor}, the longest way down from it; a circle is an error."""
    heights, open_rooms = {}, []

    def height(room):
        assert room not in open_rooms, f"a circle: {open_rooms[open_rooms.index(room) :]}"
        if room not in heights:
            open_rooms.append(room)
            heights[room] = 1 + max((height(below) for below in graph[room]), default=0)
            open_rooms.pop()
        return heights[room]

    return {room: height(room) for room in graph}


def test_at_most_30_rooms_on_9_floors_without_a_circle():
    known = rooms()
    graph = {
        room: {room_of(n, known) for f in files for n in imported(f)} - {room, None}
        for room, files in known.items()
    }
    assert "genmodels.config" in graph["genmodels.data"]  # the arrows are seen
    assert len(known) <= 30, sorted(known)
    assert max(floors(graph).values()) <= 9, floors(graph)


def test_kernels_know_torch_and_triton_alone():
    allowed = {"torch", "triton", "genmodels", "numpy"} | sys.stdlib_module_names
    for path in (ROOT / "kernels/ops").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, (path.name, name)
            assert not name.startswith("genmodels.") or name.startswith("genmodels.kernels"), name


def test_the_contract_names_every_room():
    """exhaustive = true refuses a room that has no floor; so does a misspelt contract here."""
    text = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"\nlayers = \[(.*?)\]", text, re.S)[1]
    named = set(re.findall(r"\w+", re.sub(r"#.*", "", layers)))
    there = {r.removeprefix("genmodels.") for r in rooms() if r.startswith("genmodels.")}
    assert named == (there | SHIMS) - {"kernels"}


def test_the_formatter_is_seldom_switched_off():
    marked = []
    for folder in ("genmodels", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            # The word is put together so that this file does not count.
            marked += [path.name] * path.read_text().count("fmt: " + "skip")
    assert len(marked) <= 15, marked


def test_no_module_hides_what_its_package_exports():
    """An import of genmodels.images.grid would put the module in the place of a function grid."""
    for init in PACKAGE.rglob("__init__.py"):
        for node in ast.walk(ast.parse(init.read_text())):
            for name in node.names if isinstance(node, ast.ImportFrom) else ():
                known = name.asname or name.name
                inside = init.parent / f"{known}.py", init.parent / known / "__init__.py"
                assert not any(path.exists() for path in inside), f"{init}: {known}"


def test_the_package_alone_imports_nothing_heavy():
    code = (
        "import sys, genmodels; "
        "heavy = {'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_help_of_the_scripts_waits_for_no_trainer():
    """sample.py and evaluate.py --help load neither Lightning nor diffusers nor torchvision."""
    code = (
        "import sys, sample, evaluate; "
        "assert sample.main(['--help']) == evaluate.main(['--help']) == 0; "
        "heavy = {'lightning', 'diffusers', 'torchvision', 'accelerate'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
