"""One step of every method against a plain reference, and the networks it trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

pytest.importorskip("tqdm")

from studies.spirals import PAPER, build_model
from studies.spirals.methods import RULES, STEPS, Learner
from studies.spirals.settings import METHODS
from studies.spirals.training import build_optimizer

TINY = replace(PAPER, environments=3, examples=20, shortcut_dims=4, width=8, layers=2, batch=6)
# Plain descent with rate 1 and no decay: the step is the gradient.
STEP = replace(TINY, optimizer="sgd", lr=1.0, l2=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 6, 6, generator=generator)
    return inputs, torch.randint(0, 2, (3, 6), generator=generator).float()


def step(settings, data, epoch=0, model=None):
    """Make one step; return what it subtracted from each parameter, and what was reported."""
    model = model or build_model(settings, 0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    learner = Learner(settings, model, build_optimizer(settings, model), epoch)
    reported = STEPS[settings.method](learner, *data)
    learner.optimizer.step()
    return {n: before[n] - param.detach() for n, param in model.named_parameters()}, reported


def grads_of(loss, model):
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params, retain_graph=True), strict=True))


def losses_of(model, data):
    return [binary_cross_entropy_with_logits(model(x), y) for x, y in zip(*data, strict=True)]


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_the_loss_and_the_answers_of_all_examples(method, data):
    settings = replace(STEP, method=method, dropout=0.0)
    model = build_model(settings, 0)
    if method == "batch-norm":
        model.eval()
    logits = torch.stack([model(x) for x in data[0]]).detach()
    _, (reported, loss) = step(settings, data, model=model)
    torch.testing.assert_close(reported, logits)
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, data[1]))


@pytest.mark.parametrize("method", ["mean", "l2", "irm", "dann"])
def test_a_step_is_one_on_the_pooled_batch(method, data):
    # without IRM's penalty and with DANN's classifier not heard
    settings = replace(STEP, method=method, penalty=0.0, anneal=0, reversal=0.0)
    model = build_model(settings, 0)
    loss = torch.stack(losses_of(model, data)).mean()
    names = [name for name, _ in model.named_parameters() if not name.startswith("environment")]
    expected = dict(
        zip(
            names,
            torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names]),
            strict=True,
        )
    )
    found, _ = step(settings, data)
    assert_equal({name: found[name] for name in names}, expected)


def test_l1_adds_the_sum_of_absolute_weights(data):
    settings = replace(STEP, method="l1", l1=0.03)
    model = build_model(settings, 0)
    loss = torch.stack(losses_of(model, data)).mean()
    loss = loss + 0.03 * sum(param.abs().sum() for param in model.parameters())
    assert_equal(step(settings, data)[0], grads_of(loss, model))


def test_l2_is_decay_of_weights_and_plain_training_has_none(data):
    decayed, _ = step(replace(STEP, method="l2", l2=0.1), data)
    plain, _ = step(replace(STEP, method="mean", l2=0.1), data)
    model = build_model(STEP, 0)
    expected = {n: plain[n] + 0.1 * p.detach() for n, p in model.named_parameters()}
    assert_equal(decayed, expected)


@pytest.mark.parametrize(("epoch", "weight"), [(1, 1.0), (2, 50.0)])
def test_irm_penalises_the_slope_of_each_environments_loss(data, epoch, weight):
    settings = replace(STEP, method="irm", penalty=50.0, anneal=2)
    model = build_model(settings, 0)
    penalty = 0.0
    for x, y in zip(*data, strict=True):
        logits = model(x)
        # d/ds of log(1 + exp(s z)) - s z y at s = 1
        penalty = penalty + (logits * (logits.sigmoid() - y)).mean() ** 2 / 3
    loss = (torch.stack(losses_of(model, data)).mean() + weight * penalty) / weight
    assert_equal(step(settings, data, epoch)[0], grads_of(loss, model))


def test_dann_teaches_the_classifier_what_the_features_unlearn(data):
    settings = replace(STEP, method="dann", reversal=0.7)
    model = build_model(settings, 0)
    features = model.features(data[0].flatten(0, 1))
    environment = cross_entropy(
        model.environment(features), torch.tensor([0] * 6 + [1] * 6 + [2] * 6)
    )
    label = binary_cross_entropy_with_logits(model.label(features), data[1].flatten())
    found, _ = step(settings, data)
    for name, param in model.named_parameters():
        own = {"features": label - 0.7 * environment, "label": label, "environment": environment}
        (expected,) = torch.autograd.grad(own[name.split(".")[0]], param, retain_graph=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method", [m for m in RULES if m not in ("sign-dropout", "agreement-filtering")]
)
def test_rules_see_the_gradient_of_each_environment(method, data):
    settings = replace(STEP, method=method, tau=0.5, rescale=False)
    model = build_model(settings, 0)
    each = [grads_of(loss, model) for loss in losses_of(model, data)]
    stacked = {name: torch.stack([grads[name] for grads in each]) for name in each[0]}
    reference = {
        "and-mask": lambda g: (g.sign().sum(0).abs() >= 2) * g.mean(0),
        "median": lambda g: torch.from_numpy(np.median(g.numpy(), axis=0)),
        "masked-average": lambda g: (
            torch.where(g.sign().sum(0).abs() >= 2, 1, g.sign().mean(0).abs()) * g.mean(0)
        ),
        "geometric-mean": lambda g: (
            (g.sign().sum(0).abs() >= 2) * g.mean(0).sign() * (g.abs() + 1e-10).log().mean(0).exp()
        ),
        "sand-mask": lambda g: (
            (10 * (g.sign().mean(0).abs() - 0.5) / g.var(0)).tanh().clamp(min=0).nan_to_num(1e-17)
            * g.mean(0)
        ),
    }[method]
    found, _ = step(settings, data)
    assert_equal(found, {name: reference(grads) for name, grads in stacked.items()})


def test_sign_dropout_keeps_the_gradients_of_one_sign(data):
    settings = replace(STEP, method="sign-dropout")
    model = build_model(settings, 0)
    each = [grads_of(loss, model) for loss in losses_of(model, data)]
    torch.manual_seed(0)
    found, _ = step(settings, data)
    kept = set()
    for name, param in found.items():
        grads = torch.stack([grads[name] for grads in each])
        up, down = grads.clamp(min=0).mean(0), grads.clamp(max=0).mean(0)
        is_up, is_down = ((param - one).abs() < 1e-6 for one in (up, down))
        assert (is_up | is_down).all()
        kept |= {"up"} if (is_up & ~is_down).any() else set()
        kept |= {"down"} if (is_down & ~is_up).any() else set()
    assert kept == {"up", "down"}


def test_agreement_filtering_draws_the_order_and_leaves_out_steps_without_agreement(data):
    settings = replace(STEP, method="agreement-filtering", cos_distance=2.0)
    model = build_model(settings, 0)
    loss = torch.stack(losses_of(model, data)).mean()
    assert_equal(step(settings, data)[0], grads_of(loss, model))  # all join

    halved = replace(settings, halve=True)
    torch.manual_seed(0)
    order = torch.randperm(3)
    each = [grads_of(losses_of(model, data)[index], model) for index in order]
    torch.manual_seed(0)
    expected = {n: each[0][n] / 4 + each[1][n] / 4 + each[2][n] / 2 for n in each[0]}
    assert_equal(step(halved, data, model=model)[0], expected)

    none = replace(settings, cos_distance=0.0, l2=0.1)
    assert not any(change.any() for change in step(none, data)[0].values())
