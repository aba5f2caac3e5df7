"""Moments that are merged, reset, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import andmask_ext as am

from .test_moments import (
    KINDS,
    SHAPES,
    add_one_by_one,
    assert_equal,
    new,
    stacks,
)


@given(data=st.data())
def test_any_split_merged_in_any_order_equals_all_at_once(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    environments = data.draw(st.integers(1, 9))
    grads = [g.double() for g in stacks(environments)]
    missing = [[data.draw(st.booleans()) for _ in SHAPES] for _ in range(environments)]
    owners = [data.draw(st.integers(0, 2)) for _ in range(environments)]
    parts = [new(torch.float64) for _ in range(3)]
    whole = new(torch.float64)
    for row in range(environments):
        grad = [None if out else g[row] for g, out in zip(grads, missing[row], strict=True)]
        whole.add(grad)
        parts[owners[row]].add(grad)
    order = data.draw(st.permutations(range(3)))
    merged = new(torch.float64)
    for part in order:
        merged.merge(parts[part])
    assert_equal(merged, whole, exact=False)


def test_merge_leaves_the_other_as_it_was_and_takes_itself() -> None:
    grads = stacks(3)
    moments, other = add_one_by_one(new(), grads), add_one_by_one(new(), grads)
    before = copy.deepcopy(other)
    moments.merge(other)
    assert_equal(other, before)
    other.merge(other)
    assert_equal(other, moments)
    other.merge(new())
    assert_equal(other, moments)


def test_reset_keeps_the_memory_and_forgets_the_rest() -> None:
    moments, grads = add_one_by_one(new(), stacks(5)), stacks(2)
    where = [total.data_ptr() for total in moments.sum]
    moments.reset()
    assert moments.count == 0
    assert moments.sum == [None] * len(SHAPES)
    with pytest.raises(ValueError, match="at least one environment, but got 0"):
        am.rules.Mean().update(moments)
    add_one_by_one(moments, grads)
    assert_equal(moments, add_one_by_one(new(), grads))
    assert [total.data_ptr() for total in moments.sum] == where


@pytest.mark.parametrize("environments", [1, 3, 130])
def test_state_dict_goes_on_to_the_same_bits(tmp_path: object, environments: int) -> None:
    grads, more = stacks(environments), stacks(4)
    straight = add_one_by_one(new(), grads)
    straight.add([more[0][0], None, None, None])
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = add_one_by_one(new(), more)  # what is there before does not matter
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(resumed, straight)
    assert_equal(add_one_by_one(resumed, more), add_one_by_one(straight, more))
    untouched = am.Moments([torch.zeros(2), torch.zeros(3)])
    untouched.add([torch.ones(2), None])
    loaded = am.Moments([torch.zeros(2), torch.zeros(3)])
    loaded.load_state_dict(untouched.state_dict())
    assert_equal(loaded, untouched)
    loaded.add([None, torch.ones(3)])
    assert untouched.count == 1
    assert untouched.sum[0].tolist() == [1.0, 1.0]


def test_state_of_other_moments_is_refused() -> None:
    state = add_one_by_one(new(), stacks(2)).state_dict()
    with pytest.raises(ValueError, match=r"expected sum, but got sum \+ votes"):
        new(kinds=()).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected shapes"):
        am.Moments([torch.zeros(2)], KINDS).load_state_dict(state)
