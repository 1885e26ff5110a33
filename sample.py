"""Generate images with a trained model, or restore noisy ones.

    python sample.py MODEL num=64 seed=0 out=DIR             seeds 0..63
    python sample.py MODEL seeds=0-63,100 labels=3 out=DIR   labels: 3 | 3,5 | balanced
    python sample.py MODEL cluster=IMAGES out=DIR            clusters.csv and exemplars.png
    python sample.py MODEL inpaint=PATH mask=PATH out=DIR    seed k completes image k (in turn)
    torchrun --nproc_per_node 2 sample.py MODEL num=64 out=DIR
    python sample.py MODEL denoise=PATH law=lognormal level=0.3 out=DIR     level=auto estimates it

MODEL is a run folder, a .ckpt or an exported folder. Writes DIR/000000.png ... named by seed and
DIR/grid.png; a DIR that holds images of other seeds is refused. With format=npz DIR/images.npz
(uint8 NHWC images, seeds, labels). Image k depends on seed k alone: not on batch=, on the number of
processes, or on the other seeds. IMAGES to cluster are a folder, .zip, .npz or NAME[:SPLIT].

denoise= takes a picture, a folder, .zip or .npz of them, or an .npy of floats (N, H, W, C) on the
scale 0..255, not clipped, which keeps what 8 bits cut off; DIR/000000.png ... follow their order.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from genmodels import benchmark, checkpoint, cli, clusters, files, images

SCHEMA = {
    "num": (int, 64, "how many images"),
    "seed": (int, 0, "the first seed"),
    "seeds": (str, "", "seeds in place of num and seed: 0-63,100"),
    "labels": (
        str,
        "",
        "classes: 3, or 3,5 (seed k gets entry k mod 2), or balanced; empty: random",
    ),
    "denoise": (str, "", "noisy images to restore, in place of generating"),
    "law": (str, "", "denoise: law of the noise, one that the method knows (GBM: lognormal)"),
    "level": (str, "auto", "denoise: its level in the law's unit, or auto"),
    "cluster": (str, "", "assign these images to the model's clusters in place of generating"),
    "inpaint": (str, "", "images to complete: a picture, folder, .zip or .npz"),
    "mask": (str, "", "one picture, or one for each of them: white (>= 128) = known, black = made"),
    "out": (str, "samples", "folder to write to"),
    "format": (str, "png", "png or npz"),
    "batch": (int, 64, "images at a time; changes no image"),
    "precision": (str, "fp32", "fp32 (without TF32) or bf16"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "noise": (str, "cpu", "device of the noise generators; cuda reproduces seeds published for it"),
    "ema": (bool, True, "the averaged weights; false: the raw ones of a checkpoint"),
}


def sample(argv):
    """Generate images; see the module's docstring."""
    positionals, words, flags = cli.split_words(argv)
    cli.check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(cli.help_text(__doc__, SCHEMA))
        return
    model, words = cli.one_model(positionals), dict(words)
    common = {key: words.pop(key) for key in list(words) if key in SCHEMA}
    options = cli.typed_words(common, SCHEMA)
    cli.check_choice("format", options["format"], ("png", "npz"))
    cli.check_choice("precision", options["precision"], ("fp32", "bf16"))
    cli.check_device("device", options["device"], ("auto", "cpu", "cuda", "mps"))
    cli.check_device("noise", options["noise"], ("cpu", "cuda", "mps"))
    if options["cluster"]:
        return cluster_images(model, words, options)
    seeds, out = cli.seed_list(options), Path(options["out"])
    if not options["denoise"]:
        check_folder(out, seeds, options["format"])
    state, device = benchmark.process_state(), benchmark.pick_device(options["device"])
    model = checkpoint.load(model, ema=options["ema"], device=device)
    if options["denoise"]:
        return denoise(model, options, words, out, state)
    extra = cli.typed_words(words, model.SAMPLE_OPTIONS, also=SCHEMA)
    labels = benchmark.labels_for(seeds, options["labels"], model.classes)
    settings = {key: value for key, value in extra.items() if value is not None}
    checkpoint.load_guide(settings, device)
    settings |= {key: options[key] for key in ("batch", "precision", "noise")}
    settings |= known_pixels(model, options["inpaint"], options["mask"])
    if options["format"] == "npz":
        write_npz(out, model, seeds, labels, settings, state)
    else:
        write_pngs(out, model, seeds, labels, settings, state)
    if state.is_main_process:
        chains = f", {model.chains}" if getattr(model, "chains", "") else ""
        print(f"{len(seeds)} images{chains}, {model.nfe} network evaluations each: {out}")


