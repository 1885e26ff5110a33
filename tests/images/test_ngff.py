"""Stacks in Zarr: written by the package zarr, read and written back by ours, and read by it."""

import json

import numpy as np
import pytest
from torch import nn

import genmodels
import sample
from genmodels import checkpoint
from genmodels.config import DataConfig, NoiseConfig
from genmodels.data.patches import NoisyDataModule
from genmodels.images import pictures
from tests.helpers.paths import ROOT

zarr = pytest.importorskip("zarr")

AXES = [
    {"name": name, "type": kind} for name, kind in zip("tczyx", ["time", "channel"] + ["space"] * 3)
]
SCALE = {"type": "scale", "scale": [1.0, 1.0, 0.5, 0.1, 0.1]}


def multiscales(levels=1, axes=AXES):
    datasets = [{"path": f"{k}", "coordinateTransformations": [SCALE]} for k in range(levels)]
    return [{"name": "cells", "axes": axes, "datasets": datasets}]


def stack(*shape, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(dtype)


def write_ome(path, values, version, levels=1, **options):
    """Write OME-NGFF 0.5 (Zarr 3) or 0.4 (Zarr 2)."""
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    said = {"multiscales": multiscales(levels), "omero": {"channels": [{"color": "00FF00"}]}}
    said["version"] = "0.5" if version == 3 else "0.4"
    group.attrs.update({"ome": said} if version == 3 else said)
    if version == 3:
        options["dimension_names"] = list("tczyx")
    for k in range(levels):
        part = values[..., :: 2**k, :: 2**k]
        made = group.create_array(str(k), shape=part.shape, dtype=part.dtype, **options)
        made[:] = part
    return path


def opened(path, **options):
    (reader,) = pictures.find_pictures(path, any_scale=True, **options).values()
    return reader()


def rewritten(path, out, **options):
    """Write each plane plus one as a new stack; return zarr's array of it and its group."""
    found = opened(path, **options)
    found.write(out, (found.plane(k).astype(np.float64) + 1 for k in range(len(found))))
    made = zarr.open(str(out), mode="r")
    return (made, None) if isinstance(made, zarr.Array) else (made["0"], made)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "i2", "f4"])
def test_ome_comes_back_as_it_was(tmp_path, version, dtype):
    values = (stack(2, 3, 4, 10, 12) // 16).astype(np.dtype(dtype).newbyteorder("="))  # up to 249
    options = {"chunks": (1, 1, 3, 8, 8), "fill_value": 0}
    if version == 2:
        values = values.astype(dtype)
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    elif dtype == ">u2":
        options["serializer"] = zarr.codecs.BytesCodec(endian="big")
    source = write_ome(tmp_path / "a.ome.zarr", values, version, levels=2, **options)
    found = opened(source)
    assert found.name == "a.ome.zarr" and len(found) == 24 and found.channels == 3
    assert found.label(0) == "[t0,c0,z0]" and found.label(23) == "[t1,c2,z3]"
    assert found.channel(23) == 2 and found.position(23) == (1, 3)
    assert np.array_equal(found.plane(7)[..., 0], values[0, 1, 3])
    assert found.notes == ["holds smaller copies of its pictures, which are left out"]
    made, group = rewritten(source, tmp_path / "out" / "b.zarr")
    before = zarr.open(str(source), mode="r")
    assert np.array_equal(made[:], values + 1) and made.dtype == before["0"].dtype
    assert made.metadata.zarr_format == version and made.chunks == (1, 1, 1, 8, 8)
    assert made.compressors == before["0"].compressors and made.fill_value == 0
    assert (
        made.metadata.chunk_key_encoding == before["0"].metadata.chunk_key_encoding
        if (version == 3)
        else made.metadata.dimension_separator == "/"
    )
    if version == 3:
        assert made.metadata.dimension_names == before["0"].metadata.dimension_names
        assert made.serializer == before["0"].serializer
    said, old = (each.attrs.asdict() for each in (group, before))
    said, old = said.get("ome", said), old.get("ome", old)
    assert said["multiscales"][0].pop("datasets") == old["multiscales"][0].pop("datasets")[:1]
    assert said == old
    assert sorted(group.keys()) == ["0"] and not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_by_itself_has_its_axes(tmp_path, version):
    values = stack(5, 2, 9, 11)
    made = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=values.shape, dtype=values.dtype, zarr_format=version
    )
    made[:] = values
    with pytest.raises(ValueError, match="has 4 dimensions, without names; name them by axes="):
        opened(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="axes=TYX must name as many, each by a capital"):
        opened(tmp_path / "a.zarr", axes="TYX")
    array, _ = rewritten(tmp_path / "a.zarr", tmp_path / "b.zarr", axes="TCYX")
    assert np.array_equal(array[:], values + 1)
    again = opened(tmp_path / "b.zarr")  # the names that were told are kept
    assert again.channels == 2 and again.label(9) == "[t4,c1]"
    array, _ = rewritten(tmp_path / "b.zarr", tmp_path / "b.zarr")  # in its own place
    assert np.array_equal(array[:], values + 2)
    plain = zarr.create_array(
        str(tmp_path / "c.zarr"), shape=(9, 11), dtype="f8", zarr_format=version
    )
    plain[:] = values[0, 0] + 0.25
    array, _ = rewritten(tmp_path / "c.zarr", tmp_path / "d.zarr")
    assert np.array_equal(array[:], values[0, 0] + 1.25) and array.dtype == np.float64


