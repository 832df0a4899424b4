import torch

from lcpt.evaluation.provenance import backend_of


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dx):
        return 2 * dx


def deep(twice, x):
    return (twice(x + 1) * x).sum() + x.sum()


def test_a_kernel_anywhere_in_the_graph_is_seen(monkeypatch):
    x = torch.ones(3, requires_grad=True)
    assert backend_of(deep(Twice.apply, x)) == "torch"
    monkeypatch.setattr(Twice, "__module__", "fla.ops.simple_gla.chunk")
    assert backend_of(deep(Twice.apply, x)) == "triton"
    assert backend_of(x.square()) == "torch"


def test_an_operator_is_seen():
    twice = torch.library.custom_op(
        "lcpt_kernels::twice", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor")
    twice.register_autograd(lambda ctx, dx: 2 * dx)
    assert backend_of(deep(twice, torch.ones(3, requires_grad=True))) == "triton"
