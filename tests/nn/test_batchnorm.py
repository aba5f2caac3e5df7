"""Batch norm by environment in one forward pass against one forward pass per environment."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext
from andmask_ext.agreement._current import activate
from andmask_ext.nn import (
    EnvironmentBatchNorm1d,
    EnvironmentBatchNorm2d,
    EnvironmentBatchNorm3d,
    _normalize,
    convert_batchnorm,
)

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CLASSES = (EnvironmentBatchNorm1d, EnvironmentBatchNorm2d, EnvironmentBatchNorm3d)


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor, object, Tensor]:
    """A layer, a batch, the argument ``environments`` and the environment of each example."""
    dim = draw(st.integers(2, 5))
    spatial = [draw(st.integers(1, 3)) for _ in range(dim - 2)]
    least = 2 if torch.Size(spatial).numel() == 1 else 1
    torch.manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        count, size = draw(st.integers(1, 5)), draw(st.integers(least, 4))
        ids = torch.arange(count).repeat_interleave(size)
        argument: object = None if size == 1 and draw(st.booleans()) else count
    else:
        sizes = draw(st.lists(st.integers(least, 4), min_size=1, max_size=5))
        ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        if draw(st.booleans()):
            ids = ids[torch.randperm(len(ids))]
        argument = ids
    channels = draw(st.integers(1, 4))
    layer = LAYERS[dim](
        channels,
        eps=draw(st.sampled_from([1e-5, 0.5])),
        momentum=draw(st.sampled_from([0.1, 0.5, 1.0, 0.0, None])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
        dtype=torch.float64,
    )
    for param in layer.parameters():
        nn.init.normal_(param)
    layer.train(draw(st.integers(0, 3)) > 0)
    x = torch.randn(len(ids), channels, *spatial, dtype=torch.float64) * 3 + 1
    form = draw(st.sampled_from(["contiguous", "channels last", "strided"]))
    if form == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif form == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    return layer, x, argument, ids


def grads_of(layer: nn.Module, x: Tensor, output: Tensor, factor: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((output * factor).sum(), [x, *layer.parameters()]))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def check_against_loop(case: tuple[nn.Module, Tensor, object, Tensor]) -> None:
    layer, x, argument, ids = case
    ours = convert_batchnorm(copy.deepcopy(layer))
    x.requires_grad_()
    factor = torch.randn_like(x)
    for _ in range(2):  # the running statistics of the first pass matter in the second
        with activate(argument):
            output = ours(x)
            found = grads_of(ours, x, output, factor)
        expected = torch.zeros_like(x)
        total = [torch.zeros_like(t) for t in (x, *layer.parameters())]
        for environment in range(int(ids.max()) + 1):
            rows = ids == environment
            one = x[rows]
            result = layer(one)
            expected[rows] = result.detach()
            for sum_, grad in zip(total, grads_of(layer, x, result, factor[rows]), strict=True):
                sum_ += grad
        assert_close(output, expected, 1e-11)
        assert output.stride() == torch.empty_like(x).stride() or not layer.training
        for mine, theirs in zip(found, total, strict=True):
            assert_close(mine, theirs, 1e-10)
        for name, buffer in layer.named_buffers():
            assert_close(ours.get_buffer(name), buffer)


@given(cases())
def test_equals_one_forward_pass_per_environment(case: tuple) -> None:
    check_against_loop(case)


@given(cases())
def test_large_environments_are_normalised_where_they_lie(case: tuple) -> None:
    before = _normalize._BLOCK
    _normalize._BLOCK = 1
    try:
        check_against_loop(case)
    finally:
        _normalize._BLOCK = before


@given(cases())
def test_is_batchnorm_outside_of_the_context(case: tuple) -> None:
    layer, x, _, _ = case
    if layer.training and x.shape[2:].numel() * len(x) == 1:
        return
    ours = convert_batchnorm(copy.deepcopy(layer))
    assert torch.equal(ours(x), layer(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("environments", [None, 2, torch.tensor([0, 1, 1, 0, 1, 2])])
def test_derivatives_of_both_orders(environments: object) -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(2, dtype=torch.float64))
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with activate(environments):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    arguments = (x, *(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_narrow_dtypes_have_wide_statistics(
    dtype: torch.dtype, parameters: torch.dtype | None
) -> None:
    ours = convert_batchnorm(nn.BatchNorm2d(3)).to(parameters or dtype)
    exact = nn.BatchNorm2d(3).double()
    x = (torch.randn(8, 3, 4, 4) * 2 + 30).to(dtype)  # torch's own is far off in 16 bits here
    with activate(4):
        output = ours(x)
    expected = torch.cat([exact(part.double()) for part in x.split(2)])
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))
    for name in ("running_mean", "running_var"):
        found = ours.get_buffer(name)
        torch.testing.assert_close(found, exact.get_buffer(name).to(found.dtype))


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    ours = convert_batchnorm(copy.deepcopy(model))
    x = torch.randn(6, 3, 5, 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        with activate(3):
            output = ours(x)
        expected = torch.cat([model(part) for part in x.split(2)])
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)


def test_the_graph_shows_weight_and_bias_by_themselves() -> None:
    layer = convert_batchnorm(nn.BatchNorm2d(3))
    for training in (True, False):
        layer.train(training)
        with activate(2):
            node = layer(torch.randn(4, 3, 2, 2)).grad_fn
        assert node is not None
        assert node.name() == "AddBackward0"
        assert node.next_functions[1][0].next_functions[0][0].variable is layer.bias
        product = node.next_functions[0][0]
        assert product.name() == "MulBackward0"
        assert product.next_functions[1][0].next_functions[0][0].variable is layer.weight


@pytest.mark.parametrize("environments", [None, 3, torch.tensor([0, 1, 1, 0, 1, 2])])
@pytest.mark.parametrize("training", [True, False])
def test_in_an_agreement(environments: object, training: bool) -> None:
    model = convert_batchnorm(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),  # with a bias its gradient were noise
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 3, bias=False),
            nn.BatchNorm2d(2, affine=False),
            nn.Flatten(),
            nn.Linear(18, 5),
        ).double()
    ).train(training)
    batch = torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.randint(0, 5, (6,))
    agreement = andmask_ext.Agreement(model, andmask_ext.AndMask(tau=0.6))
    found = agreement.verify(
        batch, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        environments,
    )  # fmt: skip
    assert found.passed, str(found)


def test_a_relu_in_place_may_follow() -> None:
    for affine in (True, False):
        layer = convert_batchnorm(nn.BatchNorm2d(3, affine=affine))
        x = torch.randn(4, 3, 2, 2, requires_grad=True)
        with activate(2):
            torch.relu_(layer(x)).sum().backward()
        assert x.grad is not None


def test_a_frozen_layer_needs_no_gradient() -> None:
    layer = nn.BatchNorm2d(3).eval().requires_grad_(False)
    layer.running_var.fill_(2.0)
    ours = convert_batchnorm(copy.deepcopy(layer))
    x = torch.randn(4, 3, 2, 2)
    with activate(None):
        assert torch.equal(ours(x), layer(x))


@pytest.mark.parametrize("environments", [None, torch.tensor([0, 1, 0, 2])])
def test_an_environment_with_one_value_raises(environments: Tensor | None) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        nn.BatchNorm1d(3)(x[:1])
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with activate(environments), pytest.raises(ValueError, match="environment") as ours:
        layer(x)
    number = 0 if environments is None else 1
    message = str(ours.value)
    assert message.startswith(f"environment {number}: {theirs.value}; ")
    assert "torch.nn.GroupNorm" in message
    assert layer.num_batches_tracked == 0
    layer.eval()
    with activate(environments):
        layer(x)


def test_other_errors_are_those_of_batchnorm() -> None:
    layer = convert_batchnorm(nn.BatchNorm2d(3))
    with activate(2):
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(4, 3))
        with pytest.raises(ValueError, match="divides the batch of 5 examples"):
            layer(torch.randn(5, 3, 2, 2))
        with pytest.raises(RuntimeError, match="3 channels, but got 4"):
            layer(torch.randn(4, 4, 2, 2))
        layer.eps = 0.0
        with pytest.raises(ValueError, match="eps must be positive"):
            layer(torch.randn(4, 3, 2, 2))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 3, 1),
        nn.BatchNorm1d(3, momentum=None),
        nn.Sequential(nn.Unflatten(2, (2, 2)), nn.BatchNorm2d(3, affine=False)),
        nn.Unflatten(3, (2, 1)),
        nn.BatchNorm3d(3, track_running_stats=False).eval(),
    )


def test_conversion_keeps_everything_else() -> None:
    model = network()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    layers, params, state = list(model.modules()), list(model.parameters()), model.state_dict()
    assert convert_batchnorm(model) is model
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert [type(m) for m in (model[1], model[2][1], model[4])] == list(CLASSES)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert not model[4].training
    assert model[1].momentum is None
    assert list(model.state_dict()) == list(state)
    convert_batchnorm(model)  # once more: nothing happens
    assert [type(m) for m in (model[1], model[2][1], model[4])] == list(CLASSES)
    network().load_state_dict(model.state_dict())
    model.load_state_dict(network().state_dict())
    with activate(2):
        model(torch.randn(4, 2, 4))
    assert calls == [1]
    assert model[1].num_batches_tracked == model[2][1].num_batches_tracked == 2


def test_converts_a_batchnorm_by_itself() -> None:
    assert type(convert_batchnorm(nn.BatchNorm2d(3))) is EnvironmentBatchNorm2d


def test_copies_and_pickles() -> None:
    model = convert_batchnorm(network())
    x = torch.randn(4, 2, 4)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with activate(2):
        expected = model(x)
        for twin in twins:
            assert torch.equal(twin(x), expected)
            for name, buffer in model.named_buffers():
                assert torch.equal(twin.get_buffer(name), buffer)


def test_a_layer_may_be_made_by_itself() -> None:
    layer = andmask_ext.nn.EnvironmentBatchNorm2d(3, momentum=0.5)
    layer.register_parameter("bias", None)
    with activate(2):
        layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert layer.bias is None
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.SyncBatchNorm(3), "got SyncBatchNorm, whose statistics are those of all processes"),
        (nn.LazyBatchNorm2d(), "got LazyBatchNorm2d, which does not know its channels yet"),
    ],
)
def test_refusals(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"layer '1\.0': expected BatchNorm1d") as error:
        convert_batchnorm(model)
    assert message in str(error.value)
    assert type(model[0]) is nn.BatchNorm2d  # all or nothing
    with pytest.raises(TypeError, match=r"^model: expected"):
        convert_batchnorm(layer)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_layer_compiles() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    x = torch.randn(4, 3, 5, 5)
    for environments in (2, 4, None):
        with activate(environments):
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got int"):
        convert_batchnorm(3)
