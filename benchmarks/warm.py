"""Compile the kernels of stages of gpu.sh into Triton's cache, on every core and without touching the GPU.

    python benchmarks/warm.py --target sm_90 correct attention

Every process runs the same calls at small sizes on the CPU and compiles its share of the kernels. Exit code 1 where one
does not compile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from lcpt.attention import AttentionConfig
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.attention_methods import methods, random_projections
from lcpt.benchmarking.fused_steps import steps
from lcpt.benchmarking.kernel_cases import cases, inputs, options
from lcpt.benchmarking.kernel_check import results

ROOT = Path(__file__).parents[1]
TOKENS = 2 * 256 + 77  # two blocks and a part: no kernel is compiled for a number of tokens
LAYER = Layer(batch=1, heads=12, head_dim=64, dtype=torch.bfloat16, device=torch.device("cpu"))
KINDS = ("polysketch", "kernel", "flurka", "feedforward", "fastmax", "lowrank")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=WORK, metavar="STAGE", help=", ".join(WORK))
    parser.add_argument("--target", default="sm_90", metavar="sm_N", help="(sm_90)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: with TRITON_INTERPRET=1 nothing is compiled", file=sys.stderr)
        return 2
    began, errors, count = time.monotonic(), {}, 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        parts = [pool.submit(warm, args.stages, args.target, part, args.processes) for part in range(args.processes)]
        for part in parts:
            count, of_part = part.result()
            errors |= of_part
    print(f"{count} kernels for {args.target}, {time.monotonic() - began:.0f} s")
    for kernel, reason in errors.items():
        print(f"error: {kernel}: {reason}", file=sys.stderr)
    return 1 if errors else 0


def warm(stages: list[str], target: str, part: int, parts: int) -> tuple[int, dict[str, str]]:
    """Count the kernels that the stages start, and say why some of this part's share did not compile."""
    from lcpt.benchmarking.compile_only import (
        compile_only,  # in a process of its own: Triton only compiles from here on
    )

    torch.set_num_threads(1)
    seen = compile_only(target, part, parts)
    for work in dict.fromkeys(WORK[stage] for stage in stages):
        try:
            work()
        except ModuleNotFoundError:  # the stage cannot run
            pass
        except Exception as error:  # the stage itself will report it
            seen.errors[work.__name__] = f"{type(error).__name__}: {error}"
    return len(seen.kernels), seen.errors


def run_cases() -> None:
    for case in cases():
        short = replace(case, batch=1)
        short = short if case.lengths or case.pieces else replace(short, tokens=TOKENS)
        given, do = inputs(short, LAYER.device), torch.zeros(short.batch, short.tokens, short.heads, short.head_dim)
        results(short, given, do.to(given["v"].dtype), options(short, LAYER.device), "triton")


def run_headline() -> None:
    run_methods("polysketch", "squared")


def run_kinds() -> None:
    run_methods(*KINDS)


def run_sparse() -> None:
    run_methods("sparse_hash", "sparse_qk")


def run_methods(*names: str) -> None:
    from lcpt.benchmarking.compile_only import forward_backward

    p = random_projections(LAYER, TOKENS)
    for method in methods(list(names), AttentionConfig(), LAYER)[0].values():
        forward_backward(method.attend, method.inputs(p), method.weights)


def run_training() -> None:
    """Run steps of GPT-2 small, with each kind of layer once."""
    from lcpt.benchmarking.training_step import training_step
    from lcpt.config import load_config

    for name in ("gpt2-small-8k", "gpt2-small-32k"):
        model = load_config(ROOT / f"configs/{name}.yaml").model
        model = replace(model, n_layers=len(model.attention.pattern) or 1, vocab_size=512)
        training_step(model, 1, TOKENS, "bf16", LAYER.device)()


def run_fused() -> None:
    from lcpt.benchmarking.compile_only import forward_backward

    for step in steps(LAYER, TOKENS).values():
        forward_backward(lambda *x, step=step: step.function(*x, backend="triton"), step.inputs)


WORK = {
    "attention": run_headline,
    "correct": run_cases,
    "training": run_training,
    "families": run_kinds,
    "sparse": run_sparse,
    "fused": run_fused,
}


if __name__ == "__main__":
    sys.exit(main())
