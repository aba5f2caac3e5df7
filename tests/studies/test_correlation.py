"""``python -m studies correlation``: what is permuted, what is measured, what it shows."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import andmask_ext as am
from studies.__main__ import main
from studies.correlation.measuring import (
    CONDITIONS,
    SIGNALS,
    CorrelationSettings,
    build_network,
    curve,
    environment_gradients,
    measure,
    permute,
    where_enough,
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


def test_records_hold_all_thresholds_and_both_masks(quick):
    for record in read_records(quick):
        assert record["tau"] == [k / 16 for k in range(17)]
        assert len(record["kept"]) == len(record["noise"]) == 17
        for mask in ("and", "xor"):
            for signals in ("plain", "masked"):
                assert list(record["curves"][mask][signals]) == list(SIGNALS)
        one = record["curves"]["xor"]["plain"]["mechanism"]
        assert one[0] is None  # the XOR-mask of tau = 0 keeps nothing
        assert one[-1] == pytest.approx(record["curves"]["and"]["plain"]["mechanism"][0], abs=0.01)


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


def test_starts_are_stock_or_the_authors():
    state = torch.random.get_rng_state()
    stock = build_network(SMALL, 34, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    layers = [m for m in stock.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(34, 8), (8, 8), (8, 8), (8, 1)]
    for layer in layers:
        expected = torch.nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)
    wide = CorrelationSettings(kaiming=True, width=200)
    first = next(m for m in build_network(wide, 34, seed=3).modules() if hasattr(m, "weight"))
    assert first.weight.var().item() == pytest.approx(2 / 34, rel=0.1)
    assert (first.bias == 0.01).all()


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


def test_a_mean_of_few_seeds_is_none():
    nan = float("nan")
    values = torch.tensor([[1.0, nan, nan], [2.0, 3.0, nan], [3.0, 4.0, 5.0]])
    assert where_enough(values).isnan().tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, True],
    ]


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


def test_conditions_have_a_figure_and_rows(tmp_path):
    run("correlation", *TINY, "--seeds", 0, 1, "--output", tmp_path)
    summary = read_summary(tmp_path, "correlation")
    assert [picture["file"] for picture in summary["pictures"]] == [
        "correlation.png",
        "conditions.png",
    ]
    assert len(summary["tables"][0]["rows"]) == len(CONDITIONS) * 2 * len(SIGNALS)
    assert_picture(tmp_path / "conditions.png")
    released = [r for r in read_records(tmp_path) if r["identity"]["settings"]["released"]]
    assert len(released) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--environments", "1"], "environments: expected at least 2, got 1"),
        (["--examples", "1"], "examples: expected at least 2, got 1"),
        (["--width", "0"], "width: expected at least 1, got 0"),
        (["--conditions", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["correlation", "--output", str(tmp_path / "none"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
