"""Models from configs and files: build, load, start from trained weights."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from genmodels import data
from genmodels.checkpoint import hub
from genmodels.config import Config, check_foreign, load_config
from genmodels.config.shipped import CONFIGS, MODELS, nearest, shipped
from genmodels.foreign import check_plain, load_torch, read_plain
from genmodels.images.arrays import memory_size
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.run import Run

LARGEST_SIZE = 1 << 20  # of a network's widths and numbers of layers
MOST_TENSORS = 20_000  # of a network
FORMAT = 2  # of exported folders, 2 if there are chains; a larger number is refused
CHAINS = "chains."  # before the names of what lies beside the weights in an export


class Unfit(ValueError):
    """Weights that are not those of their config; the text names the file."""


def build(
    config: Config | Path | str | dict | Sequence[Path | str | dict], *overrides: str, **needs: Any
) -> Any:
    """Return an untrained method on the CPU; its weights are a function of the config's seed.

    Args:
        config: a Config, a YAML path or a dict of the same, or a list of them merged left to right.
        overrides: "key=value" strings.
        needs: what the method needs beyond its config to train, e.g. reference=MODEL for DDO.

    Raises:
        ValueError: the config is wrong; the line says where and what to write.
    """
    if not isinstance(config, Config):
        sources = [config] if isinstance(config, str | Path | dict) else list(config)
        cfg = load_config(sources, overrides, methods=METHODS, networks=NETWORKS)
        data.check_settings(cfg.data)
        if cfg.init:
            raise ValueError(
                f"init={cfg.init}: build() makes an untrained model; leave it out and copy the "
                "weights with genmodels.checkpoint.init_weights(model, PATH)"
            )
    elif overrides:
        raise ValueError(f"overrides={overrides}: cannot be applied to a finished Config")
    else:
        cfg = config
    data.fill_in(cfg.data)
    method = METHODS[cfg.method.name]
    for key, value in needs.items():
        if key not in method.NEEDS:
            raise ValueError(
                f"{key}={value}: is nothing that {method.__name__} needs; settings are words, as "
                "build(config, 'optim.lr=0.001')"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return method(cfg, **needs)


def check_size(cfg: Config) -> None:
    """Raise ValueError for a network that is larger than this machine's memory."""
    data.fill_in(cfg.data)
    key, memory = f"network.name={cfg.network.name}", memory_size()
    line = f"{key}: it asks for more than {MOST_TENSORS} tensors; make it smaller"
    try:
        model = _method_without_memory(cfg, MOST_TENSORS, line)
    except NoNetwork as error:
        raise ValueError(f"{key}: {error}") from None
    size = sum(p.nbytes for p in model.parameters())
    if size > memory:
        raise ValueError(
            f"{key}: its weights take {size / 1e9:.3g} GB and this machine has "
            f"{memory / 1e9:.3g} GB; make it smaller"
        )


def load(path: Path | str, *, ema: bool = True, device: torch.device | str = "cpu") -> Any:
    """Return a trained method in eval mode. Nothing in the file is executed.

    Args:
        path: run folder (its last checkpoint, or the newest that can be read, with a warning),
            .ckpt file, exported folder, a folder of runs (its newest, with a warning), the name of
            a model that comes along, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub.
        ema: the averaged weights (default) or, from a checkpoint, the raw ones.
        device: where to put it.

    Raises:
        ValueError: not a model of this package, broken, or from a newer version; the hub cannot be
            reached or has no such model.
    """
    path, checkpoint, chains = model_path(path), None, {}
    if (path / "config.json").is_file():
        plain, state = _read_export(path)
        names = [name for name in state if name.startswith(CHAINS)]
        chains = {name.removeprefix(CHAINS): state.pop(name) for name in names}
    elif path.suffix == ".ckpt" or Run(path).checkpoints.is_dir():
        path, checkpoint = newest_checkpoint(path) if path.is_dir() else (path, _read_file(path))
        plain = checkpoint["hyper_parameters"]["config"]
        raw = not ema and "current_model_state" in checkpoint
        state = checkpoint["current_model_state" if raw else "state_dict"]
    else:
        raise _no_model(path)
    try:
        check_foreign(plain)
        cfg = load_config([plain], methods=METHODS, networks=NETWORKS)
        few = f"it asks for more than {4 * len(state) + 1000} tensors, the file has {len(state)}"
        model = _method_without_memory(cfg, 4 * len(state) + 1000, few)
        _check_state(model, state, path)
        model = build(cfg)
    except Unfit:
        raise
    except ValueError as error:
        raise ValueError(f"model={path}: its config does not fit this version: {error}") from None
    model.load_state_dict(state)
    model = model.to(device)
    if checkpoint is not None or chains:
        try:  # what a method keeps beside its weights
            model.on_load_checkpoint(checkpoint) if checkpoint else model.take_chains(chains)
        except Exception as error:  # what is there may be of any form
            raise ValueError(
                f"model={path}: what its method keeps beside the weights cannot be read "
                f"({type(error).__name__}: {error})"
            ) from None
    return model.eval()


