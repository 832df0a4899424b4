"""What ranks send each other in a step: counted on gloo ranks under DeepSpeed, and predicted."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import model_cost
from lcpt.parallel import groups
from lcpt.training.communication import Communication, communication_per_step
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig, build_engine, update

MODEL = ModelConfig(
    n_layers=4, d_model=32, n_heads=2, vocab_size=331, attention=AttentionConfig("polysketch", block_size=8)
)
TOKENS = 16
NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class Collectives(TorchDispatchMode):
    """Sums up the bytes of every collective: of its larger side, what all ranks have together."""

    def __init__(self):
        super().__init__()
        self.n_bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sides = ([x for x in tree_leaves(side) if isinstance(x, torch.Tensor)] for side in args)
            name = function._opname
            self.n_bytes[NAMES.get(name, name)] += max(sum(x.nbytes for x in side) for side in sides)
        return function(*args, **(kwargs or {}))


def counted(parallel, precision, micro_batches):
    """The bytes of the third step by collective: at stage 3 ranks first find out in which order weights are needed."""
    groups.join()
    torch.manual_seed(0)
    training = TrainingConfig(precision=precision)
    engine = build_engine(GPT(MODEL), training, parallel, micro_batches)
    tokens = torch.randint(MODEL.vocab_size, (1, TOKENS))
    for _ in range(3):
        with Collectives() as collectives:
            for number in range(micro_batches):
                loss, _ = engine(tokens, labels=tokens)
                engine.backward(loss / TOKENS)
                if number < micro_batches - 1:
                    engine.step()
            update(engine, 1e-3, 1.0)
    return dict(collectives.n_bytes)


def stage_3(**given):
    """All parameters are small here; DeepSpeed prefetches, and so keeps, what is soon needed."""
    given = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0} | given
    return ParallelConfig(3, deepspeed={"zero_optimization": {f"stage3_{key}": value for key, value in given.items()}})


@pytest.mark.parametrize(
    "world, parallel, precision, micro_batches",
    [
        (2, ParallelConfig(0), "fp32", 2),
        (2, ParallelConfig(1), "fp32", 1),
        (3, ParallelConfig(1), "bf16", 2),
        (2, ParallelConfig(2), "fp32", 2),
        (2, ParallelConfig(2), "bf16", 3),
        (2, ParallelConfig(3), "fp32", 1),
        (2, stage_3(param_persistence_threshold=1000), "bf16", 2),
        (3, stage_3(max_reuse_distance=20_000), "bf16", 2),  # two blocks of four are gathered again for backward
    ],
    ids=lambda value: f"stage {value.zero_stage}" if isinstance(value, ParallelConfig) else None,
)
def test_bytes_are_those_that_ranks_send(run_ranks, world, parallel, precision, micro_batches):
    modules = model_cost(MODEL, TOKENS).modules
    sent = communication_per_step(modules, parallel, world=world, precision=precision, micro_batches=micro_batches)
    expected = {name: n for name, n in {"all-gather": sent.gathered, sent.reduction: sent.reduced}.items() if n}
    for found in run_ranks(lambda: counted(parallel, precision, micro_batches), world):
        if parallel.zero_stage in (1, 2):  # matrices and vectors are padded to whole shares
            padding = found["all-gather"] - expected["all-gather"]
            assert 0 <= padding <= 2 * (2 * world - 1) * (2 if precision == "bf16" else 4)
            found["all-gather"] -= padding
            if precision == "bf16" and parallel.zero_stage == 1:
                assert 0 <= found["all-reduce"] - expected["all-reduce"] <= 2 * padding
                found["all-reduce"] = expected["all-reduce"]
        assert found == expected
    if parallel.deepspeed:
        assert sent.gathered != 2 * sum(map(sum, modules.values())) * micro_batches


def test_one_rank_sends_nothing():
    modules = {"embedding": (1000,)}
    sent = communication_per_step(modules, ParallelConfig(3), world=1, precision="bf16", micro_batches=3)
    assert sent[:2] == (0, 0) and sent.on_wire(1) == 0


def test_blocks_that_far_more_follow_are_gathered_twice():
    """1.6 G parameters in eight blocks: the backward pass of the first three is farther than DeepSpeed looks."""
    modules = {"embedding": (10**6, 2)} | {f"blocks.{n}": (2 * 10**8, 10) for n in range(8)}
    sent = communication_per_step(modules, ParallelConfig(3), world=2, precision="bf16", micro_batches=5)
    assert sent.gathered == 2 * (2 + 8 * 10 + 5 * (10**6 + (8 + 3) * 2 * 10**8))
    assert sent.reduced == 4 * 5 * sum(map(sum, modules.values()))


def test_an_all_reduce_is_a_reduce_scatter_and_a_gather():
    assert Communication(0.0, 400.0).on_wire(4) == 2 * Communication(0.0, 400.0, "reduce-scatter").on_wire(4) == 600
    assert Communication(400.0, 0.0).on_wire(4) == 300
