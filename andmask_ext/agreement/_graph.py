"""The autograd graph of a backward pass, and its parts that depend on parameters only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from ._nodes import PYTHON, integers_in, leaf, saved, shape_of
from ._views import VIEWS, View, view_through

ACCUMULATE = "torch::autograd::AccumulateGrad"

# Nodes that read data which is no input for autograd (indices), or that create new rows.
LOOKUPS = (
    "EmbeddingBackward0",
    "EmbeddingBagBackward0",
    "GatherBackward0",
    "IndexBackward0",
    "IndexSelectBackward0",
    "TakeBackward0",
)
HIDDEN_DATA = (
    *LOOKUPS, "ExpandBackward0", "MaskedFillBackward0", "MaskedFillBackward1",
    "MaskedSelectBackward0", "RepeatBackward0", "WhereBackward0",
)  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """An input of a node that is computed from parameters only.

    Attributes:
        edge: the number of the input of the node.
        root: the index of the node that computed it.
        output: the number of the output of that node.
        shape: the shape of the input.
        view: the position of its elements in the parameter, if it is a view of one; else None.
        params: the numbers of the parameters among those tracked.
    """

    edge: int
    root: int
    output: int
    shape: tuple[int, ...]
    view: View | None
    params: tuple[int, ...]


class Graph:
    """All nodes between the roots and the leaves. Their order depends on the structure only.

    Attributes:
        nodes: the nodes.
        roots: the indices of the roots.
        edges: for each node, one entry per input: None, or (index of a node, its output).
        names: for each node its type; for a tracked leaf also the parameter's number.
    """

    def __init__(self, roots: Iterable[Node], tracked: Mapping[int, int]) -> None:
        roots = list(roots)
        self.nodes: list[Node] = []
        nexts = []
        index: dict[Node, int] = {}
        stack = roots[::-1]
        while stack:
            node = stack.pop()
            if node in index:
                continue
            index[node] = len(index)
            self.nodes.append(node)
            following = node.next_functions
            nexts.append(following)
            for successor, _ in following[::-1]:
                if successor is not None and successor not in index:
                    stack.append(successor)
        self.roots = [index[root] for root in roots]
        self.edges: list[tuple[tuple[int, int] | None, ...]] = [
            tuple([None if node is None else (index[node], output) for node, output in following])
            for following in nexts
        ]
        self.names: list[str | tuple[str, int | None]] = [
            node.name() if node.next_functions else _leaf_name(node, tracked) for node in self.nodes
        ]

    def structure(self, examples: int) -> Any:
        """Return a key. Graphs with the same key have the same plan.

        The key holds the nodes and their edges, the arguments of views, and the dimensions of
        reshaped tensors into which a batch of ``examples`` fits. It does not hold sizes or values
        of data, nor indices.
        """
        tokens = [
            None if type(node) in _PLAIN else _token(node, name, examples)
            for node, name in zip(self.nodes, self.names, strict=True)
        ]
        return tuple(self.names), tuple(self.edges), tuple(tokens)

    def contents(self, index: int) -> Any:
        """Return a key of the indices that a node holds."""
        node = self.nodes[index]
        if isinstance(node, PYTHON):
            return tuple([_content(one) for one in integers_in(node)])
        values = []
        for argument in ("index", "indices", "mask", "offsets"):
            if hasattr(node, f"_saved_{argument}"):
                value = saved(node, argument)
                tensors = value if isinstance(value, (tuple, list)) else [value]
                values += [_content(tensor) for tensor in tensors]
        return tuple(values)

    def param(self, index: int) -> int | None:
        """Return the number of the tracked parameter if the node is its leaf, else None."""
        name = self.names[index]
        return name[1] if isinstance(name, tuple) else None

    def is_untracked_leaf(self, index: int) -> bool:
        """Return whether a node is the leaf of a tensor that is not tracked."""
        name = self.names[index]
        return isinstance(name, tuple) and name[1] is None

    def hides_moves(self, index: int, inputs: Sequence[tuple[int, int]]) -> bool:
        """Return whether a node may move or join rows in a way that its type does not tell.

        Args:
            index: the node.
            inputs: the outputs of nodes by which data enter it.
        """
        name = self.names[index]
        if name == COPY_SLICES:
            written: dict[str, Any] = self.nodes[index].metadata  # type: ignore[assignment]
            if PLACE not in written:
                return True
            values = [at for at in inputs if at != self.edges[index][0]]
            # A row that is written into several is joined with them.
            return written[WRITTEN] is not None and any(
                _size(shape_of(self.nodes[node], output)) != _size(written[WRITTEN])
                for node, output in values
            )
        if name == "TrilinearBackward0":  # of nn.Bilinear, which sums over features only
            return 0 in saved(self.nodes[index], "sumdim")
        return name in _HIDING

    def holds_indices(self, index: int) -> bool:
        """Return whether a node may move rows by indices that :meth:`contents` returns."""
        name = self.names[index]
        if name in _INDEXING:
            return True
        return isinstance(self.nodes[index], PYTHON) and name not in _OWN

    def is_table(self, index: int) -> bool:
        """Return whether a node's output is used for look-ups only."""
        users = [
            user
            for user, edges in enumerate(self.edges)
            for entry in edges
            if entry and entry[0] == index
        ]
        return bool(users) and all(self.names[user] in LOOKUPS for user in users)

    def children_first(self) -> list[int]:
        """Return the indices of all nodes, inputs before those that use them."""
        order: list[int] = []
        state = [0] * len(self.nodes)
        for start in range(len(self.nodes)):
            stack = [start]
            while stack:
                index = stack[-1]
                if state[index] == 0:
                    state[index] = 1
                    stack.extend(e[0] for e in self.edges[index] if e and state[e[0]] == 0)
                else:
                    stack.pop()
                    if state[index] == 1:
                        state[index] = 2
                        order.append(index)
        return order

    def may_carry_batch(self, index: int) -> bool:
        """Return whether data may enter a node other than by inputs that require gradients."""
        name = self.names[index]
        if isinstance(name, tuple) or name in VIEWS:
            return False
        # TorchScript's nodes have no edges for inputs that require no gradients.
        hides = name in HIDDEN_DATA or name.endswith("DifferentiableGraphBackward")
        return hides or None in self.edges[index]

    def operand(self, index: int, edge: int) -> Operand:
        """Describe an input of a node that is computed from parameters only."""
        entry = self.edges[index][edge]
        assert entry is not None
        root, output = entry
        shape = shape_of(self.nodes[root], output)
        chain: list[tuple[Node, int]] = []
        at: tuple[int, int] | None = entry
        while at is not None:
            param = self.param(at[0])
            if param is not None:
                view = view_through(chain[::-1], leaf(self.nodes[at[0]]).shape)
                return Operand(edge, root, output, shape, view, (param,))
            chain.append((self.nodes[at[0]], at[1]))
            following = self.edges[at[0]]
            at = following[0] if len(following) == 1 else None
        params = sorted({p for i in self.below(root) if (p := self.param(i)) is not None})
        return Operand(edge, root, output, shape, None, tuple(params))

    def below(self, *indices: int) -> set[int]:
        """Return the indices of nodes and of all that they depend on."""
        seen = set(indices)
        stack = list(indices)
        while stack:
            for entry in self.edges[stack.pop()]:
                if entry and entry[0] not in seen:
                    seen.add(entry[0])
                    stack.append(entry[0])
        return seen


