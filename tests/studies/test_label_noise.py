"""``python -m studies label-noise``: networks, training steps, the command itself."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from torch import nn
from torch.nn import functional as F

from studies import records
from studies.label_noise.data import Images
from studies.label_noise.networks import Residual, fast_resnet
from studies.label_noise.results import fall, smoothed
from studies.label_noise.training import (
    NoiseSettings,
    Trainer,
    accuracies,
    train,
)

from .common import assert_claims_hold, assert_picture, read_records, read_summary, run

SMALL = {"width": 2, "size": 16, "examples": 16, "batch": 16, "epochs": 1}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the network ----


def test_the_network_is_the_resnet_9_of_dawnbench():
    model = fast_resnet()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 128, 128, 256, 512, 512, 512]
    assert sum(p.numel() for p in model.parameters()) == 6_573_130
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {32}
    shortcuts = [m for m in model.modules() if isinstance(m, Residual)]
    assert len(shortcuts) == 2
    for shortcut in shortcuts:
        x = torch.randn(1, shortcut.layers[0][0].in_channels, 4, 4)
        assert torch.equal(shortcut(x), x + shortcut.layers(x))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# ---- a step ----


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(3)
    return torch.randn(16, 1, 16, 16), torch.arange(16) % 10


@pytest.mark.parametrize("tau", [0.2, 0.5])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_is_that_of_gradients_of_single_examples(batch, tau, norm):
    """Adam's first step is the sign of the masked mean, whose votes are counted here by hand."""
    images, labels = batch
    torch.manual_seed(0)
    settings = NoiseSettings(tau=tau, norm=norm, **SMALL)
    model = fast_resnet(1, width=2, norm=norm, groups=2).double()
    before = weights(model)
    gradients = []
    for example, label in zip(images.double(), labels, strict=True):
        loss = F.cross_entropy(model(example[None]), label[None])
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
        )
    stacked = torch.stack(gradients)
    kept = stacked.sign().sum(0).abs() >= tau * len(labels) - 1e-6
    update = stacked.mean(0) * kept
    trainer = Trainer(model, settings)
    _, share = trainer.step(images.double(), labels, measure=True)
    step = weights(model) - before
    expected = -settings.lr * update / (update.abs() + 1e-8)
    # Where the mean is rounding error its sign is arbitrary, and it may be zero by chance.
    sure = stacked.abs().max(0).values > 1e-9
    assert sure.double().mean() > 0.8
    torch.testing.assert_close(step[sure], expected[sure], rtol=1e-3, atol=1e-9)
    assert 0 < share < 1
    assert share == pytest.approx(kept.double().mean().item(), abs=0.02)


def test_accuracies_are_those_of_the_labels_they_name():
    class Says(nn.Module):
        def forward(self, x):
            return F.one_hot(x.long(), 10).float()

    images = Images(
        train=torch.tensor([1.0, 2, 3, 4, 0]),  # what the model says
        given=torch.tensor([1, 2, 9, 5, 0]),
        truth=torch.tensor([1, 0, 3, 6, 8]),
        test=torch.tensor([7.0, 8, 9, 9, 9]),
        test_truth=torch.tensor([7, 7, 7, 7, 7]),
    )
    model = Says()
    assert accuracies(model, images) == {
        "train": 0.6,
        "mislabeled": 0.5,  # of 2, 9, 5, 0: the first and the last
        "recovered": 0.25,  # of 0, 3, 6, 8: the second
        "test": 0.2,
    }
    assert model.training


@pytest.mark.parametrize(("tau", "norm"), [(None, "group"), (0.2, "batch")])
def test_a_stopped_run_ends_with_the_same_numbers(tmp_path, monkeypatch, tau, norm):
    monkeypatch.setattr(records, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(records, "CHECKPOINT_SHARE", float("inf"))
    settings = NoiseSettings(labels="noisy", tau=tau, norm=norm, **SMALL | {"epochs": 5})

    def stop(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    def go(folder, report):
        files = records.RunFiles(tmp_path / folder, "run", settings.identity())
        return train(settings, 0, files, report).results

    seen = []
    whole = go("whole", lambda done, total, text: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt):
        go("stopped", stop)
    seen.clear()
    again = go("stopped", lambda done, total, text: seen.append(done))
    assert seen == [3, 4, 5]  # the checkpoint is that of two epochs
    assert str(again) == str(whole)


# ---- what is computed from histories ----


def test_the_fall_is_from_the_peak_of_three_epochs_to_the_last_three():
    values = np.array([[0.1, 0.9, 0.8, 0.7, 0.2, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    assert fall(values) == pytest.approx([0.8 - 0.3, 0])
    assert smoothed(values[:, :2])[:, 0] == pytest.approx([0.5, 0.15])


# ---- the command ----


def test_wrong_labels_are_spread_over_the_first_batches_of_every_seed():
    for seed in range(4):
        wrong = NoiseSettings(labels="noisy").load(seed).mislabeled
        torch.manual_seed(seed * 1_000_003)  # as the loop over epochs does
        batches = torch.randperm(len(wrong)).split(80)
        shares = torch.stack([wrong[batch].double().mean() for batch in batches])
        assert shares.min() > 0.05
        assert shares.max() < 0.5


TINY = "label-noise --width 2 --examples 32 --batch 16 --epochs 2 --seeds 0".split()


def test_quick_shows_the_effect(tmp_path):
    run("label-noise", "--quick", "--output", tmp_path)
    summary = read_summary(tmp_path, "label-noise")
    assert len(summary["claims"]) == 7
    far_from_noise = ("memorise", "memorisation", "no more often")
    firm = [c for c in summary["claims"] if any(word in c["text"] for word in far_from_noise)]
    assert len(firm) == 4
    assert_claims_hold({"claims": firm})
    assert_picture(tmp_path / "label-noise-random.png")
    assert_picture(tmp_path / "label-noise-wrong.png")
    found = read_records(tmp_path)
    assert len(found) == summary["runs"] == 6
    for record in found:
        settings, history = record["identity"]["settings"], record["history"]
        assert all(len(series) == settings["epochs"] for series in history.values())
        assert record["final"]["test"] == history["test"][-1]
        noisy, masked = settings["labels"] == "noisy", bool(settings["tau"])
        assert ("noise" in settings) == noisy
        assert all((share < 1) == masked for share in history["kept"])
        if settings["labels"] == "true":
            assert set(history["mislabeled"]) == {None}
        else:
            pairs = zip(history["mislabeled"], history["recovered"], strict=True)
            assert all(wrong + right <= 1 for wrong, right in pairs)
