"""GPT-2, Llama and Qwen3, written out in float64 from their published definitions, are models of this GPT."""

import math
from dataclasses import replace

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import GPT
from lcpt.model.cost import model_cost
from lcpt.training.run_folder import RunConfig
from tests.model.conftest import PUBLISHED, V, config

T = 19


def build(name, **changes) -> GPT:
    """Every weight is drawn: a gain of one or a bias of zero would hide that it is not used."""
    torch.manual_seed(0)
    model = GPT(config(**PUBLISHED[name] | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def norm(x, weights, name, eps=None):
    """LayerNorm with a bias, or with eps given RMSNorm."""
    if eps is None:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def linear(x, weights, name, bias=False):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if bias else y


def causal_softmax(q, k, v):
    """q [B, H, T, D], k and v [B, Hkv, T, D] -> [B, T, H · D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotate(x, frequencies):
    """RoPE as published for Llama in transformers: x cos + rotate_half(x) sin."""
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def gpt2(weights, tokens):
    x = weights["embedding.weight"][tokens] + weights["positions.weight"][:T]
    for block in ("blocks.0", "blocks.1"):
        y = linear(norm(x, weights, f"{block}.attention_norm"), weights, f"{block}.attention.qkv", bias=True)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in y.chunk(3, -1))
        x = x + linear(causal_softmax(q, k, v), weights, f"{block}.attention.out", bias=True)
        y = linear(norm(x, weights, f"{block}.feed_forward_norm"), weights, f"{block}.feed_forward.up", bias=True)
        y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + linear(y, weights, f"{block}.feed_forward.down", bias=True)
    return norm(x, weights, "norm") @ weights["embedding.weight"].T


def llama(weights, tokens, frequencies=None, head_dim=8, q_k_norm=False):
    if frequencies is None:
        frequencies = torch.tensor([llama3_frequency(500.0 ** (-i / 4)) for i in range(4)], dtype=torch.float64)
    x = weights["embedding.weight"][tokens]
    for block in ("blocks.0", "blocks.1"):
        y = linear(norm(x, weights, f"{block}.attention_norm", 1e-6), weights, f"{block}.attention.qkv")
        q, k, v = (
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in y.split([2 * head_dim, head_dim, head_dim], -1)
        )
        if q_k_norm:
            q, k = (norm(x, weights, f"{block}.attention.{name}_norm", 1e-6) for x, name in ((q, "q"), (k, "k")))
        q, k = rotate(q, frequencies), rotate(k, frequencies)
        x = x + linear(causal_softmax(q, k, v), weights, f"{block}.attention.out")
        y = linear(norm(x, weights, f"{block}.feed_forward_norm", 1e-6), weights, f"{block}.feed_forward.up")
        gate, value = y.chunk(2, -1)
        x = x + linear(gate / (1 + (-gate).exp()) * value, weights, f"{block}.feed_forward.down")
    head = "embedding.weight" if q_k_norm else "head.weight"
    return norm(x, weights, "norm", 1e-6) @ weights[head].T


def llama3_frequency(theta, factor=4.0, low=1.0, high=4.0, context=32):
    """As it is written in the code that Meta released with Llama 3.1, by wavelength."""
    wavelength = 2 * math.pi / theta
    if wavelength < context / high:
        return theta
    if wavelength > context / low:
        return theta / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


def qwen3(weights, tokens):
    frequencies = 10_000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    return llama(weights, tokens, frequencies, head_dim=12, q_k_norm=True)


REFERENCES = {"gpt2": gpt2, "llama": llama, "qwen3": qwen3}


@pytest.fixture(params=PUBLISHED)
def name(request):
    return request.param


def test_logits_and_gradients_are_those_of_the_definition(name):
    """Tables of cos and sin are fp32."""
    model, tokens = build(name), torch.randint(V, (2, T))
    weights = {key: tensor.detach().clone().requires_grad_() for key, tensor in model.state_dict().items()}
    expected, found = REFERENCES[name](weights, tokens), model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, key
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_may_be_int32(name, dtype):
    model, tokens = build(name), torch.randint(V, (2, T))
    assert torch.equal(model(tokens.to(dtype)), model(tokens))
    assert torch.equal(model.token_losses(tokens.to(dtype), tokens), model.token_losses(tokens, tokens))
    logits, cache = model.prefill(tokens[:, :5].to(dtype))
    torch.testing.assert_close(model.decode(tokens[:, 5].to(dtype), cache)[0], model(tokens)[:, 5])


def test_decoding_goes_on(name):
    model, tokens = build(name), torch.randint(V, (2, T))
    expected, (logits, cache) = model(tokens), model.prefill(tokens[:, :7])
    torch.testing.assert_close(logits, expected[:, :7])
    for position in range(7, T):
        logits, cache = model.decode(tokens[:, position], cache)
        torch.testing.assert_close(logits, expected[:, position])


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("qk_norm", ["rms_norm", "none"])
def test_every_kind_takes_every_option(kind, qk_norm):
    """Loss, packed documents, decoding and gradients: with positions and without, with a key shift, in odd widths."""
    for options in (PUBLISHED["gpt2"], PUBLISHED["llama"]):
        attention = AttentionConfig(
            kind, block_size=4, qk_norm=qk_norm, head_dim=6, bias=True, polysketch=PolysketchConfig(size=8)
        )
        torch.manual_seed(0)
        model, x = GPT(config(**options | {"attention": attention})).double(), torch.randint(V, (1, T + 1))
        model(x[:, :-1], labels=x[:, 1:])[0].backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        expected = model(x)
        _, cache = model.prefill(x[:, :6])
        torch.testing.assert_close(model.prefill(x[:, 6:], cache)[0], expected[:, 6:], rtol=1e-8, atol=1e-8)
        packed = model(torch.cat((x, x), 1), cu_seqlens=torch.tensor([0, T + 1, 2 * T + 2]))
        torch.testing.assert_close(packed[:, T + 1 :], expected, rtol=1e-8, atol=1e-8)


def test_initial_biases_are_zero_and_an_untied_head_is_drawn_as_the_embedding():
    biases = dict(GPT(config(**PUBLISHED["gpt2"])).named_parameters())
    biases = {key: parameter for key, parameter in biases.items() if key.endswith("bias")}
    assert len(biases) == 2 * 6 + 1 and not any(parameter.any() for parameter in biases.values())
    model = GPT(config(tie_embeddings=False, vocab_size=5000, positions="learned", max_positions=3000))
    for weight in (model.head.weight, model.embedding.weight, model.positions.weight):
        assert weight.std().item() == pytest.approx(0.55 / 4, rel=0.03)
    assert not torch.equal(model.head.weight, model.embedding.weight)


def test_biases_and_gains_have_one_dimension(name):
    """That is how the optimizer knows what not to decay."""
    for key, parameter in GPT(config(**PUBLISHED[name])).named_parameters():
        is_vector = key.endswith("bias") or key.endswith("norm.weight")
        assert parameter.ndim == (1 if is_vector else 2), key


def test_cost_by_hand():
    """Parameters with every bias; FLOPs of products alone, of which an embedding is none."""
    d, ff, context = 16, 64, 32
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * ff + ff) + (ff * d + d) + 4 * d
    cost = model_cost(config(**PUBLISHED["gpt2"]), context)
    assert cost.parameters == 2 * block + V * d + 64 * d + 2 * d
    products, attention = 2 * (4 * d * d + 2 * d * ff) + V * d, 2 * d * context
    assert cost.flops_forward == 2 * products + 2 * attention
    ff = 24
    block = 4 * 8 * d + 2 * 8 * d + 3 * d * ff + 2 * d
    cost = model_cost(config(**PUBLISHED["llama"]), context)
    assert cost.parameters == 2 * block + 2 * V * d + d
    assert cost.flops_forward == 2 * (2 * (block - 2 * d) + V * d) + 2 * attention
    inner, ff = 2 * 12, 40
    block = d * (inner + 2 * 12) + inner * d + 3 * d * ff + 2 * d + 2 * 12
    cost = model_cost(config(**PUBLISHED["qwen3"]), context)
    assert cost.parameters == 2 * block + V * d + d
    assert cost.flops_forward == 2 * (2 * (block - 2 * d - 24) + V * d) + 2 * (2 * inner * context)
    assert cost.state_bytes == 2 * 4 * 2 * 12 * context
    assert cost.flops_step == cost.flops_forward + 4 * (2 * (block - 2 * d - 24) + V * d) + 2 * (5 * inner * context)


def test_the_default_is_what_it_was():
    """Names and the first number of each tensor of a model that lcpt drew before it had these options."""
    attention = AttentionConfig(pattern=["polysketch", "softmax"], block_size=4)
    torch.manual_seed(0)
    found = {key: tensor.flatten()[0].item() for key, tensor in GPT(config(attention=attention)).state_dict().items()}
    block = ["attention_norm.weight", "attention.key_shift", "attention.gamma", "attention.qkv.weight"]
    block += [f"attention.{x}_norm.{y}" for x in "qk" for y in ("weight", "bias")] + ["attention.out.weight"]
    block += ["attention.sketch.P", "feed_forward_norm.weight", "feed_forward.up.weight", "feed_forward.down.weight"]
    names = [f"blocks.{layer}.{key}" for layer in (0, 1) for key in block]
    names = [key for key in names if not key.startswith(("blocks.1.attention.gamma", "blocks.1.attention.sketch"))]
    assert list(found) == ["embedding.weight", *names, "norm.weight"]
    assert found == pytest.approx(
        dict.fromkeys((key for key in found if "norm" in key and "weight" in key), 1.0)
        | dict.fromkeys((key for key in found if "norm" in key and "bias" in key), 0.0)
        | {
            "embedding.weight": 0.17277278006076813,
            "blocks.0.attention.key_shift": 0.5,
            "blocks.0.attention.gamma": 0.07563565671443939,
            "blocks.0.attention.qkv.weight": -0.38134491443634033,
            "blocks.0.attention.out.weight": -0.020756911486387253,
            "blocks.0.attention.sketch.P": 0.0,
            "blocks.0.feed_forward.up.weight": 0.01675551012158394,
            "blocks.0.feed_forward.down.weight": 0.062953881919384,
            "blocks.1.attention.key_shift": 0.5,
            "blocks.1.attention.qkv.weight": -0.12992671132087708,
            "blocks.1.attention.out.weight": -0.08695846796035767,
            "blocks.1.feed_forward.up.weight": 0.0012987609952688217,
            "blocks.1.feed_forward.down.weight": 0.07868187129497528,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"norm": "batch_norm"}, "model.norm is 'batch_norm'; it is layer_norm, rms_norm"),
        ({"norm_eps": 0.0}, "norm_eps is 0"),
        ({"feed_forward": "relu"}, "feed_forward is 'relu'; it is geglu, swiglu, gelu_tanh"),
        ({"positions": "alibi"}, "positions is 'alibi'"),
        ({"positions": "learned"}, "positions is learned and model.max_positions None"),
        ({"max_positions": 8}, "positions is rotary and model.max_positions 8"),
        ({"positions": "learned", "max_positions": 0}, "max_positions is 0"),
    ],
    ids=str,
)
def test_impossible_options_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)


@pytest.mark.parametrize(
    "changes, named",
    [({"head_dim": 7}, "head_dim is 7"), ({"qk_norm": "l2"}, "qk_norm is 'l2'"), ({"qk_norm_eps": -1.0}, "eps is -1")],
    ids=str,
)
def test_impossible_options_of_attention_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(AttentionConfig(), **changes)


def test_a_sequence_longer_than_learned_positions_is_named():
    model = build("gpt2", max_positions=8)
    with pytest.raises(ValueError, match="9 tokens exceeds model.max_positions 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    _, cache = model.prefill(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="9 tokens"):
        model.decode(torch.zeros(1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="data.context 64 exceeds model.max_positions 63"):
        Config(
            run=RunConfig("-"),
            model=config(positions="learned", max_positions=63),
            data=DataConfig(path="-", context=64),
        )
