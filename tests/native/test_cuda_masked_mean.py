"""The CUDA kernel bodies of masked_mean, run thread by thread on the host.

They sum in the same order as the CPU kernels, which test_masked_mean_kernels.py holds against the
definition: so results must have the same bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native import harness
from tests.native.arrays import DTYPES, aligned, stored, wide_type
from tests.strategies import stacked

native = harness.load()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_bits_are_those_of_the_cpu(dtype: type, data: st.DataObject) -> None:
    drawn = data.draw(stacked(dtype=np.float32 if dtype is np.uint16 else dtype))
    environments, columns = drawn.shape
    # Rows in packs of 16 bytes, or such that they cannot be moved that way.
    pad = data.draw(st.sampled_from([0, -columns % 8, 1, 8]))
    grads = aligned((environments, columns + pad), dtype, data.draw(st.sampled_from([0, 0, 1])))
    grads = grads[:, :columns]
    grads[:] = stored(drawn, dtype)
    threshold = data.draw(st.integers(0, environments))
    output = data.draw(st.sampled_from(["masked_mean", "masked_mean_wide", "mask"]))
    expected, kept = native.masked_mean("baseline", grads, threshold, output)
    out = aligned((columns,), expected.dtype, data.draw(st.sampled_from([0, 0, 1])))
    # So many multiprocessors that the groups of environments are shared out, or so few that not.
    multiprocessors = data.draw(st.sampled_from([1, 100]))
    rescale = data.draw(st.booleans()) and output != "masked_mean"
    final = dtype if output == "masked_mean_wide" else wide_type(dtype)
    scaled = aligned((columns,), final, data.draw(st.sampled_from([0, 1]))) if rescale else None
    native.cuda_masked_mean(grads, threshold, output, out, scaled, multiprocessors)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))
    if scaled is not None:
        factor = native.inverse_density(kept, columns)
        like = np.empty(1, final)
        by_cpu = native.scale("baseline", expected, factor, like)
        np.testing.assert_array_equal(scaled.view(np.uint8), by_cpu.view(np.uint8))
