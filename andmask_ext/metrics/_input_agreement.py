"""What environments agree on, input by input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_tau
from ..rules._threshold import vote_threshold
from ._input_layer import Gradient, find_input_layer
from ._probe import Probe, examples_in, pairs_of
from ._votes import _noise_levels

__all__ = ["InputAgreement", "input_agreement"]

PARTS = 4  # of each environment: how far one environment agrees with itself


@dataclass(frozen=True, eq=False, repr=False)
class InputAgreement:
    """What environments agree on, by feature, pixel or token. All tensors have one shape.

    They are float64, and NaN for an input whose gradients are zero in every environment, such as a
    token that no environment has.

    Attributes:
        share: the share of coordinates that the AND-mask keeps.
        noise: the share that it would keep if signs were noise, given the zeros.
        sign_agreement: the mean of ``|votes| / d``.
        common: the share of the squared gradient of a part of an environment that all environments
            have in common.
        own: the share that the parts of an environment have in common, but not environments. What
            is left, ``1 - common - own``, is noise of the examples. All are estimates without bias
            of numerator and denominator, and can lie outside [0, 1].
        tau: the threshold.
        environments: the number d of environments.
        layer: the name of the layer that takes the input.
        kind: what an input is: ``"features"``, ``"pixels"`` or ``"tokens"``.
    """

    share: Tensor
    noise: Tensor
    sign_agreement: Tensor
    common: Tensor
    own: Tensor
    tau: float
    environments: int
    layer: str
    kind: str

    @property
    def below_noise(self) -> Tensor:
        """Whether less is kept than of noise. So are inputs that say nothing, after training."""
        return self.share < self.noise

    def fought_over(self, least: float = 0.4) -> Tensor:
        """Return on which inputs environments pull in different directions: bool.

        These are shortcuts of differing meaning. At a model that fits its data, a shortcut of
        differing strength is pulled back and forth, too: :func:`diagnose` tells them apart.

        Args:
            least: the smallest ``own``. 0.4 told a shortcut from noise in nearly all measurements
                of ``docs/metrics.md``.
        """
        return (self.own >= least) & (self.own > self.common)

    def __repr__(self) -> str:
        count = int(self.fought_over().sum())
        return (
            f"InputAgreement({list(self.share.shape)} {self.kind} of {self.layer!r}, "
            f"{self.environments} environments, tau={self.tau:g}, {count} fought over)"
        )


def input_agreement(
    model: nn.Module,
    environments: Iterable[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    tau: float,
    layer: str | None = None,
) -> InputAgreement:
    r"""Return what environments agree on in the weights of each feature, pixel or token.

    It looks at the layer that takes the input. The coordinates of an input are

    - of a feature, the weights in its column of :class:`torch.nn.Linear`;
    - of a pixel, the weights of a convolution that it meets, as if the layer had weights of its own
      at each position;
    - of a token, its row of :class:`torch.nn.Embedding`.

    Ask a model after some plain training. An input of ``share`` below ``noise`` is no evidence by
    itself: training takes away what the mean of all environments says, and the rest adds up to
    nothing. ``own`` compares environments with their own parts, which tells shortcuts from noise
    (:meth:`InputAgreement.fought_over`).

    Memory is four copies of all coordinates, however many environments there are. A convolution has
    as many as pixels, weights of a kernel and output channels multiplied.

    Args:
        model: the model. It stays as it is, and so do modes, buffers, gradients and random state.
            Batch norm in train mode normalises by the batch of an environment.
        environments: pairs (inputs, targets), of which one at a time is used. A tuple of inputs is
            passed as several arguments, and the first is asked about. Examples lie in dimension 0.
        loss_fn: a function from the model's output and the targets to a 0-dim loss.
        tau: threshold of the AND-mask in [0, 1].
        layer: the name of the layer to look at, as in ``model.named_modules()``. None: the layer
            that takes the input, which may be flattened, or scaled element by element.

    Returns:
        Shares by input. Features have the shape ``[features]``, pixels ``[channels, *size]``,
        tokens ``[vocabulary]``. ``common`` and ``own`` are NaN if an environment has fewer than 4
        examples.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no environment, none or several layers take the input, or the shape of
            inputs differs between environments.

    Example:
        >>> import torch, andmask_ext as am
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> y = torch.tensor([[1.0], [-1.0]] * 4)
        >>> environments = [(torch.cat([y, sign * y], 1), y) for sign in (1, 1, -1, -1)]
        >>> result = am.metrics.input_agreement(
        ...     model, environments, torch.nn.functional.mse_loss, tau=0.8)
        >>> result.share, result.noise
        (tensor([1., 0.], dtype=torch.float64), tensor([0.1250, 0.1250], dtype=torch.float64))
        >>> result.fought_over()
        tensor([False,  True])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    check_tau(tau)
    probe = Probe(model, loss_fn)
    found = None
    sums = _Sums()
    with probe.keeping_random_state(), torch.enable_grad():
        for inputs, targets in pairs_of(environments):
            enough = examples_in(inputs) >= PARTS
            if found is None:
                found = find_input_layer(probe, inputs, layer)
            sums.add(found.gradients(inputs, targets, PARTS), enough)
    if found is None:
        raise ValueError("environments: expected at least 1, but got none")
    return sums.result(tau, found.name, found.kind)


