"""The spirals are what the paper describes: checked on their statistics."""

import numpy as np
import pytest

from studies.spirals.data import SpiralsConfig, draw_mechanism, draw_spirals

PAPER = SpiralsConfig(environments=6, examples=2000, test_examples=5000, revolutions=2)
RELEASED = SpiralsConfig(
    environments=6,
    examples=2000,
    test_examples=5000,
    shortcut_dims=16,
    shortcut_variance=1.0,
    revolutions=3,
    standardize=True,
)


@pytest.fixture(scope="module")
def paper():
    return draw_spirals(PAPER, seed=0)


@pytest.fixture(scope="module")
def released():
    return draw_spirals(RELEASED, seed=0)


@pytest.fixture(params=["paper", "released"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("revolutions", [0.5, 1, 2, 3])
def test_radius_decides_angle_and_class_turns_it_by_half(revolutions):
    points, labels = draw_mechanism(np.random.default_rng(1), 20_000, revolutions)
    radius = np.hypot(points[:, 0], points[:, 1])
    assert 0.08 - 0.02 - 1e-6 <= radius.min() < 0.08
    assert 1.0 < radius.max() <= 1.0 + 0.02 + 1e-6

    turned = points * np.where(labels, -1, 1)[:, None]
    angle = np.arctan2(turned[:, 1], turned[:, 0])
    off = angle / (2 * np.pi * revolutions) - radius
    period = 1 / revolutions
    noise = -((off + period / 2) % period - period / 2)
    assert np.abs(noise).max() <= 0.02 + 1e-5
    assert noise.std() == pytest.approx(0.04 / 12**0.5, rel=0.03)
    assert np.abs(noise.mean()) < 1e-3


def test_shortcut_is_one_vector_with_the_sign_of_the_class(both):
    signs = 2 * both.train_labels - 1
    expected = signs[:, :, None] * both.shortcuts[:, None, :]
    np.testing.assert_array_equal(both.train_inputs[:, :, 2:], expected)


def test_test_shortcuts_are_drawn_for_each_example_and_say_nothing(both):
    shortcuts = both.test_inputs[:, 2:]
    variance = both.shortcuts.var()
    assert shortcuts.var() == pytest.approx({34: 0.1, 18: 1.0}[both.test_inputs.shape[1]], rel=0.03)
    assert variance == pytest.approx(shortcuts.var(), rel=0.4)
    signs = 2 * both.test_labels - 1
    correlation = (signs[:, None] * shortcuts).mean(axis=0) / shortcuts.std()
    assert np.abs(correlation).max() < 5 / len(signs) ** 0.5
    neighbours = (shortcuts[1:] * shortcuts[:-1]).mean() / shortcuts.var()
    assert abs(neighbours) < 5 / shortcuts.size**0.5


def test_standardize_gives_unit_deviation_and_keeps_directions(released):
    np.testing.assert_allclose(released.train_inputs[:, :, :2].std(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(released.test_inputs[:, :2].std(axis=0), 1, rtol=1e-5)
    raw, _ = draw_mechanism(np.random.default_rng(3), 100, 3)
    scaled, _ = draw_mechanism(np.random.default_rng(3), 100, 3, standardize=True)
    np.testing.assert_allclose(scaled, raw / raw.std(axis=0), rtol=1e-5)


def test_a_seed_gives_the_same_bits_and_another_seed_other_ones(paper):
    again, other = draw_spirals(PAPER, seed=0), draw_spirals(PAPER, seed=1)
    for name, array in vars(paper).items():
        np.testing.assert_array_equal(array, getattr(again, name))
        assert not np.array_equal(array, getattr(other, name))


def test_environments_do_not_depend_on_how_many_there_are(paper):
    fewer = draw_spirals(SpiralsConfig(3, 2000, 5000, revolutions=2), seed=0)
    np.testing.assert_array_equal(fewer.train_inputs, paper.train_inputs[:3])
    np.testing.assert_array_equal(fewer.test_inputs, paper.test_inputs)


def test_the_largest_vote_finds_a_dimension_that_all_environments_share():
    config = SpiralsConfig(16, 1, 1, shortcut_dims=16, shortcut_variance=1.0)
    data = draw_spirals(config, seed=0)
    assert data.largest_vote() == np.abs(np.sign(data.shortcuts).sum(axis=0)).max()
    assert data.largest_vote() == 16, "the one seed in two thousand that has such a dimension"
    assert draw_spirals(config, seed=1).largest_vote() < 16


def test_validation_data_are_like_test_data_but_others():
    data = draw_spirals(SpiralsConfig(2, 3, 4000), seed=0)
    assert data.validation_inputs.shape == data.test_inputs.shape
    assert not (data.validation_inputs == data.test_inputs).any()
    for inputs in (data.validation_inputs, data.test_inputs):
        assert inputs.mean(axis=0) == pytest.approx(0, abs=0.03)
        assert inputs[:, 2:].std(axis=0) == pytest.approx(0.1**0.5, rel=0.05)
