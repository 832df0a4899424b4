from dataclasses import replace

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.summaries import SummariesConfig
from lcpt.benchmarking.allocated_bytes import most_allocated_bytes
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import REDUCE_BUCKET, Saved, activation_elements, elements_on_host, memory_per_rank, model_cost
from lcpt.model.feed_forward import PIECE
from lcpt.training.config import TrainingConfig
from lcpt.training.dry_run import describe

CONFIGS = {
    "softmax": ModelConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=100, attention=AttentionConfig("softmax")),
    "hybrid": ModelConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=100,
        attention=AttentionConfig(pattern=["polysketch", "polynomial"], block_size=16),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_the_models(config):
    assert model_cost(config, 64).parameters == sum(p.numel() for p in GPT(config).parameters())


def test_gpt_2_small_has_its_size():
    softmax = ModelConfig(vocab_size=50_257, attention=AttentionConfig("softmax"))
    assert model_cost(softmax, 1024).parameters == pytest.approx(124e6, rel=0.01)


def test_flops_of_softmax_by_hand():
    """Matrices at 2 FLOPs a number, the head with them; attention 2·T·d a layer, which is the causal half."""
    config, context = CONFIGS["softmax"], 64
    qkv_out, geglu = 4 * 32 * 32, 3 * 32 * config.ff_width
    forward = 2 * (2 * (qkv_out + geglu) + 100 * 32) + 2 * (2 * 32 * context)
    cost = model_cost(config, context)
    assert cost.flops_forward == forward
    assert cost.flops_step == forward + 4 * (2 * (qkv_out + geglu) + 100 * 32) + 2 * (5 * 32 * context)


def test_flops_of_the_matrices_are_what_pytorch_counts():
    """Its counter does not know SDPA on a CPU: without it only the matrices are left."""
    from torch.utils.flop_counter import FlopCounterMode

    config, context = CONFIGS["softmax"], 64
    with FlopCounterMode(display=False) as counter:
        GPT(config)(torch.zeros(1, context, dtype=torch.long))
    assert counter.get_total_flops() / context == model_cost(config, context).flops_forward - 2 * (2 * 32 * context)


