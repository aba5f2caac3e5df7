"""The list ops: accumulate_, resolve, resolve_, sgd_step_, adam_step_, temporal_adam_step_."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .moments import (
    DTYPES,
    EVERY,
    KINDS,
    RULES,
    SHAPES,
    STATE,
    STEPS,
    Case,
    assert_same,
    case,
    dtypes,
    every_op,
    ops,
)

# ---- torch.library ----


@pytest.mark.parametrize(
    ("dtype", "requires_grad"), [*[(dtype, False) for dtype in DTYPES], (torch.float32, True)]
)
def test_opcheck(dtype: torch.dtype, requires_grad: bool) -> None:
    c = case(dtype)
    for param in c.params:
        param.requires_grad_(requires_grad)
    with torch.no_grad():
        torch.library.opcheck(ops._accumulate_.default, c.accumulate_args())
        torch.library.opcheck(ops._resolve.default, c.rule_args())
        torch.library.opcheck(ops._resolve_.default, c.rule_args())
        for op, (args, kwargs) in {
            ops._sgd_step_: c.sgd_args(),
            ops._adam_step_: c.adam_args(),
            ops._temporal_adam_step_: c.temporal_args(),
        }.items():
            torch.library.opcheck(op.default, args, kwargs)


def test_opcheck_of_what_may_be_left_out() -> None:
    c = case(votes=[], voters=[], squares=[], logs=[], rule="mean", arguments=[], largest=[])
    plain = case(
        votes=[], voters=[], squares=[], logs=[], rule="mean", arguments=[], first=[], momentum=0.0
    )
    one = case(stacked=False, grads=[torch.randn(shape) for shape in SHAPES], weights=[2.0])
    torch.library.opcheck(ops._accumulate_.default, c.accumulate_args())
    torch.library.opcheck(ops._accumulate_.default, one.accumulate_args())
    torch.library.opcheck(ops._resolve.default, c.rule_args())
    torch.library.opcheck(ops._adam_step_.default, *c.adam_args())
    torch.library.opcheck(ops._sgd_step_.default, *plain.sgd_args())


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resolve_keeps_the_layout_of_the_sum(layout: str) -> None:
    """Also where the moments differ in layout; the fake kernel says the same."""
    c = case(shapes=[(2, 3, 4, 5)])
    expected = c.resolve()[0]
    for kinds in (KINDS, ("sum",), ("votes",)):
        changed = Case(**vars(c))
        for kind in kinds:
            setattr(changed, kind, [LAYOUTS[layout](getattr(c, kind)[0])])
        torch.library.opcheck(ops._resolve.default, changed.rule_args())
        (result,) = changed.resolve()
        assert torch.equal(result, expected)
        assert result.stride() == torch.empty_like(changed.sum[0]).stride()


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(op: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    c = case(shapes=[(3, 5), (7,)])
    args, kwargs = {
        "accumulate": lambda c: (c.accumulate_args(), {}),
        "resolve": lambda c: (c.rule_args(), {}),
        "resolve_": lambda c: (c.rule_args(), {}),
        "sgd": Case.sgd_args,
        "adam": Case.adam_args,
        "temporal": Case.temporal_args,
    }[op](c)
    name = {"accumulate": "_accumulate_", "resolve": "_resolve", "resolve_": "_resolve_"}.get(
        op, f"_{op}_{'adam_' if op == 'temporal' else ''}step_"
    )
    expected = c.after(op)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(args: Any, kwargs: Any) -> Any:
        return getattr(ops, name)(*args, **kwargs)

    c.result = compiled(args, kwargs)
    assert_same(c, expected, *EVERY[op])


# ---- lists, layouts, threads ----


@every_op
@dtypes
def test_a_list_is_as_many_calls(op: str, dtype: torch.dtype) -> None:
    c = case(dtype)
    together = c.after(op)
    for i in range(len(SHAPES)):
        lists = {
            name: value[i : i + 1]
            for name, value in vars(c).items()
            if isinstance(value, list) and value and isinstance(value[0], Tensor)
        }
        alone = Case(**{**vars(c), **lists}).after(op)
        for name in EVERY[op]:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


@every_op
@dtypes
@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
def test_any_layout_gives_the_same_values(op: str, dtype: torch.dtype, layout: str) -> None:
    """What is written to keeps its own layout."""
    c = case(dtype, shapes=[(2, 3, 4, 5)])
    expected = c.after(op)
    names = [n for n, v in vars(c).items() if isinstance(v, list) and v and torch.is_tensor(v[0])]
    for changed in [names] if layout != "mixed" else [[name] for name in names if name != "steps"]:
        strided = Case(**vars(c.after("resolve")))
        for name in set(changed) - {"steps"}:
            convert = LAYOUTS["transposed" if layout == "mixed" else layout]
            rows = name == "grads"
            values = [
                torch.stack([convert(row) for row in t]) if rows else convert(t)
                for t in getattr(strided, name)
            ]
            if rows and layout == "channels_last":
                values = [torch.empty(3, 2, 4, 5, 3, dtype=dtype).permute(0, 1, 4, 2, 3)]
                values[0].copy_(strided.grads[0])
            setattr(strided, name, values)
        tensors = {name: getattr(strided, name) for name in EVERY[op] if name != "result"}
        strides = {name: tensors[name][0].stride() for name in tensors}
        strided.result = getattr(strided, op)()
        assert_same(strided, expected, *EVERY[op])
        assert {name: tensors[name][0].stride() for name in tensors} == strides


def test_environments_may_lie_at_any_stride() -> None:
    c = case(shapes=[(4, 6)])
    rows = torch.randn(4, 6, 3).movedim(-1, 0)  # strides (1, 18, 3)
    chosen = torch.randn(9, 4, 6)[::3]
    same = torch.randn(4, 6).expand(3, 4, 6)
    for grads in (rows, chosen, same):
        one = c.after("accumulate", grads=[grads])
        assert_same(one, c.after("accumulate", grads=[grads.contiguous()]), *KINDS)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("accumulate", "sum"),
        ("accumulate", "votes"),
        ("resolve_", "sum"),
        *[(op, name) for op in STEPS for name in ("params", "first")],
    ],
)
def test_writing_to_an_expanded_tensor_is_refused(op: str, name: str) -> None:
    c = case(shapes=[(4, 6)])
    before = c.after("__str__")
    setattr(c, name, [getattr(c, name)[0][:1].expand(4, 6)])
    with pytest.raises(RuntimeError, match=r"\[0\] whose elements lie apart, but got an expanded"):
        getattr(c, op)()
    assert_same(c, before, *{*KINDS, *STATE} - {name})


def test_reading_an_expanded_tensor_is_fine() -> None:
    c = case(shapes=[(4, 6)])
    for kind in KINDS:
        setattr(c, kind, [getattr(c, kind)[0][:1].expand(4, 6)])
    dense = {kind: [getattr(c, kind)[0].contiguous()] for kind in KINDS}
    assert torch.equal(c.resolve()[0], c.after("resolve", **dense).result[0])
    expected = c.after("sgd", **dense)
    c.sgd()
    assert_same(c, expected, "params", "first")


@every_op
@dtypes
def test_bits_do_not_depend_on_threads(op: str, dtype: torch.dtype) -> None:
    c = case(dtype, shapes=[(50_000,), (3,), (20_001,)])
    torch.set_num_threads(1)
    expected = c.after(op)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(c.after(op), expected, *EVERY[op])


# ---- accumulate_ ----


@dtypes
@pytest.mark.parametrize("kept", [(), ("votes",), ("squares",), ("logs", "votes"), KINDS[1:]])
def test_any_subset_of_moments(dtype: torch.dtype, kept: tuple[str, ...]) -> None:
    everything = case(dtype).after("accumulate")
    torch.manual_seed(0)
    c = case(dtype)
    some = c.after("accumulate", **{kind: [] for kind in KINDS[1:] if kind not in kept})
    assert_same(some, c.after("accumulate"), "sum", *kept)
    assert len(everything.votes) == len(SHAPES)


@dtypes
def test_stacked_or_one_by_one_is_the_same(dtype: torch.dtype) -> None:
    c = case(dtype, weights=[0.5, 1.0, 3.0])
    stacked = c.after("accumulate", added=0)
    one = c.after("resolve")
    for row, weight in enumerate(c.weights):
        one.grads = [grads[row] for grads in c.grads]
        one.added, one.weights, one.stacked = row, [weight], False
        one.accumulate()
    assert_same(one, stacked, *KINDS)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("vote_type", "largest"),
    [(torch.int8, 127), (torch.int16, 32767), (torch.int32, 2**31 - 1)],
    ids=lambda v: str(v),
)
def test_votes_may_fill_their_type_and_not_more(
    vote_type: torch.dtype, largest: int, stacked: bool
) -> None:
    rows = 2 if stacked else 1
    c = case(shapes=[(3,)], added=largest - rows, stacked=stacked)
    c.grads = [
        torch.tensor([-1.0, 0.0, 1.0]).expand(rows, 3)
        if stacked
        else torch.tensor([-1.0, 0.0, 1.0])
    ]
    c.votes = [torch.tensor([rows - largest, 0, largest - rows], dtype=vote_type)]
    c.voters = [torch.zeros(3, dtype=vote_type)]
    assert c.after("accumulate").votes[0].tolist() == [-largest, 0, largest]
    c.added += 1
    message = "count" if vote_type == torch.int32 else rf"votes\[0\] wide enough for {largest + 1} "
    with pytest.raises(RuntimeError, match=message):
        c.after("accumulate")


def test_the_first_environment_overwrites_what_is_there() -> None:
    c = case()
    rubbish = {kind: [torch.full_like(t, 99) for t in getattr(c, kind)] for kind in KINDS}
    assert_same(c.after("accumulate", added=0, **rubbish), c, *KINDS)


# ---- what is not finite ----


@dtypes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_everywhere(dtype: torch.dtype, rule: str, value: float) -> None:
    for row in range(3):
        grads = torch.randn(3, 40).to(dtype)
        grads[row, 5] = value
        c = case(dtype, shapes=[(40,)], added=0, grads=[grads]).after("accumulate")
        vars(c).update(rule=rule, arguments=RULES[rule], rescale=False)
        finite = torch.arange(40) != 5
        for result in (
            c.resolve()[0],
            c.after("resolve_").sum[0],
            c.after("sgd").params[0],
            c.after("adam").params[0],
            c.after("temporal", grads=[grads[row : row + 1]]).params[0],
        ):
            assert torch.equal(result.isfinite(), finite)


# ---- rescale ----


@dtypes
def test_rescale_counts_the_whole_of_each_parameter(dtype: torch.dtype) -> None:
    """Also of large ones, which are worked on in pieces, and not of its neighbours in the list."""
    shapes = [(5,), (40_000,), (300,), (20_001,)]
    c = case(dtype, shapes=shapes)
    plain = c.after("resolve", rescale=False).result
    for shape, grads, found, value in zip(shapes, c.grads, c.resolve(), plain, strict=True):
        votes = (grads > 0).sum(0) - (grads < 0).sum(0)
        kept = int((votes.abs() >= 2).sum())  # tau = .6 of 3
        expected = value.double() / (1e-10 + kept / shape[0])
        rtol = 2 * torch.finfo(dtype).eps  # both are rounded
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)