def cluster_images(path, words, options):
    """Write which cluster each image belongs to, and the most certain ones of every cluster."""
    cli.typed_words(words, {}, also=SCHEMA)
    out = Path(options["out"])
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    model = checkpoint.load(
        path, ema=options["ema"], device=benchmark.pick_device(options["device"])
    )
    if not hasattr(model, "cluster"):
        raise ValueError(f"cluster={options['cluster']}: {type(model).__name__} has no clusters")
    pixels, names = clusters.read_named(options["cluster"], model.cfg.data)
    if tuple(pixels.shape[1:]) != model.shape:
        raise ValueError(
            f"cluster={options['cluster']}: images of shape {tuple(pixels.shape[1:])}, the model "
            f"knows {model.shape}"
        )
    probabilities = clusters.assign(model, pixels, options["batch"])
    clusters.write_report(out, pixels, names, probabilities)
    sizes = torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1]).tolist()
    print(f"{len(pixels)} images in clusters of {', '.join(map(str, sizes))}: {out}")


def known_pixels(model, inpaint, mask):
    """Return sample()'s known= and mask= of inpaint= and mask=, or nothing if neither is given.

    Raises:
        ValueError: one without the other, a model that does not complete images, a wrong shape.
    """
    if not inpaint and not mask:
        return {}
    if not inpaint or not mask:
        raise ValueError(f"inpaint={inpaint}, mask={mask}: give both")
    if not model.INPAINTS:
        raise ValueError(f"inpaint={inpaint}: {type(model).__name__} does not complete images")
    known, masks = read_pictures(inpaint, model), read_pictures(mask, model)
    if len(masks) not in (1, len(known)):
        raise ValueError(f"mask={mask}: {len(masks)} pictures for {len(known)}; give 1 or as many")
    return {"known": images.from_uint8(known), "mask": masks >= 128}


def read_pictures(path, model):
    """Return uint8 images (N, C, H, W) of the model's shape.

    Raises:
        ValueError: another size.
    """
    if Path(path).is_file() and Path(path).suffix.lower() not in (".zip", ".npz"):
        pixels = images.read_image(Path(path), model.shape[0])[None]
    else:
        pixels = images.read_images(path)
        pixels = pixels.expand(-1, model.shape[0], -1, -1) if pixels.shape[1] == 1 else pixels
    if tuple(pixels.shape[1:]) != tuple(model.shape):
        shapes = f"{tuple(pixels.shape[1:])}, the model makes {tuple(model.shape)}"
        raise ValueError(f"{path}: has images of shape {shapes}")
    return pixels


