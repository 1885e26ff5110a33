import math

import pytest
import torch
from conftest import ROOT

import evaluate
import genmodels
import sample
import train
from genmodels import checkpoint
from genmodels.checkpoint import read_checkpoint
from genmodels.methods.gedi import GEDI

POINTS = {"data": {"name": "moons", "batch_size": 32}, "network": {"name": "perceptron"},
          "method": {"name": "gedi"}}  # fmt: skip
SMALL = ("network.width=16", "method.buffer=64", "method.chain_steps=2", "method.step=0.005",
         "method.noise_scale=0", "method.w_inv=1", "method.w_prior_mean=1")  # fmt: skip


def build(*words):
    return genmodels.build([POINTS], *SMALL, *words)


def batch_of(x, label=None):
    label = torch.full((len(x),), -1) if label is None else label
    return {"image": x, "label": label, "n": torch.arange(len(x))}


@pytest.fixture
def x():
    return 2 * torch.rand(32, 2, 1, 1, generator=torch.Generator().manual_seed(0)) - 1


def plane(side=120):
    """Centres of a grid over [-1, 1]^2, (side^2, 2, 1, 1), and the area of a cell."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    points = torch.cartesian_prod(axis, axis)
    return points.reshape(-1, 2, 1, 1), (2 / side) ** 2


def generative(model, x):
    """The generative part of the loss alone, and the f it is made of."""
    with torch.random.fork_rng(devices=[]):
        _, logs = model.loss(batch_of(x))
    return -float(logs["gap"])


# ------------------------------------------------------------------------------------------------
# Energy and density


def test_energy_joint_and_predictions_belong_together(x):
    """p(x) = sum_y p(x, y) and p(y | x) = p(x, y) / p(x), from logits computed here."""
    model = build("method.tau=0.2", "network.input_scale=1").eval()
    w, b = model.head[0].weight, model.head[0].bias
    hidden = x.flatten(1)
    for layer in model.net.layers:
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
    z = (hidden @ w.T + b) / 0.2
    with torch.no_grad():
        joint = torch.stack([-model.energy(x, torch.full((32,), y)) for y in range(2)], 1)
        torch.testing.assert_close(joint, z)
        torch.testing.assert_close(-model.energy(x), joint.logsumexp(1))
        torch.testing.assert_close(model.cluster(x), z.softmax(1))
        torch.testing.assert_close(model.energy(x, torch.full((32,), -1)), model.energy(x))


def test_h_constant_f(x):
    """No force on the data against the chains; the density is uniform."""
    model = build()
    for layer in model.head:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert generative(model, x) == 0
    points, cell = plane()
    f = -model.energy(points).detach().double()
    log_density = f - (f.logsumexp(0) + math.log(cell))
    torch.testing.assert_close(log_density, torch.full_like(f, -math.log(4)))


def test_i_adding_a_constant_to_all_logits(x):
    model = build("method.tau=0.2").eval()
    before = model.cluster(x), model.energy(x).detach(), generative(model, x)
    with torch.no_grad():
        model.head[-1].bias += 3.0
    torch.testing.assert_close(model.cluster(x), before[0])
    torch.testing.assert_close(model.energy(x).detach(), before[1] - 3.0 / 0.2)
    assert generative(model, x) == pytest.approx(before[2], abs=1e-4)


def test_j_gradient_of_the_generative_term(x, monkeypatch):
    """-1/B at each f of the data, +1/B at each of the chains; f has no part in other terms here."""
    model, seen = build("method.w_inv=0", "method.w_prior_mean=0", "method.w_gen=3"), []
    original = GEDI.outputs

    def spy(self, y):
        z, f = original(self, y)
        if len(y) == 96:
            f.retain_grad()
            seen.append(f)
        return z, f

    monkeypatch.setattr(GEDI, "outputs", spy)
    model.loss(batch_of(x))[0].backward()
    (f,) = seen
    expected = torch.cat([torch.full((32,), -3 / 32), torch.zeros(32), torch.full((32,), 3 / 32)])
    torch.testing.assert_close(f.grad, expected)


@pytest.mark.parametrize("w_inv, w_prior", [(1.0, 1.0), (10.0, 1.0), (0.3, 4.0)])
def test_k_the_bound_holds_with_the_exact_normaliser(w_inv, w_prior):
    """w_gen=1: L_GEN + w_inv L_INV + w_prior L_PRIOR <= E log p(x) - w_prior log C <= -H - ..."""
    from genmodels.methods.gedi_terms import invariance, log_marginal, prior_cross_entropy

    points, cell = plane(60)
    rings = (points.flatten(1).norm(dim=1).double() - 0.6).abs()
    p = torch.exp(-0.5 * (rings / 0.2) ** 2)
    p = p / p.sum()
    entropy = -float((p * p.log()).sum()) + math.log(cell)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 1.0, 3.0, 10.0):
        model = build("method.tau=0.5").double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise / 4)
            view = points + 0.1 * torch.randn(points.shape, generator=generator)
            z, f = outputs64(model, points)
            log_p = f - (f.logsumexp(0) + math.log(cell))
            gen = float((p * log_p).sum())
            inv = -float((p * invariance(z, outputs64(model, view)[0])).sum())
            log_pbar = (z.log_softmax(1) + p.log()[:, None]).logsumexp(0)
            prior = -float(prior_cross_entropy(log_pbar))
        assert inv <= 0 and prior <= -math.log(2) + 1e-12
        assert -float(prior_cross_entropy(log_marginal(z))) <= -math.log(2) + 1e-12
        total = gen + w_inv * inv + w_prior * prior
        assert total <= gen - w_prior * math.log(2) + 1e-9
        assert total <= -entropy - w_prior * math.log(2) + 1e-9


def outputs64(model, x):
    """z / tau and f in float64; outputs() itself works in float32."""
    z = model.head(model.net(x.double())) / model.cfg.method.tau
    return z, z.logsumexp(dim=1)


def test_the_bound_is_tight_at_the_best_model():
    """p itself as the density, one-hot equal predictions, balanced: equality, by construction."""
    from genmodels.methods.gedi_terms import invariance, log_marginal, prior_cross_entropy

    points, cell = plane(40)
    side = (points[:, 0, 0, 0] > 0).long()
    p = torch.full((1600,), 1 / 1600, dtype=torch.float64)  # uniform on the box
    z = 200.0 * torch.nn.functional.one_hot(side, 2).double()
    f = z.logsumexp(1)
    gen = float((p * (f - f.logsumexp(0) - math.log(cell))).sum())
    total = gen - float(invariance(z, z).mean() + prior_cross_entropy(log_marginal(z)))
    assert total == pytest.approx(-math.log(4) - math.log(2))


def test_a_scalar_head_has_its_own_density(x):
    model = build("method.energy=scalar").eval()
    z, f = model.outputs(x)
    assert not torch.allclose(f, z.logsumexp(1))
    expected = model.net(x) @ model.scalar.weight[0] + model.scalar.bias
    torch.testing.assert_close(f, expected)
    torch.testing.assert_close(model.energy(x, torch.zeros(32, dtype=torch.int64)),
                               -f - z.log_softmax(1)[:, 0])  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The loss and its variants


def test_the_loss_is_the_sum_of_its_terms(x):
    words = ("method.w_gen=0.5", "method.w_inv=2", "method.w_prior_mean=3", "method.l2=0.1")
    model = build(*words)
    loss, logs = model.loss(batch_of(x))
    z = [model.outputs(part)[0] for part in seen_by(model, x)]
    inv = torch.nn.functional.cross_entropy(z[0], z[1].softmax(1))
    prior = -z[0].softmax(1).mean(0).log().mean()
    f = z[0].logsumexp(1), z[2].logsumexp(1)
    squares = f[0].square().mean() + f[1].square().mean()
    expected = 2 * inv + 3 * prior - 0.5 * (f[0].mean() - f[1].mean()) + 0.1 * squares
    torch.testing.assert_close(loss, expected)
    assert float(logs["inv"]) == pytest.approx(float(inv) / math.log(2), abs=1e-5)
    assert float(logs["prior_gap"]) == pytest.approx(float(prior) - math.log(2), abs=1e-5)


def seen_by(model, x):
    """Data, view and chains of the latest call of loss, made again from the same keys."""
    from genmodels.views import add_noise, view

    cfg, n = model.cfg.method, torch.arange(len(x))
    slots = model.replay.slots(len(x), 0)
    return (add_noise(x, cfg.data_noise, 0, n), view(x, 0, n, noise=cfg.view_noise),
            model.replay.entries[slots])  # fmt: skip


def test_no_gen_runs_no_chain(x):
    model = build("method.w_gen=0")
    loss, logs = model.loss(batch_of(x))
    loss.backward()
    assert "gap" not in logs and model.replay.entries is None


def test_jem_is_a_setting(x):
    label = torch.arange(32) % 2
    words = ("method.w_inv=0", "method.w_prior_mean=0", "method.w_label=1")
    model = build(*words)
    loss, logs = model.loss(batch_of(x, label))
    real, _, fake = seen_by(model, x)
    cross = torch.nn.functional.cross_entropy(model.outputs(real)[0], label)
    gap = model.energy(fake).mean() - model.energy(real).mean()
    torch.testing.assert_close(loss, cross - gap)


def test_sums_teach_through_pairs_of_neighbours(x):
    label = torch.arange(32) % 2
    model = build("method.w_gen=0", "method.w_inv=0", "method.w_prior_mean=0", "method.w_sum=1")
    loss, _ = model.loss(batch_of(x, label))
    p = model.outputs(seen_real(model, x))[0].softmax(1)
    a, b = p[0::2], p[1::2]
    table = torch.stack([a[:, 0] * b[:, 0], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0],
                         a[:, 1] * b[:, 1]], 1)  # fmt: skip
    sums = label[0::2] + label[1::2]
    torch.testing.assert_close(loss, -table.gather(1, sums[:, None]).log().mean())
    with pytest.raises(ValueError, match="data.batch_size: gives a process 31 images"):
        model.loss(batch_of(x[:31], label[:31]))


def seen_real(model, x):
    from genmodels.views import add_noise

    return add_noise(x, model.cfg.method.data_noise, 0, torch.arange(len(x)))


def test_weights_rise_as_told():
    model = build("method.inv_start=100", "method.inv_ramp=50", "method.gen_ramp=200",
                  "method.w_gen=2", "method.w_inv=4")  # fmt: skip
    table = {0: (0.2, 0), 100: (1.1, 0), 125: (1.325, 2), 150: (1.55, 4), 200: (2, 4), 999: (2, 4)}
    for step, weights in table.items():
        assert model._weights(step) == pytest.approx(weights)
    assert build("method.inv_start=5")._weights(4)[1] == 0
    assert build("method.inv_start=5")._weights(5)[1] == 1


# ------------------------------------------------------------------------------------------------
# Chains


def test_chains_freeze_the_parameters_and_leave_the_graph(x, monkeypatch):
    model, seen = build(), []
    original = GEDI.energy

    def spy(self, y, labels=None):
        seen.append(any(p.requires_grad for p in self.parameters()))
        return original(self, y, labels)

    monkeypatch.setattr(GEDI, "energy", spy)
    fake = model._fakes(torch.arange(32))
    assert seen == [False, False] and not fake.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.replay.entries[model.replay.slots(32, 0)], fake)


@pytest.mark.parametrize("step, scale, variance", [(0.02, 0.2, 1.0101), (0.05, 0.1, 0.1026)])
def test_stationary_variance(monkeypatch, step, scale, variance):
    """On a standard normal x' = (1 - a) x + s z has s^2 / (1 - (1 - a)^2); s^2 / 2a is its T."""
    monkeypatch.setattr(GEDI, "energy", lambda self, y, labels: 0.5 * y.square().flatten(1).sum(1))
    model = build(f"method.step={step}", f"method.noise_scale={scale}")
    start = torch.zeros(4000, 2, 1, 1)
    end = model._chain(start, 150, torch.arange(4000))
    assert float(end.var()) == pytest.approx(variance, rel=5 * (2 / 8000) ** 0.5)


