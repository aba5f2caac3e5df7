"""The examples of some environments out of a batch: tensors and arrays in containers of any kind.

Every tensor whose batch dimension has the size of the batch is split. A list as long as the batch
with other tensors in it holds one item for each example. What can be read in two ways is refused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_TEXT = (str, bytes, bytearray, memoryview)


def take(batch: Any, examples: Tensor, batch_dim: int, size: int) -> Any:
    """Return a batch of these examples, int64, out of a batch of ``size`` examples.

    Raises:
        TypeError: something in it holds tensors, but cannot be split.
        ValueError: a list in it can be read in two ways, or in none.
    """
    return _Reading(batch_dim, size).take(batch, examples, top=True)


def batch_size(batch: Any, batch_dim: int, ids: Tensor | None) -> int:
    """Return the number of examples of a batch: that by which most of its tensors are split.

    Args:
        batch: tensors and arrays in containers.
        batch_dim: their batch dimension.
        ids: the environment of each example, if it is known.

    Raises:
        TypeError: something in it holds tensors, but cannot be split.
        ValueError: there are no tensors, or several sizes are as likely.
    """
    arrays = list(_arrays(batch))
    tensors = dict.fromkeys(a.shape[batch_dim] for a in arrays if len(a.shape) > batch_dim)
    candidates = list(dict.fromkeys([*tensors, *_lengths(batch)]))
    if not candidates:
        raise ValueError("batch: expected tensors that hold the batch, but found none")
    if ids is not None and _Reading(batch_dim, len(ids)).split(batch, top=True):
        return len(ids)
    scores: dict[int, int] = {}
    refusal = ValueError("batch: expected tensors that hold the batch, but found none")
    for size in candidates:
        reading = _Reading(batch_dim, size)
        try:
            if size in tensors or reading.splits_the_first(batch):
                scores[size] = reading.split(batch, top=True)
        except ValueError as error:
            refusal = error
    best = [size for size, score in scores.items() if score == max(scores.values())]
    if not best:
        raise refusal
    # Of several sizes of tensors the first counts. A list as long as another size is a doubt.
    if any(size not in tensors for size in best[1:]):
        raise ValueError(
            f"batch: expected one size of the batch, but it can be read as {best[0]} or "
            f"{best[-1]} examples; pass environments as an int64 tensor, one id per example"
        )
    return best[0]


class _Reading:
    """A batch, read as one of ``size`` examples."""

    def __init__(self, batch_dim: int, size: int) -> None:
        self.batch_dim = batch_dim
        self.size = size

    def axis(self, array: Any) -> int | None:
        """Return the axis of a tensor or an array that holds the batch, or None."""
        if len(array.shape) > self.batch_dim and array.shape[self.batch_dim] == self.size:
            return self.batch_dim
        labels = self.batch_dim > 0 and len(array.shape) == 1 and len(array) == self.size
        return 0 if labels else None

    def split(self, value: Any, top: bool = False) -> int:
        """Return the number of tensors that are split, those of items per example included."""
        if _is_array(value):
            return int(self.axis(value) is not None)
        if _is_list(value) and self.one_per_example(value, top):
            return sum(1 for _ in _arrays(value))
        counts = [self.split(item) for item in _children(value)]
        if counts and not any(counts) and _is_list(value) and _holds_arrays(value):
            raise ValueError(
                f"batch: expected a list of {self.size} items, one per example, or of tensors with "
                f"{self.size} rows, but got {len(value)} items without; keep what belongs to no "
                "example out of the batch, where loss_fn can read it"
            )
        return sum(counts)

    def splits_the_first(self, batch: Any) -> bool:
        """Return whether the first part that holds tensors is split."""
        if _is_list(batch) and self.one_per_example(batch, top=True):
            return True
        parts = (part for part in _children(batch) if _holds_arrays(part))
        return bool(self.split(next(parts, ())))

    def one_per_example(self, items: Sequence[Any], top: bool) -> bool:
        """Return whether a list holds one item per example, and not several parts of the batch."""
        if len(items) != self.size:
            return False
        arrays = list(_arrays(items))
        if not arrays:  # names, lengths
            return not isinstance(items, tuple) and not top
        if all(isinstance(item, Mapping) and item.keys() == items[0].keys() for item in items):
            return True
        alike = all(type(item) is type(items[0]) for item in items)
        if not alike or (top and (_is_array(items[0]) or _is_list(items[0]))):  # (inputs, labels)
            return False
        if all(self.axis(array) is not None for array in arrays):
            raise ValueError(
                f"batch: a list of {self.size} items, each with {self.size} rows, can hold one "
                "item per example or parts of the batch; pass a batch with another number of "
                "examples"
            )
        return True

    def take(self, value: Any, examples: Tensor, top: bool = False) -> Any:
        """Return these examples of a part of the batch."""
        if isinstance(value, Tensor):
            return self._rows(value, examples)
        if _is_array(value):
            axis = self.axis(value)
            return value if axis is None else value.take(examples.tolist(), axis=axis)
        if _is_list(value) and self.one_per_example(value, top):
            return type(value)([value[index] for index in examples.tolist()])
        if not self.split(value, top):
            return value
        sizes = getattr(value, "batch_size", None)
        if isinstance(sizes, torch.Size) and sizes[self.batch_dim :][:1] == (self.size,):
            return value[(slice(None),) * self.batch_dim + (examples,)]  # a TensorDict
        if isinstance(value, Mapping):
            items = {key: self.take(item, examples) for key, item in value.items()}
            if type(value) is dict or not isinstance(value, MutableMapping):
                return items
            # Anything else may carry more than its items, and may be read by attributes.
            new = copy.copy(value)
            for key, item in items.items():
                new[key] = item
            return new
        names = _fields(value)
        if names is not None:
            new = copy.copy(value)
            for name in names:  # also of frozen dataclasses
                object.__setattr__(new, name, self.take(getattr(value, name), examples))
            return new
        parts = [self.take(item, examples) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def _rows(self, tensor: Tensor, examples: Tensor) -> Tensor:
        axis = self.axis(tensor)
        if axis is None:
            return tensor
        rows = tensor.detach().index_select(axis, examples.to(tensor.device))
        return rows.requires_grad_(tensor.requires_grad)


def _is_array(value: Any) -> bool:
    """Return whether a value is a tensor, or an array as numpy's."""
    if isinstance(value, Tensor):
        if value.is_nested:
            raise _refusal(value, "pass a padded tensor and the lengths")
        return True
    if isinstance(value, Mapping):  # a TensorDict also has a shape
        return False
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and callable(getattr(value, "take", None))


