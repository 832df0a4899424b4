"""Gradients accumulate in fp32: sums over micro-batches and ranks have no rounding error of bf16, however cut."""

import copy

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.parallel import groups
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig, build_engine
from lcpt.training.zero_shards import gradient_norm_squared

MODEL = ModelConfig(
    n_layers=2, d_model=32, n_heads=2, vocab_size=331, attention=AttentionConfig("polysketch", block_size=8)
)
TOKENS = 64


def gradient_error(stage, offload, micro_batches):
    """-> relative error of the engine's gradient against the float64 sum of all ranks' bf16 gradients, that of its
    norm, and that of the same sum in bf16."""
    groups.join()
    rank, world = groups.rank(), groups.world_size()
    torch.manual_seed(0)
    model = GPT(MODEL)
    alone = copy.deepcopy(model).bfloat16()
    tokens, labels = torch.randint(331, (2, world, micro_batches, 1, TOKENS))
    # Powers of two: scaling a bf16 gradient by them rounds nothing.
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in alone.named_parameters()}
    in_bf16 = {name: torch.zeros_like(p) for name, p in alone.named_parameters()}
    for r in range(world):
        for i in range(micro_batches):
            loss, _ = alone(tokens[r, i], labels=labels[r, i])
            (loss / (TOKENS * world * micro_batches)).backward()
            for name, p in alone.named_parameters():
                expected[name] += p.grad.double()
                in_bf16[name] += p.grad
                p.grad = None
    engine = build_engine(model, TrainingConfig(precision="bf16"), ParallelConfig(stage, offload), micro_batches)
    for i in range(micro_batches):
        loss, _ = engine(tokens[rank, i], labels=labels[rank, i])
        engine.backward(loss / TOKENS)
        if i < micro_batches - 1:
            engine.step()
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    [squares] = groups.all_reduce_sum(gradient_norm_squared(engine), device=torch.device("cpu"))
    whole, same, rounded = (
        torch.cat([x[name].double().flatten() for name in expected]) for x in (found, expected, in_bf16)
    )
    error, bf16_error = (float((x - same).norm() / same.norm()) for x in (whole, rounded))
    return error, abs(squares**0.5 / float(same.norm()) - 1), bf16_error


@pytest.mark.parametrize(
    "world, stage, offload", [(1, 1, False), (2, 1, False), (2, 1, True), (2, 2, False), (2, 3, False)]
)
def test_sums_of_bf16_gradients_are_exact(run_ranks, world, stage, offload):
    for gradient, norm, bf16_gradient in run_ranks(lambda: gradient_error(stage, offload, micro_batches=16), world):
        assert gradient < 1e-8 and norm < 1e-6 and bf16_gradient > 2e-3
