"""Prints the instruction set in use and, for each thread count that is given, a digest of the ops.

Run as a script, in a process of its own: the instruction set is chosen once per process.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import numpy as np
import torch
from rules import COLUMN_RULES, MOMENT_RULES  # a script finds the files beside it

import andmask_ext as am

# The digests' fewest environments are too few to trim.
RANKED = {rule: a for rule, a in COLUMN_RULES.items() if rule != "trimmed_mean"}
ops = torch.ops.andmask


def bits(tensors: list[torch.Tensor]) -> bytes:
    """Which of two NaN a sum or a step keeps is not said: all NaN are one here."""
    return b"".join(
        t.where(t == t, torch.nan).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if t.is_floating_point()
        else t.numpy().tobytes()
        for t in tensors
    )


def moments_and_steps(
    grads: list[torch.Tensor], params: list[torch.Tensor], vote_type: torch.dtype
) -> Iterator[bytes]:
    """What the list ops make of the stacked gradients of several parameters."""
    count = len(grads[0])
    wide = [torch.float64 if g.dtype == torch.float64 else torch.float32 for g in grads]
    kinds = [
        [
            torch.empty(g.shape[1:], dtype=vote_type if votes else w)
            for g, w in zip(grads, wide, strict=True)
        ]
        for votes in (False, True, False, False, True)
    ]
    weights = [0.5 + e / count for e in range(count)]
    ops._accumulate_(*kinds, grads, 0, weights, True)
    for kind in kinds:
        yield bits(kind)
    for one, votes in zip(*kinds[:2], strict=True):
        yield bits(list(ops._vote_histograms([one], [votes], count)))
    for rule, arguments in MOMENT_RULES.items():
        for rescale in (False, True):
            yield bits(ops._resolve(*kinds, count, rule, arguments, rescale))
            yield bits([ops._squared_norm(*kinds, count, rule, arguments, rescale)])
    finite = [[t.nan_to_num(0, 1, -1) if t.is_floating_point() else t for t in k] for k in kinds]
    rule = (*finite, count, "and_mask", [0.6], True)
    state = [[torch.zeros_like(t) for t in kinds[0]] for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    decay = {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": False, "maximize": False}
    scale = ops._squared_norm(*rule).rsqrt()
    yield bits([scale])
    for first in (True, False):
        options = {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "first_step": first}
        options["grad_scale"] = scale if first else None
        ops._sgd_step_(params, state[0], *rule, **options, **decay)
    yield bits(params) + bits(state[0])
    betas = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    for factor in (None, scale):
        ops._adam_step_(params, *state, steps, *rule, **betas, **decay, grad_scale=factor)
    yield bits(params) + bits([t for kind in state for t in kind])
    options = {"tau": 0.4, "beta3": 0.7, "bias_correction": True}
    for kind in state:
        for tensor in kind:
            tensor.zero_()
    for _ in range(2):
        ops._temporal_adam_step_(params, *state, steps, finite[0], **options, **betas, **decay)
    yield bits(params) + bits([t for kind in state for t in kind])


def weight_gradients(rng: np.random.Generator, dtype: torch.dtype) -> Iterator[bytes]:
    """Moments of layers. Of whole numbers: elsewhere the multiply-adds of the processor show."""
    for rows in (1, 3, 40):
        a, d = (
            torch.from_numpy(rng.integers(-2, 3, (30, rows, width))).to(dtype)
            for width in (200, 70)
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = [torch.empty(70, 200, dtype=wide), torch.empty(70, 200, dtype=torch.int8)]
        ops._accumulate_outer_(*kinds, None, None, None, a, d, None, None, 0, [0.5])
        yield bits(kinds)
        images = a.view(30, rows, 20, 10)
        kinds = [t.view(70, -1)[:, : rows * 3].reshape(70, rows, 3, 1) for t in kinds]
        grads = torch.from_numpy(rng.integers(-2, 3, (30, 70, 18, 10))).to(dtype)
        window = ([1, 1], [0, 0], [1, 1], 1)
        ops._accumulate_convolution_(
            *kinds, None, None, None, images, grads, None, None, 0, *window, []
        )
        yield bits(kinds)


def digest_of_ops(threads: int) -> str:
    """What the ops make of many inputs."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)  # torch's own random numbers depend on the instruction set
    digest = hashlib.sha256()
    shapes = [
        (1, 1),
        (2, 70_001),
        (3, 1023),
        (8, 4097),
        (9, 65),
        (17, 33_000),
        (64, 20_000),
        (127, 130),
        (300, 1500),
    ]
    special = np.array([0.0, -0.0, 1e-45, -1e-39, 3e38, np.inf, -np.inf, np.nan])
    for shape in shapes:
        mixed = np.where(
            rng.random(shape) < 0.02, rng.choice(special, shape), rng.standard_normal(shape)
        )
        base = torch.from_numpy(mixed)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            grads = base.to(dtype)
            for tau, rescale in [(0.0, False), (0.1, True), (0.6, False), (1.0, True)]:
                for op in (torch.ops.andmask.masked_mean, torch.ops.andmask.agreement_mask):
                    out = op(grads, tau, rescale)
                    digest.update(out.contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(bits(list(ops.vote_histogram(grads))))
            noise = torch.from_numpy(rng.random(shape[1]))
            noise = noise if dtype == torch.float64 else noise.float()
            for rule, arguments in {**MOMENT_RULES, **RANKED}.items():
                random = noise if rule in ("sign_dropout", "agreement_random") else None
                rescale = rule in MOMENT_RULES and rule != "mean"
                digest.update(bits([ops._aggregate(grads, rule, arguments, rescale, random)]))
    for count, vote_type in [
        (1, torch.int8),
        (3, torch.int8),
        (130, torch.int16),
        (5, torch.int32),
    ]:
        sizes = [1, 700, 20_000 if count < 100 else 900, 65]
        dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
        grads, params = [], []
        for size, dtype in zip(sizes, dtypes, strict=True):
            mixed = rng.standard_normal((count, size))
            mixed = np.where(
                rng.random((count, size)) < 0.02, rng.choice(special, (count, size)), mixed
            )
            grads.append(torch.from_numpy(mixed).to(dtype))
            params.append(torch.from_numpy(rng.standard_normal(size)).to(dtype))
        for part in moments_and_steps(grads, params, vote_type):
            digest.update(part)
        for part in moments_and_steps(
            [g.double() for g in grads], [p.double() for p in params], vote_type
        ):
            digest.update(part)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for part in weight_gradients(rng, dtype):
            digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    print(am.build_info()["isa"], *(digest_of_ops(int(threads)) for threads in sys.argv[1:]))
