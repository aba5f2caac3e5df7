"""What only a GPU can show: streams, graphs, several devices, and the bits of the CPU.

What the kernels compute is tested without one: in tests/native thread by thread, and by the whole
suite with ``ANDMASK_TEST_KERNELS=cuda-on-host``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import andmask_ext as am

from .native.rules import MOMENT_RULES

if not torch.cuda.is_available():
    pytest.skip("these tests are about a GPU, and there is none", allow_module_level=True)

ops = torch.ops.andmask
pytestmark = pytest.mark.parametrize("device", ["cuda"])


def lists(shapes: list[tuple[int, ...]], dtype: torch.dtype, **options: object) -> list[Tensor]:
    return [torch.randn(shape, **options).to(dtype) for shape in shapes]  # type: ignore[call-overload]


SHAPES = [(5,), (300, 70), (), (4097,), (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rescale", [False, True])
def test_masked_mean_has_the_bits_of_the_cpu(dtype: torch.dtype, rescale: bool) -> None:
    for environments, columns in [(4, 1000), (65, 33), (300, 5), (1, 1)]:
        grads = torch.randn(environments, columns, device="cpu").to(dtype)
        expected = ops.masked_mean(grads, 0.4, rescale)
        found = ops.masked_mean(grads.cuda(), 0.4, rescale)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("rule", MOMENT_RULES)
def test_moments_and_steps_have_the_bits_of_the_cpu(rule: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        made = [
            [grad.to(device) for grad in lists(SHAPES, torch.float32, device="cpu")]
            for _ in range(5)
        ]
        params = [grad.clone() for grad in made[0]]
        moments = am.Moments(params, ("votes", "squares", "logs"))
        for grads in made[1:]:
            moments.add(grads, 0.5)
        arguments = (
            *moments._lists(range(len(params))),
            4,
            rule,
            MOMENT_RULES[rule],
            False,
        )
        updates = ops._resolve(*arguments)
        state = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        steps = [torch.zeros((), device=device) for _ in params]
        ops._adam_step_(
            params, *state, [], steps, *arguments, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.1, decoupled_weight_decay=True, maximize=False,
        )  # fmt: skip
        results.append([tensor.cpu() for tensor in (*updates, *state[0], *state[1], *params)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
        # The corrections of the bias come from another pow; all else is the same to the bit.
    for expected, found in list(zip(*results, strict=True))[: 3 * len(SHAPES)]:
        assert torch.equal(found, expected)


def calls() -> dict[str, Callable[[], object]]:
    """Every op once, on tensors that exist already."""
    grads = torch.randn(70, 129)
    moments = am.Moments([torch.zeros(129), torch.zeros(3, 5)], ("votes", "squares", "logs"))
    some = [torch.randn(129), torch.randn(3, 5)]
    moments.add(some)
    arguments = (*moments._lists([0, 1]), 1, "and_mask", [0.5], True)
    params = [torch.randn(129), torch.randn(3, 5)]
    state = [[torch.zeros_like(param) for param in params] for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    adam = {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0,
        "decoupled_weight_decay": False, "maximize": False,
    }  # fmt: skip
    inputs, outputs = torch.randn(8, 4, 33), torch.randn(8, 4, 17)
    total, votes = torch.zeros(17, 33), torch.zeros(17, 33, dtype=torch.int8)
    images, errors = torch.randn(6, 3, 8, 8), torch.randn(6, 4, 8, 8)
    kernel, kernel_votes = torch.zeros(4, 3, 3, 3), torch.zeros(4, 3, 3, 3, dtype=torch.int8)
    noise = torch.rand(129)
    return {
        "masked_mean": lambda: ops.masked_mean(grads, 0.5, True),
        "agreement_mask": lambda: ops.agreement_mask(grads, 0.5, True),
        "geometric_mean": lambda: ops._aggregate(grads, "geometric_mean", [0.5], True),
        "median": lambda: ops._aggregate(grads, "median", []),
        "median of few": lambda: ops._aggregate(grads[:9], "median", []),
        "sign_dropout": lambda: ops._aggregate(grads, "sign_dropout", [], False, noise),
        "agreement_random": lambda: ops._aggregate(grads, "agreement_random", [], False, noise),
        "accumulate_": lambda: ops._accumulate_(*moments._lists([0, 1]), some, 0, [0.5]),
        "resolve": lambda: ops._resolve(*arguments),
        "squared_norm": lambda: ops._squared_norm(*arguments),
        "sgd_step_": lambda: ops._sgd_step_(
            params, state[0], *arguments, lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0,
            decoupled_weight_decay=False, nesterov=False, maximize=False, first_step=False,
        ),
        "adam_step_": lambda: ops._adam_step_(params, *state[:2], [], steps, *arguments, **adam),
        "adam_step_, clipped": lambda: ops._adam_step_(
            params, *state[:2], [], steps, *arguments, **adam,
            grad_scale=ops._squared_norm(*arguments).rsqrt(),
        ),
        "temporal_adam_step_": lambda: ops._temporal_adam_step_(
            params, *state, steps, some, tau=0.3, beta3=0.9, bias_correction=True, **adam
        ),
        "accumulate_outer_": lambda: ops._accumulate_outer_(
            total, votes, None, None, None, inputs, outputs, None, None, 0
        ),
        "accumulate_outer_, one row": lambda: ops._accumulate_outer_(
            total, votes, None, None, None, inputs[:, :1], outputs[:, :1], None, None, 0
        ),
        "accumulate_convolution_": lambda: ops._accumulate_convolution_(
            kernel, kernel_votes, None, None, None, images, errors, None, None, 0, *[[1, 1]] * 3, 1
        ),
    }  # fmt: skip


def test_no_op_waits_for_the_gpu() -> None:
    made = calls()
    for call in made.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in made.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_op_runs_on_the_current_stream() -> None:
    """Queued behind a long wait on a side stream, an op must see what was written before it."""
    side = torch.cuda.Stream()
    grads = torch.zeros(64, 1 << 16)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        grads.fill_(3.0)
        mean = ops.masked_mean(grads, 1.0)
    side.synchronize()
    assert torch.equal(mean, torch.full_like(mean, 3.0))


def test_a_step_can_be_captured_and_replayed() -> None:
    def step(params: list[Tensor], state: list[list[Tensor]], steps: list[Tensor],
             moments: am.Moments, grads: list[list[Tensor]]) -> None:  # fmt: skip
        indices = range(len(params))
        for count, some in enumerate(grads):
            ops._accumulate_(*moments._lists(indices), some, count)
        ops._adam_step_(
            params, *state, [], steps, *moments._lists(indices), len(grads), "and_mask", [0.5],
            True, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
            decoupled_weight_decay=True, maximize=False,
        )  # fmt: skip

    def start() -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], am.Moments]:
        torch.manual_seed(1)
        params = lists(SHAPES[:-1], torch.float32)
        moments = am.Moments(params)
        moments.add(params)
        state = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        return params, state, [torch.zeros(()) for _ in params], moments

    grads = [lists(SHAPES[:-1], torch.float32) for _ in range(3)]
    plain = start()
    for _ in range(4):
        step(*plain, grads)
    captured = start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured, grads)
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(plain[0], captured[0], strict=True):
        assert torch.equal(one, other)
    assert float(captured[2][0]) == 4


def test_every_op_can_be_captured() -> None:
    for name, call in calls().items():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
        assert name


def test_what_is_read_from_the_host_cannot_be_captured() -> None:
    inputs, outputs, total = torch.randn(6, 2, 3), torch.randn(6, 2, 4), torch.zeros(4, 3)
    offsets = torch.tensor([0, 1, 6], device="cpu")
    ops._accumulate_outer_(total, None, None, None, None, inputs, outputs, None, offsets, 0)
    with (
        pytest.raises(RuntimeError, match="a CUDA graph cannot capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops._accumulate_outer_(total, None, None, None, None, inputs, outputs, None, offsets, 0)


def test_tensors_on_another_device_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"expected sum\[0\] on cuda:0, .* got it on the CPU"):
        ops._accumulate_([torch.zeros(3, device="cpu")], *[[]] * 4, [torch.ones(3)], 0)
    with pytest.raises(RuntimeError, match="expected offsets on the CPU"):
        ops._accumulate_outer_(
            torch.zeros(4, 3), *[None] * 4, torch.randn(2, 2, 3), torch.randn(2, 2, 4), None,
            torch.tensor([0, 2]), 0,
        )  # fmt: skip


def test_one_optimizer_for_parameters_on_two_devices() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "cuda", "cpu")]
    optimizer = am.optim.AndMaskAdam(params, lr=0.1, tau=1.0)
    for sign in (1.0, 1.0):
        with optimizer.environment():
            sum((sign * param.cpu()).sum() for param in params).backward()
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param.detach().cpu(), torch.full((3,), 0.9, device="cpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_not_the_current_one() -> None:
    with torch.cuda.device(0):
        grads = torch.randn(70, 33, device="cuda:1")
        mean = ops.masked_mean(grads, 0.5, True)
    assert mean.device == grads.device
    assert torch.equal(mean.cpu(), ops.masked_mean(grads.cpu(), 0.5, True))
