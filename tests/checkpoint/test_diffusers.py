import subprocess
import sys

import numpy as np
import pytest
import torch

import genmodels
from genmodels import checkpoint, cli
from genmodels.checkpoint.diffusers import export_diffusers, main

NETWORK = {"name": "unet", "channels": [16, 16], "norm_groups": 8, "head_dim": 8, "layers": 1}


def make(tmp_path, labels=False, colour=False, **data):
    """An exported model with random weights; digits are grey."""
    data = {"name": "digits", "labels": labels, **data}
    if colour:
        data = {"name": "imagefolder", "shape": [3, 8, 8], "classes": 4, "labels": labels}
    model = genmodels.build(
        {"data": data, "network": NETWORK, "method": {"name": "edm", "sigma_data": 0.7}}
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    checkpoint.write_export(model, tmp_path / "model", "card")
    return checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize("labels, colour", [(False, False), (True, False), (True, True)])
def test_stock_pipeline_makes_our_images(labels, colour, tmp_path):
    from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler

    model = make(tmp_path, labels, colour)
    assert cli.run(main, [str(tmp_path / "model"), f"out={tmp_path / 'pipe'}"]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(pipeline, ConsistencyModelPipeline)
    assert isinstance(pipeline.scheduler, EDMEulerScheduler)
    pipeline.set_progress_bar_config(disable=True)
    seeds, classes = [0, 5, 2], [3, 0, 2]
    words = dict(batch_size=3, num_inference_steps=18, output_type="np")
    words["class_labels"] = classes if labels else None
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    theirs = pipeline(generator=generators(), **words).images
    ours = model.sample(seeds, classes if labels else None, sampler="euler", steps=18)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.std() > 0.1
    assert np.abs(ours - theirs).max() < 1e-4
    if not colour:  # the pipeline takes latents of three channels only
        return
    # The rest of the difference is their first noise level, sqrt(80^2 + 1) instead of 80.
    noise = torch.stack([torch.randn(model.shape, generator=g) for g in generators()])
    theirs = pipeline(latents=noise * 80 / 6401**0.5, generator=generators(), **words).images
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.slow
def test_folder_needs_nothing_of_this_package(tmp_path):
    make(tmp_path)
    out = export_diffusers(tmp_path / "model", tmp_path / "pipe")
    code = (
        "import sys; from diffusers import DiffusionPipeline;"
        f"pipe = DiffusionPipeline.from_pretrained({str(out)!r});"
        "assert pipe(num_inference_steps=2, output_type='np').images.shape == (1, 8, 8, 1);"
        "assert not any(name.startswith('genmodels') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    make(tmp_path, pad=0)
    with pytest.raises(ValueError, match="exists"):
        export_diffusers(tmp_path / "model", tmp_path / "model")
    other = genmodels.build(
        {
            "data": {"name": "imagefolder", "shape": [3, 8, 10], "classes": 0},
            "network": NETWORK,
            "method": {"name": "edm"},
        }
    )
    checkpoint.write_export(other, tmp_path / "oblong", "card")
    with pytest.raises(ValueError, match="images of 8x10; the pipeline makes squares"):
        export_diffusers(tmp_path / "oblong", tmp_path / "x")
    other = genmodels.build(
        {
            "data": {"name": "digits"},
            "method": {"name": "edm"},
            "network": {"name": "edm_unet", "channels": 16, "blocks": 1, "attention": []},
        }
    )
    checkpoint.write_export(other, tmp_path / "edm_unet", "card")
    with pytest.raises(ValueError, match="network edm_unet; diffusers has a place for"):
        export_diffusers(tmp_path / "edm_unet", tmp_path / "x")
    assert not (tmp_path / "x").exists()
