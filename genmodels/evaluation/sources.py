"""Images to score: real ones, or a model's, read or made only when they are looked at."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

from genmodels import generation, images
from genmodels.config import DataConfig
from genmodels.data import DATASETS, load_split
from genmodels.data.own import OnDisk
from genmodels.distributed import gather
from genmodels.generation import check_folder
from genmodels.images import as_bytes, write_npz, write_png

_HELD = 4 << 30  # bytes of pictures held; more are read in each pass, and once for their hash


class Pictures:
    """Images that exist: a uint8 tensor (N, C, H, W), or what stands in for one.

    Points in the plane, float32 in [-1, 1], are read as bytes too, as a model's are.
    """

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, tuple(pixels.shape[1:])

    def __len__(self):
        return len(self.pixels)

    def read(self, index, batch=64):
        """Yield the images of these places, uint8 (B, C, H, W)."""
        for part in index.split(batch):
            yield as_bytes(self.pixels[part])

    def identity(self):
        """Return what tells this set from another: the sha256 of its pixels."""
        return sha256_of(*self.read(torch.arange(len(self))))


class Generated:
    """Images that a model makes when they are read; image k depends on seeds[k] alone.

    Args:
        model: a method in eval mode.
        seeds: one for each image.
        labels: one for each seed, or None.
        save: "" or where to keep the images: a folder for SEED.png, or an .npz that write_npz()
            writes in the end.
        settings: of generation.generate.

    Raises:
        ValueError: the folder holds images of other seeds.
    """

    def __init__(self, model, seeds, labels=None, *, save="", **settings):
        self.model, self.seeds, self.labels = model, list(seeds), labels
        self.shape, self.settings, self.save, self.held = tuple(model.shape), settings, save, {}
        if save and not save.endswith(".npz"):
            check_folder("save_images", Path(save), self.seeds)

    def __len__(self):
        return len(self.seeds)

    def read(self, index):
        """Yield the images of these places, uint8 (B, C, H, W)."""
        places, labels = index.tolist(), None
        seeds = [self.seeds[i] for i in places]
        if self.labels is not None:
            labels = [self.labels[i] for i in places]
        settings = {"progress": False} | self.settings
        for own, _, pictures in generation.generate(self.model, seeds, labels, **settings):
            if self.save.endswith(".npz"):
                self.held |= dict(zip(places, pictures.numpy()))
                places = places[len(own) :]
            elif self.save:
                Path(self.save).mkdir(exist_ok=True)
                for seed, picture in zip(own, pictures):
                    write_png(Path(self.save) / f"{seed:06d}.png", picture)
            yield pictures

    def write_npz(self):
        """Write the images of all processes in the order of the seeds, if an .npz was named."""
        if not self.save.endswith(".npz"):
            return
        held = gather(self.held)
        if held is not None:
            together = {place: picture for part in held for place, picture in part.items()}
            table = np.stack([together[i] for i in range(len(self))]).transpose(0, 2, 3, 1)
            write_npz(self.save, images=table, seeds=np.array(self.seeds))

    def identity(self):
        """Return what tells this set from another: weights, seeds, labels and settings."""
        # The batch changes no image: after a lack of memory the pass goes on with a smaller one.
        settings = {k: _named(v) for k, v in self.settings.items() if k != "batch"}
        words = [self.seeds, self.labels, settings]
        return [sha256_of(*self.model.state_dict().values()), words]


def _named(value):
    """Return a setting as plain data; a guide becomes the hash of its weights."""
    is_model = isinstance(value, torch.nn.Module)
    return sha256_of(*value.state_dict().values()) if is_model else value


def sha256_of(*tensors):
    """Return the sha256 of the tensors' bytes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(str(tuple(array.shape[1:])).encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def where(options, model=None):
    """Return how read_source is to read a data set."""
    trained_on = model.cfg.data if model else None
    return {"root": options["root"], "pad": options["pad"], "trained_on": trained_on}


def check_shape(source, real, model):
    """Raise ValueError unless the model makes images of the reference's shape (C, H, W)."""
    if real and tuple(real) != tuple(model.shape):
        raise ValueError(
            f"data={source}: has images of shape {tuple(real)}, the model makes "
            f"{tuple(model.shape)}; name a set of that shape, or pad= background around it"
        )


def read_source(source, *, root="", pad=-1, trained_on=None):
    """Return (images, labels or None, callable giving {"train": ..., "held_out": ...}).

    Args:
        source: NAME or NAME:SPLIT of a data set, or the path of a folder, .zip or .npz.
        root: where the data set lies; "" = as in training, else $GENMODELS_DATA, else ./data.
        pad: background pixels on each side of its images; -1 = as in training, else 0.
        trained_on: DataConfig of a model, used for its own data set.

    Raises:
        ValueError: no such data set, split or path; broken or mixed images.
    """
    name, _, split = source.partition(":")
    if trained_on is not None and name == trained_on.name:
        cfg = DataConfig(**vars(trained_on))
    elif name in DATASETS:
        cfg = DataConfig(name=name)
    else:
        return _in_files(source), None, dict
    cfg.root, cfg.pad = root or cfg.root, cfg.pad if pad < 0 else pad
    pixels, labels = load_split(cfg, split or "train")
    return (
        pixels,
        labels,
        lambda: {"train": load_split(cfg, "train")[0], "held_out": load_split(cfg, "test")[0]},
    )


def _in_files(path):
    """Return the images of a folder, .zip or .npz: a tensor, or OnDisk what would fill memory."""
    if Path(path).suffix in (".npz", ".npy"):
        return images.read_images(path)
    tree, names, shape = images.sample_tree(path)
    read = partial(images.read_samples, tree, names, shape)
    pixels = OnDisk(read, shape, torch.arange(len(names)))
    return pixels if pixels.nbytes > _HELD else pixels.load()


def of_test(source):
    """Return a data set's name with its split, test if none is named; a path as it is."""
    return f"{source}:test" if source in DATASETS else source
