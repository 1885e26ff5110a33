"""The corpus of attacks: what hostile and broken files do to every reader of foreign files.

A row is a reader, a maker of the file, and what the one line must say. A new reader of files is
added to READERS, its attacks to ATTACKS; tests/foreign/test_attacks.py runs them all, each with an
address space of little more than is in use, so that memory taken on a file's word is an error.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genmodels import checkpoint
from genmodels.checkpoint import cdrl_files
from genmodels.checkpoint.inert_pickle import load_arrays
from genmodels.config import load_config
from genmodels.evaluation.kept import KeptFeatures
from genmodels.evaluation.passes import Store
from genmodels.evaluation.references import open_reference
from genmodels.images import open_images, picture_bytes, pictures, read_image
from genmodels.images.arrays import npy_images
from genmodels.methods import METHODS
from genmodels.metrics.features import Features, load_features
from genmodels.metrics.features.weights import load_state, read_weights
from genmodels.metrics.stats import load_stats
from genmodels.networks import NETWORKS
from tests.helpers import cdrl_released


@dataclass(frozen=True)
class Attack:
    """One file.

    Args:
        reader: a key of READERS.
        make: makes it in a folder and returns its path.
        parts: what the line says.
        slow: takes more than a second.
    """

    reader: str
    make: Callable[[Path], Path]
    parts: tuple[str, ...]
    slow: bool = False


SMALL: dict = {
    "data": {"name": "digits", "labels": False},
    "method": {"name": "edm"},
    "network": {"name": "unet", "channels": [8], "layers": 1, "norm_groups": 4},
}
SMALL["network"] |= {"attention": [], "head_dim": 8}


def init_from(folder: Path) -> object:
    """Start a small model from a diffusers folder."""
    return checkpoint.init_weights(checkpoint.build(SMALL), folder)


def planes_of(path: Path) -> object:
    """Read a picture to restore, a stack plane by plane."""
    with contextlib.closing(pictures.open_picture(path.name, lambda: open(path, "rb"))) as picture:
        return [picture.plane(number) for number in range(len(picture))]


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": checkpoint.read_checkpoint,
    "model": checkpoint.load,
    "weights": load_state,
    "hash": read_weights,
    "CDRL's": cdrl_files.load_released,
    "picture": read_image,
    "to restore": planes_of,
    "images": lambda path: open_images(path)[0].shape,
    "arrays to restore": lambda path: pictures.read_picture(path.name, path.read_bytes),
    "npy": npy_images,
    "statistics": lambda path: load_stats(path, load_features("pixels")),
    "reference": lambda path: open_reference(
        str(path), Features("inception", None, "none", 2, None), read_pickle=load_arrays
    ),
    "kept": KeptFeatures,
    "blocks": lambda path: Store(path.parent, "a", []),
    "script": lambda path: load_features(str(path)),
    "diffusers": init_from,
    "yaml": lambda path: load_config([path], methods=METHODS, networks=NETWORKS),
}
ATTACKS: dict[str, Attack] = {}


def attack(name: str, reader: str, make: Callable, *parts: str, slow: bool = False) -> None:
    """Add a row."""
    key = f"{reader}-{name}"
    assert key not in ATTACKS, key
    ATTACKS[key] = Attack(reader, make, parts, slow)


# ---- files of torch.save ---------------------------------------------------------------------

OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def zip_form(pickled: bytes, records: dict[str, bytes] | None = None, packed: bool = False):
    """Return a maker of a file of torch.save with this pickle."""

    def make(folder: Path) -> Path:
        kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "a.ckpt", "w", kind) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", b"little")
            archive.writestr("archive/version", b"3\n")
            for name, data in (records or {}).items():
                archive.writestr(f"archive/{name}", data)
        return folder / "a.ckpt"

    return make


def old_form(pickled: bytes, rest: bytes = b""):
    """Return a maker of a file of the older form of torch.save."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = OLD_MAGIC + pickle.dumps(1001, 2) + pickle.dumps(info, 2)
    return of_bytes(head + pickled + pickle.dumps([], 2) + rest, "a.ckpt")


