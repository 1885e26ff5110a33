"""Read a released EDM pickle as data: whatever code it holds or calls is never run.

A released file is a pickle of {ema, loss_fn, augment_pipe, dataset_kwargs}. Every network module
in it is a call of torch_utils.persistence._reconstruct_persistent_obj with a dict that holds a
class name, that class's source code (which the original loader runs) and the module's __dict__.
Here that call makes an inert `Record`; tensors and plain containers are read; any other name is
refused. Each of the few allowed names is answered by a function or class of this file that stores
data and does nothing else. They are frozen, because pickle's BUILD opcode sets attributes on
whatever object a file points it at.
"""

import io
import math
import mmap
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from genmodels.foreign import check_key, open_plain


class _Frozen(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to change {cls.__name__}.{name}")


class Record(metaclass=_Frozen):
    """What the file says about one object: its class name and its attributes; no behaviour."""

    __slots__ = ("name", "state")
    name: str
    state: dict[Any, Any]

    def __new__(cls, name: Any = "", state: Any = None) -> "Record":
        """Return a record; a __new__, since pickle may call it without __init__."""
        record = super().__new__(cls)
        record.name = name if isinstance(name, str) else "a module without a name"
        record.__setstate__({} if state is None else state)
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of a module is a {type(state).__name__}")
        self.state = state


class Array(metaclass=_Frozen):
    """A tensor of the file, wrapped: BUILD on a torch.Tensor would resize or reroute it."""

    __slots__ = ("value",)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a tensor with a state")


class _Dict(dict, metaclass=_Frozen):
    """Stands in for the files' dict subclass with attribute access, and for OrderedDict."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a dict with a state")


class _DType(metaclass=_Frozen):
    """Stands in for numpy.dtype, of which the files hold a few for scalars."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Stored(NamedTuple):
    memory: torch.UntypedStorage
    dtype: torch.dtype


class _Call:
    """A function without attributes to set."""

    __slots__ = ("_function",)
    _function: Callable

    def __init__(self, function: Callable) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to change a function's {name}")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _persistent(meta: Any) -> Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise pickle.UnpicklingError("a module of an unknown form")
    return Record(meta.get("class_name"), meta["state"])


def _storage(data: bytes) -> _Stored:
    # Not a whitelist entry for torch.storage._load_from_bytes itself: that function unpickles
    # its argument without restrictions, so a nested payload would run.
    # The restricted load calls things as well (bytearray, for one) and inflates zips: the released
    # storages are five plain pickles and their bytes, so anything more is refused before it.
    if data[:2] == b"PK":
        raise pickle.UnpicklingError("a zip in the place of a storage")
    stream = io.BytesIO(data)
    called: Any = "something"
    for _ in range(5):  # magic number, version, machine, storage, its key
        for opcode, argument, _ in pickletools.genops(stream):
            called = argument if opcode.name == "GLOBAL" else called
            if opcode.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "INST", "OBJ"):
                raise pickle.UnpicklingError(f"in a tensor's storage, a call of {called}")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # a page of advice around one line of substance
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise pickle.UnpicklingError(f"in a tensor's storage, {reason.strip()[:100]}") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a {type(storage).__name__} in the place of a storage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TypedStorage
        if storage.nbytes() > len(data):
            raise pickle.UnpicklingError(f"a storage of {storage.nbytes()} in {len(data)} bytes")
        return _Stored(storage.untyped(), storage.dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Array:
    if not isinstance(storage, _Stored):
        raise pickle.UnpicklingError(f"a tensor made of a {type(storage).__name__}")
    size, stride = tuple(size), tuple(stride)
    whole = all(type(n) is int and 0 <= n <= 2**40 for n in (offset, *size, *stride))
    if 0 in size:
        raise pickle.UnpicklingError(f"an empty tensor, of size {size}")
    if not whole or len(size) != len(stride) or len(size) > 8:
        raise pickle.UnpicklingError("a tensor of impossible size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    stored = storage.memory.nbytes() // storage.dtype.itemsize
    # The second test refuses huge tensors made of one element by stride 0.
    if last >= stored or math.prod(size) > stored:
        raise pickle.UnpicklingError(f"a tensor of size {size} in {stored} stored elements")
    return Array(torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, size, stride))


def _parameter(data: Any, *_: Any) -> Array:
    if not isinstance(data, Array):
        raise pickle.UnpicklingError(f"a parameter made of a {type(data).__name__}")
    return data


def _scalar(dtype: Any, data: bytes) -> Any:
    if not isinstance(dtype, _DType) or dtype.code not in ("f8", "f4", "i8", "i4", "b1"):
        raise pickle.UnpicklingError("a numpy scalar of an unknown type")
    return np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))[0].item()


