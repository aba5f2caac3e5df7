"""The training loop: what it repeats and ignores, and that the AND-mask does what it is for."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")

from studies.records import RunFiles
from studies.spirals import PAPER, RELEASED, Settings, build_model, train
from studies.spirals.training import batches

TINY = replace(
    PAPER,
    environments=3,
    examples=20,
    test_examples=50,
    shortcut_dims=4,
    width=8,
    layers=2,
    batch=6,
    epochs=2,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # several threads gain little here, and lose much on a busy machine


def files(folder, settings, seed=0):
    return RunFiles(folder, "run", {"settings": settings.identity(), "seed": seed})


def one_step(settings):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 6, 6, generator=generator)
    return inputs, torch.randint(0, 2, (3, 6), generator=generator).float()


def test_the_presets_are_what_was_published():
    assert (PAPER.environments, PAPER.examples, PAPER.batch, PAPER.shortcut_dims) == (
        32,
        1280,
        128,
        32,
    )
    assert (PAPER.shortcut_variance, PAPER.epochs) == (0.1, round(3000 / 32))
    assert (PAPER.width, PAPER.layers, PAPER.optimizer, PAPER.lr, PAPER.l2) == (
        256,
        3,
        "adam",
        1e-2,
        1e-4,
    )
    assert (RELEASED.environments, RELEASED.examples, RELEASED.batch) == (16, 1024, 256)
    assert (RELEASED.shortcut_dims, RELEASED.shortcut_variance, RELEASED.revolutions) == (16, 1, 3)
    assert RELEASED.standardize
    assert not PAPER.standardize


def test_training_settles_once_it_fits():
    settings = Settings(fit=0.99, epochs=100, decay=(0.5,))
    before, after = [0.5, 0.98], [0.5, 0.98, 0.995, 0.7]
    assert settings.learning_rate(2, before) == pytest.approx(1e-2)
    assert settings.learning_rate(4, after) == pytest.approx(1e-3)
    assert settings.learning_rate(42, after) == pytest.approx(1e-3)
    assert settings.learning_rate(43, after) is None
    assert settings.learning_rate(60, before) == pytest.approx(1e-3)
    assert settings.learning_rate(100, before) is None
    assert Settings(fit=None).learning_rate(60, after) is not None


def test_the_network_is_the_one_of_the_paper():
    model = build_model(PAPER, seed=0)
    linear = [module for module in model if isinstance(module, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [256, 256, 256, 1]
    assert sum(isinstance(m, torch.nn.LeakyReLU) for m in model) == 3
    assert model(torch.randn(2, 5, 34)).shape == (2, 5)
    assert linear[1].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    again, other = build_model(PAPER, seed=0), build_model(PAPER, seed=1)
    assert torch.equal(again[0].weight, linear[0].weight)
    assert not torch.equal(other[0].weight, linear[0].weight)


def test_batches_show_every_example_once_and_keep_labels_with_inputs():
    inputs = torch.arange(3 * 20.0).view(3, 20, 1)
    labels = inputs[..., 0] * 2
    torch.manual_seed(0)
    seen = list(batches(inputs, labels, 6))
    assert [x.shape for x, _ in seen] == [(3, 6, 1)] * 3
    assert all(torch.equal(2 * x[..., 0], y) for x, y in seen)
    together = torch.cat([x[..., 0] for x, _ in seen], dim=1)
    for environment, row in enumerate(together):
        assert len(row.unique()) == 18
        assert ((row >= 20 * environment) & (row < 20 * (environment + 1))).all()
    assert not torch.equal(together[0], together[1] - 20)


@pytest.mark.parametrize("method", ["dann", "irm", "batch-norm", "dropout"])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, method, monkeypatch):
    monkeypatch.setattr("studies.records.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("studies.records.CHECKPOINT_SHARE", float("inf"))
    settings = replace(TINY, method=method, epochs=6, anneal=4)
    whole = train(settings, 0, files(tmp_path / "whole", settings))

    def stop(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, 0, files(tmp_path / "stopped", settings), stop)
    seen = []
    again = files(tmp_path / "stopped", settings)
    stopped = train(settings, 0, again, lambda done, *_: seen.append(done))
    assert seen == [4, 5, 6], "the fourth epoch was not over when it was stopped"
    assert stopped.results == whole.results
    assert all(torch.equal(stopped.weights[name], whole.weights[name]) for name in whole.weights)


def test_pooled_batches_come_from_all_environments(tmp_path):
    settings = replace(TINY, method="mean", pooled=True, batch=60, epochs=1)
    # With all 60 examples in a batch an epoch is one step on the whole pooled data, as is one of
    # the 20 of each environment.
    one = train(settings, 0, files(tmp_path / "a", settings))
    each = replace(settings, pooled=False, batch=20)
    two = train(each, 0, files(tmp_path / "b", each))
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, two.weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("method", "average"),
        ("tau", -0.1),
        ("width", 0),
        ("penalty", float("inf")),
        ("pooled", True),
        ("decay", (1.5,)),
    ],
)
def test_settings_that_cannot_be_meant(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected .* got"):
        Settings(**{argument: value})
