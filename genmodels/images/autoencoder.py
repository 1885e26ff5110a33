"""Autoencoders between pictures and latents: diffusers' AutoencoderKL, as EDM2 uses it.

    z ~ N(mean(picture), std(picture)^2)          what the VAE makes of a picture, (B, C, h, w)
    x = (z - mean of the data) / (2 std of the data)         what a model is trained on
    picture = VAE(z)

EDM2 gives the VAE of Stable Diffusion 1 pixels on [0, 1] and has a mean and a std for each of its
four channels that go with that (Karras et al. 2024, arXiv 2312.02696; Rombach et al. 2022, arXiv
2112.10752). Other VAEs get pixels on [-1, 1], as they were trained.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from genmodels.foreign import read_plain

__all__ = ["Autoencoder", "decoder_of", "load_autoencoder", "raw_latents", "scaled_latents"]

SD_SCALE = 0.18215  # of the VAEs with the latent space of Stable Diffusion 1
_AT_ONCE = 1 << 20  # pixels of a call of the VAE: 4 pictures of 512x512


class Autoencoder:
    """A VAE in eval mode; pictures are uint8 (B, 3, H, W), latents float32 (B, C, h, w).

    Args:
        name: of the VAE, for errors.
        vae: diffusers' AutoencoderKL.

    Attributes:
        channels: of a picture.
        latent_channels: of its latents.
        factor: a picture's side over that of its latents.
    """

    def __init__(self, name: str, vae: Any):
        self.name = name
        self.vae = vae.eval().requires_grad_(False)
        self.channels = int(vae.config.in_channels)
        self.latent_channels = int(vae.config.latent_channels)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def is_first_sd(self) -> bool:
        """Whether its latents are those of Stable Diffusion 1, which EDM2's statistics are of."""
        return self.latent_channels == 4 and self.vae.config.scaling_factor == SD_SCALE

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the latents of pictures (C, H, W).

        Raises:
            ValueError: colours that it does not take, or a side that it does not halve evenly.
        """
        channels, height, width = shape
        if channels not in (1, self.channels):
            raise ValueError(
                f"vae={self.name}: takes pictures of {self.channels} channels, these have "
                f"{channels}; give channels={self.channels}"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"vae={self.name}: halves pictures to 1/{self.factor} and these are "
                f"{height}x{width}; give a resolution= that is a multiple of {self.factor}"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def picture_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the pictures of latents (C, h, w).

        Raises:
            ValueError: latents that are not of this VAE.
        """
        if shape[0] != self.latent_channels:
            raise ValueError(
                f"vae={self.name}: has latents of {self.latent_channels} channels, the model's "
                f"have {shape[0]}; name the VAE that they were encoded with"
            )
        return self.channels, shape[1] * self.factor, shape[2] * self.factor

    @torch.no_grad()
    def moments(self, pictures: Tensor, pixels: str) -> Tensor:
        """Return mean and std of the latents of pictures, float32 (B, 2C, h, w), on the CPU.

        Args:
            pictures: uint8 (B, 1 or 3, H, W).
            pixels: "0..1" or "-1..1", what black and white are to the VAE.
        """
        parts = []
        for part in pictures.split(self._at_once(pictures.shape[2] * pictures.shape[3])):
            x = part.to(self.vae.device).float().expand(-1, self.channels, -1, -1)
            x = x / 255 if pixels == "0..1" else x / 127.5 - 1
            with _exactly(self.vae.device):
                law = self.vae.encode(x).latent_dist
            parts.append(torch.cat([law.mean, law.std], dim=1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, z: Tensor, pixels: str) -> Tensor:
        """Return the pictures of latents, uint8 (B, 3, H, W), on the CPU.

        Args:
            z: float32 (B, C, h, w), as the VAE makes them.
            pixels: "0..1" or "-1..1", what black and white are to the VAE.

        Raises:
            ValueError: latents of other channels.
        """
        _, height, width = self.picture_shape(tuple(z.shape[1:]))
        parts = []
        for part in z.split(self._at_once(height * width)):
            with _exactly(self.vae.device):
                x = self.vae.decode(part.to(self.vae.device)).sample
            levels = 255 * x if pixels == "0..1" else 127.5 * x + 128
            parts.append(levels.clamp(0, 255).to(torch.uint8).cpu())  # cut off, as EDM and EDM2 do
        return torch.cat(parts)

    def _at_once(self, size: int) -> int:
        return max(1, _AT_ONCE // size)


@contextlib.contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Compute in float32, without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def load_autoencoder(name: str, device: torch.device | str = "cpu") -> Autoencoder:
    """Return the VAE of a folder, or of a repository OWNER/NAME[@REVISION] of the hub, in float32.

    It may lie in the folder `vae` of a whole pipeline. Weights are read from safetensors alone, and
    nothing is executed.

    Raises:
        ValueError: no name, no diffusers, no connection, no such VAE or another kind.
    """
    if not name:
        raise ValueError("vae=: which VAE made these latents is not known here; name its folder")
    return _load(name, torch.device(device))


@lru_cache(maxsize=2)
def _load(name: str, device: torch.device) -> Autoencoder:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(f"vae={name}: needs diffusers; pip install diffusers") from None
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        _check_kind(name, folder / "config.json")
    elif folder.is_file():
        raise ValueError(
            f"vae={name}: is a file; AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER) "
            "makes a folder of it"
        )
    repository, _, revision = name.removeprefix("hf://").partition("@")
    if not local and (repository.count("/") != 1 or folder.is_absolute()):
        raise ValueError(f"vae={name}: no such folder, and no OWNER/NAME of the hub")
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32}
    options |= {"output_loading_info": True, "revision": revision or None}
    try:
        try:
            vae, read = AutoencoderKL.from_pretrained(folder if local else repository, **options)
        except OSError:
            if local:
                raise
            vae, read = AutoencoderKL.from_pretrained(repository, subfolder="vae", **options)
        odd = [*read["missing_keys"], *read["unexpected_keys"], *read["mismatched_keys"]]
        if odd:  # diffusers would fill in random numbers
            raise OSError(f"its weights are not those of its AutoencoderKL: {str(odd[0])[:100]}")
    except Exception as error:  # of the network, the server and broken files: nearly any kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"vae={name}: cannot be loaded ({reason}); fetch it elsewhere and give its folder, "
            "vae=FOLDER"
        ) from None
    return Autoencoder(name, vae.to(device))


