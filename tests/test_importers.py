import io
import os
import pickle
import pickletools
import struct

import edm_reference as reference
import numpy as np
import pytest
import torch

import sample
from genmodels import checkpoint, cli
from genmodels.importers import convert, load_released, main, read_released, state_from_released
from genmodels.inert_pickle import Record, load_pickle
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig

KINDS = ["ddpmpp", "ncsnpp", "adm"]
PRECONDS = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]


def released(kind, precond="EDMPrecond", **more):
    """(cfg, weights, bytes of the pickle) of a small released network with random weights."""
    cfg = dict(kind=kind, size=16, channels=64 if kind == "adm" else 16, multipliers=[1, 2])
    cfg.update(blocks=2, attention=[8], classes=4, augment=kind != "adm")
    cfg["outputs"] = 6 if precond == "iDDPMPrecond" else 3  # the noise and a variance
    weights = reference.Weights()
    forward = reference.dhariwal if kind == "adm" else reference.song
    with torch.no_grad():
        forward(weights, cfg, torch.zeros(1, 3, 16, 16), torch.zeros(1))
    constants = {
        "VPPrecond": dict(beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5),
        "VEPrecond": dict(sigma_min=0.02, sigma_max=100),
        "iDDPMPrecond": dict(C_1=0.001, C_2=0.008, M=1000, u=torch.tensor(reference.iddpm_table())),
    }
    attributes = {**constants.get(precond, {}), **more}
    return cfg, weights, reference.released_pickle(weights, cfg, precond, **attributes)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return released(request.param)


def write(tmp_path, data):
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    return path


def test_spec_is_read_off_the_tensors(model, tmp_path):
    cfg, weights, data = model
    spec, tensors = read_released(write(tmp_path, data))
    expected = {name: cfg[name] for name in ("kind", "channels", "multipliers", "blocks")}
    expected.update(attention=[8], augment=cfg["augment"], dropout=0.13, name="edm_unet")
    assert spec["network"] == expected
    assert (spec["shape"], spec["classes"]) == ([3, 16, 16], 4)
    assert spec["method"] == {"precond": "edm", "sigma_data": 0.5, "label_dropout": 0.2}
    assert set(tensors) == set(weights)


SIGMAS = torch.tensor([0.03, 0.5, 3.0, 70.0])


@pytest.mark.parametrize("precond", PRECONDS)
def test_same_denoiser(model, precond, tmp_path):
    """The converted folder, loaded, against the description evaluated in float64."""
    kind = model[0]["kind"]
    cfg, weights, data = released(kind, precond)
    out = convert(write(tmp_path, data), tmp_path / "export")
    own = checkpoint.load(out)
    assert own.cfg.method.precond == read_released(tmp_path / "network.pkl")[0]["method"]["precond"]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x, labels = x * (1 + SIGMAS.reshape(-1, 1, 1, 1)), torch.tensor([2, 0, -1, 3])
    sigma = own.net.known_sigma(SIGMAS)
    truth = reference.denoiser(weights, cfg, precond)
    with torch.no_grad():
        for k in range(4):
            one = slice(k, k + 1)
            expected = truth(x[one].double(), float(sigma[k]), labels[one])
            difference = own.denoise(x[one], sigma[one], labels[one]) - expected
            # Where c_out = sigma the network's rounding is magnified by it.
            scale = 1 if precond == "EDMPrecond" else max(1, float(sigma[k]))
            assert difference.abs().max() < tolerance(precond, kind) * scale


def tolerance(precond, kind):
    """1e-5; more where c_noise <= 999 is rounded to 3e-5, and features with a factor 16 see it."""
    if precond in ("EDMPrecond", "VEPrecond"):
        return 1e-5
    return 1e-2 if kind == "ncsnpp" else 3e-5


