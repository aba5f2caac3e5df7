"""Peak memory of a contestant, in a process of its own."""

from __future__ import annotations

import ctypes
import signal
import warnings
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from ..measuring import limited_memory, peak_memory, seconds_of, status
from .models import setting
from .peers import GRADIENTS, LIBRARIES, STEPS, plain

SLOW = 3.0  # seconds of a step that is not made twice
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt


def peak_of(contestant: str, model: str, examples: int, environments: int) -> tuple[float, float]:
    """Return the peak of two steps in MiB over the process with model and batch, and in all.

    The process is forked from one that has imported what is needed and done nothing else, so that
    all contestants start alike.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer, args=(there, contestant, model, examples, environments), daemon=True
    )
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    over, whole = answer
    return over / 2**20, whole / 2**20


def _answer(
    there: Connection, contestant: str, model: str, examples: int, environments: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this process
    warnings.simplefilter("ignore")  # told already when the contestant was tried
    try:
        with limited_memory():
            answer: object = _measure(contestant, model, examples, environments)
    except Exception as error:  # a library may raise anything
        answer = f"{type(error).__name__}: {error}"
    there.send(answer)


def _measure(contestant: str, model: str, examples: int, environments: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    allocator = ctypes.CDLL(None)
    for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        allocator.mallopt(threshold, 1 << 16)  # what is freed goes back: what counts is in use
    if contestant in LIBRARIES:
        import_module(LIBRARIES[contestant][0])
    make = (GRADIENTS | STEPS)[contestant]
    network, batch = setting(model, examples)
    few = max(1, examples // environments)
    plain(network, (batch[0][:few], batch[1][:few]), 1)()  # warm up
    make(*setting("MLP 16", 8), 8)()  # libraries load parts when first used
    for param in network.parameters():
        param.grad = None
    calls = 0

    def second() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # peak_memory's own first call: nothing is kept yet
            return
        step = make(network, batch, environments)
        if seconds_of(step) < SLOW:
            step()

    return peak_memory(second), status("VmHWM")
