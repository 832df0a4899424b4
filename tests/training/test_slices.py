"""Which numbers of ranks can share sequences, and what is said of others."""

from dataclasses import replace

import pytest

from lcpt.attention import AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import ModelConfig
from lcpt.model.sequence_cost import Slices, layers_by_kind
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig
from lcpt.training.slices import check_slices, data_ranks, sharing_ranks, shortest_slice, slices_of


def config_of(sequence, context, pattern="softmax", **options):
    attention = AttentionConfig(pattern=pattern.split("+"), block_size=16, **options)
    return Config(
        model=ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=50, attention=attention),
        data=DataConfig(path="-", context=context),
        training=TrainingConfig(global_batch_tokens=8 * context, valid_tokens=context, precision="bf16"),
        parallel=ParallelConfig(1, sequence=sequence),
    )


TWO_BLOCKS = {"polysketch": PolysketchConfig(local_blocks=2)}


@pytest.mark.parametrize(
    "pattern, options, least",
    [
        ("softmax", {}, 2),
        ("sparse_qk", {}, 2),
        ("lowrank", {}, 16),
        ("polysketch", {}, 16),
        ("softmax+polysketch", TWO_BLOCKS, 32),
        ("polysketch+flurka", {}, 32),
    ],
)
def test_every_layer_holds_what_it_needs(pattern, options, least):
    shortest = config_of(4, 4 * least, pattern, **options)
    layers = layers_by_kind(shortest.model)
    assert shortest_slice(layers)[0] == least
    check_slices(shortest, 8)
    assert sharing_ranks(4 * least, 8, layers) == [1, 2, 4] and sharing_ranks(4 * least, 6, layers) == [1, 2]
    if least > 2:
        with pytest.raises(ValueError, match=f"need {least}, .* of model.attention.block_size; .* can be 1 or 2, or"):
            check_slices(config_of(4, 4 * least - 4, pattern, **options), 8)


@pytest.mark.parametrize(
    "sequence, world, context, pattern, message",
    [
        (3, 8, 96, "softmax", "parallel.sequence is 3, and 8 ranks cannot .* groups of 3; .* can be 1, 2, 4 or 8$"),
        (4, 2, 96, "softmax", "2 ranks cannot be divided into groups of 4; parallel.sequence can be 1 or 2$"),
        (8, 8, 100, "softmax", "data.context 100 cannot be cut into 8 slices .* can be 1, 2 or 4, or data.context 96$"),
        (8, 8, 8, "softmax", "leaves each rank 1 tokens of data.context 8, and a slice has at least 2; .* or 4, or"),
        (8, 8, 64, "flurka", "8 tokens of .* layers of flurka need 32, 2 blocks of model.attention.block_size; "),
        (8, 8, 64, "polysketch", "polysketch need 16, one block .* can be 1, 2 or 4, or data.context 128 and more$"),
    ],
)
def test_what_does_not_divide_is_said_with_what_does(sequence, world, context, pattern, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_slices(config_of(sequence, context, pattern), world)
    assert "\n" not in str(caught.value)


def test_one_rank_a_sequence_is_always_possible():
    check_slices(config_of(1, 7, "polysketch"), 5)


def test_packed_documents_are_one_row():
    config = config_of(4, 64)
    assert data_ranks(config, 12) == 3
    assert slices_of(config, 3) == Slices(ranks=4, tokens=48, rows=1, packed=True, width=2)
    apart = replace(config, data=replace(config.data, mask_documents=False))
    assert slices_of(apart, 3) == Slices(ranks=4, tokens=16, rows=3, packed=False, width=2)
    task = replace(config, data=DataConfig(path="synthetic:mqar", context=64))
    assert not slices_of(task, 3).packed
