"""Contexts in several threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import andmask_ext as am
from andmask_ext.agreement import _mode

from ..models import curved
from .exact_loop import RULE
from .layers import rand


def switches() -> tuple[bool, bool]:
    return torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()


@pytest.fixture(params=[(True, True), (False, True), (True, False)], ids=str)
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """How the switches of the process stood before."""
    kept = switches()
    torch._C._set_mkldnn_enabled(request.param[0])
    torch._C._set_cudnn_enabled(request.param[1])
    yield request.param
    torch._C._set_mkldnn_enabled(kept[0])
    torch._C._set_cudnn_enabled(kept[1])


def run(*bodies: Callable[[], None]) -> None:
    """Run each in a thread, and raise what they raise."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_the_last_thread_restores_the_switches(before: tuple[bool, bool]) -> None:
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen: list[tuple[bool, bool]] = []

    def first() -> None:
        with _mode._WITHOUT_FUSED_KERNELS:
            first_is_in.set()
            assert second_is_in.wait(60)
            seen.append(switches())
        first_is_out.set()

    def second() -> None:
        assert first_is_in.wait(60)
        with _mode._WITHOUT_FUSED_KERNELS:
            second_is_in.set()
            assert first_is_out.wait(60)
            seen.append(switches())

    run(first, second)
    assert seen == [(False, False)] * 2
    assert switches() == before


def test_an_error_restores_the_switches(before: tuple[bool, bool]) -> None:
    with (
        pytest.raises(RuntimeError, match="expects two hidden states"),
        am.Agreement(nn.LSTM(4, 3), RULE)(),
    ):
        torch.lstm(rand(2), (), [], True, 1, 0.0, True, False, False)
    assert switches() == before


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda layer: layer.__name__)
def test_recurrent_layers_in_several_threads(layer: Callable[..., nn.Module]) -> None:
    before = switches()
    models = [layer(4, 3, batch_first=True).double() for _ in range(3)]
    batches = [rand(4, 3, 4) for _ in models]
    expected = []
    for model, x in zip(models, batches, strict=True):
        with am.Agreement(model, RULE)():
            curved(model, x).backward()
        expected.append([param.grad for param in model.parameters()])
        model.zero_grad()

    def train(model: nn.Module, x: torch.Tensor) -> None:
        agreement = am.Agreement(model, RULE)
        for _ in range(5):
            model.zero_grad()
            with agreement():
                curved(model, x).backward()

    run(*[lambda m=model, x=x: train(m, x) for model, x in zip(models, batches, strict=True)])
    for model, grads in zip(models, expected, strict=True):
        for param, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(param.grad, grad)
    assert switches() == before