class _Sums:
    """Sums over environments, one value for each coordinate or for each input."""

    def __init__(self) -> None:
        self.count = 0
        self._enough = True
        self._shape: tuple[int, ...] | None = None

    def add(self, parts: Iterator[Gradient], enough: bool) -> None:
        """Add an environment, of which the parts have gradients.

        Args:
            parts: gradients of its parts.
            enough: whether every part has examples.
        """
        total: Tensor | None = None
        squares: Tensor | float = 0.0
        for part in parts:
            total = part.values if total is None else total + part.values
            squares = squares + _squared(part.values)
            last = part
        assert total is not None
        if self._shape is None:
            self._shape, self._real = last.shape, last.real
            self._sum = torch.zeros_like(total)
            self._votes = torch.zeros_like(total, dtype=torch.int16)
            self._voters = torch.zeros_like(self._votes)
            self._of_parts = self._of_environments = torch.zeros_like(_squared(total))
        if self._shape != last.shape:
            raise ValueError(
                f"environments: expected inputs of shape {list(self._shape)} in each, but got "
                f"{list(last.shape)} in environment {self.count}"
            )
        if self.count == torch.iinfo(torch.int16).max:
            self._votes, self._voters = self._votes.int(), self._voters.int()
        up, down = total > 0, total < 0
        self._votes += up
        self._votes -= down.to(self._votes.dtype)
        self._voters += up | down
        self._sum += total
        self._of_parts = self._of_parts + squares
        self._of_environments = self._of_environments + _squared(total)
        self._enough &= enough
        self.count += 1

    def result(self, tau: float, layer: str, kind: str) -> InputAgreement:
        """Return means over the coordinates of each input."""
        assert self._shape is not None
        d, k = self.count, PARTS
        threshold = vote_threshold(tau, d)
        width = self._real.expand_as(self._votes).sum(1).double()
        levels = torch.tensor(
            _noise_levels(d, threshold), dtype=torch.float64, device=self._votes.device
        )
        votes = self._votes.abs()
        absent = self._voters.amax(1) == 0

        def shown(values: Tensor) -> Tensor:
            assert self._shape is not None
            return torch.where(absent, torch.nan, values).view(self._shape)

        # Means of products of two parts of one environment, and of two environments.
        within = (self._of_environments - self._of_parts) / (d * k * (k - 1))
        between = (_squared(self._sum) - self._of_environments) / (d * (d - 1) * k**2)
        energy = self._of_parts / (d * k)
        if not self._enough or d == 1:
            within = between = torch.full_like(energy, torch.nan)
        return InputAgreement(
            share=shown(((votes >= threshold) & self._real).sum(1) / width),
            noise=shown((levels[self._voters.long()] * self._real).sum(1) / width),
            sign_agreement=shown(votes.sum(1, dtype=torch.float64) / d / width),
            common=shown(between / energy),
            own=shown((within - between) / energy),
            tau=float(tau),
            environments=d,
            layer=layer,
            kind=kind,
        )


def _squared(values: Tensor) -> Tensor:
    """Return the sums of squares of rows."""
    return values.double().square().sum(1)