def paths_by_channels(path: Path | str) -> dict[int, Path | str]:
    """Return {channels: model} of NAME_grey and NAME_colour for NAME, else {0: path}.

    These two are meant where NAME is no model itself; one of them may be missing.
    """
    known, names = shipped(MODELS), {1: f"{path}_grey", 3: f"{path}_colour"}
    if str(path) in known or Path(path).expanduser().exists():
        return {0: path}
    folders = {key: known.get(name, Path(name).expanduser()) for key, name in names.items()}
    return {key: folder for key, folder in folders.items() if folder.is_dir()} or {0: path}


def _no_model(path: Path) -> ValueError:
    hint = "" if path.exists() else nearest(MODELS, str(path))
    if not path.exists() and str(path) in shipped(CONFIGS):
        hint = (
            f"; a config has this name (genmodels train {path} makes a model), models that come "
            f"along are {', '.join(shipped(MODELS))}, and pretrained/ of a clone has more"
        )
    if (path / "model_index.json").is_file() and (path / "unet").is_dir():
        hint = f"; the UNet of this diffusers pipeline, for init=, is {path / 'unet'}"
    return ValueError(f"model={path}: is no run folder, .ckpt file or exported folder{hint}")


def newest_run(path: Path | str) -> Path | str:
    """Return the newest run in a folder of runs, with a warning; any other path as it is."""
    folder = Path(path).expanduser()
    is_model = (folder / "config.json").is_file() or Run(folder).checkpoints.is_dir()
    if is_model or not folder.is_dir() or (run := Run.newest(folder)) is None:
        return path
    warnings.warn(f"model={path}: is a folder of runs; its newest is {run.folder}", stacklevel=2)
    return run.folder


def model_path(path: Path | str) -> Path:
    """Return where a model lies: a path that exists or its newest run, what comes along, the hub's.

    Those of the hub, which a text alone can name, lie in its cache then.
    """
    found = Path(newest_run(path)).expanduser()
    if found.exists():
        return found
    known = shipped(MODELS).get(str(path))
    return known or (hub.fetch(path) if isinstance(path, str) else None) or found


