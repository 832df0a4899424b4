"""What autograd saves lies on the host, two tensors at most on the device, and nothing is left behind."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lcpt.utils import host_offload
from lcpt.utils.host_offload import bytes_on_host, keep_on_host

LAYERS, SHAPE = 5, (3, 4)
BYTES = 4 * 3 * 4


@pytest.fixture(autouse=True)
def without_collector():
    """Tensors must be freed where the last reference goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def layers(device="cpu"):
    torch.manual_seed(0)
    return [torch.nn.Linear(4, 4).to(device) for _ in range(LAYERS)]


def run(weights, x, kept, called=lambda x: None, **shared):
    """Return the outputs of layers that are computed again in backward; `called` gets the input of each call."""

    def layer(linear, x, table=None):
        called(x)
        return linear(x).sin() * (1.0 if table is None else table)

    x = x * 1.0
    for linear in weights:
        with kept:
            x = checkpoint(layer, linear, x, use_reentrant=False, **shared)
        yield x


def gradients(weights, y, **options):
    return torch.autograd.grad(y.sum(), [p for linear in weights for p in linear.parameters()], **options)


def on_device():
    return sum(kept.on_device is not None for kept in host_offload._all)


def test_gradients_are_equal_though_the_device_forgets():
    """What was on the device is overwritten once it is let go."""
    weights, x, inputs = layers(), torch.randn(SHAPE, requires_grad=True), []
    *_, expected = run(weights, x, torch.enable_grad())
    *_, y = run(weights, x, keep_on_host(), inputs.append)
    for before in inputs[: LAYERS - 1]:
        before.data.fill_(torch.nan)
    for one, other in zip(gradients(weights, y), gradients(weights, expected), strict=True):
        assert torch.equal(one, other)


def test_at_most_two_are_on_the_device_and_none_is_left():
    weights, x, found = layers(), torch.randn(SHAPE, requires_grad=True), []
    outputs = run(weights, x, keep_on_host(), lambda x: found.append((bytes_on_host(), on_device())))
    *_, y = outputs
    assert on_device() == 1
    gradients(weights, y)
    assert [n_bytes for n_bytes, _ in found] == [BYTES * n for n in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)]
    assert max(count for _, count in found) == 1  # beside that which is in use
    assert bytes_on_host() == 0


def test_a_graph_that_is_dropped_leaves_nothing():
    *_, y = run(layers(), torch.randn(SHAPE, requires_grad=True), keep_on_host())
    assert bytes_on_host() == LAYERS * BYTES
    del y, _
    assert bytes_on_host() == 0


def test_backward_may_run_twice():
    weights = layers()
    *_, y = run(weights, torch.randn(SHAPE, requires_grad=True), keep_on_host())
    first = gradients(weights, y, retain_graph=True)
    assert bytes_on_host() == LAYERS * BYTES
    assert all(torch.equal(one, other) for one, other in zip(first, gradients(weights, y), strict=True))


def test_what_layers_share_is_not_copied():
    *_, _y = run(layers(), torch.randn(SHAPE, requires_grad=True), keep_on_host(), table=torch.ones(4))
    assert bytes_on_host() == LAYERS * BYTES


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        *_, _y = run(layers(), torch.randn(SHAPE), keep_on_host())
    assert bytes_on_host() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_while_copies_are_on_their_way():
    """Long products delay the computation, then large tensors the copies."""
    for size in (64, 4096):
        torch.manual_seed(0)
        weights = [torch.nn.Linear(size, size, device="cuda") for _ in range(8)]
        x = torch.randn(4 * size, size, device="cuda", requires_grad=True)
        *_, expected = run(weights, x, torch.enable_grad())
        expected = gradients(weights, expected)
        for _ in range(3):
            *_, y = run(weights, x, keep_on_host())
            assert all(kept.host.is_pinned() for kept in host_offload._all)
            for one, other in zip(gradients(weights, y), expected, strict=True):
                assert torch.equal(one, other)