def _check_kind(name: str, path: Path) -> None:
    """Raise ValueError unless a folder's config.json is of an AutoencoderKL."""
    try:
        kind = json.loads(read_plain(path))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"vae={name}: is no folder of diffusers (no config.json with its kind, nor one in vae/)"
        ) from None
    if kind != "AutoencoderKL":
        raise ValueError(f"vae={name}: is a {str(kind)[:100]}; give an AutoencoderKL")


class Settings(Protocol):
    """What a config says of latents, data.vae: see VAEConfig in genmodels/config/schema.py."""

    name: str
    pixels: str
    mean: list[float]
    std: list[float]


class Decoder(NamedTuple):
    """What makes pictures of a model's latents; see decoder_of."""

    autoencoder: Autoencoder
    settings: Settings

    def picture_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the pictures of latents (C, h, w); see Autoencoder."""
        return self.autoencoder.picture_shape(shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Return uint8 pictures (B, 3, H, W), on the CPU, of latents as a model makes them."""
        return self.autoencoder.pictures(raw_latents(x, self.settings), self.settings.pixels)


def decoder_of(settings: Settings, device: torch.device | str) -> Decoder | None:
    """Return what decodes latents of these settings, or None of pictures.

    Raises:
        ValueError: see load_autoencoder.
    """
    return Decoder(load_autoencoder(settings.name, device), settings) if settings.mean else None


def raw_latents(x: Tensor, settings: Settings) -> Tensor:
    """Return z = mean + 2 std x, (B, C, h, w): latents as the VAE has them."""
    return x * (2 * _per_channel(settings.std, x)) + _per_channel(settings.mean, x)


def scaled_latents(z: Tensor, settings: Settings) -> Tensor:
    """Return x = (z - mean) / (2 std), (B, C, h, w): latents as a model has them."""
    return (z - _per_channel(settings.mean, z)) / (2 * _per_channel(settings.std, z))


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
