"""Compare the kernels with the float64 definition, output and every gradient; and repeats with each other, bitwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lcpt_kernels import feature_attention, flurka_attention, lowrank_attention, sparse_attention, squared_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lcpt.attention.softmax import document_mask, softmax_in_documents
from lcpt.benchmarking.kernel_cases import Case, inputs, options

LIMITS = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}  # docs/contract.md


def packed_softmax(q, k, v, *, window: int | None, backend: str, cu_seqlens: Tensor | None = None) -> Tensor:
    """Call what the kind softmax calls in training; as the reference, it is one softmax under a mask."""
    cu_seqlens = torch.tensor([0, q.shape[1]], device=q.device) if cu_seqlens is None else cu_seqlens
    if backend == "triton":
        return softmax_in_documents(q, k, v, cu_seqlens, window)
    mask = document_mask(cu_seqlens, q.shape[1], window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "squared": squared_attention,
    "feature": feature_attention,
    "flurka": flurka_attention,
    "sparse": sparse_attention,
    "lowrank": lowrank_attention,
    "softmax": packed_softmax,
}
OF_QUERY_HEADS = {"o", "a", "q", "phi_q", "q_far", "q_keep", "k_keep", "q_bucket", "k_bucket"}
QUADRATIC = 8192  # tokens up to which the definition itself is affordable, a head at a time


def check(case: Case, device: torch.device, repeats: int, backend: str = "triton") -> dict:
    """Check a case; every second of the repeats runs while another stream is busy.

    Returns {"case", "settings", "reference", "errors" {name: ‖found − exact‖ / ‖exact‖}, "limit", "differing_repeats",
    "seconds", "passed"}.
    """
    began = time.monotonic()
    if case.attention == "softmax":
        repeats = 0  # PyTorch's own backward pass adds up in any order
    given, how = inputs(case, device), options(case, device)
    do = torch.randn(case.batch, case.tokens, case.heads, case.head_dim, device=device).to(given["v"].dtype)
    with nan_filled_memory():
        found = results(case, given, do, how, backend)
    differing, first = 0, results(case, given, do, how, backend) if repeats else {}
    for repeat in range(repeats):
        if repeat % 2:
            occupy(device)
        again = results(case, given, do, how, backend)
        differing += any(not torch.equal(again[name], x) for name, x in first.items())
    reference = "reference" if case.tokens <= QUADRATIC else "torch"
    exact = definition(case, given, do, how, reference)
    errors = {name: relative_error(found[name], exact[name]) for name in exact}
    limit = LIMITS[case.dtype]
    return {
        "case": case.name,
        "settings": asdict(case),
        "reference": reference,
        "errors": errors,
        "limit": limit,
        "differing_repeats": differing,
        "seconds": time.monotonic() - began,
        "passed": not differing and all(error < limit for error in errors.values()),  # false for NaN
    }


def results(case: Case, given: dict[str, Tensor], do: Tensor, how: dict, backend: str) -> dict[str, Tensor]:
    """Compute the output, called o, and the gradient of every input; piece by piece where the case has pieces."""
    attention = FUNCTIONS[case.attention]
    if not case.pieces:
        o = attention(**given, **how, backend=backend)
        o = o[0] if isinstance(o, tuple) else o
    else:
        outputs, state, cuts = [], None, [0, *case.pieces, case.tokens]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            piece = {name: x[:, start:stop] for name, x in given.items()}
            last = stop == case.tokens
            o, state = attention(**piece, **how, initial_state=state, output_final_state=not last, backend=backend)
            outputs.append(o)
        o = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad(o, list(given.values()), do)
    return {"o": o.detach()} | dict(zip(given, gradients, strict=True))


def definition(case: Case, given: dict[str, Tensor], do: Tensor, how: dict, backend: str) -> dict[str, Tensor]:
    """Compute the results in float64 on the whole sequence, from the rounded inputs, one key head at a time."""
    whole, group = replace(case, pieces=()), case.heads // case.key_heads
    exact = {name: torch.empty(x.shape, dtype=torch.float64, device=x.device) for name, x in given.items()}
    exact["o"] = torch.empty(do.shape, dtype=torch.float64, device=do.device)
    for n in range(case.batch):
        for head in range(case.key_heads):

            def part(name: str, x: Tensor, n: int = n, head: int = head) -> Tensor:
                per_head = group if name in OF_QUERY_HEADS else 1
                return x[n : n + 1, :, head * per_head : (head + 1) * per_head]

            of_head = {name: part(name, x).detach().double().requires_grad_() for name, x in given.items()}
            how_of_head = {name: part(name, x) if name in OF_QUERY_HEADS else x for name, x in how.items()}
            for name, x in results(whole, of_head, part("o", do).double(), how_of_head, backend).items():
                part(name, exact[name]).copy_(x)
    return exact


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Compute ‖found − exact‖ / ‖exact‖ in float64; where exact is all zero, 0 or infinity."""
    difference = (found.double() - exact).norm()
    return float(difference / exact.norm()) if difference else 0.0


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that a result that reads it unwritten is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # only then PyTorch fills it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def occupy(device: torch.device) -> None:
    """Run some milliseconds of products on a stream beside the current one."""
    if device.type != "cuda":
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        x = torch.zeros(4096, 4096, dtype=torch.bfloat16, device=device)
        for _ in range(20):
            x = x @ x