def test_noise_scale_0_is_temperature_1():
    model = build("method.step=0.02", "method.noise_scale=0")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    start = torch.zeros(4000, 2, 1, 1)
    end = model._chain(start, 1, torch.arange(4000))
    assert float(end.std()) == pytest.approx(0.2, rel=0.03)


def test_another_retry_is_other_noise_and_half_the_lr(x):
    first, same, other = build(), build(), build("method.retry=1")
    fakes = [model._fakes(torch.arange(32)) for model in (first, same, other)]
    assert torch.equal(fakes[0], fakes[1]) and not torch.allclose(fakes[0], fakes[2], atol=1e-3)
    assert other.lr_factor(7) == first.lr_factor(7) / 2


def test_samples_depend_on_their_seed_alone():
    model = build().eval()
    all_of_them = model.sample([3, 4, 2**40, 9], steps=5)
    torch.testing.assert_close(model.sample([2**40], steps=5)[0], all_of_them[2])
    assert model.nfe == 5 and model.chains == "fresh chains of 5 steps"
    assert not torch.equal(all_of_them[0], all_of_them[1])
    zero = model.sample([3], steps=0)
    assert zero.abs().max() <= 1


def test_chains_of_a_cluster_end_in_it():
    """f with two peaks, one for each cluster: labels choose the peak."""
    model = build("method.step=0.01").eval()

    def outputs(y):
        centres = torch.tensor([[-0.6, 0.0], [0.6, 0.0]])
        z = -8 * (y.flatten(1)[:, None] - centres).square().sum(2)
        return z, z.logsumexp(1)

    model.outputs = outputs
    for label, side in ((0, -1), (1, 1)):
        ends = model.sample(range(1000), labels=label, steps=50)[:, 0, 0, 0]
        # Normal around side * 0.6 with variance 2 a / (1 - (1 - 16 a)^2).
        assert float(ends.mean()) == pytest.approx(0.6 * side, abs=5 * 0.26 / 1000**0.5)
        assert float(ends.std()) == pytest.approx((0.02 / (1 - 0.84**2)) ** 0.5, rel=0.1)
    both = model.sample(range(1000), steps=50)[:, 0, 0, 0]
    assert 400 < (both > 0).sum() < 600