@pytest.mark.parametrize("kind", ATTENTION)
def test_flops_by_part_are_what_pytorch_counts(kind):
    """Forward and backward: projections, the feed-forward network and the head, exactly. Of attention see each kind."""
    from torch.utils.flop_counter import FlopCounterMode

    attention, context = AttentionConfig(kind, block_size=16), 64
    attention.flurka.summaries = attention.lowrank.summaries = SummariesConfig(projection="table")
    config = replace(CONFIGS["softmax"], attention=attention)
    model, tokens = GPT(config), torch.zeros(1, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    found = {name: sum(counts.values()) / context for name, counts in counter.get_flop_counts().items()}
    parts = {name: part.forward + part.backward for name, part in model_cost(config, context).flops.items()}
    blocks = [f"GPT.blocks.{n}" for n in range(config.n_layers)]
    assert parts.keys() == {"projections", "feed-forward", f"attention: {kind}", "head"}
    assert parts["projections"] == sum(
        found[f"{block}.attention.{name}"] for block in blocks for name in ("qkv", "out")
    )
    assert parts["feed-forward"] == sum(found[f"{block}.feed_forward"] for block in blocks)
    of_layers = sum(found[f"{block}.{name}"] for block in blocks for name in ("attention", "feed_forward"))
    assert parts["head"] == found["GPT"] - of_layers


def test_attention_of_each_kind_is_a_part():
    config = CONFIGS["hybrid"]
    parts, layers = model_cost(config, 64).flops, [block.attention for block in GPT(config).blocks]
    assert parts.keys() == {"projections", "feed-forward", "attention: polysketch", "attention: polynomial", "head"}
    assert parts["attention: polynomial"][:2] == layers[1].attend_flops(64)
    assert parts["attention: polysketch"][:2] == tuple(2 * n for n in layers[0].attend_flops(64))


def test_parameters_by_module_are_in_the_order_of_use():
    config = replace(CONFIGS["hybrid"], tie_embeddings=False)
    modules, model = model_cost(config, 64).modules, GPT(config)
    assert list(modules) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert modules["blocks.1"] == tuple(p.numel() for p in model.blocks[1].parameters())


def test_recomputation_costs_a_forward_pass_without_the_head():
    plain = CONFIGS["softmax"]
    again = ModelConfig(**{**vars(plain), "activation_checkpointing": True})
    without, with_it = model_cost(plain, 64), model_cost(again, 64)
    assert with_it.flops_forward == without.flops_forward
    assert with_it.flops_step - without.flops_step == without.flops_forward - 2 * 100 * 32


def test_offload_computes_the_feed_forward_network_once_more():
    full, offload = (model_cost(replace(CONFIGS["softmax"], activation_checkpointing=p), 64) for p in (True, "offload"))
    extra = offload.flops.pop("feed-forward").recomputed - full.flops["feed-forward"].recomputed
    assert extra == full.flops.pop("feed-forward").forward and offload.flops == full.flops


def test_pieces_recompute_no_more_flops_than_that(monkeypatch):
    """PyTorch's counter: the last piece is not computed with its block."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("lcpt.model.feed_forward.PIECE", 16)
    counted = {}
    for policy in (True, "offload"):
        config = replace(CONFIGS["softmax"], activation_checkpointing=policy)
        with FlopCounterMode(display=False) as counter:
            GPT(config)(torch.zeros(1, 64, dtype=torch.long)).sum().backward()
        counted[policy] = counter.get_total_flops() / 64
    assert counted["offload"] - counted[True] == 3 / 4 * model_cost(config, 64).flops["feed-forward"].forward


def test_state_adds_up_over_the_layers():
    config = CONFIGS["hybrid"]
    layers = [block.attention for block in GPT(config).blocks]
    last_keys = 4 * config.d_model * config.kv_heads // config.n_heads * len(layers)
    expected = sum(attention.state_bytes(64) for attention in layers)
    assert model_cost(config, 64).state_bytes == expected + last_keys > last_keys
    attention = replace(config.attention, key_shift=False)
    assert model_cost(replace(config, attention=attention), 64).state_bytes == expected


def test_cost_needs_no_memory():
    """A model of 100 G parameters."""
    huge = ModelConfig(n_layers=80, d_model=10_240, n_heads=80)
    assert model_cost(huge, 8192).parameters > 9e10


def test_memory_shrinks_with_the_stage():
    config, saved, stages = CONFIGS["softmax"], activation_elements(CONFIGS["softmax"]), {}
    for stage in (0, 1, 2, 3):
        stages[stage] = memory_per_rank(config, 1000, saved, tokens=64, world=4, zero_stage=stage, precision="fp32")
    assert [stages[n]["optimizer"] for n in range(4)] == [8000, 3000, 3000, 3000]
    assert [stages[n]["gradients"] for n in range(4)] == [4000, 4000, 1000, 1000]
    assert [stages[n]["weights"] for n in range(4)] == [4000, 4000, 4000, 1000]
    assert [stages[n].get("gathered weights") for n in range(4)] == [None, None, None, 4000]
    half = memory_per_rank(config, 1000, saved, tokens=64, world=4, zero_stage=1, precision="bf16")
    assert (half["weights"], half["optimizer"]) == (2000, 3000)
    assert (half["gradients"], half["gradients of a micro-batch"]) == (4000, 2000)  # summed in fp32, made in bf16
    assert half["activations"] * 2 == stages[1]["activations"]


def test_gradients_leave_through_a_buffer_whose_size_no_model_changes():
    def of_micro_batch(stage, precision, **bucket):
        parts = memory_per_rank(
            CONFIGS["softmax"], 10**10, Saved(1, 0), tokens=1, world=8, zero_stage=stage, precision=precision, **bucket
        )
        return parts.get("gradients of a micro-batch")

    share, size = 4 * 10**10 / 8, REDUCE_BUCKET
    assert [of_micro_batch(stage, "bf16") for stage in (1, 2, 3)] == [2 * 10**10, 2 * size + share, 8 * size]
    assert [of_micro_batch(stage, "fp32") for stage in (0, 1, 2)] == [None, 4 * size, 4 * size + share]
    assert of_micro_batch(2, "bf16", reduce_bucket=10**6) == 2 * 10**6 + share


def test_the_loss_holds_a_chunk_of_logits_and_the_gradients_of_its_inputs():
    config = CONFIGS["softmax"]
    for tokens, precision, expected in (
        (64, "fp32", 64 * (3 * 4 * 32 + 4 * 100) + 8 * 3200),
        (64, "bf16", 64 * (3 * 2 * 32 + 2 * 100) + 6 * 3200),
        (10**7, "bf16", 10**7 * 3 * 2 * 32 + 2 * 2**28 + 6 * 3200),
    ):
        parts = memory_per_rank(config, 1, Saved(0, 0), tokens=tokens, world=1, zero_stage=1, precision=precision)
        assert parts["loss, or a block made again"] == expected


def most_allocated(config, batch, tokens):
    """The most bytes that are allocated at one time in a forward and backward pass."""
    model, x = GPT(config), torch.randint(config.vocab_size, (batch, tokens))
    model(x, labels=x)[0].backward()  # what is built at the first call
    model.zero_grad()
    return most_allocated_bytes(lambda: model(x, labels=x)[0].backward())


@pytest.mark.parametrize("checkpointing", [False, "selective", True])
@pytest.mark.parametrize("kind", ["softmax", "polysketch"])
def test_the_estimate_is_what_a_step_allocates(kind, checkpointing):
    """All of it: activations, the loss, gradients; ten per cent are left for temporaries."""
    config = ModelConfig(
        n_layers=4,
        d_model=64,
        n_heads=2,
        vocab_size=256,
        activation_checkpointing=checkpointing,
        attention=AttentionConfig(kind, block_size=64),
    )
    parts = memory_per_rank(
        config,
        model_cost(config, 512).parameters,
        activation_elements(config),
        tokens=1024,
        world=1,
        zero_stage=0,
        precision="fp32",
    )
    estimate = sum(n_bytes for name, n_bytes in parts.items() if name not in ("weights", "optimizer"))
    assert most_allocated(config, 2, 512) == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("kind", ["softmax", "polysketch", "flurka"])
def test_with_offload_the_estimate_is_what_is_alive(kind, monkeypatch):
    """On the device and on the host, of a slice of several pieces."""
    from lcpt.benchmarking.live_bytes import LiveBytes

    for module in ("feed_forward", "cost"):
        monkeypatch.setattr(f"lcpt.model.{module}.PIECE", 256)
    config = ModelConfig(
        n_layers=3,
        d_model=64,
        n_heads=2,
        vocab_size=256,
        activation_checkpointing="offload",
        attention=AttentionConfig(kind, block_size=128, polysketch=PolysketchConfig(size=8)),
    )
    parts = memory_per_rank(
        config,
        model_cost(config, 2048).parameters,
        activation_elements(config),
        tokens=2048,
        world=1,
        zero_stage=0,
        precision="fp32",
    )
    model, x = GPT(config), torch.randint(256, (1, 2048))
    with LiveBytes() as live:
        model(x, labels=x)[0].backward()
    estimate = sum(n_bytes for name, n_bytes in parts.items() if name not in ("weights", "optimizer"))
    assert live.peak == pytest.approx(estimate, rel=0.1)
    assert live.host_peak == 4 * elements_on_host(config) * 2048 == 4 * 3 * 64 * 2048


def test_offload_keeps_one_input_and_holds_pieces():
    plain = CONFIGS["softmax"]
    full, offload = (activation_elements(replace(plain, activation_checkpointing=p)) for p in (True, "offload"))
    assert (offload.always, full.always) == (32, 2 * 32)
    assert offload.at_times + offload.in_pieces == full.at_times + 32  # the next block's input
    # Packed, the activation of the gate, the product, and a gradient.
    assert offload.in_pieces == pytest.approx(5 * plain.ff_width)
    for tokens, most in ((PIECE // 2, PIECE // 2), (3 * PIECE, PIECE)):
        parts = memory_per_rank(plain, 1, Saved(0, 1, 1e6), tokens=tokens, world=1, zero_stage=1, precision="fp32")
        assert parts["loss, or a block made again"] == 4 * (tokens + 1e6 * most)


def test_selective_checkpointing_costs_no_products_and_keeps_less():
    plain = replace(CONFIGS["hybrid"], attention=AttentionConfig(pattern=["polysketch", "softmax"], block_size=16))
    selective, full = (replace(plain, activation_checkpointing=policy) for policy in ("selective", True))
    assert model_cost(selective, 64) == model_cost(plain, 64) != model_cost(full, 64)
    kept = [activation_elements(config) for config in (plain, selective, full)]
    assert kept[0].always > 1.3 * kept[1].always > kept[2].always == 3 * 32
    assert kept[0].at_times == kept[1].at_times == 0 < kept[2].at_times < kept[0].always / 2


def test_dry_run_shows_the_numbers():
    config = Config(
        model=CONFIGS["hybrid"],
        data=DataConfig(path="-", context=64),
        training=TrainingConfig(max_steps=7, warmup_steps=0, global_batch_tokens=128, valid_tokens=64),
    )
    cost = model_cost(config.model, 64)
    text = describe(config, world=2)
    for part in (
        "1 polynomial, 2 polysketch",
        f"{cost.parameters:,}",
        f"{cost.flops_forward / 1e6:,.1f} M forward",
        f"{cost.flops_step / 1e6:,.1f} M a training step",
        "896 tokens in 7 steps",
        "memory a rank of 2",
        f"{cost.flops_step * 896:.3g}",
    ):
        assert part in text
    config.parallel.offload_optimizer = True
    on_device, on_host = describe(config, world=2).splitlines()[-2:]
    assert "optimizer" not in on_device and "optimizer" in on_host
