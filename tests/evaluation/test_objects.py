"""ImageScores equals Scorer and torchmetrics' metrics, in one process and in two."""

import re

import numpy as np
import pytest
import torch

from genmodels.evaluation import ImageScores, Scorer
from genmodels.metrics.features import Features
from tests.helpers.paths import ROOT

METRICS = ["fd", "kid", "prc", "mind", "is"]


class Net(torch.nn.Module):
    """Features of 4x4 grey images, fixed and of two kinds."""

    num_features = 6

    def forward(self, images):
        x = images.flatten(1).float() / 255
        return x[:, :6] + x[:, 6:12].square()


def small():
    def both(images):
        return {"features": Net()(images), "logits": images.flatten(1)[:, :5].float() / 40}

    return Features("small", None, "none", 6, both, outputs=("features", "logits"), batch=64)


def pictures(count, seed, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 1, 4, 4), generator=generator).byte()


REAL, MADE = pictures(210, 0), pictures(160, 1, 200)


def filled(metrics, real=REAL, made=MADE):
    scores = ImageScores(metrics, small())
    for batch in real.split(50):
        scores.update(batch, real=True)
    for batch in made.split(33):
        scores.update(batch)
    return scores


def test_it_equals_the_scorer_and_begins_anew():
    scores = filled(METRICS)
    truth = Scorer(METRICS, small(), reference=REAL)(MADE)
    found = scores.compute()
    for name, entry in truth.items():
        assert float(found[name]) == pytest.approx(entry["value"], rel=1e-9), name
        if "stderr" in entry:
            assert float(found[f"{name}_stderr"]) == pytest.approx(entry["stderr"], rel=1e-6), name
    assert {"fd_stderr", "kid_stderr", "precision", "recall", "mind", "is"} <= set(found)
    scores.reset()
    with pytest.raises(ValueError, match="there are no images: update with some first"):
        scores.compute()
    scores.update(REAL, real=True)
    scores.update(REAL)
    assert float(scores.compute()["fd"]) == pytest.approx(0, abs=1e-9)


def test_it_equals_torchmetrics_on_equal_features():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    made = MADE[:150]
    fid = FrechetInceptionDistance(feature=Net(), input_img_size=(1, 4, 4))
    kid = KernelInceptionDistance(feature=Net(), subsets=1, subset_size=150)
    for metric in (fid, kid):
        metric.update(REAL[:150], real=True)
        metric.update(made, real=False)
    found = filled(["fd", "kid"], REAL[:150], made).compute()
    assert float(found["fd"]) == pytest.approx(float(fid.compute()), rel=1e-5)
    assert float(found["kid"]) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_what_cannot_be_had_is_refused_at_once():
    with pytest.raises(ValueError, match="metrics=memorised: .* use Scorer"):
        ImageScores(["memorised"], small())
    with pytest.raises(ValueError, match="metrics=is: features=pixels gives no class scores"):
        ImageScores(["is"], "pixels")
    with pytest.raises(ValueError, match="metrics=fid: is kept for features=inception"):
        ImageScores(["fid"], small())


def test_the_example_of_the_documentation():
    text = (ROOT / "docs/evaluation.md").read_text()
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "reset()" in part]
    names: dict = {}
    exec(code, names)
    for name in ("fd", "kid", "precision", "recall"):
        truth = names["scores"][name]["value"]
        assert float(names["same"][name]) == pytest.approx(truth, rel=1e-9), name


def _of_one_process(rank, address, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    made = MADE[:70] if rank == 0 else MADE[70:]  # unequal shares
    found = filled(METRICS, REAL[rank::2], made).compute()
    queue.put((rank, {name: float(value) for name, value in found.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_all_images(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [
        context.Process(target=_of_one_process, args=(rank, f"file://{tmp_path}/store", queue))
        for rank in range(2)
    ]
    for job in jobs:
        job.start()
    results = dict(queue.get(timeout=120) for _ in jobs)
    for job in jobs:
        job.join()
    assert results[0] == results[1]
    truth = Scorer(METRICS, small(), reference=REAL)(MADE)
    for name in ("fd", "kid", "precision", "recall", "mind"):
        np.testing.assert_allclose(results[0][name], truth[name]["value"], rtol=1e-9)
    alone = filled(METRICS, REAL, MADE[:70]).compute()
    assert results[0]["fd"] != pytest.approx(float(alone["fd"]), rel=1e-3)
