"""Measure the memory of ranks that share one long sequence: the peak bytes of live tensors, forward and backward.

    python benchmarks/sequence_memory.py --output benchmarks/results/sequence-memory-cpu.json
    python benchmarks/sequence_memory.py --layers hybrid --slices 1x8192 2x8192 4x8192 --output OUT.json

Ranks are forked, on the CPU. A slice is RANKSxTOKENS: so many ranks, each with so many tokens of one sequence. The
peak is that of the rank with most, without what the host of a GPU would keep, which is counted apart. Gradients of
weights are in it, weights are not: both stay the same however long a sequence is.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import warnings
from pathlib import Path

import torch
import torch.multiprocessing as processes

from lcpt.attention import AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.benchmarking.live_bytes import LiveBytes
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import activation_elements, elements_on_host, model_cost
from lcpt.parallel import groups
from lcpt.parallel.sequence import join_sequence_group
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig
from lcpt.training.fitting import memory_on_gpu
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

LAYERS = {"linear": ["polysketch"], "hybrid": ["polysketch", "polysketch", "polysketch", "softmax"]}
SLICES = [(1, 8192), (2, 8192), (4, 8192), (4, 16_384), (4, 65_536)]
POLICIES: tuple[bool | str, ...] = (True, "offload")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", choices=LAYERS, default="linear", help="(linear)")
    parser.add_argument("--slices", nargs="+", type=ranks_and_tokens, default=SLICES, metavar="RANKSxTOKENS")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    print(
        f"{'ranks':>5}{'tokens a rank':>15}{'context':>10}{'policy':>10}{'peak MB':>10}{'estimated':>11}{'host MB':>10}"
    )
    rows = []
    for ranks, tokens in args.slices:
        for policy in POLICIES:
            row = measure(args.layers, policy, ranks, tokens)
            rows.append(row)
            print(
                f"{ranks:5}{tokens:15,}{row['context']:10,}{str(policy).lower():>10}{row['peak_bytes'] / 1e6:10.1f}"
                f"{row['estimated_bytes'] / 1e6:11.1f}{row['host_bytes'] / 1e6:10.1f}",
                flush=True,
            )
            report = report_header(torch.device("cpu")) | {"rows": rows}
            replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    return 0


def ranks_and_tokens(text: str) -> tuple[int, int]:
    ranks, tokens = map(int, text.split("x"))
    if ranks < 1 or tokens < 1:
        raise ValueError
    return ranks, tokens


def config_of(layers: str, policy: bool | str) -> ModelConfig:
    attention = AttentionConfig(pattern=LAYERS[layers], block_size=256, polysketch=PolysketchConfig(size=16))
    return ModelConfig(
        n_layers=4, d_model=128, n_heads=2, vocab_size=1024, activation_checkpointing=policy, attention=attention
    )


def measure(layers: str, policy: bool | str, ranks: int, tokens: int) -> dict:
    """Measure one row: the peak of each rank, and what the dry run estimates for one."""
    config = config_of(layers, policy)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    peaks: list[tuple[int, int]] = [(0, 0)] * ranks
    found = processes.get_context("fork").SimpleQueue()
    processes.start_processes(one_rank, (config, ranks, tokens, port, found), ranks, start_method="fork")
    for _ in range(ranks):
        rank, *peaks_of_rank = found.get()
        peaks[rank] = tuple(peaks_of_rank)
    return {
        "layers": layers,
        "activation_checkpointing": policy,
        "ranks": ranks,
        "tokens_per_rank": tokens,
        "context": ranks * tokens,
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "peak_bytes": max(peak for peak, _ in peaks),
        "peak_bytes_of_ranks": [peak for peak, _ in peaks],
        "host_bytes": max(host for _, host in peaks),
        "estimated_bytes": round(estimate(config, ranks, tokens)),
        "estimated_host_bytes": 4 * elements_on_host(config) * tokens,
    }


def estimate(model: ModelConfig, ranks: int, tokens: int) -> float:
    """Estimate as lcpt plan does."""
    config = Config(
        model=model,
        data=DataConfig(path="-", context=ranks * tokens, mask_documents=False),
        training=TrainingConfig(global_batch_tokens=ranks * tokens),
        parallel=ParallelConfig(zero_stage=0, sequence=ranks),
    )
    parts = memory_on_gpu(config, ranks, model_cost(model, ranks * tokens).parameters, activation_elements(model), 1)
    return sum(n_bytes for name, n_bytes in parts.items() if name not in ("weights", "optimizer"))


def one_rank(rank: int, config: ModelConfig, ranks: int, tokens: int, port: int, found) -> None:
    """Run this rank's slice forward and backward, and put (rank, peak, peak of the host) into `found`."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")
    groups.join("cpu")
    part = join_sequence_group(ranks).slice(ranks * tokens)
    torch.manual_seed(0)
    model = GPT(config)
    generator = torch.Generator().manual_seed(rank)
    x, labels = (torch.randint(config.vocab_size, (1, tokens), generator=generator) for _ in range(2))
    with LiveBytes() as live:
        loss, _ = model(x, labels, part=part)
        loss.backward()
    found.put((rank, live.peak, live.host_peak))
    groups.leave()


if __name__ == "__main__":
    sys.exit(main())
