"""Every op of torch's database in a small model: exact, or refused by name.

``torch.testing`` has samples of the arguments of each op. Each is tried as a function of a
parameter alone, as an op of data and a parameter, and on data that a parameter scales. A part runs
in `make test`, all of them in `make test-zoo`. One alone:
``pytest tests/zoo/test_operators.py -k index_select``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from ..agreement.outcomes import EXACT, MIXING
from .case import words
from .compared import causes_of, compared
from .samples import Batched, Joined, Sample, batched
from .test_modules import TOLERANCES, chosen

# Out of bounds in torch itself, with arguments that the search tries.
UNSAFE = words(
    "lu_unpack matrix_exp native_batch_norm _native_batch_norm_legit _batch_norm_with_update"
)

DRAWN = words("nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d")


def name_of(info: Any) -> str:
    return f"{info.name}-{info.variant_test_name}".removesuffix("-")


DATABASE = {
    name_of(info): info
    for info in op_db
    if info.supports_autograd and info.name not in (*UNSAFE, *DRAWN)
}

# Refused, at least for some samples: the cause, and the ops.
REFUSED = [
    # A call that takes data makes a weight of constants inside, which is not seen to be one.
    (MIXING, "nn.functional.scaled_dot_product_attention"),
    # The examples are slices of one image, and the kernel is flat.
    (MIXING, "nn.functional.conv3d"),
]

# What fails.
BROKEN = {
    "native_group_norm": "torch's formula leaves out the mean's gradient when it comes alone",
}

# The precision that a function casts its arguments to.
CASTS = {
    "bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32,
    "cfloat": torch.float32,
}  # fmt: skip

# Samples of these have complex arguments, no batch, or no gradient.
NOT_COMPARED = words(
    "istft sparse.sampled_addmm sparse.mm-reduce imag view_as_real _upsample_bilinear2d_aa "
    "torch.ops.aten._efficient_attention_forward torch.ops.aten._flash_attention_forward "
    "nn.functional.batch_norm-without_cudnn linalg.eig special.entr nn.functional.one_hot "
    "nn.functional.ctc_loss nn.functional.unfold __rpow__ slice_scatter to_sparse"
)

# What `make test` runs.
FEW = list(DATABASE)[::25]

# In float32 too few digits are left of these.
IN_DOUBLE_ONLY = words("linalg.cond logcumsumexp nn.functional.rms_norm")

SAMPLES = {torch.float64: 3, torch.float32: 1}
LARGEST = 2000  # elements


def usable(sample: Sample) -> bool:
    return bool(sample.tensors) and all(
        tensor.layout == torch.strided and 0 < tensor.numel() <= LARGEST
        for tensor in sample.tensors
    )


def undefined(name: str, sample: Sample) -> bool:
    """Return whether torch leaves the gradient open: of a write to places that may repeat."""
    return name == "index_put" and sample.leaves[-1] is False


def drawn(sample: Sample) -> bool:
    """Return whether the function draws its values."""
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        results.append(sample(sample.function, sample.tensors))
    one, other = results
    return not all(
        torch.equal(x.cdouble().nan_to_num(), y.cdouble().nan_to_num())
        for x, y in zip(one, other, strict=True)
    )


def samples_of(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    info = DATABASE[name]
    if dtype not in info.dtypes or (dtype == torch.float32 and name in IN_DOUBLE_ONLY):
        return
    made = itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=False), 60)
    samples = [Sample(info.op, ((s.input, *s.args), s.kwargs)) for s in made]
    for sample in chosen([s for s in samples if usable(s)], SAMPLES[dtype]):
        if not undefined(name, sample) and not drawn(sample):
            yield sample


def has_gradient(sample: Sample, number: int) -> bool:
    tensors: list[Tensor] = [*sample.tensors]
    tensors[number] = tensors[number].clone().requires_grad_()
    try:
        outs = [out for out in sample(sample.function, tensors) if out.requires_grad]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    except (RuntimeError, NotImplementedError):
        return False
    return tensors[number].grad is not None


def models_of(sample: Sample) -> Iterator[Batched | Joined]:
    for number, tensor in enumerate(sample.tensors[:4]):
        if tensor.is_floating_point() and has_gradient(sample, number):
            yield Joined(sample, number)
            if len(sample.tensors) > 1:
                yield from batched(sample, learned=number, most=2)
            yield from batched(sample, scaled=[number])


def marks(name: str) -> list[pytest.MarkDecorator]:
    broken = [pytest.mark.xfail(strict=True, reason=BROKEN[name])] if name in BROKEN else []
    return broken if name in FEW else [pytest.mark.zoo, *broken]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in DATABASE])
def test_operator(name: str) -> None:
    outcomes: Counter[str] = Counter()
    for dtype, tolerance in TOLERANCES.items():
        if name in CASTS:
            tolerance = max(tolerance, 8 * torch.finfo(CASTS[name]).eps)
        for sample in samples_of(name, dtype):
            for model in models_of(sample):
                outcomes += compared(model, tolerance)
    print(dict(outcomes))
    causes = causes_of(outcomes)
    assert causes == {cause for cause, names in REFUSED if name in words(names)}
    assert (not outcomes[EXACT] and not causes) == (name in NOT_COMPARED), outcomes


def test_the_tables_name_ops() -> None:
    refused = {name for _, names in REFUSED for name in words(names)}
    assert {*refused, *BROKEN, *CASTS, *NOT_COMPARED, *FEW} <= set(DATABASE)
