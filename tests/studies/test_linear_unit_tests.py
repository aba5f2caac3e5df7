"""The linear unit tests are what their paper defines, and training is what it says."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import andmask_ext as am
from studies.linear.training import (
    METHODS,
    environment_gradients,
    train,
)
from studies.linear.unit_tests import EXAMPLES, draw_problem

INVARIANT = slice(5)
SPURIOUS = slice(5, 10)


def problem(example, environments=6, samples=4000, scrambled=False, seed=0):
    return draw_problem(example, environments, samples, scrambled, seed)


# ---- the data ----


@pytest.mark.parametrize("example", EXAMPLES)
def test_scrambled_inputs_are_the_same_ones_rotated(example):
    plain, scrambled = (problem(example, samples=50, scrambled=s) for s in (False, True))
    rotation = scrambled.rotation
    assert torch.allclose(rotation @ rotation.T, torch.eye(10, dtype=torch.float64))
    assert rotation.abs().max() < 0.95
    assert torch.equal(plain.rotation, torch.eye(10, dtype=torch.float64))
    for name in ("train", "validation", "test", "oracle_train"):
        before, after = getattr(plain, name), getattr(scrambled, name)
        expected = (before.inputs.double() @ rotation).float()
        assert torch.allclose(after.inputs, expected, atol=1e-5)
        assert torch.equal(after.answers, before.answers)


@pytest.mark.parametrize("example", EXAMPLES)
def test_shortcuts_are_shuffled_for_the_oracle_and_at_test_time(example):
    drawn = problem(example)
    train, oracle = drawn.train, drawn.oracle_train
    assert torch.equal(oracle.answers, train.answers)
    assert torch.equal(oracle.inputs[..., INVARIANT], train.inputs[..., INVARIANT])
    for before, after in zip(train.inputs, oracle.inputs, strict=True):
        rows, moved = before[:, SPURIOUS], after[:, SPURIOUS]
        assert (moved != rows).any(1).double().mean() > 0.99
        assert sorted(moved.tolist()) == sorted(rows.tolist())

    def told(split):
        """How much a spurious dimension tells of the answer, at most, in each environment."""
        joint = torch.cat((split.inputs, split.answers[..., None]), dim=-1)
        return torch.stack([one.T.corrcoef()[5:10, -1].abs().max() for one in joint])

    assert told(train).max() > 0.5
    for split in (oracle, drawn.oracle_validation, drawn.test):
        assert told(split).max() < 0.08


def test_example_1_is_cause_and_effect():
    drawn = problem(1, environments=4, samples=20000)
    causes = drawn.train.inputs[..., INVARIANT]
    scales = causes.std((1, 2))
    assert scales[:3].tolist() == pytest.approx([0.1, 1.5, 2.0], rel=0.02)
    # the answer is a fixed linear function of the causes, with noise of five times their variance
    solutions = [
        torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        for x, y in zip(causes, drawn.train.answers, strict=True)
    ]
    assert torch.allclose(solutions[1], solutions[2], atol=0.06)
    for x, y, scale in zip(causes, drawn.train.answers, scales, strict=True):
        rest = y - x @ solutions[2]
        assert rest.var().item() == pytest.approx(5 * scale.item() ** 2, rel=0.05)
    # effects are caused by the answer: they differ from it by noise of variance 1 at any scale
    effects = drawn.train.inputs[0, :, SPURIOUS]
    assert effects.var(0).tolist() == pytest.approx([1.0] * 5, rel=0.1)


def test_example_2_is_cows_and_camels():
    drawn = problem(2, environments=3, samples=40000)
    inputs, answers = drawn.train.inputs, drawn.train.answers
    animal, background = inputs[..., INVARIANT] * 100, inputs[..., SPURIOUS]
    assert torch.equal(answers, (animal.sum(-1) > 0).float())
    match = ((animal.sum(-1) > 0) == (background.sum(-1) > 0)).double().mean(1)
    assert match.tolist() == pytest.approx([0.95, 0.97, 0.99], abs=0.005)
    assert answers.mean(1).tolist() == pytest.approx([0.3, 0.5, 0.7], abs=0.01)
    for shown in (animal, background):
        assert shown.abs().mean().item() == pytest.approx(1, abs=0.02)
        cow = shown[0][shown[0].sum(-1) > 0]
        assert cow.var(0).mean().item() == pytest.approx(0.1, rel=0.05)


def test_example_3_has_a_small_margin_and_shortcuts_of_each_environment():
    drawn = problem(3, environments=40, samples=2000)
    means = torch.stack(
        [
            torch.stack([x[y == label].mean(0) for label in (0, 1)])
            for x, y in zip(drawn.train.inputs, drawn.train.answers, strict=True)
        ]
    )
    assert torch.allclose(means[:, 0], -means[:, 1], atol=0.03)
    assert torch.allclose(means[:, 0, INVARIANT], torch.tensor(0.1), atol=0.02)
    shortcuts = means[:, 0, SPURIOUS]
    assert shortcuts.std().item() == pytest.approx(1, rel=0.15)
    assert abs(shortcuts.mean().item()) < 0.2
    rest = drawn.train.inputs[0][drawn.train.answers[0] == 0] - means[0, 0]
    assert rest.std().item() == pytest.approx(0.1, rel=0.05)
    assert drawn.train.answers.mean(1).tolist() == [0.5] * 40


# ---- training ----


def plain_gradients(weights, inputs, answers, classification, penalty):
    """The gradients of each environment's objective, by autograd."""
    found = []
    for x, y in zip(inputs, answers, strict=True):
        w = weights.clone().requires_grad_()
        factor = torch.ones((), requires_grad=True, dtype=w.dtype)
        outputs = x @ w * factor
        if classification:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, y)
        else:
            loss = torch.nn.functional.mse_loss(outputs, y)
        (tilt,) = torch.autograd.grad(loss, factor, create_graph=True)
        ((1 - penalty) * loss + penalty * tilt**2).backward()
        found.append(w.grad)
    return torch.stack(found)


