"""Batches of somebody's own loop, and mistakes made from Python."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import genmodels
from genmodels.methods import METHODS

TINY = ["network.channels=[8,8]", "network.norm_groups=4", "network.head_dim=8"]
EDM = ["configs/edm_digits.yaml", *TINY]


@pytest.fixture
def model():
    return genmodels.build(*EDM).train()


@pytest.fixture
def images():
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


LABELS = torch.arange(6)


def test_forms_of_a_batch_give_one_loss(model, images):
    torch.manual_seed(3)
    n = torch.randint(2**62, (6,))
    expected = model.loss({"image": images, "label": LABELS, "n": n})[0]
    for batch in ((images, LABELS), [images, LABELS], {"image": images, "label": LABELS.int()}):
        torch.manual_seed(3)
        assert torch.equal(model.loss(batch)[0], expected)
    torch.manual_seed(4)
    assert not torch.equal(model.loss((images, LABELS))[0], expected)


def test_images_alone_are_without_a_class(model, images):
    torch.manual_seed(3)
    alone = model.loss(images)[0]
    torch.manual_seed(3)
    assert torch.equal(alone, model.loss((images, torch.full((6,), -1)))[0])


def test_a_model_without_hidden_labels_needs_a_class(images):
    model = genmodels.build(*EDM, "method.label_dropout=0").train()
    with pytest.raises(ValueError, match="label=None: this model learns with a class"):
        model.loss(images)


def test_without_n_the_noise_is_another_each_time(model, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = {model.loss((images, LABELS))[0].item() for _ in range(4)}
    assert len(losses) == 4


def test_positions_that_come_again_are_told_once(model, images):
    batch = {"image": images, "label": LABELS, "n": torch.arange(6)}
    model.loss(batch)
    with pytest.warns(UserWarning, match="^n: the batch holds positions that were there before"):
        model.loss(batch | {"n": torch.arange(5, 11)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(batch)
        other = genmodels.build(*EDM).train()
        for start in (0, 6, 12):
            other.loss(batch | {"n": start + torch.arange(6)})
        other.eval()
        other.loss(batch)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: (x * 127.5 + 128).byte(), "image=torch.uint8: must be float32 on"),
        (lambda x: x * 127.5 + 128, "image=.*pixels are expected on"),
        (lambda x: x[:, :, :4], r"image=\(6, 1, 4, 8\): must be \(B,1,8,8\)"),
        (lambda x: x[0], r"image=\(1, 8, 8\): must be"),
        (lambda x: (x, LABELS.float()), r"label=\(6,\): must be whole numbers"),
        (lambda x: (x, LABELS[:3]), r"label=\(3,\): must be whole numbers"),
        (lambda x: (x, LABELS, LABELS), "batch=tuple: write images x"),
        (lambda x: {"pixels": x}, 'has no "image"'),
        (lambda x: {"image": x, "labels": LABELS}, 'has "labels"; did you mean'),
        (lambda x: (x, LABELS + 5), r"label=5\.\.10: the model's classes are 0 to 9; -1 is none"),
        (lambda x: (x, LABELS - 2), r"label=-2\.\.3: the model's classes"),
        (lambda x: {"image": x, "n": [0] * 6}, r"n=list: must be a tensor, int64 \(6,\)"),
        (lambda x: {"image": x, "n": torch.zeros(6)}, r"n=.*must be a tensor, int64 \(6,\)"),
        (lambda x: 3, "batch=int"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(model, images, change, line):
    with pytest.raises(ValueError, match=line) as raised:
        model.loss(change(images))
    assert "\n" not in str(raised.value)


def test_pixels_on_0_to_1_are_told_once(model, images):
    with pytest.warns(UserWarning, match=r"lie on \[0, 1\]; scale them, 2 x - 1"):
        model.loss(((images + 1) / 2, LABELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(((images + 1) / 2, LABELS))


def test_a_trainer_and_a_loader_of_ones_own_meet_new_noise_each_epoch(model, images):
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(float(outputs["loss"]))

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    for group in model.parameters():
        group.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    model.cfg.optim.lr = 0.0
    trainer = L.Trainer(max_epochs=3, callbacks=[Watch()], **options)
    trainer.fit(model, DataLoader(TensorDataset(images, LABELS), batch_size=6))
    assert len(set(losses)) == 3


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


class Norms(L.Callback):
    """Keeps the norm of the gradients that an optimizer step gets, and the n of each batch."""

    def __init__(self):
        self.norms, self.ns = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.ns.append(module.latest_n)

    def on_before_zero_grad(self, trainer, module, optimizer):
        grads = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(sum(grads).sqrt()))


def fitted(images, *words, **options):
    """Return what Norms has seen of two steps of a Trainer of one's own."""
    model, seen = genmodels.build(*EDM, *words), Norms()
    draw = model.as_batch

    def noted(batch):
        found = draw(batch)
        model.latest_n = found["n"].tolist()
        return found

    model.as_batch = noted
    torch.nn.init.normal_(model.net.net.unet.conv_out.weight)  # zero at first
    loader = DataLoader(TensorDataset(images, LABELS), batch_size=3)
    L.Trainer(callbacks=[seen], max_steps=2, **QUIET, **options).fit(model, loader)
    return seen