class _Numbers(metaclass=_Frozen):
    """A numpy array of the file, which numpy itself does not build; `value` is None until then."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        self.value = _filled(data, dtype, shape, "F" if by_columns else "C")


def _filled(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _DType) or dtype.code not in ("f8", "f4", "i8", "i4"):
        raise pickle.UnpicklingError("a numpy array of an unknown type")
    if not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("a numpy array of an unknown form")
    if not all(type(n) is int and 0 <= n <= 2**40 for n in shape) or len(shape) > 8:
        raise pickle.UnpicklingError("a numpy array of impossible shape")
    kind = np.dtype(dtype.code).newbyteorder(dtype.order)
    if math.prod(shape) * kind.itemsize != len(data):
        raise pickle.UnpicklingError(f"a numpy array of shape {shape} in {len(data)} bytes")
    array = np.frombuffer(bytes(data), kind).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(kind.newbyteorder("="))


def _unbuilt(*_: Any) -> _Numbers:
    return _Numbers()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Numbers:
    return _Numbers(_filled(data, dtype, shape, order))


class _NoArray(metaclass=_Frozen):
    """Stands in for numpy.ndarray, which files name and never call."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        raise pickle.UnpicklingError("a call of numpy.ndarray")


# What arrays are made by, in files of numpy 1 and 2 and of any protocol of pickle.
_ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NoArray,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Call(lambda text, _: text.encode("latin1")),
} | {
    (f"numpy.{core}.{module}", name): answer
    for core in ("core", "_core")
    for module, name, answer in (
        ("multiarray", "_reconstruct", _Call(_unbuilt)),
        ("multiarray", "scalar", _Call(_scalar)),
        ("numeric", "_frombuffer", _Call(_from_buffer)),
    )
}

# EDM2's encoders of latents hold their scale and bias in arrays.
_ANSWERS: dict[tuple[str, str], Any] = _ARRAYS | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_persistent),
    ("torch.storage", "_load_from_bytes"): _Call(_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("collections", "OrderedDict"): _Dict,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("dnnlib.util", "EasyDict"): _Dict,
}


_InPython: Any = pickle._Unpickler  # private, and its parts untyped


class _Unpickler(_InPython):
    """Python's own unpickler in Python: keys are looked at before they are hashed.

    Hashing a tuple nested a million deep ends the process, one shared with itself never ends.
    """

    dispatch = dict(_InPython.dispatch)

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.left = 4 * len(file) + (1 << 20)  # bytes that calls may get; of text twice as many

    def load_reduce(self) -> None:
        self._count(self.stack[-1])
        super().load_reduce()

    def load_build(self) -> None:
        self._count(self.stack[-1])
        super().load_build()

    def _count(self, args: Any) -> None:
        """Refuse bytes that stand once in the file and are copied over and over."""
        if isinstance(args, tuple):
            self.left -= sum(len(a) for a in args if isinstance(a, (bytes, bytearray, str)))
        if self.left < 0:
            raise pickle.UnpicklingError("calls that copy more bytes than the file has")

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # what stands above the mark
        super().load_setitems()

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems

    answers = _ANSWERS

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.answers[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None


class _ArrayUnpickler(_Unpickler):
    answers = _ARRAYS


_MOST_KEYS = 256
_ODD_OPCODES = ("PERSID", "BINPERSID", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "DICT", "FROZENSET")


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        check_key(key)


def _scan(file: Any) -> None:
    """Walk the opcodes without building anything: lengths against the file's, no odd opcodes.

    The unpickler allocates what a length or a memo index asks for before it looks at the data.
    """
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if opcode.name in _ODD_OPCODES:
            raise pickle.UnpicklingError(f"the opcode {opcode.name} at byte {position}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise pickle.UnpicklingError(f"the memo index {argument} at byte {position}")


def load_pickle(path: Path | str) -> Any:
    """Return the top object of a released pickle, with a Record for each module in it.

    Args:
        path: the file.

    Raises:
        ValueError: the file is truncated, or holds anything but tensors, modules and plain data;
            the message says what was found. Nothing of the file has been executed.
    """
    return _loaded(path, _Unpickler, "a released EDM pickle")


def load_arrays(path: Path | str) -> Any:
    """Return the dict of a pickle: plain data, numpy arrays, and dicts of these.

    Raises:
        ValueError: as load_pickle.
    """
    try:
        return _plain(_loaded(path, _ArrayUnpickler, "a pickle of numpy arrays"))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a pickle of numpy arrays; found: {error}") from None


def _plain(thing: Any, depth: int = 0) -> Any:
    """Return a dict with arrays in place of _Numbers, two dicts deep at most."""
    if isinstance(thing, dict) and depth < 2:
        if len(thing) > _MOST_KEYS:  # one dict in many places would become many
            raise pickle.UnpicklingError(f"a dict of {len(thing)} keys")
        return {key: _plain(value, depth + 1) for key, value in thing.items()}
    return thing.value if isinstance(thing, _Numbers) else thing


def _loaded(path: Path | str, unpickler: type[_Unpickler], what: str) -> Any:
    try:
        with open_plain(path) as stream:
            if not stream.seek(0, 2):
                raise pickle.UnpicklingError("no data")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
                _scan(file)
                file.seek(0)
                return unpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a hostile file may raise anything; all of it means the same
        reason = ascii(" ".join(f"{error}".split()))[1:200].rstrip("'\"") or type(error).__name__
        raise ValueError(f"{path} is not {what}; found: {reason}") from error