def edit(path, change):
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def pickled(path):
    edit(path / "0" / ".zarray", lambda told: told.update(filters=[{"id": "pickle"}]))


def pickled_three(path):
    edit(path / "0" / "zarr.json", lambda told: told["codecs"].append({"name": "numcodecs.pickle"}))


def linked(path):
    (path / "0" / "link").symlink_to(path / "zarr.json")


def linked_folder(path):
    (path / "0" / "link").symlink_to(path)


def outside(path):
    def change(told):
        told["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = "../b.zarr/0"

    edit(path / "zarr.json", change)


def unnamed(path):
    edit(path / "zarr.json", lambda told: told["attributes"]["ome"].pop("multiscales"))


def huge(path):
    edit(path / "0" / "zarr.json", lambda told: told.update(shape=[1, 1, 1, 10**6, 10**6]))


def cut_off(path):
    (path / "zarr.json").write_text((path / "zarr.json").read_text()[:-9])


@pytest.mark.parametrize(
    ("version", "harm", "message"),
    [
        (2, pickled, "packed by pickle, which is not read"),
        (3, pickled_three, "packed by numcodecs.pickle, which is not read"),
        (3, linked, "is no plain file"),
        (3, linked_folder, "is no plain file"),
        (3, outside, r"its picture lies at \.\./b.zarr/0"),
        (3, unnamed, "it is no array and holds no OME-NGFF picture"),
        (3, huge, "its planes of 1000000 x 1000000 pixels are too large"),
        (3, cut_off, "cannot be read"),
    ],
)
def test_what_is_not_read_is_one_line(tmp_path, version, harm, message):
    path = write_ome(tmp_path / "a.zarr", stack(1, 1, 1, 9, 9), version)
    harm(path)
    with pytest.raises(ValueError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value) and str(error.value).startswith("denoise=a.zarr: ")


def test_paths_that_are_no_zarr_are_one_line(tmp_path):
    group = zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with pytest.raises(ValueError, match=r"multiscales\)\); make it again"):
        opened(tmp_path / "group.zarr")
    group.create_array("first", shape=(2, 9, 9), dtype="u2")
    with pytest.raises(ValueError, match="but arrays: name one, group.zarr/first say"):
        opened(tmp_path / "group.zarr")
    assert len(opened(tmp_path / "group.zarr/first")) == 2
    with pytest.raises(ValueError, match="is a part of a Zarr folder; name .*group.zarr$"):
        opened(tmp_path / "group.zarr/zarr.json")


def test_a_broken_chunk_and_pixels_that_are_no_numbers_are_named(tmp_path):
    values = stack(1, 1, 2, 9, 9, dtype=np.float32)
    values[0, 0, 1, 3, 3] = np.nan
    path = write_ome(tmp_path / "a.zarr", values, 3, chunks=(1, 1, 1, 9, 9))
    found = opened(path)
    with pytest.raises(ValueError, match=r"a.zarr\[t0,c0,z1\]: holds NaN or infinite pixels"):
        found.plane(1)
    (path / "0" / "c" / "0" / "0" / "0" / "0" / "0").write_bytes(b"\x28\xb5\x2f\xfdbroken")
    with pytest.raises(ValueError, match=r"a.zarr\[t0,c0,z0\]: cannot be read"):
        found.plane(0)


def test_it_is_restored_and_learned_from(tmp_path, capsys):
    words = ["data.patch=16", "network.channels=[4]", "network.blocks=[1]"]
    model = genmodels.build(str(ROOT / "configs/noise2score_bsd400.yaml"), *words).eval()
    nn.init.normal_(model.net.exit.weight, std=0.05)
    run = checkpoint.write_export(model, tmp_path / "model", "card")
    rng = np.random.default_rng(0)
    values = rng.normal(1000, 30, (3, 2, 1, 40, 44)) * np.array([1, 2])[:, None, None, None]
    write_ome(tmp_path / "in" / "a.ome.zarr", values.round().astype(np.uint16), 3)
    words = [str(run), f"denoise={tmp_path}/in", "law=gaussian"]
    assert sample.main([*words, f"out={tmp_path}/out"]) == 0
    restored = zarr.open(str(tmp_path / "out" / "a.ome.zarr"), mode="r")["0"]
    assert restored.dtype == np.uint16 and restored.shape == values.shape
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert not np.array_equal(restored[:], values)
    assert sample.main([*words, f"out={tmp_path}/out"]) == 0  # again, in its place
    one = [str(run), f"denoise={tmp_path}/in/a.ome.zarr", f"out={tmp_path}/in"]
    capsys.readouterr()
    assert sample.main(one) == 2 and "is the folder of the noisy picture" in capsys.readouterr().err
    noise = NoiseConfig(law="gaussian", level=0.0, copies="given", scale="quantiles")
    options = {"name": "imagefolder", "root": f"{tmp_path}/in", "channels": 1, "patch": 16}
    data = NoisyDataModule(DataConfig(**options, holdout=0.3, noise=noise))
    assert len(data.cfg.noise.black) == 2 and len(data.numbers["test"]) == 2
    assert data.levels[0] == pytest.approx(data.levels[1], rel=0.2)