def test_a_trainers_own_clipping_holds_beside_the_configs(images):
    free = fitted(images, "optim.clip=0").norms
    assert len(free) == 1 and min(free) > 0.5
    for words, options in (
        (("optim.clip=0.1",), {}),
        (("optim.clip=0",), {"gradient_clip_val": 0.1}),
        (("optim.clip=9",), {"gradient_clip_val": 0.1}),
    ):
        torch.testing.assert_close(fitted(images, *words, **options).norms, [0.1])
    each = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    assert max(fitted(images, "optim.clip=0", **each).norms) < max(free) / 2


def test_micro_batches_of_a_trainers_own_accumulation_have_each_their_noise(images):
    seen = fitted(images, accumulate_grad_batches=2)
    assert len(seen.ns) == 4 and len({n for part in seen.ns for n in part}) == 12


def test_a_trainer_that_ends_elsewhere_than_the_configs_schedule_is_told(images):
    loader = DataLoader(TensorDataset(images, LABELS), batch_size=3)
    for words, warned in (("optim.decay=cosine", True), ("optim.decay=none", False)):
        model = genmodels.build(*EDM, "trainer.max_steps=5", words)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            L.Trainer(max_steps=2, **QUIET).fit(model, loader)
        line = "trainer.max_steps=5: schedules of this config end there, and the Trainer at 2"
        assert sum(line in str(w.message) for w in caught) == warned


def test_gedi_moves_its_chains_in_a_loop_of_ones_own():
    model = genmodels.build("configs/gedi_moons.yaml").train()
    points = torch.rand(model.cfg.data.batch_size, *model.shape) - 0.5
    model.loss(points)
    before = model.replay.entries.clone()
    model.loss(points)
    assert not torch.equal(before, model.replay.entries)


def test_noise2score_takes_noisy_patches_of_any_size_and_the_configs_level():
    small = ["network.channels=[4,4]", "network.blocks=[1,1]"]
    model = genmodels.build("configs/noise2score_bsd400.yaml", *small).train()
    patches = torch.rand(3, 1, 16, 24) * 2 - 1
    n = torch.arange(3)
    named = {"image": patches, "level": torch.full((3,), 25.0), "n": n}
    assert torch.equal(model.loss({"image": patches, "n": n})[0], model.loss(named)[0])


def test_lightnings_own_loading_gives_what_load_gives(tiny_run, tmp_path):
    path = next(tiny_run.glob("checkpoints/last.ckpt"))
    ours = genmodels.load(path).state_dict()
    theirs = METHODS["edm"].load_from_checkpoint(path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"is of EDM; write EDM\.load_from_checkpoint"):
        METHODS["gbm"].load_from_checkpoint(path)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of this package"):
        METHODS["edm"].load_from_checkpoint(tmp_path / "list.ckpt")


def test_forward_is_the_denoiser_or_the_energy(model, images):
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images, 0.5, LABELS), model.denoise(images, 0.5, LABELS))
    energy = genmodels.build("configs/gedi_moons.yaml").eval()
    points = torch.rand(4, *energy.shape)
    assert torch.equal(energy(points), energy.energy(points))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m: m.sample(4), r"seeds=4: one for each image; write range\(4\)"),
        (lambda m: m.sample([0], steps="9"), "steps=9: must be a whole number"),
        (lambda m: m.sample([0], steps=2.5), "steps=2.5: must be a whole number"),
        (lambda m: m.sample([0], guidance="2"), "guidance=2: must be a number"),
        (lambda m: m.half().train().loss(torch.zeros(1, 1, 8, 8)), "weights=torch.float16"),
        (lambda m: m.sample([0], labels="3"), "labels='3': must be whole numbers"),
        (lambda m: m.sample([0], labels=2.5), "labels=2.5: must be whole numbers"),
        (lambda m: m.denoise(torch.zeros(1, 1, 8, 8).byte(), 1.0), "image=torch.uint8"),
        (lambda m: m.half().sample([0]), "weights=torch.float16: must be float32"),
        (lambda m: m.double().sample([0]), "weights=torch.float64: must be float32"),
        (lambda m: genmodels.build(*EDM, lr=1e-3), "lr=0.001: is nothing that EDM needs"),
    ],
)
def test_mistakes_from_python_are_one_line(model, call, line):
    with pytest.raises(ValueError, match=line):
        call(model.eval())


def test_tab_shows_what_there_is():
    import genmodels.kernels

    assert genmodels.kernels.philox.philox_normal  # in a clone too
    assert dir(genmodels) == sorted(["METHODS", "__version__", "build", "load"])
    assert "Raises" in genmodels.build.__doc__ and "Raises" in genmodels.load.__doc__
