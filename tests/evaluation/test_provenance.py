import torch

from lcpt.evaluation.provenance import backend_of


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dx):
        return 2 * dx


def test_a_kernel_anywhere_in_the_graph_is_seen(monkeypatch):
    x = torch.ones(3, requires_grad=True)
    deep = (Twice.apply(x + 1) * x).sum() + x.sum()
    assert backend_of(deep) == "torch"
    for module in ("lcpt_kernels.triton.squared", "fla.ops.simple_gla.chunk"):
        monkeypatch.setattr(Twice, "__module__", module)
        assert backend_of(deep) == "triton"
        assert backend_of(x.square()) == "torch"
