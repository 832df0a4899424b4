"""Llama of transformers, 1 to 3: rotary positions, RMSNorm, SwiGLU, grouped queries. What Qwen3 shares is public."""

from __future__ import annotations

from lcpt.attention import AttentionConfig
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.model.gpt import ModelConfig
from lcpt.model.huggingface.architecture import Architecture
from lcpt.model.huggingface.import_rope import read_rope
from lcpt.model.huggingface.import_settings import Settings
from lcpt.model.huggingface.import_tensors import Made, Source, one

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
BUFFERS = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # a function of the config, which older versions saved


def read_config(settings: Settings) -> tuple[ModelConfig, int]:
    return read_decoder(
        settings, vocab_size=32000, d_ff=11008, context=2048, head_dim=None, bias=settings.flag("mlp_bias")
    )


def read_decoder(
    settings: Settings,
    *,
    vocab_size: int,
    d_ff: int,
    context: int,
    head_dim: int | None,
    bias: bool = False,
    qk_norm: str = "none",
    window: int | None = None,
) -> tuple[ModelConfig, int]:
    """Read what Llama and Qwen3 share. vocab_size to head_dim: defaults, which are transformers'."""
    context = settings.size("max_position_embeddings", context)
    d_model, n_heads = settings.size("hidden_size", 4096), settings.size("num_attention_heads", 32)
    head_dim = settings.size("head_dim", head_dim or d_model // n_heads)
    rope_base, rope_scaling = read_rope(settings, context)
    eps = settings.positive("rms_norm_eps", 1e-6)
    config = ModelConfig(
        n_layers=settings.size("num_hidden_layers", 32),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=settings.size("num_key_value_heads", n_heads),
        vocab_size=settings.size("vocab_size", vocab_size),
        norm="rms_norm",
        norm_eps=eps,
        feed_forward=settings.choice("hidden_act", ACTIVATIONS, "silu"),
        d_ff=settings.size("intermediate_size", d_ff),
        bias=bias,  # an RMSNorm has none: of the feed-forward network alone
        tie_embeddings=settings.flag("tie_word_embeddings", False),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        attention=AttentionConfig(
            "softmax",
            key_shift=False,
            head_dim=None if head_dim == d_model // n_heads else head_dim,
            bias=settings.flag("attention_bias"),
            qk_norm=qk_norm,
            qk_norm_eps=eps,
            softmax=SoftmaxConfig(window),
        ),
    )
    return config, context


def recipe(config: ModelConfig) -> dict[str, Made]:
    """Return the tensors of Llama; the gate's rows come before those that it multiplies, and heads lie as in ours."""
    d, wide = config.d_model, config.ff_width
    q, kv = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
    made = {"embedding.weight": one("embed_tokens.weight", config.vocab_size, d)}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        made |= _affine(
            f"{ours}.attention.qkv",
            {f"{attention}.q_proj": (q, d), f"{attention}.k_proj": (kv, d), f"{attention}.v_proj": (kv, d)},
            config.attention.bias,
        )
        made |= _affine(f"{ours}.attention.out", {f"{attention}.o_proj": (d, q)}, config.attention.bias)
        made |= _affine(
            f"{ours}.feed_forward.up", {f"{mlp}.gate_proj": (wide, d), f"{mlp}.up_proj": (wide, d)}, config.bias
        )
        made |= _affine(f"{ours}.feed_forward.down", {f"{mlp}.down_proj": (d, wide)}, config.bias)
        made[f"{ours}.attention_norm.weight"] = one(f"{theirs}.input_layernorm.weight", d)
        made[f"{ours}.feed_forward_norm.weight"] = one(f"{theirs}.post_attention_layernorm.weight", d)
    made["norm.weight"] = one("norm.weight", d)
    if not config.tie_embeddings:
        made["head.weight"] = one("lm_head.weight", config.vocab_size, d)
    return made


def _affine(ours: str, parts: dict[str, tuple[int, int]], bias: bool) -> dict[str, Made]:
    """A matrix of theirs, or several below each other, [outputs, inputs], and the bias if there is one."""
    made = {f"{ours}.weight": Made(tuple(Source(f"{name}.weight", shape) for name, shape in parts.items()))}
    if bias:
        made[f"{ours}.bias"] = Made(tuple(Source(f"{name}.bias", shape[:1]) for name, shape in parts.items()))
    return made


LLAMA = Architecture(
    classes=("LlamaForCausalLM", "LlamaModel"),
    read_config=read_config,
    harmless=frozenset({"attention_dropout", "is_llama_config", "pretraining_tp"}),
    recipe=recipe,
    prefix="model.",
    ignored=BUFFERS,
    embedding="embed_tokens.weight",
)