def _is_list(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, _TEXT)
        and not hasattr(value, "_fields")
    )


def _fields(value: Any) -> list[str] | None:
    """Return the names of the attributes of a record, or None if a value is none."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif hasattr(type(value), "__attrs_attrs__"):
        names = [attribute.name for attribute in type(value).__attrs_attrs__]
    elif isinstance(value, SimpleNamespace):
        names = []
    else:
        return None
    names = list(dict.fromkeys([*names, *getattr(value, "__dict__", ())]))
    return [name for name in names if hasattr(value, name)]


def _children(value: Any) -> Collection[Any]:
    """Return the parts of a container. Raise if it holds tensors, but no parts are known."""
    if isinstance(value, PackedSequence):
        raise _refusal(value, "pass the padded tensor and the lengths, and pack them in loss_fn")
    if isinstance(value, Mapping):
        return list(value.values())
    names = _fields(value)
    if names is not None:
        return [getattr(value, name) for name in names]
    if isinstance(value, Sequence) and not isinstance(value, _TEXT):
        return value
    if _holds_tensors(value):
        raise _refusal(
            value, f"pass its tensors in a dict, and make the {type(value).__name__} in loss_fn"
        )
    return ()


def _refusal(value: Any, remedy: str) -> TypeError:
    return TypeError(
        "batch: expected tensors, arrays, lists, tuples, mappings and dataclasses of them, but got "
        f"a {type(value).__name__}, which holds tensors and cannot be split; {remedy}"
    )


def _holds_tensors(value: Any) -> bool:
    """Return whether tensors are among the attributes of an object, or in a set."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (*_TEXT, int, float, type, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (Sequence, AbstractSet)):
            stack += value
        else:
            stack += getattr(value, "__dict__", {}).values()
            slots = getattr(type(value), "__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            stack += [getattr(value, name) for name in names if hasattr(value, name)]
    return False


def _arrays(value: Any) -> Iterator[Any]:
    """Yield all tensors and arrays in a value."""
    if _is_array(value):
        yield value
    else:
        for item in _children(value):
            yield from _arrays(item)


def _holds_arrays(value: Any) -> bool:
    return any(True for _ in _arrays(value))


def _lengths(value: Any, top: bool = True) -> Iterator[int]:
    """Yield the lengths of lists that may hold one item per example."""
    if _is_array(value):
        return
    items = _children(value)
    records = bool(items) and all(isinstance(item, Mapping) or _fields(item) for item in items)
    if _is_list(value) and (records or not top) and _holds_arrays(value):
        yield len(items)
    for item in items:
        yield from _lengths(item, top=False)
