"""Splitting of batches of every kind into environments."""

from __future__ import annotations

import argparse
import dataclasses
from collections import OrderedDict, UserDict, deque
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from andmask_ext.agreement._batches import batch_size, take

X = torch.arange(24.0).reshape(6, 4)
Y = torch.arange(6)
CHOSEN = torch.tensor([4, 1])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = "a"
    made: list[Any] = dataclasses.field(default_factory=list, init=False)


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    y: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As that of tokenizers: a mapping with attributes."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class TensorDictLike(UserDict):  # type: ignore[type-arg]
    """All items share their first dimensions, and cannot be replaced by others."""

    def __init__(self, data: Any, sizes: tuple[int, ...]) -> None:
        self.batch_size = torch.Size(sizes)
        super().__init__(data)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data[key]
        items = {name: item[key] for name, item in self.data.items()}
        return TensorDictLike(items, (len(key[0]),))

    def __setitem__(self, key: Any, value: Any) -> None:
        assert value.shape[: len(self.batch_size)] == self.batch_size
        self.data[key] = value


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        Pair(X, Y),
        {"x": X, "y": Y},
        OrderedDict(x=X, y=Y),
        UserDict(x=X, y=Y),
        MappingProxyType({"x": X, "y": Y}),
        Encoding({"x": X, "y": Y}),
        Record(X, Y),
        Slots(X, Y),
        SimpleNamespace(x=X, y=Y),
        TensorDictLike({"x": X, "y": Y}, (6,)),
        deque([X, Y]),
        {"inputs": [Encoding({"x": X})], "y": (Record(X, Y), Y)},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_tensors_in_containers(batch: Any) -> None:
    assert batch_size(batch, 0, None) == 6
    part = take(batch, CHOSEN, 0, 6)
    kept = dict if isinstance(batch, MappingProxyType) else type(batch)
    assert type(part) is kept

    def found(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, (dict, UserDict, MappingProxyType)):
            return [tensor for item in value.values() for tensor in found(item)]
        if isinstance(value, (tuple, list, deque)):
            return [tensor for item in value for tensor in found(item)]
        return [*found(value.x), *found(value.y)]

    for whole, some in zip(found(batch), found(part), strict=True):
        assert torch.equal(some, whole[CHOSEN])


def test_the_batch_is_not_changed() -> None:
    batch = Encoding({"x": X, "y": Y}, encodings="kept")
    part = take(batch, CHOSEN, 0, 6)
    assert batch["x"] is X
    assert part.encodings == "kept"
    assert torch.equal(part.x, X[CHOSEN])


def test_arrays() -> None:
    batch = {"x": X.numpy(), "names": np.array(list("abcdef"), dtype=object), "w": np.ones(3)}
    part = take(batch, CHOSEN, 0, batch_size(batch, 0, None))
    assert isinstance(part["x"], np.ndarray)
    np.testing.assert_array_equal(part["x"], X[CHOSEN].numpy())
    assert part["names"].tolist() == ["e", "b"]
    assert part["w"] is batch["w"]


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4, 5, 6], [6, 6, 6, 6, 6, 6], [4, 4, 4, 4, 4, 4]])
def test_one_dict_per_example(boxes: list[int]) -> None:
    labels = [{"boxes": torch.rand(n, 4), "size": torch.tensor([9, 9])} for n in boxes]
    batch = {"pixels": X, "labels": labels, "names": list("abcdef")}
    assert batch_size(batch, 0, None) == 6
    part = take(batch, CHOSEN, 0, 6)
    assert part["labels"] == [labels[4], labels[1]]
    assert part["names"] == ["e", "b"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_images_and_targets(kind: type) -> None:
    images = kind(torch.rand(3, 5 + n, 7) for n in range(4))
    targets = kind({"boxes": torch.rand(n, 4)} for n in range(4))
    batch = (images, targets)
    assert batch_size(batch, 0, None) == 4
    part = take(batch, torch.tensor([2]), 0, 4)
    assert part[0][0] is images[2]
    assert part[1] == kind([targets[2]])


def test_a_list_of_examples() -> None:
    batch = [{"image": torch.rand(3, 5, 5), "label": torch.tensor(n)} for n in range(4)]
    assert batch_size(batch, 0, None) == 4
    assert take(batch, torch.tensor([3, 0]), 0, 4) == [batch[3], batch[0]]


def test_parts_of_the_batch_are_no_examples() -> None:
    two = (X[:2], Y[:2])
    assert batch_size(two, 0, None) == 2
    assert torch.equal(take(two, torch.tensor([1]), 0, 2)[0], X[1:2])
    views = {"views": (X, X + 1), "y": Y}
    assert batch_size(views, 0, None) == 6
    assert torch.equal(take(views, CHOSEN, 0, 6)["views"][1], X[CHOSEN] + 1)


def test_what_has_other_sizes_stays_whole() -> None:
    table, one = torch.rand(3, 3), torch.tensor(0.5)
    batch = {"x": X, "y": Y, "table": table, "one": one, "shape": (6, 4), "text": "abcdef"}
    part = take(batch, CHOSEN, 0, batch_size(batch, 0, None))
    assert part["table"] is table
    assert part["one"] is one
    assert part["shape"] == (6, 4)
    assert part["text"] == "abcdef"


def test_batch_in_dimension_one() -> None:
    batch = (torch.rand(5, 6, 2), Y)
    assert batch_size(batch, 1, None) == 6
    part = take(batch, CHOSEN, 1, 6)
    assert torch.equal(part[0], batch[0][:, CHOSEN])
    assert torch.equal(part[1], Y[CHOSEN])


def test_inputs_that_require_gradients_still_do() -> None:
    x = X.clone().requires_grad_()
    part = take(x, CHOSEN, 0, 6)
    assert part.requires_grad
    assert part.is_leaf


class Graph:
    def __init__(self) -> None:
        self.stores = [{"x": X}]


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (Graph(), "make the Graph in loss_fn"),
        (argparse.Namespace(x=X), "pass its tensors in a dict"),
        ({X}, "pass its tensors in a dict"),
        (pack_padded_sequence(X[..., None], [4, 4, 3, 3, 2, 1], batch_first=True), "pack them in"),
        (
            torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged),
            "padded tensor and the lengths",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_split_is_refused(value: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match="holds tensors and cannot be split") as caught:
        batch_size({"a": X, "b": value}, 0, None)
    assert type(value).__name__ in str(caught.value)
    assert remedy in str(caught.value)


def test_lists_of_what_belongs_to_no_example_are_refused() -> None:
    for ids in (None, Y):
        with pytest.raises(ValueError, match="out of the batch, where loss_fn can read it"):
            take((X, [torch.rand(3), torch.rand(3)]), Y, 0, batch_size((X, X), 0, ids))


def test_what_can_be_read_in_two_ways_is_refused() -> None:
    images = {"images": [torch.rand(3, 5, 5) for _ in range(4)]}
    with pytest.raises(ValueError, match="read as 3 or 4 examples; pass environments as an int64"):
        batch_size(images, 0, None)
    assert batch_size(images, 0, torch.arange(4)) == 4
    square = {"images": [torch.rand(3, 5, 5) for _ in range(3)], "y": Y[:3]}
    with pytest.raises(ValueError, match="another number of examples"):
        take(square, torch.tensor([0]), 0, 3)


@pytest.mark.parametrize("batch", [(), {}, [1, 2], "text", torch.tensor(1.0), {"a": None}])
def test_no_tensors(batch: Any) -> None:
    with pytest.raises(ValueError, match="but found none"):
        batch_size(batch, 0, None)
