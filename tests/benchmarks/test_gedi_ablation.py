"""The stacked step of benchmarks.gedi_ablation is the method's step."""

import torch

from benchmarks.gedi_ablation import Runs
from tests.helpers.gedi_models import batch_of, build, points

WORDS = (
    "method.data_noise=0",
    "method.view_noise=0",
    "method.l2=0.03",
    "method.tau=0.3",
    "method.inv_start=2",
    "method.inv_ramp=4",
    "network.input_scale=4",
    "method.w_inv=3",
)
VARIANTS = ((), ("method.w_gen=0",), ("method.detach_target=true", "method.w_prior_mean=7"))


def test_runs_trained_at_once_are_those_trained_alone(monkeypatch):
    """Without noise, on given chains: the same parameters after some steps of Adam."""
    x, fake = points(), points().flip(0) * 0.9
    models = [build(*WORDS, *words, f"seed={i}") for i, words in enumerate(VARIANTS)]
    runs = Runs(models, 0)
    monkeypatch.setattr(Runs, "chains", lambda self, count: fake.flatten(1).expand(3, -1, -1))
    for number in range(8):
        runs.step(x.flatten(1).expand(3, -1, -1), number)
    for i, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), model.cfg.optim.lr)
        model._fakes = lambda n: fake
        for number in range(8):
            monkeypatch.setattr(type(model), "global_step", number)
            optimizer.zero_grad()
            model.loss(batch_of(x))[0].backward()
            optimizer.step()
        for own, stacked in zip(model.parameters(), runs.parameters):
            torch.testing.assert_close(own, stacked[i], atol=2e-5, rtol=1e-3)