def of_bytes(data: bytes, name: str):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def int4(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: str, key: str, count: bytes) -> bytes:
    """Return the opcodes of a reference to a storage."""
    parts = (text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu"), count)
    return b"(" + b"".join(parts) + b"tQ"


def tensor(count: bytes, shape: bytes, strides: bytes, offset: bytes = b"K\0") -> bytes:
    """Return the opcodes of a tensor in the storage 0."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage("FloatStorage", "0", count)
    return made + offset + shape + strides + b"\x89)Rt"[:1] + b"ccollections\nOrderedDict\n)RtR"


DEEP = 100_000
PICKLES = {
    # A tuple nested as deep as this as a key: hashing it ends the process.
    "deep-key": (b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.", "a tuple as a key"),
    # One that holds itself twice, sixty times over: hashing it never ends.
    "shared-key": (b"\x80\x02})q\0" + b"h\0\x86q\0" * 60 + b"K\x01s.", "a tuple as a key"),
    "number-keys": (
        b"\x80\x02}("
        + b"".join(
            b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 9)
        )
        + b"u.",
        "as a key",
    ),
    "deep-list": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "nested more than 40 deep"),
    "shared-list": (
        b"\x80\x02]q\0" + b"](h\0h\0eq\0" * 30 + b".",
        "more than 4194304 values",
    ),
    "circle": (b"\x80\x02]q\0h\0a.", "nested more than 40 deep"),
    "bytearray": (
        b"\x80\x02cbuiltins\nbytearray\n" + int4(1 << 30) + b"\x85R.",
        "a call of builtins.bytearray",
    ),
    "tensor-class": (
        b"\x80\x02ctorch\nFloatTensor\n" + int4(1 << 30) + b"\x85R.",
        "a call of torch.FloatTensor",
    ),
    "codec": (
        b"\x80\x02c_codecs\nencode\n" + text("a" * 1000) + text("idna") + b"\x86R.",
        "a call of _codecs.encode",
    ),
    "set": (b"\x80\x02cbuiltins\nset\n]\x85R.", "a call of builtins.set"),
    "system": (b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.", "a call of os.system"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the opcode or memo 129"),
    "build": (b"\x80\x02ctorch\nfloat32\n}b.", "with a state"),
    "append": (b"\x80\x02)K\x01a.", "items of a tuple"),
    "no-storage": (b"\x80\x02" + storage("FloatStorage", "7", b"K\x01") + b".", "of 4 bytes where"),
    "storage-lie": (
        b"\x80\x02" + tensor(int4(1 << 30), int4(1 << 30) + b"\x85", b"K\x01\x85") + b".",
        "a storage of 4294967296 bytes where the file has 16",
    ),
    "beyond": (
        b"\x80\x02" + tensor(b"K\x04", b"K\x04\x85", b"K\x02\x85") + b".",
        "a tensor of size (4,) in 4 stored numbers",
    ),
    "stride-0": (
        b"\x80\x02" + tensor(b"K\x04", (int4(1 << 30) * 2) + b"\x86", b"K\0K\0\x86") + b".",
        "in 4 stored numbers",
    ),
    "backwards": (
        b"\x80\x02" + tensor(b"K\x04", b"K\x04\x85", int4(-1) + b"\x85", b"K\x03") + b".",
        "impossible size or stride",
    ),
    "cut": (b"\x80\x02}", "a.ckpt"),
}
for _name, (_pickled, *_parts) in PICKLES.items():
    for _reader in ("checkpoint", "weights"):
        attack(_name, _reader, zip_form(_pickled, {"data/0": bytes(16)}), "a.ckpt", *_parts)
OLDER = ("deep-key", "shared-key", "bytearray", "deep-list", "stride-0")
for _name in OLDER:
    _pickled, *_parts = PICKLES[_name]
    attack(f"older-{_name}", "weights", old_form(_pickled, bytes(64)), "a.ckpt", *_parts)
attack(
    "older-storage-lie",
    "weights",
    old_form(b"\x80\x02" + storage("FloatStorage", "0", int4(1 << 30)) + b"."),
    "storages of more bytes than the file's",
)
attack(
    "tar", "weights", of_bytes(b"sys_info" + bytes(1000), "a.pth"), "does not begin as a file of"
)
attack(
    "packed",
    "checkpoint",
    zip_form(b"\x80\x02" + b"N0" * 100_000 + b"N.", packed=True),
    "the packed entry archive/data.pkl",
)
attack(
    "two-pickles",
    "checkpoint",
    zip_form(b"\x80\x02}.", {"DATA.PKL": PICKLES["deep-key"][0]}),
    "two entries of one name",
)
for _name, _odd in {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.empty(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
}.items():

    def _make_odd(folder: Path, odd=_odd) -> Path:
        torch.save({"state_dict": {"w": odd()}}, folder / "a.ckpt")
        return folder / "a.ckpt"

    attack(_name, "weights", _make_odd, "a.ckpt", "")


CDRLS = "a.ckpt is not a checkpoint released with CDRL; found: "
for _name in ("system", "deep-key"):
    _pickled, *_parts = PICKLES[_name]
    attack(_name, "CDRL's", zip_form(_pickled, {"data/0": bytes(16)}), CDRLS, *_parts)


def tall(folder: Path) -> Path:
    """A layer of 60,000 numbers whose singular values would take 29 GB."""
    content = cdrl_released.content()
    content["pi_state_dict"]["module.temb_map1.weight_orig"] = torch.zeros(60_000, 1)
    content["pi_ema_state_dict"]["shadow_params"][1] = torch.zeros(60_000, 1)
    torch.save(content, folder / "a.ckpt")
    return folder / "a.ckpt"


attack("tall", "CDRL's", tall, CDRLS, "embedding.hidden.weight is (60000, 1), not (32, 8)")


def fifo(name: str):
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


PIPE = "is no plain file but a pipe"
attack("pipe", "checkpoint", fifo("a.ckpt"), "a.ckpt: no such file")
attack("pipe", "weights", fifo("a.pth"), "a.pth", PIPE)
attack("pipe", "hash", fifo("a.pth"), "a.pth", PIPE)
attack("pipe", "CDRL's", fifo("a.pth"), "a.pth", PIPE)
attack("pipe-safetensors", "weights", fifo("a.safetensors"), "a.safetensors", PIPE)
attack("device", "hash", lambda folder: Path("/dev/zero"), "/dev/zero", PIPE)

# ---- models: configs beside weights -----------------------------------------------------------


def export_of(change: Callable[[dict], object] | None, spoil: Callable | None = None):
    """Return a maker of an export whose config is changed, and one file spoilt."""

    def make(folder: Path) -> Path:
        plain = tiny_plain()
        model = checkpoint.build(plain)
        from safetensors.torch import save_file

        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        if change:
            change(plain)
        (folder / "m").mkdir()
        save_file(state, folder / "m" / "model.safetensors")
        whole = {"genmodels_format": 1, "config": plain}
        (folder / "m" / "config.json").write_text(json.dumps(whole))
        if spoil:
            spoil(folder / "m")
        return folder / "m"

    return make


def tiny_plain() -> dict:
    """Return the config of a model of a few hundred weights."""
    return {
        "name": "tiny",
        "data": {"name": "moons", "points": 16, "shape": [2, 1, 1], "classes": 2},
        "network": {"name": "perceptron", "width": 8, "layers": 1},
        "method": {"name": "gedi"},
    }


def put(*path_and_value):
    """Return a function that sets plain[a][b] = value."""
    *path, key, value = path_and_value

    def change(plain: dict) -> None:
        for part in path:
            plain = plain[part]
        plain[key] = value

    return change


BOMB = {f"x{k}": f"${{x{k + 1}}}" * 10 for k in range(10)} | {"x10": "x"}
for _name, _change, *_parts in [
    ("bomb", lambda p: p.update(BOMB), "x0=${x1}", "no ${"),
    ("known-bomb", lambda p: p.update(out_dir="${init}" * 10, init="${name}" * 10), "no ${"),
    ("secret", put("method", "name", "${oc.env:GENMODELS_SECRET}"), "${oc.env:GENMODELS_SECRET}"),
    ("brace", put("name", "${"), "name=${: a model's config holds values"),
    ("missing", put("name", "???"), "name=???: is missing"),
    ("wide", put("network", "width", 10**6), "has a wrong shape for"),
    ("layers", put("network", "layers", 10**9), "network.layers=1000000000: no network is so"),
    ("deep", put("network", "layers", 10**6), "it asks for more than"),
    ("overflow", put("network", "width", 1 << 62), "no network is so large"),
    ("classes", lambda p: p["data"].update(labels=True, classes=10**12), ""),
    ("shape", put("data", "shape", [-8, 1, 1]), "data.shape"),
    ("points", put("data", "points", 1 << 40), "data.points=1099511627776: must be"),
    ("nan", put("method", "l2", float("nan")), "method.l2=nan"),
    ("inf", put("method", "l2", float("inf")), "method.l2=inf: must be finite"),
    ("nul", put("name", "a\0b"), "must hold no NUL"),
    ("long-name", put("name", "a" * 300), "is too long"),
    ("many", put("data", "shape", [1] * 10**6), "holds too many values"),
]:
    attack(_name, "model", export_of(_change), "m", *_parts)


def config_json(content: str):
    return lambda model: (model / "config.json").write_text(content)


NOT_OURS = "config.json is not one of genmodels' exports"
_deep = '{"genmodels_format": 1, "config": ' + "[" * 200_000 + "]" * 200_000 + "}"
attack("deep-json", "model", export_of(None, config_json(_deep)), NOT_OURS)
attack(
    "nested",
    "model",
    export_of(put("name", json.loads("[" * 100 + "]" * 100))),
    "nested more than 12 deep",
)
attack("1e999", "model", export_of(None, config_json('{"genmodels_format": 1e999}')), NOT_OURS)


def pipe_for(name: str):
    def spoil(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return spoil


attack("pipe", "model", export_of(None, pipe_for("model.safetensors")), "m", PIPE)
attack("pipe-config", "model", export_of(None, pipe_for("config.json")), "m: is no run folder")


def not_finite(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    next(value for value in state.values() if value.dim())[0] = float("nan")
    save_file(state, model / "model.safetensors")


attack("nan-weights", "model", export_of(None, not_finite), "holds NaN or infinite values")

# ---- YAML --------------------------------------------------------------------------------------

BOTH = "method: {name: edm}\nnetwork: {name: unet}\n"
for _name, _text, *_parts in [
    ("deep", "a: " + "[" * 100_000, "nested more than 12 deep"),
    ("deep-blocks", "".join(f"{' ' * k}a:\n" for k in range(300)), "nested more than 12 deep"),
    (
        "laughs",
        BOTH
        + "x: &a [1,1,1,1,1]\n"
        + "".join(
            f"x{k}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
            for k, (a, b) in enumerate(zip("abcdefghi", "bcdefghij"))
        ),
        "",
    ),
    ("large", "a: " + "b" * (1 << 20), "more than 1 MB"),
    ("bomb", BOTH + "".join(f"{k}: {v}\n" for k, v in BOMB.items()), "${x"),
    ("circle", BOTH + "name: ${out_dir}\nout_dir: ${name}\n", "must be a value that is written"),
    ("self", BOTH + "name: ${name}\n", "must be a value that is written out"),
    ("brace", BOTH + "name: '${'\n", "not YAML: no viable"),
    ("dot", BOTH + "name: ${.}\n", "not YAML: extraneous input"),
    ("resolver", BOTH + "name: ${oc.create:'[1]'}\n", "write ${KEY} or ${oc.env:VARIABLE}"),
    ("nested", BOTH + "name: ${${init}}\n", "write ${KEY} or ${oc.env:VARIABLE}"),
    ("copies", BOTH + f"out_dir: {'${name}' * 200}\nname: a\n", "200 times ${"),
    ("secret", "method: {name: '${oc.env:GENMODELS_SECRET}'}\n", "method.name=${oc.env:GENM"),
    ("unknown", BOTH + "datta: ${oc.env:GENMODELS_SECRET}\n", "unknown key datta"),
    ("type", BOTH + "seed: ${oc.env:GENMODELS_SECRET}\n", "seed=${oc.env:GENMODELS_SECRET}"),
    ("missing", BOTH + "name: ???\n", "name=???: is missing; give a value"),
]:
    attack(_name, "yaml", of_bytes(_text.encode(), "a.yaml"), *_parts)
attack("pipe", "yaml", fifo("a.yaml"), "a.yaml: no such file")

# ---- pictures ----------------------------------------------------------------------------------


def deep_png(spoil: Callable[[bytes], bytes]):
    """Return a maker of a PNG of 16-bit colour, spoilt."""

    def make(folder: Path) -> Path:
        values = np.random.default_rng(0).integers(0, 65536, (64, 64, 3)).astype(np.uint16)
        (folder / "a.png").write_bytes(spoil(picture_bytes(values, "png")))
        return folder / "a.png"

    return make


def flip(place: int):
    return lambda data: data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def with_pixels(change: Callable[[bytes], bytes]):
    """Return a function that packs other pixels into a PNG, with right checksums."""

    def spoil(data: bytes) -> bytes:
        length = int.from_bytes(data[33:37], "big")
        content = change(data[41 : 41 + length])
        chunk = b"IDAT" + content
        head = data[:33] + len(content).to_bytes(4, "big") + chunk
        return head + zlib.crc32(chunk).to_bytes(4, "big") + data[45 + length :]

    return spoil


for _reader in ("picture", "to restore"):
    for _name, _spoil, *_parts in [
        ("flip-idat", flip(20_000), "its chunk IDAT is damaged"),
        ("flip-adler", with_pixels(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "incorrect data check"),
        ("short", with_pixels(lambda b: zlib.compress(bytes(1000))), "its header promises"),
        ("bomb", with_pixels(lambda b: zlib.compress(bytes(10**8))), "its header promises"),
        (
            "filter",
            with_pixels(lambda b: zlib.compress(b"\7" + zlib.decompress(b)[1:])),
            "filter 7",
        ),
        ("cut", lambda data: data[:10_000], "a.png"),
    ]:
        attack(_name, _reader, deep_png(_spoil), "a.png", "cannot be read (", *_parts)
attack("pipe", "picture", fifo("a.png"), "a.png", PIPE)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
attack("postscript", "picture", of_bytes(EPS, "a.png"), "it is no picture")


def linked_pipe(folder: Path) -> Path:
    (folder / "set").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "set" / "a.png").symlink_to(folder / "pipe")
    return folder / "set"


attack("linked-pipe", "images", linked_pipe, "a.png", PIPE)


def tiff_bomb(folder: Path) -> Path:
    """A TIFF of 64 x 64 whose only strip unpacks to 300 MB."""
    strip = zlib.compress(bytes(300 << 20), 1)
    kinds = {1: "B", 3: "H", 4: "I"}
    tags = [
        *((256, 3, 64), (257, 3, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8)),
        *((277, 3, 1), (278, 3, 64), (279, 4, len(strip))),
    ]
    rows = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack(f"<{kinds[kind]}", value).ljust(4, b"\0")
        for tag, kind, value in tags
    )
    directory = struct.pack("<H", len(tags)) + rows + bytes(4)
    start = b"II*\0" + struct.pack("<I", 8 + len(strip))
    (folder / "a.tif").write_bytes(start + strip + directory)
    return folder / "a.tif"


for _reader in ("picture", "to restore"):
    attack("tiff-bomb", _reader, tiff_bomb, "unpacks to more than the", slow=True)


def tiff_that_says(text: str):
    """Return a maker of a TIFF of one page of 9 x 7 with this description."""

    def make(folder: Path) -> Path:
        import tifffile

        levels = np.zeros((9, 7), np.uint16)
        tifffile.imwrite(folder / "a.tif", levels, description=text.encode(), metadata=None)
        return folder / "a.tif"

    return make


OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>'
    '<Pixels DimensionOrder="XYCZT" SizeX="7" SizeY="9" SizeC="1" SizeZ="100000" SizeT="1000000" '
    'Type="uint16"><TiffData/></Pixels></Image></OME>'
)
for _name, _text, _part in [
    ("imagej-planes", "ImageJ=1\nimages=1000000000\nslices=1000000000\n", "its header promises 10"),
    ("shaped-planes", '{"shape": [1000000000, 9, 7]}', "it is cut off"),
    ("shaped-nested", '{"shape": ' + "[" * 100_000 + "}", "recursion"),
    ("ome-planes", OME, "MemoryError"),
]:
    attack(_name, "to restore", tiff_that_says(_text), "a.tif: cannot be read (", _part)

# ---- arrays and statistics ---------------------------------------------------------------------


def npz_of(packed: bool = True, name: str = "a.npz", **arrays):
    def make(folder: Path) -> Path:
        with open(folder / name, "wb") as file:
            (np.savez_compressed if packed else np.savez)(file, **arrays)
        return folder / name

    return make


def bomb_of(name: str, kind: str, shape: tuple[int, ...], size: int, **others):
    """Return a maker of an npz with an array of `size` zeros beside others, packed."""

    def make(folder: Path) -> Path:
        npz_of(**others)(folder)
        with zipfile.ZipFile(folder / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for _ in range(size >> 24):
                    entry.write(bytes(1 << 24))
        return folder / "a.npz"

    return make


GIB, FEW = 1 << 30, np.zeros((4, 8, 8), np.uint8)
attack("bomb", "images", bomb_of("images", "|u1", (1 << 20, 32, 32), GIB), "from", slow=True)
attack(
    "label-bomb",
    "images",
    bomb_of("labels", "<f8", (1 << 27,), GIB, images=FEW),
    "labels has shape (134217728,) for 4 images",
    slow=True,
)
attack("lie", "images", bomb_of("images", "|u1", (1 << 40, 8, 8), 1 << 24), "its header promises")
attack("objects", "images", npz_of(images=np.array([{}], object)), "a.npz", "Python objects")
attack("not-zip", "images", of_bytes(b"PK\3\4hello", "a.npz"), "a.npz: cannot be read (")


def npy(shape: tuple[int, ...], size: int):
    head = {"descr": "<f4", "fortran_order": False, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, head)
    return of_bytes(buffer.getvalue() + bytes(size), "a.npy")


for _reader in ("npy", "arrays to restore"):
    attack("lie", _reader, npy((1 << 40, 8, 8, 1), 64), "a.npy", "its header promises")
    attack("cut", _reader, npy((8, 8), 255), "a.npy", "255 bytes where its header promises 256")

EYE = np.eye(2)


def stats_of(spoil: Callable[[bytes], bytes] = bytes, **changes):
    def make(folder: Path) -> Path:
        npz_of(packed=False, **{"mu": np.zeros(2), "sigma": EYE} | changes)(folder)
        blob = (folder / "a.npz").read_bytes()
        (folder / "a.npz").write_bytes(spoil(blob))
        return folder / "a.npz"

    return make


def encrypted(blob: bytes) -> bytes:
    changed = bytearray(blob)
    changed[6] |= 1
    changed[blob.index(b"PK\1\2") + 8] |= 1
    return bytes(changed)


for _name, _make, *_parts in [
    ("indefinite", stats_of(sigma=np.array([[1.0, 5], [5, 1]])), "negative variance"),
    ("infinite", stats_of(sigma=EYE * np.inf), "infinite"),
    ("nan", stats_of(mu=np.full(2, np.nan)), "NaN"),
    ("huge", stats_of(sigma=EYE * 1e307), "no feature's"),
    ("complex", stats_of(mu=np.zeros(2, complex)), "mu holds complex128"),
    ("text", stats_of(mu=np.array(["a", "b"])), "mu holds"),
    ("objects", stats_of(mu=np.array([{}], object)), "Python objects"),
    ("num", stats_of(meta=np.array('{"num": 1e400, "features": {}}')), "a.npz"),
    ("no-num", stats_of(meta=np.array('{"num": -1, "features": {}}')), "num is -1"),
    ("deep", stats_of(meta=np.array("[" * 100_000)), "a.npz"),
    ("list", stats_of(meta=np.array("[1]")), "a.npz"),
    ("cut", stats_of(lambda blob: blob[:-30]), "a.npz"),
    ("encrypted", stats_of(encrypted), "a.npz"),
    ("method", stats_of(lambda b: b.replace(b"PK\1\2" + b[-80:-78], b"PK\1\2zz")[:-1]), "a.npz"),
    ("array", npz_of(mu=np.zeros(2)), "a.npz"),
    ("wide", stats_of(sigma=np.zeros((1, 1 << 16))), "has shape (1, 65536)"),
]:
    attack(
        _name,
        "statistics",
        _make,
        "reference=",
        "cannot be read (" * (_name != "indefinite"),
        *_parts,
    )


def array_named_npz(folder: Path) -> Path:
    with open(folder / "a.npz", "wb") as file:
        np.save(file, np.zeros((2, 2)))
    return folder / "a.npz"


attack("npy", "statistics", array_named_npz, "reference=", "a.npz: cannot be read (")
attack("empty", "statistics", stats_of(mu=np.zeros(0), sigma=np.zeros((0, 0))), "reference=", "net")


# ---- what evaluations keep and compare with ----------------------------------------------------


def named(name: str, make: Callable[[Path], Path]):
    """Return a maker of the same file under another name."""
    return lambda folder: make(folder).rename(folder / name)


ROWS = np.zeros((4, 2), np.float32)
for _reader, _file, _good in (
    ("kept", "k.npz", {"m.rows": ROWS}),
    ("blocks", "a-00.npz", {"mark": np.array("x")}),
):
    _bomb = bomb_of(next(iter(_good)), "<f4", (1 << 26, 1), 1 << 28)
    attack("bomb", _reader, named(_file, _bomb), _file, "is packed", slow=True)
    attack("packed", _reader, named(_file, npz_of(**_good)), _file, "is packed")
    attack("not-zip", _reader, of_bytes(b"PK\3\4hello", _file), _file, "cannot be read (")
    _objects = npz_of(packed=False, **{next(iter(_good)): np.array([{}], object)})
    attack("objects", _reader, named(_file, _objects), _file, "Python objects")
    _whole = npz_of(packed=False, **_good)

    def _flipped(folder: Path, whole=_whole) -> Path:
        path = whole(folder)
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\1\2") - 3] ^= 1
        path.write_bytes(data)
        return path

    attack("flip", _reader, named(_file, _flipped), _file, "cannot be read (Bad CRC")
attack("pipe", "blocks", fifo("a-00.npz"), "a-00.npz", PIPE)
for _name, _arrays in {
    "other": {"images": FEW},
    "float64": {"m.rows": ROWS.astype(float)},
    "deep": {"m.rows": ROWS[None]},
    "alone": {"m.logits": ROWS},
    "short": {"m.rows": ROWS, "m.marks": np.zeros(3, np.int64)},
}.items():
    attack(_name, "kept", npz_of(packed=False, name="k.npz", **_arrays), "keep=", "k.npz: ")


def overlapping(folder: Path) -> Path:
    """An npz of 1 MB whose directory lists its array a thousand times."""
    path = npz_of(packed=False, **{"m.rows": np.zeros((1 << 17, 2), np.float32)})(folder)
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    entry = data[start:end]
    many = b"".join(entry.replace(b"m.rows", b"%06x" % k) for k in range(1000))
    tail = struct.pack("<HHIIH", 1000, 1000, len(many), start, 0)
    path.write_bytes(data[:start] + many + data[end : end + 8] + tail)
    return path


attack("overlap", "kept", overlapping, "keep=", "cannot be read (")

attack("beside", "reference", stats_of(arr_0=np.array([{}], object)), "a.npz", "Python objects")
attack(
    "beside-bomb",
    "reference",
    bomb_of("arr_0", "|u1", (1 << 20, 32, 32), GIB, mu=np.zeros(2), sigma=EYE),
    "a.npz",
    "from",
    slow=True,
)
attack("rows", "reference", stats_of(rows=np.array(["a"])), "reference=", "rows holds no numbers")


def numbers(kind: str, shape: tuple[int, ...], data: bytes):
    """Return what pickles as a numpy array of these bytes."""

    class Made:
        def __reduce__(self):
            state = (1, shape, np.dtype(kind), False, data)
            return (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)

    return Made()


def pickled(thing: object):
    return of_bytes(pickle.dumps(thing), "a.pkl")


def with_fid(**parts: object):
    return pickled({"fid": {"mu": np.zeros(2), "sigma": EYE} | parts})


def copied() -> bytes:
    """Return a pickle of 1 MB of which 2000 arrays of the other order of bytes are made."""
    data = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\0000"
    kind = b"cnumpy\ndtype\n" + text("f8") + b"\x85R" + int4(3) + text(">") + b"\x86bq\x010"
    call = b"cnumpy._core.numeric\n_frombuffer\n"
    array = call + b"(h\0h\1" + int4(1 << 17) + b"\x85" + text("C") + b"tR"
    return b"\x80\x04" + data + kind + b"(" + array * 2000 + b"l."


WIDE = {f"{k}": 0.0 for k in range(5000)}
for _name, _make, *_parts in [
    ("call", of_bytes(PICKLES["system"][0], "a.pkl"), "the name os.system"),
    ("nothing", of_bytes(b"", "a.pkl"), "no data"),
    ("deep-key", of_bytes(PICKLES["deep-key"][0], "a.pkl"), "a tuple as a key"),
    ("shared-key", of_bytes(PICKLES["shared-key"][0], "a.pkl"), "a tuple as a key"),
    ("many-dicts", pickled({f"{k}": WIDE for k in range(5000)}), "a dict of 5000 keys"),
    ("copies", of_bytes(copied(), "a.pkl"), "calls that copy more bytes"),
    ("short", with_fid(mu=numbers("f8", (1 << 30,), b"short")), "in 5 bytes"),
    ("nan", with_fid(mu=np.array([np.nan, 0])), "mu has values that are infinite, NaN"),
    ("infinite", with_fid(sigma=EYE * np.inf), "sigma has values that are infinite"),
    ("complex", with_fid(mu=np.zeros(2, complex)), "a numpy array of an unknown type"),
    ("wide", with_fid(mu=np.zeros(3)), "statistics of another net"),
    ("list", with_fid(sigma=[1.0]), "has no mu and sigma"),
    ("indefinite", with_fid(sigma=np.array([[1.0, 5], [5, 1]])), "negative variance"),
]:
    attack(f"pickle-{_name}", "reference", _make, "reference=", "a.pkl", *_parts)
attack("pipe", "script", fifo("a.pt"), "a.pt")

# ---- models of diffusers -----------------------------------------------------------------------


def unet_of(spoil: Callable[[Path], object] = bool, **changes: object):
    """Return a maker of a folder of the network of init_from, its config changed."""

    def make(folder: Path) -> Path:
        checkpoint.build(SMALL).net.net.unet.save_pretrained(folder / "u")
        plain = json.loads((folder / "u" / "config.json").read_text()) | changes
        (folder / "u" / "config.json").write_text(json.dumps(plain))
        spoil(folder / "u")
        return folder / "u"

    return make


def nan_unet(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"][0] = float("nan")
    save_file(state, path, {"format": "pt"})


UNET = "diffusion_pytorch_model.safetensors"
for _name, _make, *_parts in [
    ("wide", unet_of(block_out_channels=[1 << 16]), "there and"),
    ("layers", unet_of(layers_per_block=10**9), "it asks for far more than our"),
    ("overflow", unet_of(block_out_channels=[1 << 62]), "is no UNet2DModel ("),
    ("odd", unet_of(block_out_channels="eight"), "is no UNet2DModel ("),
    ("deep", unet_of(config_json("[" * 200_000 + '"UNet2DModel"')), "is no UNet2DModel ("),
    ("nan", unet_of(nan_unet), "conv_in.weight holds NaN"),
    ("cut", unet_of(lambda m: os.truncate(m / UNET, 1000)), "cannot be read as safetensors"),
    ("pipe", unet_of(pipe_for(UNET)), PIPE),
]:
    attack(_name, "diffusers", _make, "init=", *_parts)
