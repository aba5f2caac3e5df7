"""The Monitor: metrics of every parameter during training."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._checks import check_bool, check_count
from .._pending import Group, Observer
from .._vote_test import vote_test
from ..agreement import Agreement
from ..optim import EnvironmentOptimizer, TemporalAndMaskAdam
from ._record import METRICS, make_record

__all__ = ["Monitor"]

_ALL = "all"  # used instead of a parameter's name


class SummaryWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that :meth:`Monitor.write` needs."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> Any:
        """Write one value of a curve."""


class Monitor(Observer):
    r"""Record how far the environments agree, for each parameter, while a model trains.

    Every ``every`` steps, just before the moments are aggregated, it records these metrics:

    - ``sign_agreement``: mean of :math:`|\mathrm{votes}| / d` over coordinates;
    - ``kept_fraction``: share of coordinates with :math:`|\mathrm{votes}| \ge t`;
    - ``noise_kept_fraction``: the share expected for pure noise;
    - ``threshold``: :math:`t / d`, above 1 where a parameter is masked whole; for all parameters
      together the mean over coordinates;
    - ``noise_share``: ``noise_kept_fraction / kept_fraction``, at most 1: the estimated share of
      noise among what is kept. It is NaN where nothing is kept;
    - ``norm``, ``masked_norm``: norms of the mean gradient and of its kept coordinates;
    - ``coherence``: see :func:`andmask_ext.metrics.coherence`.

    A recorded step makes one more pass over sums and votes. If a rule does without votes
    (``Mean()``), they are counted for the monitor, in every step. With ``coherence=True`` it also
    computes the squared norm of each environment's gradient. Other steps cost nothing. Results
    stay on the device of the parameters, so no step waits for the device. The source keeps the
    monitor until :meth:`detach`.

    The threshold t of votes is that of each group's rule: :math:`\tau d` rounded up, or what its
    ``fdr`` or ``significance`` makes of the votes of a parameter. If zeros abstain, t depends on
    the coordinate, and ``threshold`` is that of a coordinate without zeros.

    To monitor plain training, train with ``Mean()``. ``Monitor(optimizer, tau=0.8)`` then records
    what a threshold of 0.8 would keep, and ``Monitor(optimizer, fdr=0.005)`` what that level would.

    Args:
        source: an optimizer of :mod:`andmask_ext.optim` that takes environments, or an
            :class:`andmask_ext.Agreement`.
        tau: threshold, instead of that of each group's rule.
        fdr: false discovery rate, instead of that threshold: see :class:`andmask_ext.AndMask`.
        significance: level of significance, instead of that threshold.
        zeros: with one of these three, ``"count"`` or ``"abstain"``: what a gradient of 0 is.
        every: the number of steps from one record to the next. The first step is recorded.
        coherence: whether to record the coherence.
        names: names of the parameters: ``model.named_parameters()`` or a dict. None: the names that
            the source knows, else the numbers of group and parameter.

    Raises:
        TypeError: ``source`` is neither of these, such as ``TemporalAndMaskAdam``, which has one
            environment per step; or an option has the wrong type.
        ValueError: more than one threshold is given, or ``zeros`` without one; one of them lies
            outside its range; or ``every`` is not positive.

    Example:
        >>> import torch, andmask_ext as am
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=1.0)
        >>> monitor = am.metrics.Monitor(optimizer, names=model.named_parameters())
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     with optimizer.environment():
        ...         model(x).backward()
        >>> optimizer.step()
        >>> monitor
        Monitor(1 record of 1 parameter, every 10 steps)
        >>> monitor.latest["kept_fraction/weight"]
        tensor(0.5000, dtype=torch.float64)
        >>> monitor.latest["noise_kept_fraction/weight"]
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        source: EnvironmentOptimizer | Agreement,
        *,
        tau: float | None = None,
        fdr: float | None = None,
        significance: float | None = None,
        zeros: str = "count",
        every: int = 10,
        coherence: bool = True,
        names: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | None = None,
    ) -> None:
        of_rules = (tau, fdr, significance, zeros) == (None, None, None, "count")
        self._test = None if of_rules else vote_test(tau, fdr, significance, zeros)
        abstain = self._test is not None and self._test.abstain
        self.kinds = ("votes", "voters") if abstain else ("votes",)
        check_count("every", every, 1)
        check_bool("coherence", coherence)
        known: dict[int, str] = {}
        if isinstance(source, Agreement):
            known = source._require_setup("Monitor").names
            if source._optimizer is not None:
                source = source._optimizer
        elif not isinstance(source, EnvironmentOptimizer):
            raise TypeError(
                "source: expected an optimizer of andmask_ext.optim that takes environments, or an "
                f"Agreement, but got {type(source).__name__}"
                + (", which sees one in each step" * isinstance(source, TemporalAndMaskAdam))
            )
        # The source holds the monitor. A strong reference back would make a cycle.
        self._source = weakref.ref(source)
        self._every = every
        self._coherence = coherence
        self._known = known if names is None else _by_id(names)
        self._step = 0
        self._written = 0
        self.steps: list[int] = []
        self.names: list[str] = []
        # Each record: metric -> one value per parameter, and one for all parameters.
        self._records: list[dict[str, Tensor]] = []
        source._pending.add_observer(self)

    def __repr__(self) -> str:
        return (
            f"Monitor({_number(len(self.steps), 'record')} of "
            f"{_number(len(self.names), 'parameter')}, every {_number(self._every, 'step')})"
        )

    def detach(self) -> None:
        """Stop recording. The records stay."""
        source = self._source()
        if source is not None:
            source._pending.remove_observer(self)

    # ---- what the source calls ----

    def begin(self) -> bool:
        return self._coherence and self._step % self._every == 0

    @torch.no_grad()
    def end(self, groups: Sequence[Group]) -> None:
        step, self._step = self._step, self._step + 1
        if step % self._every:
            return
        names = self._names([params for params, _, _ in groups])
        if self._records and names != self.names:
            self._rename(names)
        self.names = names
        self._records.append(make_record(groups, self._test, self._coherence))
        self.steps.append(step)

    def _rename(self, names: list[str]) -> None:
        """Convert earlier records to a new list of parameters. New ones get NaN.

        A group may be added to a monitored optimizer.
        """
        before = {name: place for place, name in enumerate(self.names)}
        for record in self._records:
            for metric, values in record.items():
                nothing = values.new_full((), torch.nan)
                record[metric] = torch.stack([
                    *(values[before[name]] if name in before else nothing for name in names),
                    values[-1],
                ])  # fmt: skip

    def _names(self, groups: Sequence[Sequence[Tensor]]) -> list[str]:
        return [
            self._known.get(id(param), f"{number}.{index}")
            for number, params in enumerate(groups)
            for index, param in enumerate(params)
        ]

    # ---- looking at it ----

    @property
    def latest(self) -> dict[str, Tensor]:
        """The last record: 0-dim float64 tensors by ``"metric/parameter"`` and ``"metric/all"``.

        Raises:
            RuntimeError: there is no record.
        """
        if not self._records:
            raise RuntimeError("latest: expected a step before, but nothing has been recorded")
        return self._scalars(-1)

    def _scalars(self, record: int) -> dict[str, Tensor]:
        return {
            f"{metric}/{name}": value
            for metric, values in self._records[record].items()
            for name, value in zip((*self.names, _ALL), values.unbind(), strict=True)
        }

    def series(self, metric: str) -> Tensor:
        """Return a metric of each parameter over time.

        Args:
            metric: the name of a metric of :class:`Monitor`.

        Returns:
            float64 ``[records, parameters]``. NaN if the parameter had no gradient, and for
            the coherence of gradients that are all zero.

        Raises:
            ValueError: ``metric`` is unknown.
        """
        return self._stacked(metric)[:, :-1]

    def total(self, metric: str) -> Tensor:
        """Return a metric of all parameters together over time.

        Args:
            metric: the name of a metric of :class:`Monitor`.

        Returns:
            float64 ``[records]``.

        Raises:
            ValueError: ``metric`` is unknown.
        """
        return self._stacked(metric)[:, -1]

    def _stacked(self, metric: str) -> Tensor:
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, but got {metric!r}")
        if not self._records:
            return torch.zeros(0, len(self.names) + 1, dtype=torch.float64)
        device = self._records[-1][metric].device  # a loaded record may be on another device
        return torch.stack([record[metric].to(device) for record in self._records])

    def write(self, writer: SummaryWriter) -> None:
        """Write all new records to TensorBoard.

        It may be called repeatedly, for example after each epoch.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or an object with its
                ``add_scalar``.
        """
        for record in range(self._written, len(self._records)):
            for metric, values in self._records[record].items():
                for name, value in zip((*self.names, _ALL), values.tolist(), strict=True):
                    writer.add_scalar(f"{metric}/{name}", value, self.steps[record])
        self._written = len(self._records)

    def to_dataframe(self) -> Any:
        """Return all records as a ``pandas.DataFrame``.

        There is a row for each record and parameter, and one for ``"all"``. The columns are
        ``step``, ``parameter`` and the metrics.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: `pip install pandas`") from error
        names = [*self.names, _ALL]
        columns: dict[str, Any] = {
            "step": [step for step in self.steps for _ in names],
            "parameter": names * len(self.steps),
        }
        for metric in METRICS:
            columns[metric] = self._stacked(metric).flatten().tolist()
        return pandas.DataFrame(columns)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for :meth:`load_state_dict`."""
        return {
            "step": self._step,
            "written": self._written,
            "steps": list(self.steps),
            "names": list(self.names),
            "records": [dict(record) for record in self._records],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the records of an interrupted training run.

        Raises:
            ValueError: the records have different parameters.
        """
        source = self._source()
        groups = [] if source is None else source._rules()
        expected = self._names([params for params, _ in groups])
        if state["names"] and source is not None and state["names"] != expected:
            raise ValueError(
                f"state: expected records of {_number(len(expected))} ({_listed(expected)}), "
                f"but got {_number(len(state['names']))} ({_listed(state['names'])})"
            )
        self._step, self._written = state["step"], state["written"]
        self.steps, self.names = list(state["steps"]), list(state["names"])
        self._records = [_with_all_metrics(record) for record in state["records"]]


def _with_all_metrics(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a record with NaN for metrics that an earlier version did not know."""
    unknown = torch.full_like(record["norm"], torch.nan)
    return {metric: record.get(metric, unknown) for metric in METRICS}


def _by_id(names: object) -> dict[int, str]:
    pairs = names.items() if isinstance(names, Mapping) else names
    by_id = {}
    try:
        for name, param in pairs:  # type: ignore[attr-defined]
            if not isinstance(name, str) or not isinstance(param, Tensor):
                raise TypeError
            by_id[id(param)] = name
    except (TypeError, ValueError):
        raise TypeError(
            "names: expected pairs of name and parameter, as model.named_parameters(), "
            f"but got {type(names).__name__}"
        ) from None
    return by_id


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _number(count: int, of: str = "parameter") -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"