@pytest.mark.parametrize(
    "options, words",
    [({"start": "warm"}, "start=warm: choose from fresh, buffer"), ({"steps": -1}, "steps=-1"),
     ({"labels": 2}, r"labels=\[2\]: must be in 0..1"), ({"labels": [0, 1]}, "give 1 or 3"),
     ({"start": "buffer"}, "only a run or its .ckpt holds a buffer")],
)  # fmt: skip
def test_sample_errors(options, words):
    with pytest.raises(ValueError, match=words):
        build().eval().sample([0, 1, 2], **options)


@pytest.mark.parametrize(
    "words, message",
    [(("method.tau=0",), "method.tau=0.0: must be > 0"),
     (("method.prior=0.5,0.6",), "must be positive and sum to 1"),
     (("method.prior=0.5,0.3,0.2",), "must have 2 numbers"),
     (("method.energy=mlp",), "choose from logits, scalar"),
     (("method.reinit=2",), r"method.reinit=2.0: must be in \[0, 1\]"),
     (("method.marginal_ema=1",), "method.marginal_ema=1.0"),
     (("method.clusters=3", "method.w_label=1"), "needs clusters = classes"),
     (("method.clusters=-1",), "must be >= 0"), (("method.buffer=0",), "must be > 0")],
)  # fmt: skip
def test_config_errors(words, message):
    with pytest.raises(ValueError, match=message):
        build(*words)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="network.name=unet: GEDI needs an encoder"):
        genmodels.build([POINTS | {"network": {"name": "unet"}}])
    with pytest.raises(ValueError, match="network.name=perceptron: needs a network that makes"):
        genmodels.build([POINTS | {"method": {"name": "edm"}}])
    with pytest.raises(ValueError, match="network.name=resnet8: needs images of 4x4 or more"):
        genmodels.build([POINTS | {"network": {"name": "resnet8"}}])


