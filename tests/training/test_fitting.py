"""The memory of a rank: predicted, and counted on gloo ranks under DeepSpeed by PyTorch's own account."""

import bisect
import gc
import itertools
import time

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.benchmarking.allocated_bytes import changes_of_allocated_bytes
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import activation_elements, model_cost
from lcpt.parallel import groups
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig, build_engine, update
from lcpt.training.fitting import memory_on_gpu

CONTEXT, BATCH, VOCABULARY = 256, 2, 512


def config_of(stage, precision, policy):
    model = ModelConfig(
        n_layers=4,
        d_model=128,
        n_heads=2,
        vocab_size=VOCABULARY,
        activation_checkpointing=policy,
        attention=AttentionConfig("softmax"),
    )
    return Config(
        model=model,
        data=DataConfig(path="-", context=CONTEXT),
        training=TrainingConfig(
            global_batch_tokens=4 * BATCH * CONTEXT, micro_batch=BATCH, precision=precision, valid_tokens=CONTEXT
        ),
        parallel=ParallelConfig(stage, deepspeed={"zero_optimization": {"reduce_bucket_size": 500_000}}),
    )


def most_allocated(config):
    """The most bytes that are allocated at one time in a step, the engine's own among them: the least of three steps,
    for what Python has not collected yet may come on top."""
    groups.join()
    x = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    GPT(config.model)(x, labels=x)[0].backward()  # what is built at the first call
    begun = []

    def steps():
        engine = build_engine(GPT(config.model), config.training, config.parallel, 2)
        for _ in range(4):
            for number in range(2):
                gc.collect()
                if number == 0:
                    begun.append(time.time_ns())
                loss, _ = engine(x, labels=x)
                engine.backward(loss / x.numel())
                if number == 0:
                    engine.step()
            update(engine, 1e-3, 1.0)

    changes = changes_of_allocated_bytes(steps)
    allocated = list(itertools.accumulate(n_bytes for _, n_bytes in changes))
    starts = [bisect.bisect(changes, (when, 0)) for when in begun] + [len(changes)]
    return min(max(allocated[first:end]) for first, end in itertools.pairwise(starts[1:]))


@pytest.mark.parametrize(
    "stage, precision, policy",
    [
        (0, "fp32", True),
        pytest.param(1, "fp32", "selective", marks=pytest.mark.slow),
        (1, "bf16", False),
        pytest.param(2, "fp32", True, marks=pytest.mark.slow),
        (3, "bf16", False),
    ],
)
def test_a_rank_allocates_what_is_estimated(run_ranks, stage, precision, policy):
    config = config_of(stage, precision, policy)
    parameters = model_cost(config.model, CONTEXT).parameters
    parts = memory_on_gpu(config, 2, parameters, activation_elements(config.model), BATCH)
    found = min(run_ranks(lambda: most_allocated(config), 2))
    assert found == pytest.approx(sum(parts.values()), rel=0.1)
