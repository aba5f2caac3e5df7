"""Moments: the few sums over environments that a rule needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_dense_grad, check_dtype, check_weight
from ._devices import by_device
from ._dtypes import dtype_name, wide_dtype
from ._norms import squared_norm

if TYPE_CHECKING:
    from .rules import Rule

__all__ = ["Moments"]

KINDS = ("votes", "squares", "logs")
_LOG_OF_ZERO = math.log(1e-10)
_VOTE_TYPES = (torch.int8, torch.int16, torch.int32)


class Moments:
    r"""Sums over environments for a list of parameters, in memory that does not grow with them.

    Per parameter, in its shape, device and memory layout:

    - ``sum``: :math:`\sum_e g_e`, float32 (float64 for float64 parameters); always kept;
    - ``votes``: :math:`\sum_e \mathrm{sign}(g_e)`, int8 up to 127 environments, int16 up to 32767,
      int32 beyond: widened before they could overflow;
    - ``squares``: :math:`\sum_e (g_e - \bar g)^2`, the squared deviations from the mean. They are
      updated as the mean moves, so that nothing cancels where the mean is far larger than the
      spread;
    - ``logs``: :math:`\sum_e \log(|g_e| + 10^{-10})`.

    With ``track_norms = True``, set before the first environment, also a number per parameter,
    ``squared_norms``: :math:`\sum_e \|g_e\|^2`, for :func:`andmask_ext.metrics.coherence`.

    ``count`` is the number of environments. An environment without a gradient for a parameter has
    gradient zero there: it counts, and votes for neither sign. The entry of a parameter that no
    environment has touched is None.

    Args:
        params: the parameters (or any tensors of their shape, dtype, device and layout).
        kinds: the moments to keep beside the sum; for a rule, its ``rule.moments``.

    Raises:
        TypeError: a parameter is not a floating-point tensor.
        ValueError: a kind is not known.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.zeros(2)
        >>> moments = am.Moments([weight])
        >>> moments.add([torch.tensor([1.0, -2.0])])
        >>> moments.add([torch.tensor([3.0, 4.0])])
        >>> moments
        Moments(2 environments, 1 of 1 parameters, sum + votes)
        >>> [am.AndMask(tau).resolve(moments)[0].tolist() for tau in (0.0, 1.0)]
        [[2.0, 1.0], [2.0, 0.0]]
    """

    def __init__(self, params: Iterable[Tensor], kinds: Iterable[str] = ("votes",)) -> None:
        self._params = list(params)
        for index, param in enumerate(self._params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"params[{index}]: expected a Tensor, but got {type(param).__name__}"
                )
            check_dtype(f"params[{index}]", param)
        wanted = tuple(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, but got {kind!r}")
        self.kinds: tuple[str, ...] = tuple(kind for kind in KINDS if kind in wanted)
        self.count = 0
        self._vote_type = torch.int8
        self._touched = [False] * len(self._params)
        self._open: set[int] = set()  # touched in the environment that is being added
        self.track_norms = False
        self.observed = False  # an observer wants norms in this step
        self._norms: list[Tensor | None] | None = None
        self._memory: dict[str, list[Tensor | None]] = {
            kind: [None] * len(self._params) for kind in ("sum", *self.kinds)
        }

    def __repr__(self) -> str:
        return (
            f"Moments({self.count} environments, {sum(self._touched)} of {len(self._params)} "
            f"parameters, {' + '.join(self._memory)})"
        )

    def _get(self, kind: str) -> list[Tensor | None]:
        if kind not in self._memory:
            raise AttributeError(f"{kind} are not kept: pass kinds=(..., {kind!r}) to Moments")
        return [
            memory if touched else None
            for memory, touched in zip(self._memory[kind], self._touched, strict=True)
        ]

    @property
    def sum(self) -> list[Tensor | None]:
        """Sums of the gradients."""
        return self._get("sum")

    @property
    def votes(self) -> list[Tensor | None]:
        """Sums of their signs."""
        return self._get("votes")

    @property
    def squares(self) -> list[Tensor | None]:
        """Sums of their squared deviations from the mean."""
        return self._get("squares")

    @property
    def logs(self) -> list[Tensor | None]:
        """Sums of the logarithms of their magnitudes (plus 1e-10)."""
        return self._get("logs")

    @property
    def squared_norms(self) -> list[Tensor | None] | None:
        """Sums of the squared norms of the gradients, 0-dim float64; None: they are not tracked.

        They belong neither to :meth:`state_dict` nor, unless both have them, to :meth:`merge`.
        """
        if self._norms is None or self.count == 0:
            return None
        return [
            norm if touched else None
            for norm, touched in zip(self._norms, self._touched, strict=True)
        ]

    @property
    def tracks_norms(self) -> bool:
        """Whether squared norms are tracked, for the user or for an observer."""
        return self.track_norms or self.observed

    # ---- producers ----

    def add(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add one environment.

        Args:
            grads: its gradients, one per parameter; None is zero.
            weight: multiplies them, as it would the environment's loss; positive. It does not
                change their votes. (The pooled loss of environments of n_e examples, N in all, has
                weights d * n_e / N.)

        Raises:
            TypeError: a gradient is sparse or of another dtype than its parameter.
            ValueError: another number of gradients, another shape, or a weight that is not
                positive and finite.
        """
        check_weight(weight)
        self._check_length(grads)
        self.add_some(
            [i for i, grad in enumerate(grads) if grad is not None],
            [grad for grad in grads if grad is not None],
            weight,
        )
        self.end_environment()

    def add_stacked(
        self, grads: Sequence[Tensor | None], weights: Sequence[float] | None = None
    ) -> None:
        """Add several environments at once.

        Args:
            grads: one tensor ``[c, *shape]`` per parameter; None is zero in all of them.
            weights: one positive factor per environment; see :meth:`add`.

        Raises:
            TypeError: as :meth:`add`.
            ValueError: as :meth:`add`, or the number of environments differs or is zero.
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
        if not set(given).issuperset(i for i, touched in enumerate(self._touched) if touched):
            for row in range(environments):  # some parameters have zeros: one at a time
                self.add(
                    [None if grad is None else grad[row] for grad in grads],
                    1.0 if weights is None else weights[row],
                )
            return
        self._accumulate(given, chosen, list(weights or ()), environments)
        self.count += environments

    def add_some(self, indices: Sequence[int], grads: Sequence[Tensor], weight: float) -> None:
        """Add gradients of some parameters to the environment that :meth:`end_environment` ends.

        For producers that see gradients one after the other. Each parameter at most once for each
        environment.
        """
        for index, grad in zip(indices, grads, strict=True):
            self._check_grad(index, grad, tuple(self._params[index].shape))
        if not self._open.isdisjoint(indices):
            raise RuntimeError("expected each parameter once in an environment, but got one twice")
        self._accumulate(indices, grads, [] if weight == 1 else [weight], 0)
        self._open.update(indices)

    def open_memory(self, indices: Sequence[int], environments: int) -> list[list[Any]]:
        """Return the moments of some parameters, ready for so many environments more.

        For producers that add several environments to a parameter themselves, before
        :meth:`end_environments`. With ``count`` 0 what the moments hold is to be ignored.
        """
        if not self._open.isdisjoint(indices):
            raise RuntimeError("expected each parameter once in an environment, but got one twice")
        self._widen_votes(self.count + environments)
        for index in indices:
            self._touch(index)
        self._open.update(indices)
        return self._lists(indices)

    def end_environment(self) -> None:
        """End the environment: what has not come is zero."""
        self.end_environments(1)

    def end_environments(self, environments: int) -> None:
        """End environments that were added together: what has not come is zero in all of them."""
        for _ in range(environments):
            if self.kinds not in ((), ("votes",)):  # zeros change neither the sum nor the votes
                missing = [
                    i for i, touched in enumerate(self._touched) if touched and i not in self._open
                ]
                zeros = [torch.zeros_like(self._params[i].detach()) for i in missing]
                self._accumulate(missing, zeros, [], 0)
            self.count += 1
        self._open.clear()

    def _accumulate(
        self, indices: Sequence[int], grads: Sequence[Tensor], weights: list[float], stacked: int
    ) -> None:
        if not indices:
            return
        with torch.no_grad():
            self._widen_votes(self.count + max(stacked, 1))
            for index in indices:
                self._touch(index)
            if self._norms is not None:
                squared = _squared_norms(grads, weights, stacked > 0)
                for index, norm in zip(indices, squared, strict=True):
                    self.add_squared_norm(index, norm)
            for places in self._by_device(indices):
                some = [grads[place] for place in places]
                torch.ops.andmask._accumulate_.default(
                    *self._lists([indices[place] for place in places]),
                    [grad.detach() if grad.requires_grad else grad for grad in some],
                    self.count,
                    weights,
                    stacked > 0,
                )

    def add_squared_norm(self, index: int, squared_norm: Tensor) -> None:
        """Add to the squared norms of a parameter, if they are tracked.

        For producers that write to :meth:`open_memory`.
        """
        if self._norms is None:
            return
        before = self._norms[index]
        self._norms[index] = squared_norm if before is None else before + squared_norm

    def _widen_votes(self, environments: int) -> None:
        if "votes" not in self._memory or environments <= torch.iinfo(self._vote_type).max:
            return
        self._vote_type = next(t for t in _VOTE_TYPES if environments <= torch.iinfo(t).max)
        self._memory["votes"] = [
            None if votes is None else votes.to(self._vote_type) for votes in self._memory["votes"]
        ]

    def _touch(self, index: int) -> None:
        """Make sure that a parameter has its memory, and that it holds the zeros before."""
        if self._touched[index]:
            return
        if self.tracks_norms and not any(self._touched):  # environments before were zero here
            self._norms = [None] * len(self._params)
        self._touched[index] = True
        param = self._params[index]
        for kind, memory in self._memory.items():
            kept, dtype = memory[index], self._dtype(kind, param)
            if kept is None or kept.dtype != dtype or kept.device != param.device:
                memory[index] = torch.empty_like(param.detach(), dtype=dtype)
            if self.count:  # else the first environment overwrites what is there
                memory[index].fill_(self.count * _LOG_OF_ZERO if kind == "logs" else 0)  # type: ignore[union-attr]

    def _dtype(self, kind: str, param: Tensor) -> torch.dtype:
        if kind == "votes":
            return self._vote_type
        return wide_dtype(param)

    def _lists(self, indices: Sequence[int]) -> list[list[Any]]:
        """Sum, votes, squares and logs of some parameters; those not kept are empty."""
        return [
            [self._memory[kind][i] for i in indices] if kind in self._memory else []
            for kind in ("sum", *KINDS)
        ]

    # ---- consumers ----

    @property
    def touched(self) -> list[int]:
        """The indices of the parameters that any environment has touched."""
        return [i for i, touched in enumerate(self._touched) if touched]

    def arguments(self, rule: Rule, indices: Sequence[int]) -> tuple[Any, ...]:
        """Return what the native consumers take: moments, count, rule."""
        if self.count == 0:
            raise ValueError("moments: expected at least one environment, but got 0")
        missing = set(rule.moments or ()) - set(self.kinds)
        if rule.moments is None or missing:
            raise ValueError(
                f"moments: expected {' + '.join(('sum', *(rule.moments or ())))} for {rule}, "
                f"but got {' + '.join(self._memory)}"
            )
        return (*self._lists(indices), self.count, rule.name, rule.arguments, rule.rescale)

    def resolve(self, rule: Rule) -> list[Tensor | None]:
        """Return the update that a rule makes of each parameter; None for untouched ones.

        The moments stay as they are: several rules, or values of ``tau``, may be tried on them.

        Args:
            rule: one that has ``rule.moments``; all of those must be kept.

        Returns:
            One tensor per parameter, in its shape, dtype, device and layout.

        Raises:
            ValueError: no environment has been added, or the rule needs a moment that is not kept.
        """
        return self._resolve(rule, torch.ops.andmask._resolve.default)

    def resolve_and_release(self, rule: Rule) -> list[Tensor | None]:
        """Like :meth:`resolve`, in the memory of the sums where it can be; then start anew."""

        def resolve(*arguments: Any) -> list[Tensor]:
            torch.ops.andmask._resolve_.default(*arguments)
            sums: list[Tensor] = arguments[0]
            return sums

        resolved = self._resolve(rule, resolve)
        for index in self.touched:
            self._memory["sum"][index] = None
        self.reset()
        return resolved

    def _resolve(self, rule: Rule, op: Callable[..., list[Tensor]]) -> list[Tensor | None]:
        touched = self.touched
        self.arguments(rule, touched)  # raises, even if there is nothing to do
        resolved: list[Tensor | None] = [None] * len(self._params)
        for places in self._by_device(touched):
            indices = [touched[place] for place in places]
            with torch.no_grad():
                updates = op(*self.arguments(rule, indices))
            for index, update in zip(indices, updates, strict=True):
                resolved[index] = update.to(self._params[index].dtype)
        return resolved

    def _by_device(self, indices: Sequence[int]) -> list[list[int]]:
        return by_device([self._params[index] for index in indices])

    # ---- bookkeeping ----

    def reset(self) -> None:
        """Forget all environments, and keep the memory for the next ones."""
        self.count = 0
        self._touched = [False] * len(self._params)
        self._open.clear()
        self._norms = None

    def merge(self, other: Moments) -> None:
        """Add all environments of other moments (of the same parameters, on another machine, say).

        Raises:
            ValueError: they keep other kinds, or have parameters of other shapes.
        """
        mine, theirs = ([p.shape for p in m._params] for m in (self, other))
        if self.kinds != other.kinds or mine != theirs:
            raise ValueError(f"other: expected moments like {self}, but got {other}")
        if other.count == 0:
            return
        with torch.no_grad():
            if self.count == 0:
                self._vote_type = max(self._vote_type, other._vote_type, key=lambda t: t.itemsize)
            self._widen_votes(self.count + other.count)
            norms = self._merged_norms(other)
            for index in set(self.touched) | set(other.touched):
                self._merge_one(index, other)
            self._norms = norms
        self.count += other.count

    def _merged_norms(self, other: Moments) -> list[Tensor | None] | None:
        if other._norms is None or (self.count and self._norms is None):
            return None
        mine = self._norms or [None] * len(self._params)
        theirs = [
            None if norm is None else norm.to(param.device)
            for norm, param in zip(other._norms, self._params, strict=True)
        ]
        return [
            one if two is None else two if one is None else one + two
            for one, two in zip(mine, theirs, strict=True)
        ]

    def _merge_one(self, index: int, other: Moments) -> None:
        self._touch(index)
        param, count = self._params[index], other.count
        if self.count == 0:
            for memory in self._memory.values():
                memory[index].zero_()  # type: ignore[union-attr]
        mine: dict[str, Any] = {kind: memory[index] for kind, memory in self._memory.items()}
        theirs: dict[str, Any] = {
            kind: memory[index].to(param.device)  # type: ignore[union-attr]
            if other._touched[index]
            else torch.full_like(mine[kind], count * _LOG_OF_ZERO if kind == "logs" else 0)
            for kind, memory in other._memory.items()
        }
        if "squares" in mine:
            mine["squares"] += theirs["squares"]
            if self.count:  # the deviation of the two means (Chan, Golub and LeVeque 1979)
                deviation = theirs["sum"] / count - mine["sum"] / self.count
                share = self.count * count / (self.count + count)
                mine["squares"] += deviation.square_().mul_(share)
        for kind in mine.keys() - {"squares"}:
            mine[kind] += theirs[kind]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`load_state_dict` needs to go on to the same bits.

        Like those of modules and optimizers it holds the tensors themselves, not copies.
        """
        return {"count": self.count, **{kind: self._get(kind) for kind in self._memory}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of moments of the same kinds and parameters; tensors are copied.

        Raises:
            ValueError: the state has other kinds, or tensors of other shapes.
        """
        kinds = [kind for kind in state if kind != "count"]
        if sorted(kinds) != sorted(self._memory):
            raise ValueError(
                f"state: expected {' + '.join(self._memory)}, but got {' + '.join(kinds)}"
            )
        shapes = [[None if t is None else t.shape for t in state[kind]] for kind in kinds]
        expected = [
            None if t is None else p.shape for p, t in zip(self._params, state["sum"], strict=False)
        ]
        if any(found != expected for found in shapes) or len(expected) != len(self._params):
            raise ValueError(f"state: expected shapes {expected}, but got {shapes[0]}")
        self.reset()
        self._widen_votes(state["count"])
        for index, total in enumerate(state["sum"]):
            if total is None:
                continue
            self._touch(index)
            for kind in kinds:
                self._memory[kind][index].copy_(state[kind][index])  # type: ignore[union-attr]
        self._norms = None  # not part of the state
        self.count = state["count"]

    # ---- checks ----

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
        check_dense_grad(f"grads[{index}]", grad)
        if grad.shape != shape:
            raise ValueError(f"grads[{index}]: expected shape {shape}, but got {tuple(grad.shape)}")
        if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
            raise TypeError(
                f"grads[{index}]: expected dtype {dtype_name(param.dtype)}, "
                f"but got {dtype_name(grad.dtype)}"
            )


def _squared_norms(grads: Sequence[Tensor], weights: list[float], stacked: bool) -> list[Tensor]:
    """Return the sum over environments of the squared norm of each gradient, 0-dim float64."""
    if stacked and len(weights) > 1:
        return [
            torch.stack(
                [squared_norm(row) * weight**2 for row, weight in zip(grad, weights, strict=True)]
            ).sum()
            for grad in grads
        ]
    factor = weights[0] ** 2 if weights else 1.0
    return [squared_norm(grad) * factor for grad in grads]
