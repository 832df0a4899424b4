"""Count the bytes that a training step moves and the operators that it starts, without a GPU: on meta tensors, each
operator's tensors once, kernels as a GPU would run them.

    python benchmarks/step_traffic.py --config configs/gpt2-small-8k.yaml [section.key=value …]

One micro-batch forward and backward, in the config's precision. torch.compile would fuse more. A softmax layer counts
with all its scores, which PyTorch's flash attention on a GPU does not write.
"""

from __future__ import annotations

import argparse
import sys

import torch

from lcpt.benchmarking.traffic import Traffic
from lcpt.config import ConfigError, load_config
from lcpt.model import GPT
from lcpt.model.gpt import ModelConfig
from lcpt.model.loss import cross_entropy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="X.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, ["run.dir=none", *args.overrides])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    parts = step_traffic(config.model, config.training.micro_batch, config.data.context, dtype)
    print(f"{config.training.micro_batch} x {config.data.context:,} tokens, {config.training.precision}")
    for name, (n_bytes, operators) in parts.items():
        print(f"{name:8s} {n_bytes / 1e9:8.2f} GB  {operators:6,d} operators")
    return 0


def step_traffic(model: ModelConfig, sequences: int, context: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Count (bytes, operators) of the blocks, with embedding and last norm, and of the loss."""
    with torch.device("meta"):
        gpt = GPT(model).to(dtype)
        tokens = torch.zeros(sequences, context, dtype=torch.int32)
        with Traffic() as blocks:
            hidden = gpt.hidden(tokens)
            hidden.backward(torch.empty_like(hidden))
        gpt.zero_grad()
        hidden = torch.empty_like(hidden, requires_grad=True)
        with Traffic() as loss:
            nats, _ = cross_entropy(hidden, gpt.head_weight, tokens, model.z_loss)
            nats.backward()
    return {name: (part.bytes, part.operators) for name, part in {"blocks": blocks, "loss": loss}.items()}


if __name__ == "__main__":
    sys.exit(main())
