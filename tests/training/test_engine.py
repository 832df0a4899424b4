import pytest

from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.training.checks import micro_batches
from lcpt.training.engine import ParallelConfig, parameter_groups


def test_matrices_decay_and_vectors_do_not():
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=20, attention=AttentionConfig("polysketch")))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in others["params"]} == {
        "norm.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.attention.q_norm.weight",
        "blocks.0.attention.q_norm.bias",
        "blocks.0.attention.k_norm.weight",
        "blocks.0.attention.k_norm.bias",
        "blocks.0.attention.gamma",
        "blocks.0.attention.key_shift",
    }
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_micro_batches_must_divide_evenly():
    assert micro_batches(24, 3, 2) == 4
    for sequences, micro_batch, world in ((24, 5, 2), (24, 3, 5), (1, 1, 2)):
        with pytest.raises(ValueError, match=f"{sequences} .* {world} .* {micro_batch}"):
            micro_batches(sequences, micro_batch, world)


@pytest.mark.parametrize("stage", [-1, 4])
def test_other_zero_stages_are_refused(stage):
    with pytest.raises(ValueError, match=f"zero_stage is {stage}"):
        ParallelConfig(stage)
