"""Hostile pickles. A payload that runs sets OWNED in the environment."""

import io
import os
import pickle
import struct

import pytest
import torch

from genmodels.checkpoint.inert_pickle import load_pickle
from tests.helpers.edm_reference import released, write


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
