"""Metrics that take second derivatives through attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import andmask_ext as am

MASK = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(2, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (1, 2)).transpose(1, 2) for part in self.project(x).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=MASK.to(x.device))
        return self.head(mixed.squeeze(1).mean(1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = (
            nn.TransformerEncoderLayer(2, 1, 2, 0.0, batch_first=True),
            nn.Linear(2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def switches() -> list[bool]:
    return [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]


@pytest.mark.parametrize("kind", [Attention, Layer])
def test_curvature_of_attention(kind: type[nn.Module]) -> None:
    model = kind().double()
    pairs = [(torch.randn(3, 3, 2, dtype=torch.float64), torch.randint(0, 2, (3,))) for _ in "ab"]
    losses, params = am.metrics.model_losses(model, pairs, F.cross_entropy)
    before = switches()
    torch.manual_seed(0)
    found = am.metrics.hessian_diagonals(losses, params, probes=4)
    assert switches() == before
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        expected = am.metrics.hessian_diagonals(losses, params, probes=4)
    for ours, theirs in zip(found.diagonals, expected.diagonals, strict=True):
        for name, diagonal in theirs.items():
            torch.testing.assert_close(ours[name], diagonal)
