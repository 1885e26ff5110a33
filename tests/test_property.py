"""Properties that hold for all inputs (hypothesis): words of the config, bytes of images."""

import dataclasses
import io
import math
import string
from typing import get_args, get_origin, get_type_hints

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from omegaconf import OmegaConf
from PIL import Image

from genmodels import config, images
from genmodels.config.words import parse_value, split_words
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = [str, int, float, bool, list[int], list[float], list[str]]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@QUICK
@given(TEXT, st.sampled_from(KINDS))
def test_any_text_is_a_value_of_the_type_or_one_line(text, kind):
    try:
        value = parse_value("a.b", text, kind)
    except ValueError as error:
        assert str(error).startswith("a.b=") and ": " in str(error)
        return
    if get_origin(kind) is list:
        assert isinstance(value, list) and all(type(v) is get_args(kind)[0] for v in value)
    else:
        assert type(value) is kind


@QUICK
@given(st.one_of(st.integers(), st.floats(), st.booleans()))
def test_a_printed_number_reads_back_as_itself(value):
    read = parse_value("a", str(value), type(value))
    assert read == value or (math.isnan(read) and math.isnan(value))


@QUICK
@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_a_printed_list_reads_back_as_itself(values):
    for text in (str(values), ",".join(map(str, values))):
        assert parse_value("a", text, list[float]) == values


@QUICK
@given(st.lists(TEXT))
def test_every_command_line_is_sorted_without_loss(argv):
    argv = [word.replace("~", "-") for word in argv]  # which may stand for the home of the user
    try:
        positionals, words, flags = split_words(argv)
    except ValueError as error:
        assert str(error).endswith("too; leave one out")  # two values of one key
        return
    assert len(positionals) + len(flags) + len(words) <= len(argv)
    kept = {*positionals, *flags, *(f"{key}={text}" for key, text in words.items())}
    assert kept <= set(argv)
    later = {word.partition("=")[0] for word in argv} - {w.partition("=")[0] for w in kept}
    assert not later  # only an earlier value of a key given twice is dropped


@QUICK
@given(TEXT)
def test_a_duration_is_seconds_or_one_line(text):
    try:
        assert config.seconds(text) >= 0
    except ValueError as error:
        assert str(error).startswith(f"trainer.max_time={text}: write 90s")


@QUICK
@given(st.dictionaries(st.sampled_from("smhd"), st.integers(0, 10**6), min_size=1, max_size=1))
def test_durations_in_units(parts):
    ((unit, number),) = parts.items()
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert config.seconds(f"{number}{unit}") == number * scale


WORDS = st.text(string.ascii_letters + string.digits + "._=[],-+:$ {}", max_size=16)


@QUICK
@given(st.lists(st.tuples(WORDS, WORDS), max_size=3))
def test_any_override_gives_a_config_or_one_line(pairs):
    base = {"method": {"name": "edm"}, "network": {"name": "unet"}}
    overrides = [f"{key}={text}" for key, text in pairs]
    try:
        cfg = config.load_config([base], overrides, methods=METHODS, networks=NETWORKS)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(cfg, config.Config)


def settable(cls, prefix=""):
    """Yield (key, type) of the shared schema."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from settable(kind, f"{prefix}{item.name}.")
        elif kind in KINDS:
            yield f"{prefix}{item.name}", kind


VALUES = {
    int: st.integers(-5, 10**6),
    float: st.floats(-2, 1e6),
    bool: st.booleans(),
    str: WORDS,
    list[int]: st.lists(st.integers(0, 64), max_size=3),
    list[float]: st.lists(st.floats(0, 1), max_size=3),
    list[str]: st.lists(st.sampled_from(["csv", "fd", "x"]), max_size=2),
}


@settings(QUICK, max_examples=20)
@given(st.data())
def test_every_key_set_by_word_and_by_yaml_is_the_same(data):
    """What a word sets is what the same value in a file sets, and it survives a round trip."""
    key, kind = data.draw(st.sampled_from(list(settable(config.Config))))
    value = data.draw(VALUES[kind])
    base = {"method": {"name": "edm"}, "network": {"name": "unet"}}
    nested = OmegaConf.create(base)
    results = []
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    OmegaConf.update(nested, key, value)
    nested = OmegaConf.to_container(nested)
    for source, words in ((base, [f"{key}={text}"]), (nested, [])):
        try:
            cfg = config.load_config([source], words, methods=METHODS, networks=NETWORKS)
            results.append(config.to_plain(cfg))
            again = config.load_config([results[-1]], methods=METHODS, networks=NETWORKS)
            assert config.to_plain(again) == results[-1]
        except ValueError as error:
            assert "\n" not in str(error)
            results.append("refused")
    assert results[0] == results[1]


PIXELS = st.tuples(
    st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)
).flatmap(lambda shape: arrays(np.uint8, shape))


@QUICK
@given(PIXELS)
def test_bytes_to_floats_and_back_are_the_same_bytes(pixels):
    pixels = torch.from_numpy(pixels)
    x = images.from_uint8(pixels)
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert torch.equal(images.to_uint8(x), pixels)
    assert torch.equal(images.to_uint8(x.double()), pixels)


@QUICK
@given(arrays(np.float32, 20, elements=st.floats(-3, 3, width=32)))
def test_floats_to_bytes_are_clipped_and_in_order(values):
    levels = images.to_uint8(torch.from_numpy(np.sort(values))).int()
    assert (levels.diff() >= 0).all()
    inside = np.abs(np.sort(values)) <= 1
    back = images.from_uint8(levels.to(torch.uint8)).numpy()
    assert np.abs(back - np.sort(values))[inside].max(initial=0) <= 0.5 / 127.5 + 1e-6


@QUICK
@given(PIXELS)
def test_pictures_survive_png_npz_and_npy(tmp_path, pixels):
    tensor = torch.from_numpy(pixels)
    for image in tensor:
        assert torch.equal(images.read_image(io.BytesIO(images.png_bytes(image))), image)
    nhwc = pixels.transpose(0, 2, 3, 1)
    images.write_npz(tmp_path / "a.npz", images=nhwc)
    np.save(tmp_path / "a.npy", nhwc)
    for name in ("a.npz", "a.npy"):
        assert torch.equal(images.read_images(tmp_path / name), tensor)


@QUICK
@given(
    st.binary(max_size=200), st.sampled_from(["a.png", "a.jpg", "a.tif", "a.npz", "a.npy", "a.zip"])
)
def test_any_bytes_are_pictures_or_one_line(tmp_path, blob, name):
    (tmp_path / name).write_bytes(blob)
    reader = images.read_images if name.endswith(("npz", "npy", "zip")) else images.read_image
    try:
        read = reader(tmp_path / name)
        assert read.dtype == torch.uint8
    except ValueError as error:
        assert str(tmp_path / name) in str(error)


@QUICK
@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]))
def test_a_picture_with_one_wrong_byte_is_read_or_one_line(where, value, kind):
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 8, 8), dtype=np.uint8))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, kind)
    blob = bytearray(buffer.getvalue())
    blob[where % len(blob)] = value
    try:
        assert images.read_image(io.BytesIO(blob), 3, "a").shape[0] == 3
    except ValueError as error:
        assert str(error).startswith("image=a: ")


@QUICK
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(2, 20), st.sampled_from(["center", "adm"])
)
def test_any_picture_fits_any_side(height, width, side, crop):
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    made = images.fit(image, side, crop)
    assert made.shape == (3, side, side) and made.unique().tolist() == [77]