def _size(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without leading ones."""
    return tuple(shape[1:] if shape and shape[0] == 1 else shape)


def _leaf_name(node: Node, tracked: Mapping[int, int]) -> str | tuple[str, int | None]:
    name = node.name()
    return (name, tracked.get(id(leaf(node)))) if name == ACCUMULATE else name


# Arguments that determine how a node orders its elements.
_STATIC = ("dim", "dim0", "dim1", "dim2", "dimension", "dims", "index", "k", "offset", "pad",
           "repeats", "shifts", "size", "start", "step", "storage_offset", "stride",
           "training")  # fmt: skip
_INDEXED = ("IndexBackward0", "IndexPutBackward0")
CHECKPOINT = "CheckpointFunctionBackward"  # reentrant checkpointing
COPY_SLICES = "torch::autograd::CopySlices"
# The key of the metadata of a node that writes into a part of a tensor: which part.
PLACE = "andmask_ext.place"
WRITTEN = "andmask_ext.written"  # the shape of that part; None: of several
# Nodes that move rows by an index, and that are followed by its contents only.
_INDEXING = frozenset((
    "EmbeddingBackward0", "EmbeddingBagBackward0", "PutBackward0", "UnsafeIndexBackward0",
    "UnsafeIndexPutBackward0", "UnsafeMaskedIndexBackward0",
))  # fmt: skip
_OWN = (CHECKPOINT, "_NormalizeBackward")  # Python functions that are known
# Nodes that join rows by values, or move them by what they do not save.
_HIDING = frozenset((
    "AddbmmBackward0", "GridSampler2DBackward0", "GridSampler3DBackward0", "LinalgSolveExBackward0",
    "SegmentReduceBackward0", "SparseMmReduceImplBackward0",
))  # fmt: skip
RESHAPES = ("ReshapeAliasBackward0", "UnsafeViewBackward0", "ViewBackward0")

# Per type of node: its arguments that belong to the structure. Types without such arguments.
_TOKENS: dict[type, tuple[str, ...]] = {}
_PLAIN: set[type] = set()


def _token(node: Node, name: str | tuple[str, int | None], examples: int) -> Any:
    kind = type(node)
    if kind not in _TOKENS:
        present = tuple(argument for argument in _STATIC if hasattr(kind, f"_saved_{argument}"))
        if not present and name not in (*RESHAPES, *_INDEXED, COPY_SLICES):
            _PLAIN.add(kind)
            return None
        _TOKENS[kind] = present
    if name in RESHAPES:
        return tuple(
            "batch" if size == examples else size % examples == 0 for size in shape_of(node)
        )
    if name == COPY_SLICES:
        return node.metadata.get(PLACE)  # type: ignore[attr-defined]
    if name in _INDEXED:
        return tuple(-1 if index is None else index.dim() for index in saved(node, "indices"))
    values = [saved(node, argument) for argument in _TOKENS[kind]]
    return tuple(value for value in values if isinstance(value, (int, tuple)))


def _content(tensor: Tensor | None) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return tuple(tensor.shape), hash(tensor.detach().cpu().contiguous().numpy().tobytes())
