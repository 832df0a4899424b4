"""Model the time of an optimizer step on a GPU that is not here.

A model, not a measurement: compute, memory, network and host each work at a fixed part of their peak, and all at once,
so that the slowest alone decides. Attention waits for what ranks that share sequences exchange, so that comes on top of
the slowest; latencies are left out. Real steps overlap less and take longer; the model is there to compare settings,
and to name what limits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcpt.model.cost import Cost, bytes_moved, elements_on_host
from lcpt.utils.gpus import NVLINK, gpu_peaks

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.training.communication import Communication

# Parts of a peak that programs reach. Products: of two 8,192² matrices on an H200, 790 of 989 TFLOP/s; memory: a copy
# there, 4.3 of 4.8 TB/s; attention: flash attention at 300 to 350 TFLOP/s. benchmarks/roofline.py assumes the same.
PRODUCTS = 0.80
ATTENTION = 0.33
MEMORY = 0.90
NETWORK = 0.80  # of large messages by NCCL, assumed
HOST_LINK = 25e9  # bytes a second and GPU over PCIe 4.0 x16, of 32e9
HOST_MEMORY = 25e9  # bytes a second and GPU: 200e9 of a machine that eight share, assumed
MACHINE = 8  # GPUs that NVLink joins
ADAM_BYTES = 28  # a parameter: fp32 gradient, weight and moments read, weight and moments written


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Gives the peaks of one GPU, and of its network."""

    flops: float  # a second, of dense products in the run's precision
    memory: float  # bytes a second
    network: float  # bytes a second and GPU, each way
    nvlink: float | None = None  # the same to GPUs of its machine; None: by the network

    def exchange_seconds(self, n_bytes: float, ranks: int) -> float:
        """Model the time in which ranks that share sequences, neighbours, each send so many bytes to one another: over
        NVLink where one machine holds them, else over the network, as if all went there."""
        link = self.nvlink if self.nvlink and MACHINE % ranks == 0 else self.network
        return n_bytes / (link * NETWORK)


def hardware(gpu: str, precision: str, network: float) -> Hardware:
    """Return the peaks of a GPU of lcpt.utils.gpus; ValueError for another name."""
    flops, memory = gpu_peaks(gpu, precision)
    return Hardware(flops=flops, memory=memory, network=network, nvlink=NVLINK.get(gpu))


def seconds_by_part(
    config: Config,
    cost: Cost,
    sent: Communication,
    peaks: Hardware,
    *,
    kept: float,
    made: float,
    world: int,
    micro_batches: int,
    exchanged: float,
) -> dict[str, float]:
    """Model what each part of a rank's hardware works in one step of `micro_batches`; see `step_seconds` for the whole.
    `kept` and `made` are those of model.cost.bytes_moved, `exchanged` the bytes that a rank sends to those that share
    its sequences."""
    training, parallel = config.training, config.parallel
    tokens = micro_batches * training.micro_batch * config.data.context // parallel.sequence
    attention = sum(sum(part) for name, part in cost.flops.items() if name.startswith("attention"))
    products = cost.flops_step - attention
    shard = cost.parameters / (world if parallel.zero_stage else 1)
    width = 2 if training.precision == "bf16" else 4
    moved = bytes_moved(
        config.model,
        cost.parameters,
        kept=kept,
        made=made,
        tokens=tokens,
        micro_batches=micro_batches,
        width=width,
    )
    update = ADAM_BYTES * shard
    parts = {
        "compute": tokens * (products / PRODUCTS + attention / ATTENTION) / peaks.flops,
        "memory": (moved + update * (not parallel.offload_optimizer)) / (peaks.memory * MEMORY),
        "network": sent.on_wire(world) / (peaks.network * NETWORK),
    }
    if kept_there := elements_on_host(config.model):
        parts["host"] = 2 * width * kept_there * tokens / HOST_LINK
    if parallel.offload_optimizer:
        parts["host"] = parts.get("host", 0.0) + (4 + width) * shard / HOST_LINK + update / HOST_MEMORY
    if parallel.sequence > 1:
        parts["exchange"] = peaks.exchange_seconds(exchanged, parallel.sequence)
    return parts


def step_seconds(parts: dict[str, float]) -> float:
    """Return the time of a step: its longest part, and the exchange, which nothing hides."""
    return max(seconds for part, seconds in parts.items() if part != "exchange") + parts.get("exchange", 0.0)
