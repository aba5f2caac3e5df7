"""torch.ops.andmask._aggregate: transforms, errors, memory. Values: tests/rules."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import andmask_ext as am

from ..native.rules import COLUMN_RULES, MOMENT_RULES
from ..rules.rule_table import TABLE, examples
from .test_masked_mean import LAYOUTS, dtypes

op = torch.ops.andmask._aggregate

RULES = {**MOMENT_RULES, **COLUMN_RULES}
NOISE = {"sign_dropout": torch.rand, "agreement_random": torch.randn}
# Rules with a mask are tried with rescale.
FACTS = [line.split() for line in torch.ops.andmask._rule_table().splitlines()]
RESCALES = {name: rescales == "1" for name, _, _, rescales, _ in FACTS}
calls = pytest.mark.parametrize("name", RULES)
rules = pytest.mark.parametrize("rule", examples(), ids=lambda rule: type(rule).__name__)


def noise_for(name: str, grads: Tensor) -> Tensor | None:
    if name not in NOISE:
        return None
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    return NOISE[name](grads.shape[1:], dtype=dtype, device=grads.device)


def arguments_of(name: str, grads: Tensor) -> tuple[Tensor, str, list[float], bool, Tensor | None]:
    return grads, name, RULES[name], RESCALES[name], noise_for(name, grads)


def test_every_native_rule_is_tried_and_has_a_class() -> None:
    assert set(RESCALES) == set(RULES) == {rule.name for rule in TABLE}


def test_and_mask_is_masked_mean() -> None:
    for environments in (5, 40, 300):
        grads = torch.randn(environments, 3, 50)
        for rescale in (False, True):
            expected = torch.ops.andmask.masked_mean(grads, 0.2, rescale)
            torch.testing.assert_close(op(grads, "and_mask", [0.2], rescale), expected)


# ---- torch.library ----


@calls
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "environments last", "columns strided"])
def test_opcheck(name: str, dtype: torch.dtype, layout: str) -> None:
    grads = LAYOUTS[layout](torch.randn(3, 4, 5).to(dtype))
    torch.library.opcheck(op.default, arguments_of(name, grads))


@calls
@pytest.mark.parametrize("shape", [(3,), (3, 0), (9, 70), (40, 3)])
def test_opcheck_shapes(name: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(op.default, arguments_of(name, torch.randn(shape)))


@calls
@pytest.mark.parametrize("environments", [3, 40])
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_equals_a_loop(name: str, environments: int, in_dim: int) -> None:
    batch = torch.randn(4, environments, 6).movedim(0, in_dim)
    values, rescale = RULES[name], RESCALES[name]
    if noise_for(name, batch[0]) is None:
        out = vmap(lambda g: op(g, name, values, rescale), in_dims=in_dim)(batch)
        loop = [op(g, name, values, rescale) for g in batch.unbind(in_dim)]
        assert torch.equal(out, torch.stack(loop))
        return
    samples = batch.unbind(in_dim)
    noise = torch.rand(4, 6)
    for noises, noise_dim in ((noise, 0), (noise.t(), 1), (noise[0], None)):
        out = vmap(lambda g, n: op(g, name, values, rescale, n), (in_dim, noise_dim))(batch, noises)
        each = [noise[0]] * 4 if noise_dim is None else noise.unbind()
        loop = [op(g, name, values, rescale, n) for g, n in zip(samples, each, strict=True)]
        assert torch.equal(out, torch.stack(loop))
    out = vmap(lambda n: op(samples[0], name, values, rescale, n))(noise)
    loop = [op(samples[0], name, values, rescale, n) for n in noise]
    assert torch.equal(out, torch.stack(loop))


@rules
def test_vmap_of_the_rule(rule: am.rules.Rule) -> None:
    batch = torch.randn(3, 7, 5)
    if TABLE[type(rule)].random:
        assert vmap(rule, randomness="different")(batch).shape == (3, 5)
    else:
        assert torch.equal(vmap(rule)(batch), torch.stack([rule(g) for g in batch]))


@rules
def test_compile_fullgraph(rule: am.rules.Rule) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: rule(g * 2) + 1, fullgraph=True, dynamic=True)
    for shape in [(7, 6), (9, 4)]:
        grads = torch.randn(shape)
        out = compiled(grads)
        assert out.shape == shape[1:]
        if not TABLE[type(rule)].random:
            torch.testing.assert_close(out, rule(grads * 2) + 1)


@rules
def test_a_backward_pass_is_refused(rule: am.rules.Rule) -> None:
    if isinstance(rule, am.AndMask):
        return  # it has a derivative: test_transforms.py
    grads = torch.randn(6, 4, requires_grad=True)
    out = rule(grads)
    with pytest.raises(NotImplementedError, match=r"andmask::_aggregate: rule \w+ has no deriv"):
        out.sum().backward()
    with torch.no_grad():
        assert not rule(grads).requires_grad
    if TABLE[type(rule)].random or isinstance(rule, am.rules.MedianOfThree):
        return
    plain = grads.detach()
    with pytest.raises(NotImplementedError, match="has no derivative"):
        grad(lambda g: rule(g).sum())(plain)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        jvp(rule, (plain,), (plain,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain, plain)
        with pytest.raises(NotImplementedError, match="has no derivative"):
            rule(dual)
    # What is only multiplied with the update has its derivative.
    torch.testing.assert_close(grad(lambda x: (rule(plain) * x).sum())(plain[0]), rule(plain))


def test_downstream_of_torch_func() -> None:
    weight, inputs = torch.randn(7), torch.randn(5, 20, 7)
    grads = vmap(grad(lambda w, x: (x @ w).square().mean()), (None, 0))(weight, inputs)
    torch.testing.assert_close(am.rules.Median()(grads), grads.median(0).values)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_autocast_does_not_cast(inner: torch.dtype) -> None:
    grads = torch.randn(5, 4)
    with torch.autocast(torch.get_default_device().type, inner):
        assert torch.equal(am.rules.Median()(grads), grads.median(0).values)


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": torch.ones(2, 3, dtype=torch.int64)}, "expected grads of dtype .* got Long"),
        ({"grads": torch.tensor(1.0)}, "expected grads of shape .* 0-dim"),
        ({"grads": torch.ones(0, 3)}, "at least 1 environment"),
        ({"rule": "mode"}, "expected rule to be one of mean, .*, agreement_random, but got mode"),
        ({"arguments": [1.0]}, r"expected 0 argument\(s\) of rule median, but got 1"),
        ({"rescale": True}, "expected rescale=False, because rule median has no mask .* True"),
        ({"noise": torch.rand(3)}, "expected no noise for rule median, but got a tensor"),
        ({"rule": "sign_dropout"}, "expected noise for rule sign_dropout, but got None"),
        (
            {"rule": "sign_dropout", "noise": torch.rand(2)},
            r"expected noise of the shape .* grads \(5, 3\), but got \(2\)",
        ),
        (
            {"rule": "sign_dropout", "noise": torch.rand(3, dtype=torch.float64)},
            "expected noise of dtype Float for grads of dtype Float, but got Double",
        ),
        (
            {"rule": "trimmed_mean", "arguments": [3.0]},
            "expected more than 2 b environments for rule trimmed_mean, but got 3 and 5 env",
        ),
        ({"rule": "trimmed_mean", "arguments": [0.5]}, "expected a whole b >= 0 .* got 0.5"),
        ({"rule": "trimmed_mean", "arguments": [float("nan")]}, "expected a whole b >= 0"),
        ({"rule": "winsorized_mean", "arguments": [50.1]}, r"c in \[0, 50\] .* but got 50.1"),
        ({"rule": "fed_ilc", "arguments": [1.5]}, r"tau in \[0, 1\] .* but got 1.5"),
        ({"rule": "and_mask", "arguments": [float("nan")]}, r"tau in \[0, 1\] .* but got nan"),
        ({"rule": "sand_mask", "arguments": [0.5, 0.0]}, "k > 0 .* but got 0.5 and 0"),
        ({"rule": "mean", "rescale": True}, "rule mean has no mask"),
    ],
)
def test_native_errors(changes: dict[str, object], message: str) -> None:
    given = {"grads": torch.randn(5, 3), "rule": "median", "arguments": [], **changes}
    with pytest.raises(RuntimeError, match=f"^andmask::_aggregate: .*{message}"):
        op(**given)


def test_fake_kernel_checks_like_the_real_one() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        grads, noise = torch.empty(3, 4, 5, dtype=torch.bfloat16), torch.empty(4, 5)
        assert op(grads, "median", []).shape == (4, 5)
        assert op(grads, "sign_dropout", [], False, noise).dtype == torch.bfloat16
        assert op(torch.empty(3, 4, device="cuda"), "median", []).device.type == "cuda"
        for arguments in [
            (torch.empty(()), "median", []),
            (torch.empty(0, 3), "median", []),
            (torch.empty(2, 3, dtype=torch.int32), "median", []),
            (grads, "mode", []),
            (grads, "median", [1.0]),
            (grads, "median", [], True),
            (grads, "median", [], False, noise),
            (grads, "sign_dropout", []),
            (grads, "sign_dropout", [], False, torch.empty(5)),
            (grads, "sign_dropout", [], False, torch.empty(4, 5, dtype=torch.float64)),
        ]:
            with pytest.raises((RuntimeError, TypeError, ValueError), match="expected"):
                op(*arguments)


# ---- memory ----


@calls
def test_small_thread_stacks(name: str) -> None:
    """All scratch of the kernels fits on the stack of a thread that has 256 KiB."""
    failures: list[BaseException] = []
    arguments = [
        arguments_of(name, torch.randn(environments, 40).to(dtype))
        for environments in (5, 70, 600)
        for dtype in (torch.float16, torch.float32, torch.float64)
    ]

    def run() -> None:
        try:
            for given in arguments:
                op(*given)
        except BaseException as error:
            failures.append(error)

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert not failures


def test_very_many_environments() -> None:
    """One column is sorted in a few MB, however long: no list of comparators is kept."""
    values = torch.randperm(200_001, dtype=torch.float64)
    assert op(values[:, None], "median", []).tolist() == [100_000.0]
    assert op(values[:, None], "trimmed_mean", [50.0]).item() == pytest.approx(100_000.0)
    out = op(values, "winsorized_mean", [10.0])  # 0-dim columns
    assert out.shape == ()
    assert out.item() == pytest.approx(100_000.0)
