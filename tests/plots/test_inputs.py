"""The figure of what environments agree on by input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from andmask_ext import plots

from .pictures import ByInput, colour_at, draw

nan = float("nan")


def test_features_are_bars_beside_the_noise_level():
    result = ByInput(torch.tensor([0.5, nan, 0.1]), torch.tensor([0.2, nan, 0.3]), torch.zeros(3))
    axes = plots.input_agreement(result, names=["age", "sex", "hospital"])
    shares, noise = (patch.get_data().values for patch in axes.patches)
    np.testing.assert_allclose(shares, [0.5, 0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(noise, [0.2, 0, 0.3], rtol=1e-6)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["age", "sex", "hospital"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["gradients, τ = 0.8", "pure noise"]


def test_pixels_are_blue_above_noise_and_vermilion_below_it():
    share = torch.tensor([[0.6, 0.25], [0.0, nan]])
    noise = torch.full((2, 2), 0.25)
    axes = plots.input_agreement(ByInput(share, noise, torch.zeros(2, 2)))
    draw(axes)
    above, below, same, missing = (
        colour_at(axes, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    assert above[2] > above[0] + 50
    assert below[0] > below[2] + 50
    assert same.min() > 250
    assert len(set(missing)) == 1
    assert missing[0] < 200


def test_channels_are_averaged_and_a_single_one_is_left_out():
    share = torch.rand(3, 2, 4)
    share[:, 0, 0] = nan
    share[0, 1, 1] = nan
    result = ByInput(share, torch.zeros(3, 2, 4), torch.zeros(3, 2, 4))
    image = plots.input_agreement(result).images[0].get_array()
    np.testing.assert_allclose(image[1], share[:, 1].nanmean(0), rtol=1e-6)
    assert image.mask[0, 0]
    line = ByInput.of(1, 6)
    assert not plots.input_agreement(line).images  # a signal of one channel: bars


def test_own_shares_are_drawn_instead():
    own = torch.tensor([[0.0, 1.0], [-0.2, 0.5]])
    result = ByInput(torch.zeros(2, 2), torch.zeros(2, 2), own)
    axes = plots.input_agreement(result, own=True)
    np.testing.assert_allclose(axes.images[0].get_array(), own)
    assert axes.images[0].get_clim() == (0, 1)
    bars = plots.input_agreement(ByInput(torch.zeros(3), torch.zeros(3), torch.rand(3)), own=True)
    assert bars.get_ylabel() == "own share of gradient"
    assert bars.get_legend() is None


@pytest.mark.parametrize("own", [False, True])
def test_tokens_are_ranked(own):
    share = torch.tensor([0.3, 0.0, nan, 0.1])
    result = ByInput(
        share, torch.full((4,), 0.2), torch.tensor([0.1, 0.9, nan, 0.5]), kind="tokens"
    )
    axes = plots.input_agreement(result, own=own, names=["the", "scanner", "unseen", "Kodak"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["scanner", "Kodak", "the"]
    assert len(plots.input_agreement(ByInput.of(300, kind="tokens")).patches) == 20


@pytest.mark.parametrize(
    ("result", "options", "message"),
    [
        (ByInput.of(2, 2, 2, 2), {}, r"1 to 3 dimensions, but got shape \[2, 2, 2, 2\]; draw a s"),
        (ByInput.of(3), {"names": ["a"]}, "names: expected 3, one for each input, but got 1"),
        (replace(ByInput.of(3), share=torch.full((3,), nan)), {}, "at least one input, but all"),
    ],
)
def test_errors(result, options, message):
    with pytest.raises(ValueError, match=message):
        plots.input_agreement(result, **options)


def test_a_real_result_is_drawn():
    from andmask_ext import metrics

    torch.manual_seed(0)
    environments = [(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))) for _ in range(3)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    loss = torch.nn.functional.cross_entropy
    result = metrics.input_agreement(model, environments, loss, tau=1.0)
    assert plots.input_agreement(result).images[0].get_array().shape == (4, 4)
