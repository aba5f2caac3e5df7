"""Losses of environments as functions of one flat vector: values, gradients, curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..._dtypes import dtype_name
from ..._switches import Switches

Params: TypeAlias = "Tensor | dict[str, Tensor]"
Loss: TypeAlias = Callable[[Params], Tensor]

CHUNK = 64  # number of points in one vmap call

# Fused kernels of attention have no second derivative.
_MATH_ATTENTION = Switches(
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash, False),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient, False),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn, False),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math, True),
)


class FlatLayout:
    """Conversion of parameters, a tensor or a dict of tensors, to one vector and back."""

    def __init__(self, params: object, name: str = "params") -> None:
        if isinstance(params, Tensor):
            items = {"": params}
        elif isinstance(params, Mapping):
            items = dict(params)
            for key, value in items.items():
                if not isinstance(key, str) or not isinstance(value, Tensor):
                    raise TypeError(
                        f"{name}: expected a dict from str to Tensor, "
                        f"but got {type(value).__name__} at {key!r}"
                    )
        else:
            raise TypeError(
                f"{name}: expected a Tensor or a dict of Tensors, but got {type(params).__name__}"
            )
        self.keys = None if isinstance(params, Tensor) else list(items)
        self.shapes = [value.shape for value in items.values()]
        self.size = sum(value.numel() for value in items.values())
        if self.size == 0:
            raise ValueError(f"{name}: expected at least 1 number, but got none")
        kinds = {(value.dtype, value.device) for value in items.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: expected one dtype and one device, "
                f"but got {', '.join(sorted(f'{dtype_name(t)} on {d}' for t, d in kinds))}"
            )

    def flatten(self, params: Params) -> Tensor:
        """Return the numbers of ``params`` as one vector."""
        values = [params] if isinstance(params, Tensor) else [params[k] for k in self.keys or []]
        return torch.cat([value.detach().reshape(-1) for value in values])

    def unflatten(self, vector: Tensor) -> Params:
        """Return the vector's numbers in the structure of the parameters."""
        pieces = vector.split([math.prod(shape) for shape in self.shapes])
        values = [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return values[0] if self.keys is None else dict(zip(self.keys, values, strict=True))


class Problem:
    """Losses of at least two environments around one point.

    :func:`torch.func.vmap` computes values, gradients and Hessian-vector products for many points
    at once. A loss that vmap or :mod:`torch.func` does not support is evaluated point by point with
    plain autograd. ``looped`` names such losses and the reason.
    """

    def __init__(self, losses: object, params: object, eps: float = 1.0) -> None:
        self.layout = FlatLayout(params)
        self.point = self.layout.flatten(params)  # type: ignore[arg-type]
        if self.point.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"params: expected dtype float32 or float64, but got {dtype_name(self.point.dtype)}"
            )
        self.losses = _check_losses(losses)
        self.looped: dict[int, str] = {}
        self.start = self._start(eps)

    @property
    def environments(self) -> int:
        """The number of environments."""
        return len(self.losses)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.layout.size

    def pairs(self) -> list[tuple[int, int]]:
        """Return the ordered pairs of different environments."""
        count = range(self.environments)
        return [(kept, moved) for kept in count for moved in count if kept != moved]

    def loss(self, environment: int, vector: Tensor) -> Tensor:
        """Return one environment's loss at one flat point."""
        with _MATH_ATTENTION:
            value = self.losses[environment](self.layout.unflatten(vector))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"losses[{environment}]: expected a 0-dim Tensor, but got {type(value).__name__}"
            )
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"losses[{environment}]: expected a 0-dim floating-point Tensor, "
                f"but got shape {list(value.shape)} and {dtype_name(value.dtype)}"
            )
        return value

    def values(self, environment: int, points: Tensor) -> Tensor:
        """Return the loss at points ``[m, n]`` as ``[m]``."""
        return self._map(environment, self.loss, self.loss, points).detach()

    def gradients(self, environment: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss ``[m]`` and gradient ``[m, n]`` at points ``[m, n]``."""

        def fused(environment: int, point: Tensor) -> Tensor:
            gradient, value = torch.func.grad_and_value(lambda x: self.loss(environment, x))(point)
            return torch.cat([gradient, value.reshape(1).to(gradient.dtype)])

        def plain(environment: int, point: Tensor) -> Tensor:
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                value = self.loss(environment, point)
                gradient = _gradient(value, point)
            return torch.cat([gradient, value.reshape(1).to(gradient.dtype)])

        out = self._map(environment, fused, plain, points).detach()
        return out[:, -1], out[:, :-1]

    def products(self, environment: int, vectors: Tensor) -> Tensor:
        """Return Hessian-vector products at the point: ``[m, n]`` of vectors ``[m, n]``."""

        def fused(environment: int, vector: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda x: self.loss(environment, x))
            # Backward over backward: forward over backward saves little, and fails for more losses.
            product: Tensor = torch.func.vjp(gradient, self.point)[1](vector)[0]
            return product

        def plain(environment: int, vector: Tensor) -> Tensor:
            with torch.enable_grad():
                point = self.point.detach().requires_grad_()
                gradient = _gradient(self.loss(environment, point), point, create_graph=True)
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(point)
            (product,) = torch.autograd.grad(gradient, point, vector, materialize_grads=True)
            return product

        return self._map(environment, fused, plain, vectors).detach()

    def hessian(self, environment: int) -> Tensor:
        """Return the Hessian at the point, in float64 on the CPU, symmetric."""
        identity = torch.eye(self.size, dtype=self.point.dtype, device=self.point.device)
        hessian = self.products(environment, identity).to("cpu", torch.float64)
        return hessian.add(hessian.mT).div(2)

    def gradient(self, environment: int) -> Tensor:
        """Return the gradient at the point, in float64 on the CPU."""
        gradient = self.gradients(environment, self.point[None])[1][0].to("cpu", torch.float64)
        if not bool(gradient.isfinite().all()):
            raise ValueError(f"losses[{environment}]: the gradient at params is not finite")
        return gradient

    def notes(self) -> tuple[str, ...]:
        """Return which losses were evaluated point by point, and why."""
        return tuple(
            f"losses[{environment}] evaluated point by point, as torch.func refused it ({why})"
            for environment, why in sorted(self.looped.items())
        )

    def _map(
        self,
        environment: int,
        fused: Callable[[int, Tensor], Tensor],
        plain: Callable[[int, Tensor], Tensor],
        points: Tensor,
    ) -> Tensor:
        if environment not in self.looped:
            try:
                batched = torch.func.vmap(lambda x: fused(environment, x), chunk_size=CHUNK)
                return batched(points)
            except Exception as error:  # an error of the loss itself is raised again by the loop
                # It is recorded only after the loop has succeeded.
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                out = torch.stack([plain(environment, point) for point in points])
                self.looped[environment] = why[:120]
                return out
        return torch.stack([plain(environment, point) for point in points])

    def _start(self, eps: float) -> list[float]:
        environments = range(self.environments)
        first = torch.stack([self.loss(e, self.point).detach().double() for e in environments])
        again = torch.stack([self.loss(e, self.point).detach().double() for e in environments])
        two = self.point.expand(2, -1)
        mapped = torch.stack([self.values(e, two)[1].double() for e in environments])
        digits = torch.finfo(self.point.dtype).eps
        by_environment = torch.stack([first, again, mapped], 1).tolist()
        for e, (value, *repeats) in enumerate(by_environment):
            if not math.isfinite(value):
                raise ValueError(f"losses[{e}]: expected a finite loss at params, but got {value}")
            if eps < 16 * digits * abs(value):
                raise ValueError(
                    f"eps: expected at least {16 * digits * abs(value):.2g}, as losses[{e}] is "
                    f"{value:.4g} and {dtype_name(self.point.dtype)} resolves no smaller change, "
                    f"but got {eps:g}"
                )
            for repeat, how in zip(repeats, ("a second call", "torch.func.vmap"), strict=True):
                if not abs(value - repeat) <= max(math.sqrt(digits) * abs(value), 1e-3 * eps):
                    raise ValueError(
                        f"losses[{e}]: expected a function of the parameters alone, but got "
                        f"{value} at params and {repeat} from {how} (dropout, or sampled data?)"
                    )
        return [float(value) for value in first]


def _gradient(value: Tensor, point: Tensor, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(
        value, point, create_graph=create_graph, materialize_grads=True
    )
    return gradient


def _check_losses(losses: object) -> list[Loss]:
    expected = "from parameters to a 0-dim Tensor (model_losses makes them of a model)"
    if not isinstance(losses, Sequence):
        raise TypeError(
            f"losses: expected a sequence of callables {expected}, but got {type(losses).__name__}"
        )
    for index, loss in enumerate(losses):
        if not callable(loss):
            raise TypeError(
                f"losses[{index}]: expected a callable {expected}, but got {type(loss).__name__}"
            )
    if len(losses) < 2:
        raise ValueError(f"losses: expected at least 2 environments, but got {len(losses)}")
    return list(losses)


def draw_normal(problem: Problem, rows: int, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers ``[rows, n]``, drawn on the device of the generator."""
    device = "cpu" if generator is None else generator.device
    out = torch.randn(
        rows, problem.size, dtype=problem.point.dtype, device=device, generator=generator
    )
    return out.to(problem.point.device)


def draw_signs(problem: Problem, rows: int, generator: torch.Generator | None) -> Tensor:
    """Return random signs +1 and -1 ``[rows, n]``, drawn on the device of the generator."""
    device = "cpu" if generator is None else generator.device
    bits = torch.randint(0, 2, (rows, problem.size), device=device, generator=generator)
    return (2 * bits - 1).to(problem.point)
