"""Moments: the sums over environments that a rule needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_dense_grad, check_dtype, check_weight
from ._devices import by_device
from ._dtypes import dtype_name
from ._memory import KINDS, Memory
from ._norms import merged_norms, squared_norms_over_environments

__all__ = ["Moments"]


class Moments:
    r"""Sums over environments for a list of parameters. Their memory does not grow with d.

    Each parameter has these sums, in its shape, device and memory layout:

    - ``sum``: :math:`\sum_e g_e`, float32 (float64 for float64 parameters), always kept;
    - ``votes``: :math:`\sum_e \mathrm{sign}(g_e)`, int8 up to 127 environments, int16 up to 32767,
      then int32;
    - ``squares``: :math:`\sum_e (g_e - \bar g)^2`, updated with the running mean, so a mean far
      above the spread cancels no digits; float32 or float64 as ``sum``;
    - ``logs``: :math:`\sum_e \log(|g_e| + 10^{-10})`, float32 or float64 as ``sum``;
    - ``voters``: the number of signs that are not zero, in the dtype of ``votes``, which it needs.

    The kind ``"norms"`` adds one float64 number per parameter, ``squared_norms``:
    :math:`\sum_e \|g_e\|^2`, for :func:`andmask_ext.metrics.coherence`.

    ``count`` is the number d of environments. If an environment has no gradient for a parameter, it
    counts with gradient zero and votes for neither sign. The sums of a parameter are None until an
    environment has a gradient for it.

    Args:
        params: the parameters (or any tensors of their shape, dtype, device and layout). Frozen
            parameters of other dtypes are passed over.
        kinds: the moments to keep in addition to the sum: a subset of ``"votes"``, ``"squares"``,
            ``"logs"``, ``"norms"`` and, beside votes, ``"voters"``. For a rule: ``rule.moments``.

    Raises:
        TypeError: a parameter is not a floating-point tensor.
        ValueError: a kind is unknown.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.zeros(2)
        >>> moments = am.Moments([weight])
        >>> moments.add([torch.tensor([1.0, -2.0])])
        >>> moments.add([torch.tensor([3.0, 4.0])])
        >>> moments
        Moments(2 environments, 1 of 1 parameters, sum + votes)
        >>> [am.AndMask(tau).update(moments)[0].tolist() for tau in (0.0, 1.0)]
        [[2.0, 1.0], [2.0, 0.0]]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        kinds: Iterable[str] = ("votes",),
        *,
        _frozen: bool = False,  # pass over all tensors without gradients, parameters or not
    ) -> None:
        self._params = list(params)
        for index, param in enumerate(self._params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"params[{index}]: expected a Tensor, but got {type(param).__name__}"
                )
            frozen = not param.requires_grad and (_frozen or isinstance(param, nn.Parameter))
            if not frozen:  # quantized weights never have a gradient
                check_dtype(f"params[{index}]", param)
        wanted = tuple(kinds)
        known = (*KINDS, "norms")
        for kind in wanted:
            if kind not in known:
                raise ValueError(f"kinds: expected some of {', '.join(known)}, but got {kind!r}")
        if "voters" in wanted and "votes" not in wanted:
            raise ValueError("kinds: expected 'votes' beside 'voters', but got 'voters' alone")
        self.kinds: tuple[str, ...] = tuple(kind for kind in known if kind in wanted)
        self.count = 0
        self._memory = Memory(self._params, self.kinds)
        self._open: set[int] = set()  # parameters already added to in this environment
        self._observed = False  # an observer wants norms in this step
        self._norms: list[Tensor | None] | None = None

    def __repr__(self) -> str:
        return (
            f"Moments({self.count} environments, {len(self._touched)} of {len(self._params)} "
            f"parameters, {' + '.join(self._memory.kinds)})"
        )

    def _get(self, kind: str) -> list[Tensor | None]:
        if kind not in self._memory.kinds:
            raise AttributeError(f"{kind} are not kept: pass kinds=(..., {kind!r}) to Moments")
        return self._memory.get(kind)

    @property
    def sum(self) -> list[Tensor | None]:
        """Sums of the gradients."""
        return self._get("sum")

    @property
    def votes(self) -> list[Tensor | None]:
        """Sums of the signs of the gradients."""
        return self._get("votes")

    @property
    def squares(self) -> list[Tensor | None]:
        """Sums of the squared deviations of the gradients from their mean."""
        return self._get("squares")

    @property
    def logs(self) -> list[Tensor | None]:
        """Sums of the logarithms of the magnitudes of the gradients (plus 1e-10)."""
        return self._get("logs")

    @property
    def voters(self) -> list[Tensor | None]:
        """Numbers of gradients whose sign is not zero."""
        return self._get("voters")

    @property
    def squared_norms(self) -> list[Tensor | None] | None:
        """Sums of the squared norms of the gradients, 0-dim float64; None: they are not tracked.

        :meth:`state_dict` does not save them. :meth:`merge` keeps them only if both sides track.
        """
        if self._norms is None or self.count == 0:
            return None
        return [
            norm if self._memory.is_touched(index) else None
            for index, norm in enumerate(self._norms)
        ]

    @property
    def _tracks_norms(self) -> bool:
        """Whether squared norms are tracked for the user or for an observer."""
        return self._observed or "norms" in self.kinds

    @property
    def _counts_zeros(self) -> bool:
        """Whether a gradient of zero changes more than ``count``."""
        return "squares" in self.kinds or "logs" in self.kinds

    # ---- producers ----

    def add(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add one environment.

        Args:
            grads: its gradients, one per parameter; None is zero.
            weight: positive factor of the gradients, like a factor of the loss. It does not change
                votes. With n_e examples in environment e and N in all, the pooled loss has the
                weights ``d * n_e / N``.

        Raises:
            TypeError: a gradient is sparse, or its dtype differs from that of its parameter.
            ValueError: the number or the shapes of gradients are wrong, or ``weight`` is not
                positive and finite.
        """
        check_weight(weight)
        self._check_length(grads)
        self._add_some(
            [i for i, grad in enumerate(grads) if grad is not None],
            [grad for grad in grads if grad is not None],
            weight,
        )
        self._end_environments(1)

    def add_stacked(
        self, grads: Sequence[Tensor | None], weights: Sequence[float] | None = None
    ) -> None:
        """Add several environments at once.

        Args:
            grads: one tensor ``[c, *shape]`` per parameter, for c environments; None is zero.
            weights: one positive factor per environment; see :meth:`add`.

        Raises:
            TypeError: as :meth:`add`.
            ValueError: as :meth:`add`, or c is zero or differs between parameters.
        """
        self._check_length(grads)
        given = [i for i, grad in enumerate(grads) if grad is not None]
        if not given:
            raise ValueError("grads: expected at least one tensor, but got None only")
        first = grads[given[0]]
        if not isinstance(first, Tensor):
            raise TypeError(f"grads[{given[0]}]: expected a Tensor, but got {type(first).__name__}")
        environments = first.shape[0] if first.dim() else 0
        if environments == 0:
            raise ValueError("grads: expected at least 1 environment (dim 0), but got 0")
        if weights is not None and len(weights) != environments:
            raise ValueError(
                f"weights: expected {environments}, one per environment, but got {len(weights)}"
            )
        for weight in weights or ():
            check_weight(weight)
        chosen = [grad for grad in grads if grad is not None]
        for index, grad in zip(given, chosen, strict=True):
            self._check_grad(index, grad, (environments, *self._params[index].shape))
        if not set(given).issuperset(self._touched):
            for row in range(environments):  # some parameters are None: add one by one
                self.add(
                    [None if grad is None else grad[row] for grad in grads],
                    1.0 if weights is None else weights[row],
                )
            return
        self._accumulate(given, chosen, list(weights or ()), environments)
        self.count += environments

    # ---- producers of this package ----

    def _add_some(self, indices: Sequence[int], grads: Sequence[Tensor], weight: float) -> None:
        """Add gradients of some parameters to an environment. ``_end_environments`` ends it.

        This is for producers that get gradients one by one. Each parameter may come once per
        environment.
        """
        for index, grad in zip(indices, grads, strict=True):
            self._check_grad(index, grad, tuple(self._params[index].shape))
        self._require_new(indices)
        self._accumulate(indices, grads, [] if weight == 1 else [weight], 0)
        self._open.update(indices)

    def _open_memory(self, indices: Sequence[int], environments: int) -> list[list[Any]]:
        """Return the moments of some parameters, wide enough for more environments.

        This is for producers that add several environments themselves, before
        ``_end_environments``. If ``count`` is 0, the tensors are uninitialised.
        """
        self._require_new(indices)
        self._memory.widen_votes(self.count + environments)
        for index in indices:
            self._touch(index)
        self._open.update(indices)
        return self._lists(indices)

    def _end_environments(self, environments: int) -> None:
        """Count environments. Parameters without a gradient have gradient zero in all of them."""
        if self._counts_zeros:
            missing = [index for index in self._touched if index not in self._open]
            zeros = [torch.zeros_like(self._params[index].detach()) for index in missing]
            for _ in range(environments):
                self._accumulate(missing, zeros, [], 0)
                self.count += 1
        else:
            self.count += environments
        self._open.clear()

    def _accumulate(
        self, indices: Sequence[int], grads: Sequence[Tensor], weights: list[float], stacked: int
    ) -> None:
        if not indices:
            return
        with torch.no_grad():
            self._memory.widen_votes(self.count + max(stacked, 1))
            for index in indices:
                self._touch(index)
            if self._norms is not None:
                squared = squared_norms_over_environments(grads, weights, stacked > 0)
                for index, norm in zip(indices, squared, strict=True):
                    self._add_squared_norm(index, norm)
            for places in by_device([self._params[index] for index in indices]):
                some = [grads[place] for place in places]
                torch.ops.andmask._accumulate_.default(
                    *self._lists([indices[place] for place in places]),
                    [grad.detach() if grad.requires_grad else grad for grad in some],
                    self.count,
                    weights,
                    stacked > 0,
                )

    def _add_squared_norm(self, index: int, squared_norm: Tensor) -> None:
        """Add to the squared norms of a parameter, if they are tracked.

        This is for producers that write to the tensors of ``_open_memory``.
        """
        if self._norms is None:
            return
        before = self._norms[index]
        self._norms[index] = squared_norm if before is None else before + squared_norm

    def _touch(self, index: int) -> None:
        # Earlier environments had gradient zero here, so their norms are zero.
        if self._tracks_norms and not self._touched:
            self._norms = [None] * len(self._params)
        self._memory.touch(index, self.count)

    # ---- for the rules ----

    @property
    def _touched(self) -> list[int]:
        """The indices of the parameters that any environment has touched."""
        return self._memory.touched

    def _lists(self, indices: Sequence[int]) -> list[list[Any]]:
        """Return sum, votes, squares, logs and voters of some parameters, as native ops do."""
        return self._memory.lists(indices)

    def _release_sums(self) -> None:
        """Drop all environments, and leave the sums to their new owner."""
        self._memory.release_sums()
        self.reset()

    # ---- bookkeeping ----

    def reset(self) -> None:
        """Drop all environments, but keep the memory for reuse."""
        self.count = 0
        self._memory.reset()
        self._open.clear()
        self._norms = None

    def merge(self, other: Moments) -> None:
        """Add all environments of other moments of the same parameters, e.g. of another process.

        Raises:
            ValueError: ``other`` has different kinds, or parameters of different shapes.
        """
        mine, theirs = ([p.shape for p in m._params] for m in (self, other))
        if self._memory.kinds != other._memory.kinds or mine != theirs:
            raise ValueError(f"other: expected moments like {self}, but got {other}")
        if other.count == 0:
            return
        with torch.no_grad():
            lost = other._norms is None or (self.count > 0 and self._norms is None)
            norms = None if lost else merged_norms(self._params, self._norms, other._norms)
            self._memory.merge(other._memory, self.count, other.count)
            self._norms = norms
        self.count += other.count

    def state_dict(self) -> dict[str, Any]:
        """Return the state for :meth:`load_state_dict`. Resuming from it gives identical bits.

        It holds the tensors themselves, not copies, as the state of modules and optimizers.
        """
        return {"count": self.count, **{kind: self._get(kind) for kind in self._memory.kinds}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of moments with the same kinds and parameters. Tensors are copied.

        Raises:
            ValueError: the state has different kinds, or tensors of different shapes.
        """
        kinds = [kind for kind in state if kind != "count"]
        if sorted(kinds) != sorted(self._memory.kinds):
            raise ValueError(
                f"state: expected {' + '.join(self._memory.kinds)}, but got {' + '.join(kinds)}"
            )
        shapes = [[None if t is None else t.shape for t in state[kind]] for kind in kinds]
        expected = [
            None if t is None else p.shape for p, t in zip(self._params, state["sum"], strict=False)
        ]
        if any(found != expected for found in shapes) or len(expected) != len(self._params):
            raise ValueError(f"state: expected shapes {expected}, but got {shapes[0]}")
        self.reset()
        self._memory.widen_votes(state["count"])
        for index, total in enumerate(state["sum"]):
            if total is not None:
                self._memory.load(index, {kind: state[kind][index] for kind in kinds})
        self.count = state["count"]

    # ---- checks ----

    def _require_new(self, indices: Sequence[int]) -> None:
        if len(set(indices)) < len(indices) or not self._open.isdisjoint(indices):
            raise RuntimeError("expected each parameter once in an environment, but got one twice")

    def _check_length(self, grads: Sequence[Tensor | None]) -> None:
        if isinstance(grads, Tensor):
            raise TypeError("grads: expected a sequence of tensors, but got one Tensor")
        if len(grads) != len(self._params):
            raise ValueError(
                f"grads: expected {len(self._params)}, one per parameter, but got {len(grads)}"
            )

    def _check_grad(self, index: int, grad: Tensor, shape: tuple[int, ...]) -> None:
        param = self._params[index]
        if not isinstance(grad, Tensor):
            raise TypeError(f"grads[{index}]: expected a Tensor, but got {type(grad).__name__}")
        check_dtype(f"params[{index}]", param)
        check_dense_grad(f"grads[{index}]", grad)
        if grad.shape != shape:
            raise ValueError(f"grads[{index}]: expected shape {shape}, but got {tuple(grad.shape)}")
        if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
            raise TypeError(
                f"grads[{index}]: expected dtype {dtype_name(param.dtype)}, "
                f"but got {dtype_name(grad.dtype)}"
            )