@pytest.mark.parametrize("options", [{}, dict(churn=20.0, low=0.05, high=50.0, noise=1.003)])
def test_same_images(model, options, tmp_path):
    """sample.py on the converted folder against the released generator, byte by byte."""
    cfg, weights, data = model
    argv = [str(write(tmp_path, data)), f"out={tmp_path / 'export'}"]
    assert cli.run(main, argv) == 0
    expected, _ = reference.released_images(weights, cfg, "EDMPrecond", [0, 7, 2**33], 5, **options)
    names = dict(churn="churn", low="churn_min", high="churn_max", noise="churn_noise")
    words = [f"{names[key]}={value}" for key, value in options.items()]
    words += ["seeds=0,7,8589934592", "steps=5", "format=npz", "batch=2", "device=cpu"]
    assert sample.main([str(tmp_path / "export"), f"out={tmp_path / 'out'}", *words]) == 0
    images = np.load(tmp_path / "out" / "images.npz")["images"]
    assert images.std() > 20  # not all black or white
    distance = np.abs(images.astype(int) - expected.astype(int))
    assert (distance <= 1).mean() >= 0.999


@pytest.mark.parametrize("precond", PRECONDS[1:])
def test_same_images_with_the_older_preconditionings(precond, tmp_path):
    cfg, weights, data = released("ddpmpp", precond)
    own = load_released(write(tmp_path, data))
    more = dict(churn=20.0, low=0.05, high=50.0)
    # Before they become bytes: random weights drive nearly all of those to 0 or 255.
    expected, _ = reference.released_states(weights, cfg, precond, [3, 4], 5, **more)
    images = own.sample([3, 4], steps=5, churn=20.0, churn_min=0.05, churn_max=50.0)
    error = (images - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, error


def test_the_table_of_noise_levels_is_the_file_s(tmp_path):
    table = torch.tensor(reference.iddpm_table()) * 1.0001
    *_, data = released("ddpmpp", "iDDPMPrecond", u=table)
    own = load_released(write(tmp_path, data))
    assert torch.equal(own.net.levels, table[:-1])


def test_constants_that_differ_are_refused(tmp_path):
    for name, right, wrong in (("beta_d", "19.9", 18.0), ("epsilon_t", "1e-05", 1e-3)):
        *_, data = released("ddpmpp", "VPPrecond", **{name: wrong})
        with pytest.raises(ValueError, match=f"{name} must be {right}, found {wrong}"):
            read_released(write(tmp_path, data))


@pytest.mark.parametrize("kind, taps", [("ddpmpp", [1, 3, 3, 1]), ("ncsnpp", [1, 1])])
def test_resampling_filters_of_another_kind_are_refused(kind, taps, tmp_path):
    *_, data = released(kind, taps=taps)
    with pytest.raises(ValueError, match=f"resample_filter must be the filter .* of {kind}"):
        read_released(write(tmp_path, data))


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    path = write(tmp_path, b"no pickle")
    assert cli.run(main, [str(path), f"out={tmp_path / 'x'}"]) == 2
    assert "is not a released EDM pickle" in capsys.readouterr().err
    assert cli.run(main, [str(path)]) == 2
    assert cli.run(main, [str(tmp_path / "missing.pkl"), f"out={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(model, change):
    cfg, weights, _ = model
    net = EDMUNet(EDMUNetConfig(**small_config(cfg)), (3, 16, 16), 4)
    tensors = dict(weights)
    if change == "missing":
        del tensors["enc.16x16_block0.conv0.weight"]
    elif change == "extra":
        tensors["enc.16x16_block7.conv0.weight"] = torch.zeros(1)
    else:
        tensors["enc.16x16_block0.conv0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="enc.16x16_block[07].conv0.weight"):
        state_from_released(net, tensors, 16)


def small_config(cfg):
    return {
        k: cfg[k] for k in ("kind", "channels", "multipliers", "blocks", "attention", "augment")
    }


# ------------------------------------------------------------------------------------------------
# Hostile files. A payload that runs sets OWNED in the environment.


class Call:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attack(function, *arguments):
    return pickle.dumps({"ema": Call(function, *arguments)}, protocol=4)


def os_system():
    return attack(os.system, "false")


def environment():
    return attack(os.putenv, "OWNED", "1")


def evaluated():
    return attack(eval, "__import__('os').environ.update(OWNED='1')")


def imported():
    return attack(__import__, "os")


def nested_in_a_storage():
    """A torch.save payload where a tensor's bytes should be: the trap of a plain whitelist."""
    inner = io.BytesIO()
    payload = Call(exec, "import os; os.environ['OWNED'] = '1'")
    torch.save(payload, inner, _use_new_zipfile_serialization=False)
    return attack(torch.storage._load_from_bytes, inner.getvalue())


def nested_pickle():
    inner = pickle.dumps(Call(exec, "import os; os.environ['OWNED'] = '1'"))
    return attack(pickle.loads, inner)


def another_torch_function():
    return attack(torch.load, "/dev/null")


def old_style_global():
    return b"cos\nsystem\n(S'false'\ntR."


def old_style_instance():
    return b"(S'false'\nios\nsystem\n."


def persistent_id():
    return b"Pevil\n."


def dotted_name():
    """STACK_GLOBAL with a path through an allowed module."""
    return b"\x80\x04\x8c\x0bcollections\x8c\x0c_sys.modules\x93."


def truncated():
    return released("ddpmpp")[2][:-5000]


def empty():
    return b""


def not_a_pickle():
    return b"PK\x03\x04 this is a zip archive"


def absurd_length():
    """BINBYTES8 that announces 2^60 bytes."""
    return b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc."


def absurd_memo():
    """LONG_BINPUT at index 2^32 - 1, for which the C unpickler would grow its table to 64 GB."""
    return b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"."


def storage(count=4):
    inner = io.BytesIO()
    typed = torch.arange(float(count)).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=typed, dtype=torch.float32, _internal=True)
    torch.save(typed, inner, _use_new_zipfile_serialization=False)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


def tensor_beyond_its_storage():
    return attack(torch._utils._rebuild_tensor_v2, storage(), 1, (4,), (1,), False, None)


def tensor_of_a_trillion_equal_elements():
    return attack(torch._utils._rebuild_tensor_v2, storage(), 0, (10**12,), (0,), False, None)


def tensor_with_negative_stride():
    return attack(torch._utils._rebuild_tensor_v2, storage(), 3, (4,), (-1,), False, None)


def storage_that_announces_too_much():
    data = storage(4).call[1][0]
    ending = b"K\x04Nt"  # BININT1 4, NONE, TUPLE: the number of elements, no view
    assert data.count(ending) == 1
    huge = data.replace(ending, b"\x8a\x06" + (2**46).to_bytes(6, "little") + b"Nt")
    return attack(torch.storage._load_from_bytes, huge)


def changes_an_allowed_function():
    """BUILD with a slot state, which sets attributes on the object it is pointed at."""
    state = b"N}\x8c\x09_functionNs\x86b."
    return b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93" + state


def changes_an_allowed_class():
    state = b"N}\x8c\x05itemsNs\x86b."
    return b"\x80\x04\x8c\x0bdnnlib.util\x8c\x08EasyDict\x93" + state


def call_in_a_storage():
    """bytearray(n) where the magic number should be: allowed by weights_only, and n is free."""
    inner = b"\x80\x02\x8c\x08builtins\x8c\x09bytearray\x93J\x00\x00\x00\x10\x85R."
    return attack(torch.storage._load_from_bytes, inner)


def zip_in_a_storage():
    inner = io.BytesIO()
    torch.save(torch.zeros(3).untyped_storage(), inner)
    return attack(torch.storage._load_from_bytes, inner.getvalue())


def tensor_with_a_state():
    """BUILD on a tensor, which torch would answer by set_() on any storage and size."""
    tensor = pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, storage(), 0, (4,), (1,), False, {})
    )
    return tensor[:-1] + b"(K\x00K\x00K\x00K\x00tb."


def empty_tensor():
    arguments = (storage(), 0, (2**18, 0), (1, 1), False, None)
    return attack(torch._utils._rebuild_tensor_v2, *arguments)


def deep_key():
    return b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns."


def endless_key():
    return b"\x80\x04}K\x01" + b"2\x86" * 60 + b"Ns."


def deep_member():
    return b"\x80\x04\x8f()" + b"\x85" * 1_000_000 + b"\x90."


HOSTILE = {
    os_system: r"posix\.system|nt\.system",
    environment: r"posix\.putenv",
    evaluated: r"builtins\.eval",
    imported: r"builtins\.__import__",
    nested_in_a_storage: "in a tensor's storage, a call of (builtins|__builtin__) exec",
    call_in_a_storage: "in a tensor's storage, a call of something",
    zip_in_a_storage: "a zip in the place of a storage",
    tensor_with_a_state: "a tensor with a state",
    empty_tensor: r"an empty tensor, of size \(262144, 0\)",
    deep_key: "a tuple as a key",
    endless_key: "a tuple as a key",
    deep_member: "a tuple as a key",
    nested_pickle: "_pickle.loads",
    another_torch_function: "torch.serialization.load",
    old_style_global: r"os\.system",
    old_style_instance: "INST",
    persistent_id: "PERSID",
    dotted_name: "collections._sys.modules",
    truncated: "expected .* bytes|exhausted|truncated",
    empty: "no data",
    not_a_pickle: "opcode|newline",
    absurd_length: "expected .* bytes",
    absurd_memo: "memo index 4294967295",
    tensor_beyond_its_storage: r"size \(4,\) in 4 stored elements",
    tensor_of_a_trillion_equal_elements: "1000000000000",
    tensor_with_negative_stride: "impossible size or stride",
    storage_that_announces_too_much: "storage|elements|size|memory",
    changes_an_allowed_function: "change a function's _function",
    changes_an_allowed_class: "_Dict",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_files_are_refused_and_named(make, tmp_path, monkeypatch):
    monkeypatch.delenv("OWNED", raising=False)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(ValueError, match=HOSTILE[make]) as raised:
        load_pickle(write(tmp_path, make()))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert "OWNED" not in os.environ
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_plain_whitelist_would_have_run_the_nested_payload(monkeypatch):
    """The reason for _storage: the same file through torch's own function executes the code."""
    monkeypatch.delenv("OWNED", raising=False)
    monkeypatch.setenv("OWNED", "0")
    pickle.loads(nested_in_a_storage())
    assert os.environ["OWNED"] == "1"


def test_embedded_sources_are_skipped_and_unknown_classes_named(model, tmp_path):
    *_, data = model
    assert b"raise SystemExit" in data  # it would end the process if it were run
    content = load_pickle(write(tmp_path, data))
    assert isinstance(content["loss_fn"], Record) and content["loss_fn"].state["P_mean"] == -1.2
    assert content["dataset_kwargs"]["path"] == "x.zip"
    with pytest.raises(ValueError, match="'loss_fn' must be one of EDMPrecond.*found .EDMLoss"):
        read_released(write(tmp_path, data), key="loss_fn")
    with pytest.raises(ValueError, match="found NoneType"):
        read_released(write(tmp_path, data), key="augment_pipe")


def test_modules_that_contain_themselves_are_refused(tmp_path):
    net = reference.persistent("EDMPrecond", sigma_data=0.5)
    net._modules["model"] = model = reference.persistent("SongUNet")
    shared = reference.persistent("UNetBlock")
    model._modules.update(a=shared, b=shared)
    with pytest.raises(ValueError, match="occurs twice"):
        read_released(write(tmp_path, reference.dumps({"ema": net})))


def test_every_single_byte_change_is_refused_or_harmless(tmp_path):
    """Flip bytes outside the tensors: never anything but a result or a one-line ValueError."""
    data = bytearray(released("ddpmpp")[2])
    arrays = set()
    for _, argument, position in pickletools.genops(bytes(data)):
        if isinstance(argument, bytes) and len(argument) > 100:
            arrays.update(range(position, position + len(argument)))
    places = [place for place in range(len(data)) if place not in arrays]
    generator = torch.Generator().manual_seed(0)
    for choice in torch.randint(len(places), (150,), generator=generator).tolist():
        changed = bytearray(data)
        changed[places[choice]] ^= 1 << (choice % 8)
        try:
            read_released(write(tmp_path, bytes(changed)))
        except ValueError:
            pass
