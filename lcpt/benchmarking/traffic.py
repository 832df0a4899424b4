"""Count the bytes that PyTorch's operators move: the tensors of each, read or written once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTHING_MOVES = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::_unsafe_view"}


class Traffic(TorchDispatchMode):
    """Counts `bytes` and `operators` within its context, without views. A custom operator counts with its inputs and
    outputs; what an operator changes in place is read and written. Meta tensors do: nothing is computed on them."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view and operator._schema.name not in NOTHING_MOVES:
            self.bytes += sum(map(bytes_of, read_and_written(operator._schema, args, kwargs or {}, out)))
            self.operators += 1
        return out


def read_and_written(schema: torch.FunctionSchema, args: tuple, kwargs: dict, out) -> list[Tensor]:
    """List the tensors that a call reads and those that it writes. One that it changes in place stands here twice."""
    moved = []
    for place, argument in enumerate(schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        moved += tree_leaves(given) * (2 if changed and not argument.is_out else 1)
    results = out if isinstance(out, tuple) and len(schema.returns) > 1 else (out,)
    for returned, result in zip(schema.returns, results, strict=False):
        if returned.alias_info is None:  # else it is an argument
            moved += tree_leaves(result)
    return [x for x in moved if isinstance(x, Tensor)]


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
