"""The ops under autograd, vmap, torch.func, torch.compile, torch.export and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import andmask_ext as am
from andmask_ext import reference

from .test_masked_mean import LAYOUTS, dtypes, rescales

OPS = [torch.ops.andmask.masked_mean, torch.ops.andmask.agreement_mask]
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
taus = pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])


def away_from_the_threshold(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients whose signs no small step changes."""
    values = torch.rand(shape, dtype=dtype) + 0.5
    signs = torch.where(torch.rand(shape) < 0.15, -1.0, 1.0)
    return (values * signs).requires_grad_()


# ---- autograd ----


@taus
@rescales
def test_gradcheck(tau: float, rescale: bool) -> None:
    grads = away_from_the_threshold(4, 3, 2)

    def function(grads: Tensor) -> Tensor:
        return torch.ops.andmask.masked_mean(grads, tau, rescale)

    assert torch.autograd.gradcheck(function, (grads,))
    # Linear for a fixed mask: the second derivative with respect to grads is zero.
    assert torch.autograd.gradgradcheck(function, (grads,))


@taus
@rescales
@dtypes
def test_backward_is_the_mask_over_d_for_every_environment(
    dtype: torch.dtype, tau: float, rescale: bool
) -> None:
    grads = torch.randn(5, 30).to(dtype).requires_grad_()
    weight = torch.randn(30).to(dtype)
    (result,) = torch.autograd.grad(
        torch.ops.andmask.masked_mean(grads, tau, rescale), grads, weight
    )
    expected = weight.double() * reference.agreement_mask(grads, tau, rescale) / 5
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), expected.expand(5, 30), rtol=torch.finfo(dtype).eps, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backward_of_rescale_where_the_factor_is_beyond_float16(dtype: torch.dtype) -> None:
    """One coordinate of 200,000 is kept: the factor is 2e5, the gradient is not."""
    grads = torch.tensor([1.0, -1.0]).repeat(2)[:, None].expand(4, 200_000).to(dtype).contiguous()
    grads[:, 0] = 1e-3
    grads.requires_grad_()
    weight = torch.zeros(200_000, dtype=dtype)
    weight[0] = 0.01
    out = torch.ops.andmask.masked_mean(grads, 1.0, True)
    (result,) = torch.autograd.grad(out, grads, weight)
    assert out[0].item() == pytest.approx(200.0, rel=0.01)
    assert result[:, 0].tolist() == pytest.approx([500.0] * 4, rel=0.01)
    assert not result[:, 1:].any()


