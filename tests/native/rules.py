"""Every rule of the native library, with arguments to try it with.

All tests of ops and kernels take the rules from here. `tests/ops/test_aggregate.py` compares the
names with the library's own table. Kept free of torch, as the kernel tests are.
"""

from __future__ import annotations

# Functions of moments.
MOMENT_RULES: dict[str, list[float]] = {
    "mean": [],
    "and_mask": [0.6],
    "geometric_mean": [0.4],
    "sand_mask": [0.3, 2.0],
    "masked_average": [0.6],
    "agreement_sum": [],
}
# Functions of the gradients of all environments at once.
COLUMN_RULES: dict[str, list[float]] = {
    "median": [],
    "trimmed_mean": [1.0],
    "winsorized_mean": [15.0],
    "fed_ilc": [0.4],
    "sign_dropout": [],
    "agreement_random": [],
}
