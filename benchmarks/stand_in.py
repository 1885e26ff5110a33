"""A device that is not there, and a watch over what a device would have to wait for.

install() registers `standin`: host memory under another name, on which every operation is the
CPU's, so that numbers are real and whole trainings run. It takes a C++
compiler, and half a minute once.

    install()
    with Watch() as seen:
        model.to("standin").sample(range(4))
    seen.reads       Counter: values of the device that the host asked for, by what and where
    seen.copies      Counter: copies to the device
    seen.mixed       Counter: operations on tensors of two devices, an error on a GPU

What it does not see: Triton, cuDNN, streams, and how long anything takes.
"""

import collections
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genmodels import atomic

NAME = "standin"
MODULE = "genmodels_stand_in"
SOURCE = Path(__file__).with_name("stand_in.cpp")

aten = torch.ops.aten
# Their result, or its size, goes to the host.
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.unique_dim_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# These may see two devices.
COPYING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten._copy_from.default,
    aten._foreach_copy_.default,
    aten.set_.source_Tensor,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
}


def has_compiler() -> bool:
    """Return whether install() can build."""
    return bool(shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja"))


@functools.cache
def install() -> None:
    """Build and register the device, once in a process."""
    _built().register_hooks()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[])


def _built() -> ModuleType:
    """Return the compiled module, made if this source has not been compiled here before."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"genmodels-stand-in-{os.getuid()}-{key}.so"
    if library.is_file():
        loader = importlib.machinery.ExtensionFileLoader(MODULE, str(library))
        spec = importlib.util.spec_from_loader(MODULE, loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    with tempfile.TemporaryDirectory() as folder:  # a fresh one: torch waits for a lock it finds
        flags = ["-O1", "-w"]
        module = cpp_extension.load(
            MODULE, [str(SOURCE)], extra_cflags=flags, build_directory=folder
        )
        atomic.write_bytes(library, (Path(folder) / f"{MODULE}.so").read_bytes())
    return module


def _device_module() -> ModuleType:
    """Return what torch and Lightning ask for as torch.standin."""
    module = ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "is_autocast_enabled": False,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        "get_device_properties": SimpleNamespace(total_memory=1 << 37, name=NAME),
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "set_rng_state")),
        **dict.fromkeys(("manual_seed", "manual_seed_all")),
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *args, answer=answer, **kwargs: answer)
    module.get_rng_state = lambda *args: torch.get_rng_state()
    return module


class Watch(TorchDispatchMode):
    """Counts, while it is entered, reads, copies and mixed devices; see the module.

    Args:
        root: folder of the code whose lines are named.
    """

    def __init__(self, root: Path | None = None) -> None:
        super().__init__()
        self.root = str(root or Path.cwd())
        self.reads, self.copies, self.mixed = (collections.Counter() for _ in range(3))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if x.device.type == NAME]
        host = [x for x in tensors if x.device.type == "cpu"]
        if func in COPYING:
            self._copy(func, args, kwargs)
        elif here:
            masks = []
            if func in INDEXING:
                index = [i for i in args[1] if i is not None]
                masks = [i for i in index if i.dtype in (torch.bool, torch.uint8)]
                on_host = [i for i in index if i.device.type == "cpu"]
                if on_host and args[0].device.type == NAME:  # allowed: the index is copied
                    self._note(self.copies, f"{func} by an index of the host")
                    host = [x for x in host if all(x is not i for i in on_host)]
            if func in READS or masks:
                self._note(self.reads, str(func))
            if any(x.dim() for x in host):  # single numbers may come from the host
                self._note(self.mixed, f"{func} {[tuple(x.shape) for x in host if x.dim()]}")
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs) -> None:
        """Note a copy between the devices."""
        if func is aten._to_copy.default:
            pairs = [(args[0], torch.device(kwargs.get("device") or args[0].device).type)]
        elif func is aten.copy_.default:
            pairs = [(args[1], args[0].device.type)]
        elif func is aten._foreach_copy_.default:
            pairs = [(source, target.device.type) for target, source in zip(args[0], args[1])]
        else:
            return
        for source, target in pairs:
            if source.device.type == NAME and target == "cpu":
                self._note(self.reads, f"copy {tuple(source.shape)}")
            elif source.device.type == "cpu" and target == NAME:
                self._note(self.copies, f"copy {tuple(source.shape)}")

    def _note(self, counter: collections.Counter, what: str) -> None:
        """Count it under the two innermost lines of our code, and who they called."""
        frame, ours, library = sys._getframe(2), [], ""
        while frame and len(ours) < 2:
            name, line = frame.f_code.co_filename, f"{frame.f_lineno} {frame.f_code.co_name}"
            if name.startswith(self.root) and "site-packages" not in name:
                if name != __file__:
                    ours.append(f"{name[len(self.root) + 1 :]}:{line}")
            elif not ours and "/torch/" not in name:
                library = library or f"{'/'.join(name.split('/')[-2:])}:{line}"
            frame = frame.f_back
        counter[what, " < ".join([*([library] if library else []), *ours])] += 1
