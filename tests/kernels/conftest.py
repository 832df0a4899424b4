"""How a backend is held against the definition."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """The interpreter's tests take longest, so they begin first (`--no-loadscope-reorder` keeps that order)."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; where the expected is all zero, 0 or infinity."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def results(function, inputs, do, options) -> dict[str, torch.Tensor]:
    """The output, called o, and the gradient of every input; strides of the inputs are kept."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o = function(**leaves, **options)
    o = o[0] if isinstance(o, tuple) else o
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.fixture
def agree():
    """agree(function, inputs, tolerance, do=None, **options): backend "torch" against the float64 definition."""

    def check(function, inputs, tolerance, do=None, **options):
        v, queries = inputs["v"], next(inputs[name] for name in ("q", "a", "phi_q") if name in inputs)
        if do is None:
            do = torch.randn(*queries.shape[:3], v.shape[3], dtype=torch.float64).to(v.dtype)
        found = results(function, inputs, do, options | {"backend": "torch"})
        exact = {name: x.double() for name, x in inputs.items()}
        expected = results(function, exact, do.double(), options | {"backend": "reference"})
        for name, x in inputs.items():
            assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert found["o"].dtype == queries.dtype
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error < tolerance for error in errors.values()), errors  # also false for NaN

    return check


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote holds NaN."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