# ------------------------------------------------------------------------------------------------
# Training runs


def run_of(tmp_path, *words):
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    argv = [str(ROOT / "configs/gedi_moons.yaml"), str(ROOT / "configs/debug.yaml"), *SMALL,
            f"out_dir={out}", "sample.every=0", "trainer.progress=false", "data.points=200",
            "data.batch_size=32", "method.inv_start=0", "method.inv_ramp=0",
            "optim.decay=none", *words]  # fmt: skip
    assert train.main(argv) == 0
    (folder,) = out.glob("*/*")
    return folder


def state_of(run):
    saved = read_checkpoint(run / "checkpoints" / "last.ckpt")
    weights = {f"weights.{k}": v for k, v in saved["state_dict"].items()}
    raw = {f"raw.{k}": v for k, v in saved.get("current_model_state", {}).items()}
    return weights | raw | saved["replay"]


def test_resume_is_exact_with_buffer_and_marginal(tmp_path):
    words = ("method.marginal_ema=0.5", "trainer.accumulate=2", "ema.half_life=100")
    straight = run_of(tmp_path, *words, "trainer.max_steps=6")
    stopped = run_of(tmp_path, *words, "trainer.max_steps=3")
    middle = state_of(stopped)
    assert train.main([f"resume={stopped}", "trainer.max_steps=6"]) == 0
    first, second = state_of(straight), state_of(stopped)
    assert first.keys() == second.keys() and any(key.startswith("raw.") for key in first)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(middle["entries"], first["entries"])
    assert first["visits"].max() > 1 and first["log_ema"].exp().sum() == pytest.approx(1, abs=1e-5)


