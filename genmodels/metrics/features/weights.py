"""Weights of feature nets: read, hash, download only when asked."""

import hashlib
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from genmodels.atomic import whole_path
from genmodels.foreign import check_plain, load_torch, read_plain


def read_weights(path: Path | str) -> tuple[bytes, str]:
    """Return (bytes, sha256) of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        data = read_plain(path)
    except OSError as error:
        raise ValueError(f"weights={path} cannot be read: {error.strerror or error}") from None
    return data, hashlib.sha256(data).hexdigest()


def check_sha256(path: Path | str, sha256: str, wanted: str | None) -> None:
    """Raise ValueError unless the hash of a file begins with the one wanted; None = any."""
    if wanted is not None and (len(wanted) < 8 or not sha256.startswith(wanted.lower())):
        raise ValueError(
            f"weights={path}: sha256 is {sha256}, not {wanted}: another or a broken file, fetch it "
            "anew"
        )


def download_weights(url: str, sha256: str | None) -> Path:
    """Return the path of a file fetched from `url` into torch's cache, once; all or nothing.

    Raises:
        ValueError: no connection, or a file with another sha256 (None = any).
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_path(path, several=True) as partial:
                print(f"downloading {url} to {path}")
                urllib.request.urlretrieve(url, partial)
                check_sha256(url, read_weights(partial)[1], sha256)
        except (OSError, urllib.error.ContentTooShortError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(
                f"weights=download: {url} cannot be fetched ({reason}); fetch it elsewhere and "
                "name it, weights=FILE"
            ) from None
    check_sha256(path, read_weights(path)[1], sha256)
    return path


def is_script(path: Path | str) -> bool:
    """Return whether the file is TorchScript."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any("/code/" in name for name in file.namelist())


def load_script(path: Path | str, device: torch.device) -> Any:
    """Return the TorchScript net in a file, in eval mode.

    Raises:
        ValueError: the file holds none.
    """
    try:
        with warnings.catch_warnings():
            # Deprecated in torch in favour of torch.export, but what published nets come as.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"features={path} is not a TorchScript file: save the net with torch.jit.save "
            f"({str(error).splitlines()[0][:100]})"
        ) from None


def load_state(path: Path | str) -> dict[str, torch.Tensor]:
    """Return the state dict in a .safetensors or torch.save file; nothing in it is executed.

    Raises:
        ValueError: the file holds none.
    """
    try:
        if Path(path).suffix == ".safetensors":
            check_plain(path)
            return load_file(path)
        state = load_torch(path)
    except Exception as error:  # unpickling raises whatever the bytes make it raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights={path} holds no state dict: {reason[:100]}") from None
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"weights={path} holds no state dict: save net.state_dict()")
    return state
