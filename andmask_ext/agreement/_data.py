"""Which tensors and nodes are made of data, and which of parameters only."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ._nodes import PYTHON, saved_tensors
from ._shown import ShownData
from ._views import VIEWS
from ._writes import WRITING, say_index, say_view


class Origin(enum.IntEnum):
    """What a tensor is made of. A result is as its argument of the largest value."""

    FREE = 0
    """Parameters, buffers, and what functions make without any tensor, such as ``randn``."""
    UNKNOWN = 1
    """A tensor that existed before, as a label or a constant. It is no input of the model."""
    HIDDEN = 2
    """A node inside a function that took data. Data may enter the node."""
    DATA = 3
    """An input of the model, or made of one."""


# What holds no tensors that a function takes. Most arguments are told by their exact type.
_ATOMS = frozenset((bool, float, int, slice, str, type(None), torch.device, torch.dtype))
_CONTAINERS = frozenset((dict, list, tuple))
_WITHOUT = (str, int, float, type, nn.Module)


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples, dicts and dataclass-like objects."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _ATOMS:
            continue
        if kind is Tensor or (kind not in _CONTAINERS and isinstance(value, Tensor)):
            found.append(value)
            continue
        if (kind not in _CONTAINERS and isinstance(value, _WITHOUT)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += list(value.values())[::-1]
        elif isinstance(value, (list, tuple)):
            stack += value[::-1]
        elif hasattr(value, "__dict__"):
            kinds = (Tensor, list, tuple, dict)
            stack += [item for item in vars(value).values() if isinstance(item, kinds)][::-1]
    return found


def storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no storage, as inside torch.vmap
        return -1


class DataRecord:
    """Follows the data of a forward pass. Functions are recorded one by one while it runs.

    What is made of a tensor that requires gradients and is not made of parameters only is data.
    Most calls of a model are of that kind, and cost one look-up each.

    Args:
        modules: the modules of the model. Their parameters and buffers hold no data.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._origins: dict[int, Origin] = {}  # by the address of the memory
        self._weights: dict[int, Tensor] = {}  # by id: tensors made of parameters only
        self._nodes: dict[Node, Origin] = {}
        self._kept: list[Tensor] = []  # kept alive so that the address is not reused
        self.shown = ShownData()
        self._inputs: list[Tensor] = []
        self._began = False
        self._left = False  # data have left torch
        self._unknown = Origin.UNKNOWN  # of a tensor of which nothing is known

    def take(self, inputs: Iterable[Tensor], origin: Origin) -> None:
        """Record inputs of the model."""
        self._begin()
        for tensor in inputs:
            made = tensor.grad_fn is not None and id(tensor) in self._weights
            if made or _is_parameter(tensor):
                continue
            self._origins[storage(tensor)] = origin
            self._weights.pop(id(tensor), None)
            self._kept.append(tensor)
            self._inputs += [tensor] if origin == Origin.DATA else []

    def note(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """Record a call of the function ``name``."""
        if name == "__setitem__":
            result = args[0]
            say_index(result, *args[1:])
        elif name in WRITING:
            say_view(result)
        if self._takes_computed(args[:1] if name in _AS else args):
            self._note_data(name, result, args)
            return
        if name in _LEAVING:
            self._leave(name, args)
            return
        results = (result,) if isinstance(result, Tensor) else result
        made = [tensor for tensor in results if isinstance(tensor, Tensor)]
        if not made:
            return
        self._begin()
        taken = [] if name in _LIKE else tensors_in((args, kwargs))
        if name in _AS:
            taken = taken[:1]
        origin = max((self.origin(tensor) for tensor in taken), default=Origin.FREE)
        if self._left and name in _RETURNING:
            origin = max(origin, Origin.HIDDEN)
        for tensor in made:
            self._set(tensor, origin)
            if tensor.grad_fn is not None:
                self._record(tensor.grad_fn, origin)

    def examples(self, tensor: Tensor, axis: int, dim: int, count: int) -> Tensor | None:
        """Return the example of each entry along an axis, if a tensor is a view of an input.

        Args:
            tensor: the tensor.
            axis: its axis. Of the others, the first entry counts.
            dim: the batch dimension of the inputs of the model.
            count: the number of examples.
        """
        if tensor.numel() == 0:
            return None
        for given in self._inputs:
            batched = given.dim() > dim and given.shape[dim] == count and given.is_contiguous()
            if batched and storage(given) == storage(tensor) and given.dtype == tensor.dtype:
                first = tensor.storage_offset() - given.storage_offset()
                places = first + tensor.stride(axis) * torch.arange(tensor.shape[axis])
                return places // given.stride(dim) % count
        return None

    def holds(self, node: Node) -> bool:
        """Return whether a node is that of a leaf that holds data."""
        tensor = getattr(node, "variable", None)
        return isinstance(tensor, Tensor) and self.holds_tensor(tensor)

    def holds_tensor(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds data."""
        return storage(tensor) != -1 and self.origin(tensor) == Origin.DATA

    def _leave(self, name: str, args: Any) -> None:
        """Record that data have left torch, from where they may come back as new tensors."""
        if self.origin(args[0]) >= Origin.HIDDEN:
            self._left = True
            self._unknown = Origin.HIDDEN if name in _AS_ARRAY else self._unknown

    def _takes_computed(self, args: Any) -> bool:
        """Return whether an argument requires gradients and is not made of parameters only."""
        for value in args:
            if isinstance(value, Tensor):
                if not value.requires_grad or id(value) in self._weights:
                    continue
                try:
                    node = value.grad_fn
                except RuntimeError:  # a view made under no_grad, which was written into
                    return True
                if node is None:
                    continue
                if not (isinstance(node, PYTHON) and self._adopts(value, node)):
                    return True
            elif isinstance(value, (list, tuple)) and self._takes_computed(value):
                return True
        return False

    def _adopts(self, tensor: Tensor, node: Any) -> bool:
        """Record the output of a Python function, which is not called by way of the mode."""
        for after, _ in node.next_functions:
            known = after is None or self._nodes.get(after, Origin.DATA) <= Origin.UNKNOWN
            if not known and not _is_parameter(getattr(after, "variable", tensor)):
                return False
        self._begin()
        origin = self.of_node(node)
        if origin > Origin.UNKNOWN:
            return False
        self._set(tensor, origin)
        self._record(node, origin)
        return True

    def _note_data(self, name: str, result: Any, args: Any) -> None:
        """Record a call that took computed data. Most results are known as data anyway."""
        if not isinstance(result, Tensor):
            return
        if not result.requires_grad:
            self._begin()
            self._set(result, Origin.FREE if name in _LIKE else Origin.DATA)
        elif args and result is args[0]:  # in place: the memory may have been free of data
            address = storage(result)
            if self._origins.get(address, Origin.DATA) != Origin.DATA:
                self._origins[address] = Origin.DATA
                same = [key for key, one in self._weights.items() if storage(one) == address]
                for key in same:
                    del self._weights[key]

    def _set(self, tensor: Tensor, origin: Origin) -> None:
        address = storage(tensor)
        if address == 0:  # all tensors without elements share it
            self._origins[0] = max(origin, self._origins.get(0, origin))
        elif address != -1:
            self._origins[address] = origin
        if origin == Origin.FREE or (origin == Origin.UNKNOWN and tensor.requires_grad):
            self._kept.append(tensor)
            self._weights[id(tensor)] = tensor

    def _record(self, node: Node, origin: Origin) -> None:
        """Record the nodes of a call, down to those that are known or leaves."""
        if origin == Origin.DATA:
            # Where in the call the data enter is not known. A view has one input.
            self._nodes[node] = origin
            while node.name() in VIEWS and node.next_functions[0][0] is not None:
                node = node.next_functions[0][0]
                if node in self._nodes or not node.next_functions:
                    return
                self._nodes[node] = origin
            return
        stack = [node]
        while stack:
            node = stack.pop()
            if node not in self._nodes and node.next_functions:
                self._nodes[node] = origin
                stack += [after for after, _ in node.next_functions if after is not None]

    def _begin(self) -> None:
        if not self._began:
            self._began = True
            for module in self._modules:
                for member in (*module._parameters.values(), *module._buffers.values()):
                    if member is not None:
                        self._origins[storage(member)] = Origin.FREE

    def origin(self, tensor: Tensor) -> Origin:
        """Return what a tensor is made of."""
        if id(tensor) in self._weights:
            return self._origins.get(storage(tensor), Origin.FREE)
        if _is_parameter(tensor):
            return Origin.FREE
        default = self._unknown if tensor.is_leaf else Origin.DATA
        return self._origins.get(storage(tensor), default)

    def of_node(self, node: Node) -> Origin:
        """Return what the inputs of a node are made of, those included that autograd ignores."""
        known = self._nodes.get(node)
        if known is not None:
            return known
        # A Python function, or a node inside of a function that took data.
        tensors = _held_by(node)
        constants = None if tensors is None else [t for t in tensors if not t.requires_grad]
        if not constants:
            return Origin.HIDDEN
        return max(self.origin(tensor) for tensor in constants)

    def is_free(self, node: Node) -> bool:
        """Return whether a node is that of a leaf that holds no data, such as a parameter."""
        tensor = getattr(node, "variable", None)
        return isinstance(tensor, Tensor) and self.origin(tensor) == Origin.FREE

    def is_data(self, node: Node) -> bool:
        """Return whether data are known to enter a node."""
        return self._nodes.get(node) == Origin.DATA

    def is_weight(self, node: Node) -> bool:
        """Return whether a node is known to be made of parameters only."""
        return self._nodes.get(node) == Origin.FREE

    def close(self) -> None:
        """Forget all, and let go of what was made of shown data."""
        self.shown.release(self._modules)
        self.forget()

    def forget(self) -> None:
        """Forget all tensors and nodes."""
        self._began, self._left, self._unknown = False, False, Origin.UNKNOWN
        self._origins, self._weights, self._nodes, self._kept = {}, {}, {}, []
        self._inputs = []


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_leaf


# Functions that take the shape of a tensor only.
_LIKE = frozenset((
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like",
    "rand_like", "randint_like", "randn_like", "zeros_like",
))  # fmt: skip

# Functions that take the shape, the dtype or the device of their second tensor.
_AS = frozenset(("expand_as", "reshape_as", "to", "type_as", "view_as"))

# Functions by which the values of a tensor leave torch, and others by which they come back.
_AS_ARRAY = frozenset(("numpy", "__array__", "__dlpack__"))
_LEAVING = _AS_ARRAY | {"tolist", "item"}
_RETURNING = frozenset(("tensor", "as_tensor", "from_numpy", "full", "scalar_tensor"))

# Nodes that save all their inputs, if one of them requires gradients.
_KEEPING = frozenset((
    "AddmmBackward0", "BmmBackward0", "DivBackward0", "DotBackward0", "EmbeddingBackward0",
    "EmbeddingBagBackward0", "GatherBackward0", "IndexBackward0", "IndexSelectBackward0",
    "MaskedFillBackward0", "MaskedFillBackward1", "MmBackward0", "MulBackward0", "MvBackward0",
    "TakeBackward0",
))  # fmt: skip


def _held_by(node: Node) -> list[Tensor] | None:
    """Return the tensors that a node holds, if they are all that enter it; else None."""
    if isinstance(node, PYTHON):
        return tensors_in((node.saved_tensors, vars(node)))
    return saved_tensors(node) if node.name() in _KEEPING else None