def test_a_run_that_diverges_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    original = GEDI.outputs

    def outputs(self, x):
        z, f = original(self, x)
        blow = 1e6 if self.training and self.global_step >= 3 and not self.cfg.method.retry else 0
        return z, f + blow * torch.linspace(0, 1, len(f))

    monkeypatch.setattr(GEDI, "outputs", outputs)
    out = tmp_path / "run"
    argv = [str(ROOT / "configs/gedi_moons.yaml"), str(ROOT / "configs/debug.yaml"), *SMALL,
            f"out_dir={out}", "sample.every=0", "trainer.progress=false", "data.points=200",
            "checkpoint.every=1", "trainer.max_steps=6"]  # fmt: skip
    assert train.main(argv) == 1
    error = capsys.readouterr().err
    (run,) = out.glob("*/*")
    assert "method.max_gap=1000: energies of data and chains ran apart at step 3" in error
    assert "'gap': " in error and f"python train.py resume={run} method.retry=1" in error
    before = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert before["global_step"] == 3 and torch.isfinite(before["replay"]["entries"]).all()
    assert train.main([f"resume={run}", "method.retry=1"]) == 0
    after = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert after["global_step"] == 6
    assert after["hyper_parameters"]["config"]["method"]["retry"] == 1
    lr = after["optimizer_states"][0]["param_groups"][0]["lr"]
    assert lr == pytest.approx(
        0.5 * before["optimizer_states"][0]["param_groups"][0]["lr"], rel=0.3
    )


def test_chains_that_are_not_finite_stop_the_run_and_spare_the_buffer(x):
    model = build()
    model.loss(batch_of(x))
    before = model.replay.entries.clone()
    with torch.no_grad():
        model.head[0].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="ran apart"):
        model.loss(batch_of(x) | {"n": torch.arange(32, 64)})
    assert torch.equal(model.replay.entries, before)


