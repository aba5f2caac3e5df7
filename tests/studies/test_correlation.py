"""``python -m studies correlation``: what is permuted, what is measured, what it shows."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import andmask_ext as am
from studies.correlation.measuring import (
    SIGNALS,
    CorrelationSettings,
    build_network,
    curve,
    environment_gradients,
    measure,
    permute,
)
from studies.correlation.study import claims

from .common import assert_picture, read_records, read_summary, run

SMALL = CorrelationSettings(environments=4, examples=32, width=8)
TINY = ("--environments", 4, "--examples", 32, "--width", 8)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("correlation")
    run("correlation", "--quick", "--output", folder)
    return folder


def test_the_quick_setting_shows_what_the_paper_claims(quick):
    summary = read_summary(quick, "correlation")
    start, _, rise, reverse = summary["claims"]
    assert start["holds"]
    # few coordinates are left, three seeds do not decide: that the shortcut falls is seen below
    assert rise["holds"]
    assert reverse["holds"]
    records = read_records(quick)
    assert len(records) == 3
    mechanism, shortcut = (curve(records, "and", "plain", name) for name in SIGNALS[:2])
    assert shortcut[:, -1].nanmean() < shortcut[:, 0].mean() - 0.1
    assert mechanism[:, -1].nanmean() > mechanism[:, 0].mean() + 0.1
    assert_picture(quick / "correlation.png")


def test_permuting_moves_some_dimensions_within_an_environment():
    torch.manual_seed(0)
    inputs = torch.randn(3, 50, 6)
    permuted = permute(inputs, slice(2, None), torch.Generator().manual_seed(0))
    assert torch.equal(permuted[..., :2], inputs[..., :2])
    for before, after in zip(inputs, permuted, strict=True):
        assert sorted(after[:, 2:].tolist()) == sorted(before[:, 2:].tolist())
        assert (after[:, 2:] != before[:, 2:]).any(1).double().mean() > 0.8
    assert not torch.equal(permuted[0, :, 2].argsort(), permuted[1, :, 2].argsort())


def test_gradients_are_those_of_each_environment():
    model = build_network(SMALL, 34, seed=0)
    inputs, labels = torch.randn(4, 32, 34), torch.rand(4, 32).round()
    found = environment_gradients(model, inputs, labels)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for number, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        model.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
        for name, param in model.named_parameters():
            assert torch.equal(found[name][number], param.grad)


def test_what_is_measured_is_the_packages_metric():
    """With the same permutations, in the order in which they are drawn."""
    from studies.spirals import draw_spirals

    found = measure(SMALL, seed=5, report=lambda done, total, text: None)
    data = draw_spirals(SMALL.data_config(), 5)
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    generator = torch.Generator().manual_seed(5)

    def shuffled(which, source):
        other = source.clone()
        for one in other:
            order = torch.randperm(32, generator=generator)
            one[:, which] = one[order][:, which]
        return other

    mechanism = shuffled(list(range(2, 34)), inputs)
    shortcut = shuffled([0, 1], inputs)
    model = build_network(SMALL, 34, 5)
    whole = environment_gradients(model, inputs, labels)
    signals = {
        "mechanism": environment_gradients(model, mechanism, labels),
        "shortcut": environment_gradients(model, shortcut, labels),
        "neither": environment_gradients(model, shuffled([0, 1], mechanism), labels),
    }
    assert found["tau"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for mask in ("and", "xor"):
        for masked in (False, True):
            expected = am.metrics.gradient_correlation(
                whole, signals, found["tau"], mask_signals=masked, xor=mask == "xor"
            )
            for name in SIGNALS:
                values = found["curves"][mask]["masked" if masked else "plain"][name]
                assert values == pytest.approx(expected.correlations[name].tolist(), nan_ok=True)


def fabricated(start, end, low):
    """Records of seeds: correlations with the mechanism and with the shortcut, one or for each."""

    def values(pair, seed):
        return [one[seed] if isinstance(one, list) else one for one in pair]

    def curves(first, last):
        return {
            "mechanism": [first[0], last[0]],
            "shortcut": [first[1], last[1]],
            "neither": [0, 0],
        }

    records = []
    for seed, shake in enumerate((-0.01, 0.0, 0.01, 0.0)):
        shaken = [value + shake for value in values(start, seed)]
        first, last = values(low, seed), values(end, seed)
        plain = {"and": {"plain": curves(shaken, last)}, "xor": {"plain": curves(first, shaken)}}
        records.append({"tau": [0.0, 1.0], "curves": plain})
    return records


@pytest.mark.parametrize(
    ("start", "end", "low", "holds"),
    [
        ((0.4, 0.9), (0.8, 0.2), (0.1, 0.9), [True, True, True, True]),
        ((0.6, 0.9), (0.8, 0.2), (0.1, 0.9), [False, True, True, True]),
        ((0.4, 0.9), (0.8, 0.9), (0.1, 0.9), [True, False, True, True]),
        ((0.4, 0.9), (0.2, 0.2), (0.1, 0.9), [True, True, False, True]),
        ((0.4, 0.9), (None, None), (0.1, 0.9), [True, False, False, True]),
        # a fall that is sure, and too small
        ((0.4, 0.9), (0.8, 0.85), (0.1, 0.9), [True, False, True, True]),
        # one that is large, and not sure
        ((0.4, 0.9), (0.8, [0.9, 0.9, 0.1, 0.9]), (0.1, 0.9), [True, False, True, True]),
        # noise does not make a fall of the mechanism one that stays
        ((0.4, 0.9), ([-0.6, 0.9, -0.1, 0.5], 0.2), (0.1, 0.9), [True, True, False, True]),
        # three of four seeds are enough, two are not
        ((0.4, 0.9), ([None, 0.8, 0.8, 0.8], [None, 0.2, 0.2, 0.2]), (0.1, 0.9), [True] * 4),
        (
            (0.4, 0.9),
            ([None, None, 0.8, 0.8], [None, None, 0.2, 0.2]),
            (0.1, 0.9),
            [True, False, False, True],
        ),
        # the XOR-mask: both fall; the mechanism falls by little
        ((0.4, 0.9), (0.8, 0.2), (0.1, 0.7), [True, True, True, False]),
        ((0.4, 0.9), (0.8, 0.2), (0.35, 0.9), [True, True, True, False]),
    ],
)
def test_claims_can_fail(start, end, low, holds):
    assert [claim.holds for claim in claims(fabricated(start, end, low))] == holds
