"""Reference statistics in a file: mean and covariance of the features of a data set.

Our own npz holds `mu` (D,), `sigma` (D,D; denominator n - 1) and `meta`, a JSON text that says of
what: number of images, feature net (name, sha256, resize, mode), data set, split, sha256 of the
pixels, version. Programs that read `mu` and `sigma` (pytorch-fid, EDM) can read it too. On request
it also holds `rows` (N,D), the features of every image.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels.foreign import Npz, open_npz
from genmodels.metrics.features import Features
from genmodels.metrics.frechet import Moments
from genmodels.run import holds_arrays

__all__ = ["checked_stats", "describe", "is_stats", "load_rows", "load_stats", "stats_bytes"]

_LARGEST = 1 << 15  # dimensions; a covariance of them takes 8 GB
_MOST = 2**53
_ODD = "has values that are infinite, NaN or no feature's"
_UNKNOWN = 2**31  # number of images where a file does not say it


def describe(features: Features) -> dict[str, Any]:
    """Return what must agree between two sets of features: name, sha256, resize and mode."""
    keys = {"name": features.name, "sha256": features.sha256, "resize": features.resize}
    return keys | {"mode": features.mode}


def stats_bytes(
    moments: Moments, features: Features, *, rows: torch.Tensor | None = None, **facts: Any
) -> bytes:
    """Return the bytes of a statistics file.

    Args:
        moments: Moments of the data.
        features: the Features that made them.
        rows: features of every image, float32 (N,D), to be kept too; None = not.
        facts: what else to tell: data, data_sha256, shape, version...
    """
    meta = {"num": moments.count, "features": describe(features)} | facts
    buffer = io.BytesIO()
    mu, sigma = moments.mean.cpu().numpy(), moments.cov.cpu().numpy()
    kept = {} if rows is None else {"rows": rows.cpu().numpy()}
    np.savez(buffer, mu=mu, sigma=sigma, meta=np.array(json.dumps(meta)), **kept)
    return buffer.getvalue()


def is_statistics(path: Path) -> bool:
    """Return whether a file is one of stats_bytes."""
    return holds_arrays(path, ("mu", "sigma", "meta"))


def is_stats(path: Path | str) -> bool:
    """Return whether a path is an npz of statistics (`mu` and `sigma`) rather than of images."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    with _reading(path), open_npz(path) as file:
        return {"mu", "sigma"} <= set(file.files)


def load_stats(path: Path | str, features: Features) -> tuple[Moments, dict[str, Any]]:
    """Return (Moments, meta dict) of a statistics file, ours or another program's.

    Files of pytorch-fid and EDM (`mu`, `sigma`) and ADM (with `mu_s`, `sigma_s` besides, those of
    features=inception_spatial) do not say which net made them: a UserWarning says so, and meta is
    empty.

    Raises:
        ValueError: not such a file; made with another net, resize or weights; another dimension.
    """
    with _reading(path), open_npz(path) as file:
        names = ("mu", "sigma")
        if features.name == "inception_spatial" and "mu_s" in file.files:
            names = ("mu_s", "sigma_s")
        mean, cov = (_numbers(file, name) for name in names)
        meta = json.loads(str(file.read("meta", 1 << 24))) if "meta" in file.files else {}
        if meta:
            meta = {**meta, "num": int(meta["num"]), "features": dict(meta["features"])}
            if not 2 <= meta["num"] < _MOST:
                raise ValueError(f"num is {meta['num']}")
    if meta:
        _check_features(path, meta, features)
    else:
        warnings.warn(
            f"reference={path} names no features: make sure that it was made with {features.name}, "
            f"resize {features.resize}, or the distance means nothing",
            stacklevel=2,
        )
    return checked_stats(path, mean, cov, features, meta.get("num", _UNKNOWN)), meta