def test_a_collapsed_run_says_so(tmp_path, capsys):
    words = ("trainer.max_steps=100", "method.w_gen=0", "method.w_inv=0", "method.tau=1000",
             "trainer.log_every=100")  # fmt: skip
    run_of(tmp_path, *words)
    assert capsys.readouterr().out.count("every prediction is uniform") == 1


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A short run on the digits, with a buffer."""
    out = tmp_path_factory.mktemp("digits")
    config = out / "tiny.yaml"
    config.write_text(
        "data: {name: digits, batch_size: 32}\nnetwork: {name: resnet8, width: 8}\n"
        "method: {name: gedi, tau: 0.1, w_inv: 1, w_prior_mean: 1, step: 0.01, noise_scale: 0,\n"
        "  chain_steps: 2, buffer: 64, steps: 4, view_affine: 0.5}\n"
    )
    argv = [str(config), str(ROOT / "configs/debug.yaml"), f"out_dir={out}",
            "trainer.progress=false"]  # fmt: skip
    assert train.main(argv) == 0
    (run,) = out.glob("tiny/*")
    return run


def test_grids_are_made_while_training(digits_run):
    assert [p.name for p in (digits_run / "samples").iterdir()] == ["step-00000004.png"]


def test_sampling_says_where_the_chains_came_from(digits_run, tmp_path, capsys):
    assert sample.main([str(digits_run), "num=4", "steps=3", f"out={tmp_path / 'a'}"]) == 0
    assert "4 images, fresh chains of 3 steps, 3 network" in capsys.readouterr().out
    words = ["num=4", "start=buffer", f"out={tmp_path / 'b'}"]
    assert sample.main([str(digits_run), *words, "labels=3"]) == 0
    assert "4 images, the replay buffer's chains, 0 steps on" in capsys.readouterr().out
    model = genmodels.load(digits_run)
    entries = read_checkpoint(digits_run / "checkpoints/last.ckpt")["replay"]["entries"]
    assert torch.equal(model.sample([65], start="buffer")[0], entries[1])


def test_exports_cluster_but_hold_no_buffer(digits_run, tmp_path, capsys):
    out = checkpoint.export(digits_run, tmp_path / "model")
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(
        genmodels.load(out).cluster(x), genmodels.load(digits_run).cluster(x)
    )
    assert sample.main([str(out), "num=1", "start=buffer", f"out={tmp_path / 'a'}"]) == 2
    assert "only a run or its .ckpt holds a buffer" in capsys.readouterr().err


def test_clusters_as_csv_and_exemplars(digits_run, tmp_path, capsys):
    out = tmp_path / "clusters"
    assert sample.main([str(digits_run), "cluster=digits:test", f"out={out}"]) == 0
    lines = (out / "clusters.csv").read_text().splitlines()
    assert lines[0] == "image,cluster,probability," + ",".join(f"p{c}" for c in range(10))
    assert len(lines) == 361
    row = lines[5].split(",")
    probabilities = [float(text) for text in row[3:]]
    assert row[0] == "4" and sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert probabilities[int(row[1])] == max(probabilities) == float(row[2])
    assert (out / "exemplars.png").exists()
    # Images in a folder go by their names.
    sample.main([str(digits_run), "num=3", "steps=1", f"out={tmp_path / 'made'}"])
    assert sample.main([str(digits_run), f"cluster={tmp_path / 'made'}", f"out={out}"]) == 0
    lines = (out / "clusters.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"00000{i}.png" for i in range(3)]
    capsys.readouterr()
    assert sample.main([str(digits_run), "cluster=moons", f"out={out}"]) == 2
    assert "cluster=moons: images of shape (2, 1, 1)" in capsys.readouterr().err


def test_evaluate_scores_clusters_and_images_together(digits_run, tmp_path, capsys):
    import json

    from sklearn.metrics import normalized_mutual_info_score

    from genmodels.data import load_split

    out = tmp_path / "scores.json"
    words = ["cluster=digits:test", "metrics=nmi,acc,fd", "num=20", "resamples=0", "steps=2",
             "features=pixels", f"out={out}"]  # fmt: skip
    assert evaluate.main([str(digits_run), *words]) == 0
    scores = json.loads(out.read_text())["metrics"]
    assert list(scores) == ["nmi", "acc", "fd"]
    model = genmodels.load(digits_run)
    pixels, labels = load_split(model.cfg.data, "test")
    found = model.cluster(pixels.float() / 127.5 - 1).argmax(1)
    expected = normalized_mutual_info_score(labels, found)
    assert scores["nmi"]["value"] == pytest.approx(expected, abs=1e-6)
    assert evaluate.main([str(digits_run), "cluster=digits:test", f"out={out}"]) == 0
    assert list(json.loads(out.read_text())["metrics"]) == ["nmi", "acc", "ari", "ami"]
    capsys.readouterr()
    assert evaluate.main([str(digits_run), "cluster=mnist", "metrics=nmi,bad"]) == 2
    assert "metrics=bad: choose from" in capsys.readouterr().err


def test_out_of_distribution_scores(digits_run):
    model = genmodels.load(digits_run)
    x = 2 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    scores = model.ood_scores(x)
    torch.testing.assert_close(scores["f"], -model.energy(x).detach())
    torch.testing.assert_close(scores["confidence"], model.cluster(x).amax(1))
    step, direction = 1e-2, torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    direction = direction / direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    slope = (model.energy(x + step * direction) - model.energy(x - step * direction)) / (2 * step)
    assert (slope.detach().abs() <= -scores["grad_norm"] * 1.01).all()


def test_pairs_of_training_images_stay_together():
    """Images 2k and 2k + 1 are neighbours at an even n; every pass holds each once, reordered."""
    from genmodels.data import TrainStream

    pixels = torch.arange(11, dtype=torch.uint8).reshape(11, 1, 1, 1)
    stream = TrainStream(pixels, torch.arange(11), 0, 4, lambda: 0, pairs=True)
    batches = [batch for batch, _ in zip(stream, range(10))]
    numbers = torch.cat([batch["label"] for batch in batches])
    assert torch.equal(numbers[0::2] % 2, torch.zeros(20, dtype=torch.int64))
    assert torch.equal(numbers[1::2], numbers[0::2] + 1)
    passes = numbers.reshape(4, 10)  # the odd one, image 10, is left out
    assert all(sorted(row.tolist()) == list(range(10)) for row in passes)
    assert len({tuple(row.tolist()) for row in passes}) == 4
    with pytest.raises(ValueError, match="data.pairs=True: does not go with data.balanced"):
        build("data.pairs=true", "data.balanced=true")


# ------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("gedi_*.yaml")), ids=lambda p: p.stem
)
def test_configs_build(path):
    model = genmodels.build(str(path))
    cfg = model.cfg.method
    x = torch.zeros(2, *model.shape)
    assert model.eval().cluster(x).shape == (2, cfg.clusters or model.cfg.data.classes)
    if model.shape[1] > 1:
        assert cfg.view_flip is (model.cfg.data.name in ("cifar10", "cifar100"))


def test_two_processes_share_the_buffer_and_go_on_exactly(tmp_path):
    words = ("trainer.devices=2", "trainer.strategy=ddp_fork", "trainer.accelerator=cpu")
    straight = run_of(tmp_path, *words, "trainer.max_steps=4")
    stopped = run_of(tmp_path, *words, "trainer.max_steps=2")
    assert train.main([f"resume={stopped}", "trainer.max_steps=4"]) == 0
    first, second = state_of(straight), state_of(stopped)
    assert first["entries"].shape == (64, 2, 1, 1)
    assert not torch.equal(first["entries"][:32], first["entries"][32:])
    # Each process visits 16 of its 32 entries in each of the 4 steps.
    assert [int(first["visits"][part].sum() > 0) for part in (slice(32), slice(32, 64))] == [1, 1]
    for key in first:
        if first[key] is not None:
            assert torch.equal(first[key], second[key]), key
