"""What the dry run says of GPUs and of communication; the shipped configs fit the card that they are made for."""

from dataclasses import replace
from pathlib import Path

import pytest

from lcpt.attention import AttentionConfig
from lcpt.config import Config, load_config
from lcpt.data import DataConfig
from lcpt.model import ModelConfig
from lcpt.model.cost import activation_elements, model_cost
from lcpt.model.sequence_cost import exchange, layers_by_kind
from lcpt.training.checks import micro_batches
from lcpt.training.config import TrainingConfig
from lcpt.training.dry_run import describe
from lcpt.training.engine import ParallelConfig
from lcpt.training.fitting import HEADROOM, fitting_settings, memory_on_gpu
from lcpt.training.slices import slices_of
from lcpt.utils.gpus import GPU_BYTES, gpu_bytes

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("gpt2-*.yaml"))


def needed(config, world, micro_batch=None):
    parameters = model_cost(config.model, config.data.context).parameters
    micro_batch = micro_batch or config.training.micro_batch
    return sum(memory_on_gpu(config, world, parameters, activation_elements(config.model), micro_batch).values())


@pytest.fixture
def config():
    model = ModelConfig(n_layers=4, d_model=64, n_heads=2, vocab_size=50, attention=AttentionConfig("softmax"))
    training = TrainingConfig(max_steps=7, warmup_steps=0, global_batch_tokens=24 * 64, valid_tokens=64, micro_batch=3)
    return Config(model=model, data=DataConfig(path="-", context=64), training=training)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_fits_80_gb_and_fills_it(path):
    """It takes the largest micro-batch of its policy, and the cheapest policy that fits at all."""
    config, size = load_config(path), GPU_BYTES["H100-80GB"]
    for world in (1, 2, 4, 8):
        micro_batches(config.sequences, config.training.micro_batch, world)
    assert needed(config, 8) <= (1 - HEADROOM) * size
    best = fitting_settings(config, 8, size)[0]
    assert best.activation_checkpointing == config.model.activation_checkpointing
    assert best.micro_batch == config.training.micro_batch and best.n_bytes == needed(config, 8)


def test_settings_that_fit_are_the_largest_micro_batches_of_each_policy(config):
    """At a size between: selective takes more sequences than no checkpointing, full all of them."""
    all_fit = fitting_settings(config, 2, 1e12)
    assert [(x.activation_checkpointing, x.micro_batch) for x in all_fit] == [
        (False, 12),
        ("selective", 12),
        (True, 12),
        ("offload", 12),
    ]
    assert all_fit[0].n_bytes > all_fit[1].n_bytes > all_fit[2].n_bytes >= all_fit[3].n_bytes
    size = needed(config, 2, 4) / (1 - HEADROOM) + 1
    found = fitting_settings(config, 2, size)
    assert [(x.activation_checkpointing, x.micro_batch) for x in found] == [
        (False, 4),
        ("selective", 6),
        (True, 12),
        ("offload", 12),
    ]
    assert found[0].n_bytes == needed(config, 2, 4)
    assert fitting_settings(config, 2, size - 2)[0].micro_batch == 3
    assert fitting_settings(config, 2, 1000) == []
    assert [x.micro_batch for x in fitting_settings(config, 5, 1e12)] == [1, 1, 1, 1]  # 24 sequences do not divide


def test_the_table_says_what_fits(config, monkeypatch):
    size = needed(config, 2, 4) / (1 - HEADROOM) + 1
    monkeypatch.setitem(GPU_BYTES, "small", size)
    text = describe(config, 2, "small")
    assert "on small" in text and "GiB: fits\n" in text
    assert "fits with         activation_checkpointing=false micro_batch=4 (" in text
    assert "; activation_checkpointing=selective micro_batch=6 (" in text
    config.training.micro_batch = 6
    assert "does not fit with 15% left free" in describe(config, 2, "small")
    monkeypatch.setitem(GPU_BYTES, "small", 1000)
    assert "none: more ranks, a higher parallel.zero_stage or parallel.sequence, a shorter" in describe(
        config, 2, "small"
    )
    assert "small" not in describe(config, 2)


def test_an_optimizer_on_the_host_leaves_the_gpu(config):
    config.parallel.offload_optimizer = True
    with_it = needed(config, 2)
    config.parallel.offload_optimizer = False
    assert needed(config, 2) - with_it == 12 * model_cost(config.model, 64).parameters / 2


def test_inputs_of_blocks_go_to_the_host(config):
    config.model = replace(config.model, activation_checkpointing="offload")
    config.data.context, config.training.micro_batch = 2**18, 1
    config.training.global_batch_tokens = 2**20
    [row] = [line for line in describe(config, 2).splitlines() if line.startswith("  of its host")]
    assert f"activations {4 * 64 * 4 * 2**18 / 2**30:,.2f}" in row
    config.model = replace(config.model, activation_checkpointing=True)
    assert "activations" not in describe(config, 2).splitlines()[-1]


def test_an_unknown_gpu_is_named(config):
    with pytest.raises(ValueError, match="no GPU 'H100' is known; known are A100-40GB"):
        describe(config, 2, "H100")
    assert gpu_bytes("H200-141GB") == 141 * 10**9


def test_the_table_says_how_often_gradients_are_reduced(config):
    assert "none on one rank" in describe(config, 1)
    assert "stage 1 reduces once" in describe(config, 2)
    config.parallel = ParallelConfig(2)
    assert "stage 2 reduces in each of 4 micro-batches" in describe(config, 2)
    config.parallel = ParallelConfig(3)
    assert "(reduce-scatter): stage 3 reduces in each of 4" in describe(config, 2)


def test_ranks_that_share_sequences_are_described(config):
    """24 sequences: eight ranks of which four share each read as two do."""
    alone = describe(config, 2)
    assert "a sequence  " not in alone
    config.parallel.sequence = 4
    text = describe(config, 8)
    layers, slices = layers_by_kind(config.model), slices_of(config, 3)
    sent = exchange(layers, slices).per_step(4, recomputed=False)
    assert f"on 4 ranks, 16 tokens on each, which sends the others {sent / 2**20:,.1f} MiB a step" in text
    with pytest.raises(ValueError, match="6 ranks cannot be divided into groups of 4"):
        describe(config, 6)


def test_settings_that_fit_divide_the_sequences_among_groups_of_ranks(config):
    config.parallel.sequence = 4
    assert {x.micro_batch for x in fitting_settings(config, 8, 1e12)} == {12}
    assert {x.micro_batch for x in fitting_settings(config, 4, 1e12)} == {24}
    config.parallel.sequence = 2
    assert fitting_settings(config, 8, 1e12)[0].n_bytes == needed(config, 8, 6)
