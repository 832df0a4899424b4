"""Count the bytes that PyTorch's operators move: the tensors of each, read or written once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTHING_MOVES = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::_unsafe_view"}


class Traffic(TorchDispatchMode):
    """Counts `bytes` and `operators` within its context, without views. A custom operator counts with its inputs and
    outputs. Meta tensors do: nothing is computed on them."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view and operator._schema.name not in NOTHING_MOVES:
            tensors = [x for x in chain(tree_leaves((args, kwargs)), tree_leaves(out)) if isinstance(x, Tensor)]
            self.bytes += sum(map(bytes_of, tensors))
            self.operators += 1
        return out


def bytes_of(x: Tensor) -> int:
    """Count the bytes of a tensor; an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def traffic(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> dict[str, dict[str, int]]:
    """Count mode -> {"bytes", "operators"} of function(*inputs), and with the gradients of inputs that require them."""
    wanted = [x for x in inputs if x.requires_grad]
    with Traffic() as forward:
        outputs = [x for x in function(*inputs) if x is not None]
    gradients = [torch.empty_like(x) for x in outputs]
    with Traffic() as backward:
        torch.autograd.grad(outputs, wanted, gradients)
    both = forward.bytes + backward.bytes, forward.operators + backward.operators
    return {
        mode: dict(zip(("bytes", "operators"), counts, strict=True))
        for mode, counts in {"forward": (forward.bytes, forward.operators), "forward_backward": both}.items()
    }