def denoise(model, options, words, out, state):
    """Restore the images of denoise=, each process its share, and write them as PNGs."""
    cli.typed_words(words, {}, also=SCHEMA)  # the options of sample() mean nothing here
    cli.check_choice("law", options["law"], tuple(model.DENOISE_LAWS) or ("no law: no denoiser",))
    text = options["level"]
    try:
        level = None if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"level={text}: must be a number, or auto") from None
    if options["format"] != "png":
        raise ValueError(f"format={options['format']}: denoise= writes png")
    noisy = read_noisy(Path(options["denoise"]), model)
    check_folder(out, range(len(noisy)), "png")
    labels = benchmark.labels_for(range(len(noisy)), options["labels"], model.classes)
    if model.classes and labels is None and not getattr(model.cfg.method, "label_dropout", 0):
        raise ValueError(
            "labels=: this model was trained with a class for every image and knows no image "
            "without; give labels=3, or labels=3,5 (image k gets entry k mod 2)"
        )
    own = torch.arange(state.process_index, len(noisy), state.num_processes)
    levels = []
    for part in own.split(options["batch"]):
        told = None if labels is None else torch.tensor(labels, device=model.device)[part]
        restored, found = model.restore(noisy[part], options["law"], level, told)
        out.mkdir(parents=True, exist_ok=True)
        for index, picture in zip(part.tolist(), images.to_uint8(restored)):
            images.write_png(out / f"{index:06d}.png", picture)
        levels += found.tolist()
    state.wait_for_everyone()
    if state.is_main_process:
        shown = f"{min(levels):.3g}" if level else f"{min(levels):.3g} to {max(levels):.3g} (found)"
        print(f"{len(noisy)} images restored, level {shown}: {out}")


def read_noisy(path, model):
    """Return noisy images as float32 (N, C, H, W) on the [-1, 1] scale, not clipped."""
    channels = model.shape[0]
    if path.suffix == ".npy" and path.is_file():
        array = np.load(path, allow_pickle=False)
        if array.ndim != 4 or array.dtype.kind != "f":
            raise ValueError(f"denoise={path}: {array.dtype} {array.shape}; must be (N, H, W, C)")
        noisy = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    elif path.suffix.lower() in files.SUFFIXES and path.is_file():
        noisy = images.from_uint8(images.read_image(path, channels)[None])
    else:
        noisy = images.from_uint8(images.read_images(path, channels))
    if noisy.shape[1:] != model.shape or not len(noisy):
        raise ValueError(
            f"denoise={path}: {len(noisy)} images of shape {tuple(noisy.shape[1:])}, "
            f"must be one or more of {model.shape}"
        )
    model.noisy_state(noisy)  # all of them, before the first is written
    return noisy


def check_folder(out, seeds, kind):
    """Raise ValueError if images written to this folder would mix with those of other seeds."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    numbered = out.glob("[0-9]*.png") if kind == "png" else ()
    asked = {f"{seed:06d}" for seed in seeds}
    strange = sorted(p.name for p in numbered if p.stem.isdecimal() and p.stem not in asked)
    if strange:
        raise ValueError(
            f"out={out}: holds images of {len(strange)} other seeds ({strange[0]}, ...); "
            "name an empty folder or delete them"
        )


def write_pngs(out, model, seeds, labels, settings, state):
    """Write OUT/SEED.png, each process its share, then OUT/grid.png of the first 100."""
    share = slice(state.process_index, None, state.num_processes)
    own_labels = None if labels is None else labels[share]
    batches = benchmark.generate(
        model, seeds[share], own_labels, progress=state.is_main_process, **settings
    )
    for own, _, pictures in batches:
        out.mkdir(parents=True, exist_ok=True)
        for seed, picture in zip(own, pictures):
            images.write_png(out / f"{seed:06d}.png", picture)
    state.wait_for_everyone()
    if state.is_main_process:
        first = [images.read_image(out / f"{seed:06d}.png", model.shape[0]) for seed in seeds[:100]]
        sheet = images.grid(torch.stack(first))
        images.write_png(out / "grid.png", images.enlarge(sheet, max(1, 512 // sheet.shape[-1])))


def write_npz(out, model, seeds, labels, settings, state):
    """Write OUT/images.npz in the order of the seeds; labels are -1 where they were random."""
    pictures = benchmark.generate_everywhere(model, seeds, labels, **settings)
    if state.is_main_process:
        nhwc = pictures.permute(0, 2, 3, 1).numpy()
        out.mkdir(parents=True, exist_ok=True)
        known = np.full(len(seeds), -1) if labels is None else np.array(labels)
        images.write_npz(out / "images.npz", images=nhwc, seeds=np.array(seeds), labels=known)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(sample, argv)


if __name__ == "__main__":
    sys.exit(main())