def load_guide(settings: dict[str, Any], device: torch.device | str) -> None:
    """Put the model in the place of its path, if the settings for sample() name a guide."""
    if settings.get("guide"):
        settings["guide"] = load(settings["guide"], device=device)


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Return the dict in a .ckpt file, or in a run folder's newest one (no code in it is run).

    Raises:
        ValueError: missing, damaged, or not written by this package.
    """
    path = model_path(path)
    return newest_checkpoint(path)[1] if path.is_dir() else _read_file(path)


def newest_checkpoint(folder: Path | str) -> tuple[Path, dict[str, Any]]:
    """Return (file, the dict in it) of a run's last checkpoint.

    Where that is missing or damaged it is the newest of the run's steps that can be read, and a
    warning says so.

    Raises:
        ValueError: none can be read.
    """
    run = Run(Path(folder).expanduser())
    try:
        return run.last, _read_file(run.last)
    except ValueError as error:
        reason = error
    for path in reversed(run.steps()):
        try:
            checkpoint = _read_file(path)
        except ValueError:
            continue
        warnings.warn(f"{reason}; {path.name} is taken in its place", stacklevel=2)
        return path, checkpoint
    raise reason


def _read_file(path: Path) -> dict[str, Any]:
    """Return the dict in a .ckpt file."""
    if not path.is_file():
        raise ValueError(f"model={path}: no such file; the run has saved no checkpoint yet")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a foreign file; the error says enough
            checkpoint = load_torch(path)
            checkpoint["hyper_parameters"]["config"]["method"]["name"]
            checkpoint["state_dict"].keys()
    except Exception as error:  # a broken file raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"model={path}: not a checkpoint of genmodels ({reason[:120]})") from None
    return checkpoint


def _read_export(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (plain config, state dict) of an exported folder."""
    plain, digest = _read_description(path)
    weights = path / "model.safetensors"
    try:
        check_plain(weights)
        with safe_open(weights, "pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        found = file_sha256(weights) if digest else ""
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model={path}: model.safetensors cannot be read ({error})") from None
    if found != digest:
        raise ValueError(
            f"model={path}: model.safetensors has another sha256 than config.json says, so it is "
            "damaged or another model's; export it anew"
        )
    return plain, state


def _read_description(path: Path) -> tuple[dict[str, Any], str]:
    """Return (plain config, sha256 of the weights or "") of an exported folder."""
    try:
        description = json.loads(read_plain(path / "config.json"))
        version, plain = int(description["genmodels_format"]), dict(description["config"])
        digest = str(description.get("weights_sha256", ""))  # of older exports: none
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise ValueError(f"model={path}: config.json is not one of genmodels' exports") from None
    if version > FORMAT:
        raise ValueError(
            f"model={path}: export format {version}, this version reads up to {FORMAT}; "
            "upgrade genmodels"
        )
    return plain, digest


class NoNetwork(ValueError):
    """Settings that no network can be made of."""


def _method_without_memory(cfg: Config, most: int, line: str) -> Any:
    """Return the method of a config with shapes and no numbers; see _without_memory."""
    for key, value in vars(cfg.network).items():
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > LARGEST_SIZE:
                raise ValueError(f"network.{key}={size}: no network is so large")
    data.fill_in(cfg.data)  # not below: it may read the data
    return _without_memory(lambda: METHODS[cfg.method.name](cfg), most, line)


def _without_memory(make: Callable[[], Any], most: int, line: str) -> Any:
    """Return what `make` makes with shapes and no numbers, so that sizes cost nothing.

    Args:
        make: makes a module.
        most: tensors that it may have.
        line: of the error if it asks for more.

    Raises:
        ValueError: it asks for more.
        NoNetwork: nothing can be made so.
    """
    made = 0

    def stop(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(line)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(stop)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return make()
    except ValueError:
        raise
    except Exception as error:  # sizes that nobody checks end in any kind
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
        raise NoNetwork(f"no network can be made of it ({reason})") from None
    finally:
        hook.remove()


def _check_state(model: Any, state: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for a state dict that is not this model's; it names the first difference.

    Args:
        model: one without memory will do.
        state: the state dict.
        path: of the file.
    """
    known = model.state_dict()
    if not isinstance(state, Mapping):
        raise Unfit(f"model={path}: its weights are no state dict")
    shapes = {key: getattr(value, "shape", None) for key, value in state.items()}
    for what, keys in (
        ("lacks", sorted(known.keys() - state.keys())),
        ("has the unknown", sorted(state.keys() - known.keys(), key=str)),
        (
            "has a wrong shape for",
            sorted(key for key in known.keys() & shapes.keys() if known[key].shape != shapes[key]),
        ),
    ):
        if keys:
            raise Unfit(
                f"model={path}: {what} {keys[0]} (and {len(keys) - 1} more); "
                "it does not belong to its config"
            )
    if odd := _not_finite(state):
        raise Unfit(f"model={path}: {odd} holds NaN or infinite values; take another checkpoint")


def _not_finite(state: Mapping[str, torch.Tensor]) -> str:
    """Return the first key of values that are not finite, or ""."""
    # Of a sum a single value that is not finite leaves nothing finite.
    odd = (
        key
        for key, value in state.items()
        if value.is_floating_point() and not value.sum(dtype=torch.float64).isfinite()
    )
    return next(odd, "")


def _diffusers_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of network `unet`, and of its images, of a diffusers UNet2DModel."""
    try:
        config = json.loads(read_plain(path / "config.json"))
        attended = ["Attn" in str(kind) for kind in config["down_block_types"]]
        network = {
            "name": "unet",
            "channels": [int(channels) for channels in config["block_out_channels"]],
            "layers": int(config["layers_per_block"]),
            "attention": [level for level, attends in enumerate(attended) if attends],
            "head_dim": int(config["attention_head_dim"]),
            "norm_groups": int(config["norm_num_groups"]),
            "dropout": float(config.get("dropout", 0)),
        }
        shape = [int(config["in_channels"]), *2 * [int(config["sample_size"] or 0)]]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"init={path}: is no UNet2DModel ({reason})") from None
    return {"network": network, "data": {"shape": shape}, "method": {}}


def is_diffusers(path: Path | str) -> bool:
    """Return whether a folder holds a diffusers UNet2DModel."""
    config = Path(path).expanduser() / "config.json"
    return config.is_file() and b"UNet2DModel" in read_plain(config)


def settings_of_model(path: Path | str) -> dict[str, dict[str, Any]]:
    """Return the plain sections network, data and method of a model that init= may name.

    Args:
        path: as for init_weights.

    Raises:
        ValueError: there is no model.
    """
    folder = model_path(path)
    if is_diffusers(folder):
        return _diffusers_settings(folder)
    if (folder / "config.json").is_file():
        plain = _read_description(folder)[0]
    elif folder.suffix == ".ckpt" or Run(folder).checkpoints.is_dir():
        plain = read_checkpoint(folder)["hyper_parameters"]["config"]
    else:
        raise _no_model(folder)
    check_foreign(plain)
    sections: dict[str, Any] = {name: plain.get(name) for name in ("network", "data", "method")}
    for name, section in sections.items():
        if not isinstance(section, dict) or not isinstance(section.get("name"), str):
            raise ValueError(f"init={path}: its config does not say {name}.name")
    return sections


def init_weights(model: Any, path: Path | str) -> list[str]:
    """Copy the (EMA) weights of another model into this one; return the keys that stay fresh.

    Args:
        model: an untrained method.
        path: run folder, .ckpt, export, or a diffusers UNet2DModel folder (network `unet`).

    Raises:
        ValueError: the networks differ in anything but their class embedding.
    """
    if is_diffusers(path):
        target = getattr(getattr(model.net, "net", None), "unet", None)
        if target is None:
            raise ValueError(f"init={path}: a diffusers UNet needs network.name=unet")
        source = _diffusers_weights(path, target.state_dict(), model.cfg)
    else:
        target, source = model, load(path).state_dict()
    ours = target.state_dict()
    agree = _agreeing(path, ours, source, model.cfg)
    target.load_state_dict({key: source[key] for key in agree}, strict=False)
    return sorted(ours.keys() - agree)


def _diffusers_weights(
    path: Path | str, ours: Mapping[str, torch.Tensor], cfg: Config
) -> dict[str, Any]:
    """Return the state dict of a diffusers folder; it is of our sizes before memory is taken."""
    from diffusers import UNet2DModel

    folder = Path(path).expanduser()
    line = f"it asks for far more than our {len(ours)} tensors"
    try:
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.json")]:
            check_plain(file)
        settings = UNet2DModel.load_config(folder)
        sizes = _without_memory(
            lambda: UNet2DModel.from_config(settings), 4 * len(ours) + 1000, line
        )
        shapes = sizes.state_dict()
    except Exception as error:  # of settings that may be anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"init={path}: is no UNet2DModel ({reason})") from None
    _agreeing(path, ours, shapes, cfg)
    try:
        source = UNet2DModel.from_pretrained(folder, use_safetensors=True).state_dict()
    except Exception as error:  # of a broken file nearly any kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"init={path}: cannot be read as safetensors ({reason})") from None
    if odd := _not_finite(source):
        raise ValueError(f"init={path}: {odd} holds NaN or infinite values; take another model")
    return source


def _agreeing(
    path: Path | str,
    ours: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor],
    cfg: Config,
) -> set[str]:
    """Return the keys of one shape here and there; ValueError if others have to agree too.

    Args:
        path: of the model that `source` is the state dict of.
        ours: state dict of the model of this config.
        source: the other's.
        cfg: named in the error where it differs from the other's.
    """
    agree = {k for k in ours.keys() & source.keys() if ours[k].shape == source[k].shape}
    others = sorted((ours.keys() | source.keys()) - agree)
    # New labels, augmentation values and loss weights start fresh; a prior is fitted to the data.
    fresh = ("class_embedding", "embedding.label", "embedding.augment", "uncertainty", "prior.")
    wrong = [key for key in others if not any(part in key for part in fresh)]
    if wrong:
        there, here = (
            tuple(state[wrong[0]].shape) if wrong[0] in state else "absent"
            for state in (source, ours)
        )
        raise ValueError(
            f"init={path}: {wrong[0]} is {there} there and {here} here (and {len(wrong) - 1} "
            f"more); use the network.* and data settings of that model{_differing(path, cfg)}"
        )
    return agree


def _differing(path: Path | str, cfg: Config) -> str:
    """Return ": network.KEY=VALUE, not ..." for each setting of the network that differs there."""
    theirs, ours = settings_of_model(path)["network"], vars(cfg.network)
    if theirs["name"] != ours["name"]:
        return f": network.name={theirs['name']}, not {ours['name']}"
    others = {key: value for key, value in theirs.items() if ours.get(key, value) != value}
    texts = [f"network.{key}={value}, not {ours[key]}" for key, value in others.items()]
    return f": {'; '.join(texts)}" if texts else ""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(model: Any) -> str:
    """Return the sha256 of a model's state dict: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
