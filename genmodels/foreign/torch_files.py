"""Files of torch.save: read as inert data first, and loaded only if nothing in them is odd.

torch.load(weights_only=True) runs no code of a file, but a tuple nested a million deep ends the
process, one that holds itself twice sixty times over never ends, and sizes are believed: memory is
taken for them, or read beyond its end. So the pickle is read here by Python's own unpickler with
stand-ins for every name, and what it promises is compared with what the file holds. What a state
dict needs is allowed and nothing else; both forms of file are read, the zip and the older one.
"""

import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from genmodels.foreign.plain import open_plain

DEEPEST = 40  # containers in containers; a checkpoint of Lightning has ten
MOST_VALUES = 1 << 22  # in all containers, those counted twice that stand in two
LARGEST_KEY = 1 << 31  # of whole numbers as keys: larger ones can be made to collide

# The first of the five pickles of the older form: torch's magic number.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_SIZES = {  # bytes of an element, by the storage's name
    **{"DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16},
    **{"FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
    "UntypedStorage": 1,
}


class Refused(pickle.UnpicklingError):
    """What is in the file and is not taken."""


def load_torch(path: Path | str) -> Any:
    """Return what torch.save put into a file, on the CPU; nothing in it is executed.

    Raises:
        OSError: it cannot be opened, or is no plain file.
        Exception: any kind, where it is broken or holds anything odd.
    """
    import torch

    with open_plain(path) as file:
        start = file.read(len(_OLD_MAGIC))
        file.seek(0)
        if start[:4] == b"PK\x03\x04":
            _check_zip(file)
        elif start == _OLD_MAGIC:
            _check_old(file)
        else:
            raise Refused("it does not begin as a file of torch.save")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def is_torch_file(path: Path | str) -> bool:
    """Return whether a file begins as torch.save's do; of a zip, whatever is in it.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    with open_plain(path) as file:
        start = file.read(len(_OLD_MAGIC))
    return start[:4] == b"PK\x03\x04" or start == _OLD_MAGIC


def check_key(key: object) -> None:
    """Raise UnpicklingError for a key of a dict that is no text, small whole number or None."""
    if not isinstance(key, str | int | None):
        raise Refused(f"a {type(key).__name__} as a key")
    if isinstance(key, int) and abs(key) > LARGEST_KEY:
        raise Refused(f"the number {key} as a key")


class _Name:
    """Stands in for a class or function of the file."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Storage:
    """Stands in for the numbers of a tensor; `size` is how many there are."""

    __slots__ = ("itemsize", "size")

    def __init__(self, size: int, itemsize: int):
        self.size, self.itemsize = size, itemsize


class _Tensor:
    """Stands in for a tensor."""

    __slots__ = ()


class _Dict(dict):
    """Stands in for an OrderedDict."""

    __slots__ = ()


_Unpickler: Any = pickle._Unpickler  # private, and its parts untyped

# What torch's own reader of weights knows; and of these only a state dict's.
_OPCODES = (
    *("GLOBAL", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MARK", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST"),
    *("EMPTY_DICT", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "LONG1", "PROTO", "STOP"),
)


class _Inert(_Unpickler):
    """Python's unpickler in Python with nothing to call: it makes stand-ins and plain data.

    Args:
        file: open at a pickle.
        records: {key of a storage: its bytes}, as the zip says; None: the older form.
        size: bytes of the whole file.
    """

    dispatch = {
        getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(self, file: Any, records: dict[str, int] | None, size: int):
        # Text of Python 2 stays bytes, as torch.load reads it.
        super().__init__(file, encoding="bytes")
        self.records, self.size = records, size
        self.promised: dict[str, int] = {}  # bytes of each storage of the older form

    def load(self) -> Any:
        """Return the data; an opcode that is not known is one that is refused."""
        try:
            return super().load()
        except KeyError as error:
            raise Refused(f"the opcode or memo {error} of a pickle") from None

    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] not in ("storage", b"storage")
        ):
            raise Refused("a reference to no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        key = key.decode("latin1") if isinstance(key, bytes) else key
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if name not in _SIZES or not kind.name.startswith("torch.") or not isinstance(key, str):
            raise Refused("a storage of an unknown kind")
        if type(count) is not int or not 0 <= count < 1 << 60:
            raise Refused("a storage of an impossible size")
        if len(pid) == 6 and pid[5] is not None:
            raise Refused("a storage that is a part of another")
        size = count * _SIZES[name]
        if self.records is None:
            self.promised[key] = max(size, self.promised.get(key, 0))
            there = self.size
            if sum(self.promised.values()) > there:
                raise Refused(f"storages of more bytes than the file's {there}")
        else:
            there = self.records.get(key, -1)
            if there < 0 or size > there:
                raise Refused(f"a storage of {size} bytes where the file has {max(there, 0)}")
        return _Storage(count, _SIZES[name])

    def load_reduce(self) -> None:
        args = self.stack.pop()
        name = getattr(self.stack[-1], "name", "")
        if name == "collections.OrderedDict" and args == ():
            self.stack[-1] = _Dict()
        elif name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            self.stack[-1] = self._tensor(args)
        elif name == "torch._utils._rebuild_parameter" and args and type(args[0]) is _Tensor:
            self.stack[-1] = args[0]
        elif name == "_codecs.encode" and len(args) == 2 and args[1] == "latin1":
            self.stack[-1] = b""  # bytes, as protocol 2 writes them
        else:
            raise Refused(f"a call of {name or type(self.stack[-1]).__name__}")

    def _tensor(self, args: tuple) -> _Tensor:
        storage, offset, shape, strides = (*args, *(None,) * 4)[:4]
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple):
            raise Refused("a tensor made of no storage")
        whole = isinstance(strides, tuple) and all(
            type(n) is int and 0 <= n < 1 << 60 for n in (offset, *shape, *strides)
        )
        if not whole or len(shape) != len(strides) or len(shape) > 16:
            raise Refused("a tensor of impossible size or stride")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides)) if count else offset
        if last + bool(count) > storage.size:
            raise Refused(f"a tensor of size {shape} in {storage.size} stored numbers")
        # With a stride of 0 one number can stand for any amount of them.
        if count > storage.size and count * storage.itemsize > self.size:
            raise Refused(f"a tensor of size {shape} in {storage.size} stored numbers")
        return _Tensor()

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Dict or type(state) not in (dict, _Dict):
            raise Refused(f"a {type(self.stack[-1]).__name__} with a state")
        for key in state:
            check_key(key)

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def _check_keys(self, target: Any, keys: Iterable[Any]) -> None:
        if type(target) not in (dict, _Dict):
            raise Refused(f"keys of a {type(target).__name__}")
        for key in keys:
            check_key(key.decode("latin1") if isinstance(key, bytes) else key)

    def load_append(self) -> None:
        self._check_list(self.stack[-2])
        super().load_append()

    def load_appends(self) -> None:
        self._check_list(self.metastack[-1][-1])
        super().load_appends()

    def _check_list(self, target: Any) -> None:
        if type(target) is not list:
            raise Refused(f"items of a {type(target).__name__}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends


def _check_depth(top: Any) -> None:
    """Raise Refused for data nested too deep or too large; what stands in two places counts twice.

    Of itself such data are harmless, but whoever walks through them never comes back.
    """
    left, level = MOST_VALUES, [top]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            if len(below) > left:
                raise Refused(f"more than {MOST_VALUES} values, or one that holds itself")
        left -= len(below)
        level = below
        if not level:
            return
    raise Refused(f"data nested more than {DEEPEST} deep")


def _check_zip(file: BinaryIO) -> None:
    """Raise unless the pickle of a zip is harmless and its storages are there."""
    import torch

    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        top = names[0].partition("/")[0] if names else ""
        # torch looks names up whatever their case; which of two it takes is not for us to guess.
        if len({name.lower() for name in names}) != len(names):
            raise Refused("two entries of one name")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Refused(f"the packed entry {info.filename}; torch.save packs none")
        if sum(info.file_size for info in infos) > size:
            raise Refused("records that overlap")
        # torch.load looks at no checksum. Checking a file takes less long than loading it.
        if (damaged := archive.testzip()) is not None:
            raise Refused(f"damaged: the checksum of {damaged} is wrong")
        pickled = archive.read(f"{top}/data.pkl")
    file.seek(0)
    # A zip can be made to say one thing to one reader and another to the next.
    if torch._C.PyTorchFileReader(file).get_record("data.pkl") != pickled:
        raise Refused("two pickles, depending on who reads the zip")
    start = f"{top}/data/"
    records = {
        info.filename.removeprefix(start): info.file_size
        for info in infos
        if info.filename.startswith(start)
    }
    _check_depth(_Inert(io.BytesIO(pickled), records, size).load())


def _check_old(file: BinaryIO) -> None:
    """Raise unless the five pickles of the older form are harmless and promise no more than it."""
    size = file.seek(0, io.SEEK_END)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):  # magic number, version, machine, the data, the storages' keys
            _check_depth(_Inert(content, None, size).load())
