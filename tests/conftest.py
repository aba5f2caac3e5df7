"""Shared by all tests. Kept free of torch, so that the kernel tests can run under a sanitizer.

Tests run on the CPU, and on a GPU where there is one: tensors are made there by default. With
``ANDMASK_TEST_KERNELS=cuda-on-host`` the ops on the CPU are those of CUDA, whose kernels then run
thread by thread on the host.
"""

import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Processes of pytest-xdist share the cores; torch reads this when it is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,  # a timing is never a pass criterion
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=10)
settings.register_profile(
    "long", settings.get_profile("default"), max_examples=5000, derandomize=False
)
settings.load_profile(os.environ.get("ANDMASK_HYPOTHESIS_PROFILE", "default"))

TESTS = Path(__file__).parent
MARKERS_OF_FOLDERS = {
    "benchmarks": ["no_device", "study"],
    "native": ["no_device"],  # kernels on numpy arrays: no torch, no device
    "plots": ["no_device"],
    "repo": ["no_device"],
    "studies": ["no_device", "study"],
    "zoo": ["no_device"],
}
KERNELS = os.environ.get("ANDMASK_TEST_KERNELS", "own")


def pytest_configure(config: pytest.Config) -> None:
    if KERNELS not in ("own", "cuda-on-host"):
        raise pytest.UsageError(
            f"ANDMASK_TEST_KERNELS: expected own or cuda-on-host, but got {KERNELS}"
        )
    if KERNELS == "cuda-on-host":
        import torch

        import andmask_ext

        with warnings.catch_warnings():  # of kernels that take the place of others
            warnings.simplefilter("ignore")
            torch.ops.load_library(Path(andmask_ext.__file__).with_name("_cuda_on_host.so"))


def pytest_report_header() -> str:
    return f"devices: {', '.join(devices())}; kernels: {KERNELS}"


def devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def cuda_kernels() -> bool:
    """Return whether the ops of this test run the kernels of CUDA, on a GPU or on the host."""
    import torch

    return KERNELS == "cuda-on-host" or torch.get_default_device().type == "cuda"


def markers_of_folder(item: pytest.Item) -> list[str]:
    if TESTS not in item.path.parents:
        return []
    return MARKERS_OF_FOLDERS.get(item.path.relative_to(TESTS).parts[0], [])


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in markers_of_folder(item):
            item.add_marker(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    test = metafunc.definition
    if "no_device" in markers_of_folder(test) or test.get_closest_marker("no_device"):
        return
    if "device" not in metafunc.fixturenames:
        if devices() == ["cpu"]:
            return
        metafunc.fixturenames.append("device")
    if not any(mark.args[0] == "device" for mark in test.iter_markers("parametrize")):
        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def _reset_torch(request: pytest.FixtureRequest):
    """Every test starts from the same random state and leaves torch's settings as they were."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    callspec = getattr(request.node, "callspec", None)
    device = callspec.params.get("device", "cpu") if callspec else "cpu"
    torch.set_default_device(None if device == "cpu" else device)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_device(None)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The mixing checks of Agreement that have run."""
    from andmask_ext.agreement._mixing import MixingCheck

    found: list[object] = []
    original = MixingCheck.find

    def find(self: MixingCheck, *args: object) -> None:
        found.append(self)
        original(self, *args)

    monkeypatch.setattr(MixingCheck, "find", find)
    return found