def checked_stats(
    path: Path | str,
    mean: torch.Tensor,
    cov: torch.Tensor,
    features: Features,
    num: int = _UNKNOWN,
) -> Moments:
    """Return the Moments of a mean (D,) and a covariance (D,D) from a file.

    Args:
        path: of the file, for errors.
        mean, cov: float64.
        features: whose dimension they must have.
        num: of how many images; by default so many that it does not matter.

    Raises:
        ValueError: another dimension, or no covariance.
    """
    square = mean.ndim == 1 and len(mean) > 0 and cov.shape == 2 * mean.shape
    if not square or features.dim not in (None, len(mean)):
        raise ValueError(
            f"reference={path}: mu has shape {tuple(mean.shape)} and sigma {tuple(cov.shape)}, "
            f"features={features.name} has dimension {features.dim}: statistics of another net"
        )
    for name, values in (("mu", mean), ("sigma", cov)):
        if not (values.abs() < _MOST).all():
            raise ValueError(f"reference={path}: {name} {_ODD}; make the file again")
    slack = 1e-6 * float(cov.abs().max())  # files of float32 are not quite symmetric
    if cov.diagonal().min() < -slack or (cov - cov.T).abs().max() > slack:
        raise ValueError(f"reference={path}: sigma is no covariance; make the file again")
    # Rounding to float32 moves an eigenvalue by D half units of the last place at most.
    slack = len(cov) * 2.0**-24 * float(cov.diagonal().max()) + torch.finfo(torch.float64).tiny
    if torch.linalg.cholesky_ex(cov + slack * torch.eye(len(cov), dtype=cov.dtype))[1]:
        raise ValueError(
            f"reference={path}: sigma is no covariance, a direction has a negative variance; make "
            "the file again"
        )
    return Moments.from_stats(mean, cov, num)


def load_rows(path: Path | str, dim: int) -> torch.Tensor | None:
    """Return the rows (N,D) that a statistics file keeps, None if it keeps none.

    Raises:
        ValueError: they cannot be read, or have not dimension `dim`.
    """
    with _reading(path), open_npz(path) as file:
        if "rows" not in file.files:
            return None
        if file.header("rows")[1].kind not in "fiu":
            raise ValueError("rows holds no numbers")
        rows = torch.from_numpy(file.read("rows").astype(np.float32))
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(
            f"reference={path}: rows has shape {tuple(rows.shape)}, not (N, {dim}); make it again"
        )
    return rows


def _check_features(path: Path | str, meta: dict[str, Any], features: Features) -> None:
    """Raise ValueError where the file was made with other features; warn of another mode."""
    theirs, ours = meta.get("features", {}), describe(features)
    for key in ("name", "sha256", "resize"):
        if theirs.get(key) != ours[key]:
            raise ValueError(
                f"reference={path}: made with features' {key} {theirs.get(key)}, these have "
                f"{ours[key]}: give the same features= and weights=, or make the file again"
            )
    if theirs.get("mode") != ours["mode"]:
        warnings.warn(
            f"reference={path} was made in mode={theirs.get('mode')}, the images are scored in "
            f"mode={ours['mode']}",
            stacklevel=3,
        )


def _numbers(file: Npz, name: str) -> torch.Tensor:
    """Return an array of an npz in float64; ValueError for what no features can have."""
    shape, kind = file.header(name)
    if kind.kind not in "fiu":
        raise ValueError(f"{name} holds {kind}")
    if len(shape) > 2 or max(shape, default=0) > _LARGEST:
        raise ValueError(f"{name} has shape {shape}")
    values = torch.from_numpy(file.read(name).astype(np.float64))
    if not (values.abs() < _MOST).all():
        raise ValueError(f"{name} {_ODD}")
    return values


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn what goes wrong with a file into one line that names it."""
    try:
        yield
    except Exception as error:  # broken, encrypted, another format: each raises its own kind
        reason = str(error) or type(error).__name__
        raise ValueError(f"reference={path}: cannot be read ({reason}); make it again") from None