def test_double_backward_reaches_the_incoming_gradient() -> None:
    grads = away_from_the_threshold(3, 4)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out = torch.ops.andmask.masked_mean(grads, 1.0)
    (first,) = torch.autograd.grad(out, grads, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    torch.testing.assert_close(second, reference.agreement_mask(grads))


def test_the_mask_has_no_gradient() -> None:
    grads = torch.randn(3, 4, requires_grad=True)
    assert not torch.ops.andmask.agreement_mask(grads, 0.5).requires_grad
    assert torch.ops.andmask.masked_mean(grads, 0.5).requires_grad
    with torch.no_grad():
        assert not torch.ops.andmask.masked_mean(grads, 0.5).requires_grad


def test_changing_the_input_before_backward_is_detected() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    grads = leaf * 1
    out = torch.ops.andmask.masked_mean(grads, 0.5)
    grads.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@rescales
def test_forward_mode(rescale: bool) -> None:
    primal, tangent = torch.randn(3, 4), torch.randn(3, 4)
    expected = (reference.agreement_mask(primal, 0.5, rescale) * tangent.mean(0)).float()
    rule = am.AndMask(0.5, rescale)
    torch.testing.assert_close(torch.func.jvp(rule, (primal,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        out = rule(torch.autograd.forward_ad.make_dual(primal, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)


@pytest.mark.xfail(
    raises=AttributeError,
    reason="torch: an op with register_autograd drops tangents; use andmask_ext.ops instead",
)
def test_forward_mode_through_the_raw_op() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3, 4), torch.randn(3, 4))
        out = torch.ops.andmask.masked_mean(dual, 0.5)
        torch.autograd.forward_ad.unpack_dual(out).tangent.sum()


# ---- torch.library ----


@ops
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(op: object, dtype: torch.dtype, layout: str) -> None:
    grads = LAYOUTS[layout](torch.randn(3, 4, 5).to(dtype))
    torch.library.opcheck(op.default, (grads, 0.5), {"rescale": True})


@ops
@pytest.mark.parametrize("shape", [(1,), (2, 0), (1, 1), (9, 70)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_shapes(op: object, shape: tuple[int, ...], requires_grad: bool) -> None:
    torch.library.opcheck(op.default, (torch.randn(shape, requires_grad=requires_grad),))


@ops
def test_fake_kernel_checks_like_the_real_one(op: object) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert op(torch.empty(3, 4, 5, dtype=torch.bfloat16), 0.5).shape == (4, 5)
        assert op(torch.empty(3, 4, device="cuda"), 0.5).device.type == "cuda"
        for grads, tau in [
            (torch.empty(()), 1.0),
            (torch.empty(0, 3), 1.0),
            (torch.empty(2, 3, dtype=torch.int32), 1.0),
            (torch.empty(2, 3), 1.5),
        ]:
            with pytest.raises((RuntimeError, TypeError, ValueError), match="expected"):
                op(grads, tau)


# ---- vmap and torch.func ----


@ops
@rescales
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap_equals_a_loop(op: object, rescale: bool, in_dim: int) -> None:
    batched = torch.randn(4, 5, 6)
    out = vmap(lambda grads: op(grads, 0.6, rescale), in_dims=in_dim)(batched)
    loop = torch.stack([op(grads, 0.6, rescale) for grads in batched.unbind(in_dim)])
    assert torch.equal(out, loop)


@ops
@rescales
def test_nested_vmap(op: object, rescale: bool) -> None:
    batched = torch.randn(2, 3, 4, 5)
    out = vmap(vmap(lambda grads: op(grads, 0.6, rescale)))(batched)
    loop = torch.stack([torch.stack([op(g, 0.6, rescale) for g in row]) for row in batched])
    assert torch.equal(out, loop)


def test_vmap_with_autograd_outside() -> None:
    batched = torch.randn(4, 5, 6, requires_grad=True)
    (result,) = torch.autograd.grad(
        vmap(lambda grads: torch.ops.andmask.masked_mean(grads, 0.6))(batched).sum(), batched
    )
    expected = torch.stack([reference.agreement_mask(g, 0.6).expand(5, 6) / 5 for g in batched])
    torch.testing.assert_close(result, expected.float())


def test_downstream_of_torch_func() -> None:
    """The common use: per-environment gradients by vmap(grad), then the op."""
    weight, inputs = torch.randn(7), torch.randn(5, 20, 7)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return (x @ weight).square().mean()

    grads = vmap(grad(loss), in_dims=(None, 0))(weight, inputs)
    torch.testing.assert_close(
        torch.ops.andmask.masked_mean(grads, 0.6), reference.masked_mean(grads, 0.6).float()
    )


TRANSFORMS = {
    "grad": lambda rule: lambda g: grad(lambda z: rule(z).sum())(g[0]),
    "vmap(grad)": lambda rule: vmap(grad(lambda z: rule(z).sum())),
    "grad(vmap)": lambda rule: grad(lambda g: vmap(rule)(g).sum()),
    "vjp": lambda rule: lambda g: vjp(rule, g[0])[1](torch.ones(6))[0],
    "jvp": lambda rule: lambda g: jvp(rule, (g[0],), (torch.ones(5, 6),))[1],
    "vmap(jvp)": lambda rule: vmap(lambda g: jvp(rule, (g,), (torch.ones(5, 6),))[1]),
    "jacrev": lambda rule: lambda g: jacrev(rule)(g[0]).sum(0),
    "jacfwd": lambda rule: lambda g: jacfwd(rule)(g[0]).sum(0),
    "grad(grad)": lambda rule: grad(lambda g: grad(lambda z: rule(z).square().sum())(g[0]).sum()),
}


@rescales
@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in TRANSFORMS] + [(name, True) for name in TRANSFORMS],
)
def test_the_wrapper_works_inside_torch_func(name: str, compiled: bool, rescale: bool) -> None:
    """Against the same transform of plain torch ops with the mask held constant."""
    torch._dynamo.reset()
    grads = torch.randn(3, 5, 6)
    rule = am.AndMask(0.6, rescale)

    def plain(g: Tensor) -> Tensor:
        mask = am.ops.agreement_mask(g.detach(), 0.6, rescale)
        return mask * g.mean(0)

    function = TRANSFORMS[name](rule)
    if compiled:
        function = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(function(grads), TRANSFORMS[name](plain)(grads))
    assert torch.equal(vmap(rule)(grads), torch.stack([rule(g) for g in grads]))


@pytest.mark.xfail(
    raises=RuntimeError,
    reason="torch: func.grad through an op with register_autograd; use andmask_ext.ops instead",
)
def test_torch_func_grad_through_the_raw_op() -> None:
    grad(lambda grads: torch.ops.andmask.masked_mean(grads, 0.6).sum())(torch.randn(5, 6))


# ---- torch.compile and torch.export ----


@pytest.mark.parametrize("function", [am.ops.masked_mean, torch.ops.andmask.masked_mean])
@rescales
def test_compile_fullgraph_with_dynamic_shapes(function: object, rescale: bool) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(grads: Tensor) -> Tensor:
        return function(grads * 2, 0.6, rescale) + 1

    for shape in [(4, 6), (5, 9), (17, 3)]:
        grads = torch.randn(shape, requires_grad=True)
        out = compiled(grads)
        torch.testing.assert_close(out, function(grads * 2, 0.6, rescale) + 1)
        (result,) = torch.autograd.grad(out.sum(), grads)
        expected = 2 * reference.agreement_mask(grads, 0.6, rescale).expand(shape) / shape[0]
        torch.testing.assert_close(result, expected.float())


def test_compile_of_the_rule_inside_a_step() -> None:
    torch._dynamo.reset()
    rule = am.AndMask(0.6, True)
    compiled = torch.compile(lambda grads: rule(grads) * 0.1, fullgraph=True)
    grads = torch.randn(4, 6)
    torch.testing.assert_close(compiled(grads), rule(grads) * 0.1)


@pytest.mark.parametrize("rule", [am.AndMask(0.6), am.AndMask(fdr=0.3, rescale=True)], ids=str)
def test_compile_of_vmap(rule: am.AndMask) -> None:
    torch._dynamo.reset()
    grads = torch.randn(3, 5, 6)
    found = torch.compile(vmap(rule), fullgraph=True)(grads)
    assert torch.equal(found, vmap(rule)(grads))


def test_export_with_a_dynamic_number_of_environments() -> None:
    class Module(torch.nn.Module):
        def forward(self, grads: Tensor) -> Tensor:
            return torch.ops.andmask.masked_mean(grads, 0.6, True)

    dims = {"grads": {0: torch.export.Dim("environments", min=2, max=64)}}
    program = torch.export.export(Module(), (torch.randn(4, 6),), dynamic_shapes=dims)
    for environments in (2, 4, 33):
        grads = torch.randn(environments, 6)
        assert torch.equal(program.module()(grads), torch.ops.andmask.masked_mean(grads, 0.6, True))


# ---- autocast ----


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_cast(inner: torch.dtype, dtype: torch.dtype) -> None:
    grads = torch.randn(3, 4).to(dtype)
    expected = am.ops.masked_mean(grads, 0.6)
    with torch.autocast(torch.get_default_device().type, inner):
        out = am.ops.masked_mean(grads, 0.6)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
