"""What a plan cannot be made for, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.autograd.graph import Node

from ._graph import CHECKPOINT, Graph
from ._nodes import has_hooks

_COMPILED = "CompiledFunctionBackward"
BATCH_NORM = (
    "Agreement: torch.nn.functional.batch_norm in training mode takes statistics over all "
    "environments; use andmask_ext.nn.convert_batchnorm(model) with layers, or "
    "andmask_ext.backward with one forward pass per environment"
)
REENTRANT_INPUT = (
    "Agreement: no input of a region under reentrant checkpointing requires gradients, so torch "
    "leaves out the gradients of its parameters; use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or call requires_grad_() on the "
    "inputs of the model"
)


def refuse_compiled(graph: Graph) -> None:
    """Raise RuntimeError if a compiled function of the graph takes tracked parameters."""
    if _COMPILED not in graph.names:
        return
    for name, edges in zip(graph.names, graph.edges, strict=True):
        below = [entry[0] for entry in edges if entry is not None]
        if name == _COMPILED and any(graph.param(child) is not None for child in below):
            refuse_opaque(_COMPILED)


def refuse_compiled_modules(modules: Iterable[nn.Module]) -> None:
    """Raise RuntimeError if ``compile()`` was called on a module with parameters."""
    for module in modules:
        if module._compiled_call_impl is not None and any(True for _ in module.parameters()):
            refuse_opaque(_COMPILED)


def refuse_donated(graph: Graph) -> None:
    """Raise RuntimeError if a compiled function of the graph uses up what it has saved."""
    for node, name in zip(graph.nodes, graph.names, strict=True):
        if name == _COMPILED and is_donated(node):
            raise RuntimeError(
                "Agreement: expected functions whose backward pass can run several times, as the "
                "check for mixing does, but torch.compile has compiled one that uses up what it "
                "has saved (donated buffers); leave torch._functorch.config.donated_buffer alone "
                "inside the context, which switches it off, and call torch.compiler.reset()"
            )


def is_donated(node: Node) -> bool:
    """Return whether the backward pass of a compiled function writes into what it has saved."""
    compiled = getattr(type(node), "_forward_cls", None)
    return bool(getattr(getattr(compiled, "metadata", None), "bw_donated_idxs", None))


def refuse_opaque(name: str) -> None:
    """Raise RuntimeError if the uses of a node's parameters cannot be seen."""
    if name == _COMPILED:
        raise RuntimeError(
            "Agreement: the model, or a part of it that has parameters, was compiled with "
            "torch.compile, which hides the uses of parameters in its backward pass; call the "
            "original module inside the context (model._orig_mod, or model.forward after "
            "model.compile()), or use andmask_ext.backward"
        )
    if name == CHECKPOINT:
        raise RuntimeError(
            "Agreement: a parameter is an argument of a function under reentrant "
            "checkpointing; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def refuse_hooks(node: Node, name: str, output: int) -> None:
    if has_hooks(node, output):
        raise RuntimeError(
            f"Agreement: {name} has a hook (Tensor.register_hook), which would have to change the "
            "gradient of each environment; remove it, or use andmask_ext.backward"
        )


def added_later(name: str) -> str:
    return (
        f"Agreement: {name} received a gradient, but was added to the optimizer after this "
        "Agreement had been made (add_param_group), so its environments were not counted; make a "
        "new Agreement(model, optimizer) after add_param_group"
    )


def learned_weight(name: str) -> str:
    return (
        f"Agreement: a parameter is joined with the loss of the whole batch (at {name}), such as a "
        "learned weight of a loss, so the loss of each environment is needed there; multiply the "
        "losses of the examples before their mean is taken: "
        "`(weight * F.mse_loss(x, y, reduction='none').mean(1)).mean()`, or, of several losses, "
        "`(torch.stack([first, second], 1) * weights).sum(1).mean()`, where `first` and `second` "
        "have one loss for each example; or use andmask_ext.backward with one loss per environment"
    )


def mixing(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: environments mix in the model: the gradient at {name} (output of shape "
        f"{tuple(shape)}, batch of {examples}) depends on examples of several environments; use "
        "andmask_ext.backward, with one forward pass per environment"
    )


def out_of_place(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: environments mix in the model: the rows of {name} (output of shape "
        f"{tuple(shape)}, batch of {examples}) reach other environments than those of their place, "
        "and no index in the graph says why; if the model packs its examples into rows, pass the "
        "environment of each row; if it picks rows of its inputs and puts them back, call "
        "requires_grad_() on the inputs, so that autograd sees it; else use andmask_ext.backward, "
        "with one forward pass per environment"
    )


def not_found(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: cannot tell where the batch of {examples} examples lies in the output of "
        f"{name}, of shape {tuple(shape)}; expected a model that is called inside the context and "
        "returns the tensors that the loss is computed from; if their batch is not in dimension "
        "batch_dim, pass Agreement(output_batch_dim=...); if the number of examples is not "
        f"{examples}, pass batch_size=... to the context, or the environment of each example; or "
        "use andmask_ext.backward"
    )