@pytest.mark.parametrize("classification", [False, True])
def test_gradients_are_those_of_autograd(classification):
    torch.manual_seed(0)
    inputs, weights = torch.randn(3, 20, 11).double(), torch.randn(4, 11).double()
    answers = torch.rand(3, 20).double().round() if classification else torch.randn(3, 20).double()
    penalties = torch.tensor([0.0, 0.5, 0.9, 0.999]).double()
    found = environment_gradients(weights, inputs, answers, classification, penalties)
    assert found.shape == (3, 4, 11)
    for model, penalty in enumerate(penalties):
        expected = plain_gradients(weights[model], inputs, answers, classification, penalty)
        assert torch.allclose(found[:, model], expected), penalty
    plain = environment_gradients(weights, inputs, answers, classification, torch.zeros(4).double())
    assert torch.allclose(plain[:, :1], found[:, :1])


@pytest.mark.parametrize("method", METHODS)
def test_models_trained_side_by_side_are_those_trained_by_the_packages_optimizers(method):
    drawn = problem(3, environments=4, samples=30)
    trials = [
        {"lr": lr, "weight_decay": decay, "tau": tau, "penalty": 0.9}
        | {"fdr": 0.7, "significance": 0.2}  # some coordinates pass
        for lr, decay, tau in ((0.1, 0.01, 1.0), (0.01, 1e-4, 0.5))
    ]
    if method != "irm":
        trials = [{k: v for k, v in trial.items() if k != "penalty"} for trial in trials]
    found = train(drawn, method, trials, 5, seed=1)
    split = drawn.oracle_train if method == "oracle" else drawn.train
    inputs = torch.cat((split.inputs, torch.ones(4, 30, 1)), -1)
    generator = torch.Generator().manual_seed(1)
    start = (2 * torch.rand(11, generator=generator) - 1) / math.sqrt(10)
    for trial, weights in zip(trials, found, strict=True):
        rule = {
            "and-mask": am.AndMask(trial["tau"]),
            "fdr": am.AndMask(fdr=trial["fdr"]),
            "significance": am.AndMask(significance=trial["significance"]),
            "geometric": am.rules.GeometricMean(trial["tau"]),
        }
        param = torch.nn.Parameter(start.clone())
        optimizer = am.optim.AndMaskAdam(
            [param],
            lr=trial["lr"],
            weight_decay=trial["weight_decay"],
            rule=rule.get(method, am.rules.Mean()),
        )
        for _ in range(5):
            penalty = trial.get("penalty", 0.0)
            for grad in plain_gradients(param.detach(), inputs, split.answers, True, penalty):
                with optimizer.environment():
                    (param * grad).sum().backward()
            optimizer.step()
        assert torch.allclose(weights, param, atol=1e-5)
