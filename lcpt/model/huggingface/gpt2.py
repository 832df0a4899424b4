"""GPT-2 of transformers: learned positions, LayerNorm and GELU with biases, matrices stored [inputs, outputs]."""

from __future__ import annotations

from lcpt.attention import AttentionConfig
from lcpt.model.gpt import ModelConfig
from lcpt.model.huggingface.architecture import Architecture
from lcpt.model.huggingface.import_settings import Settings
from lcpt.model.huggingface.import_tensors import Made, Source, one

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
HARMLESS = frozenset(
    "attn_pdrop embd_pdrop n_ctx reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout"
    " summary_proj_to_labels summary_type summary_use_proj".split()
)


def read_config(settings: Settings) -> tuple[ModelConfig, int]:
    context = settings.size("n_positions", 1024)
    settings.require("scale_attn_weights", True, True, "lcpt's scores are q·k / √d")
    settings.require("scale_attn_by_inverse_layer_idx", False, False, "lcpt's scores are q·k / √d in every layer")
    settings.require("add_cross_attention", False, False, "lcpt's models have decoders alone")
    config = ModelConfig(
        n_layers=settings.size("n_layer", 12),
        d_model=settings.size("n_embd", 768),
        n_heads=settings.size("n_head", 12),
        vocab_size=settings.size("vocab_size", 50257),
        norm="layer_norm",
        norm_eps=settings.positive("layer_norm_epsilon", 1e-5),
        feed_forward=settings.choice("activation_function", ACTIVATIONS, "gelu_new"),
        d_ff=settings.size_if_there("n_inner"),
        bias=True,
        tie_embeddings=settings.flag("tie_word_embeddings", True),
        positions="learned",
        max_positions=context,
        attention=AttentionConfig("softmax", key_shift=False, qk_norm="none", bias=True),
    )
    return config, context


def recipe(config: ModelConfig) -> dict[str, Made]:
    d, wide = config.d_model, config.ff_width
    made = {
        "embedding.weight": one("wte.weight", config.vocab_size, d),
        "positions.weight": one("wpe.weight", config.max_positions or 0, d),
    }
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        made |= _affine(f"{ours}.attention_norm", f"{theirs}.ln_1", d)
        made |= _affine(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", d, 3 * d)
        made |= _affine(f"{ours}.attention.out", f"{theirs}.attn.c_proj", d, d)
        made |= _affine(f"{ours}.feed_forward_norm", f"{theirs}.ln_2", d)
        made |= _affine(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", d, wide)
        made |= _affine(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", wide, d)
    made |= _affine("norm", "ln_f", d)
    if not config.tie_embeddings:
        made["head.weight"] = one("lm_head.weight", config.vocab_size, d)
    return made


def _affine(ours: str, theirs: str, *shape: int) -> dict[str, Made]:
    """A weight and its bias; a matrix of theirs is [inputs, outputs]."""
    return {
        f"{ours}.weight": Made((Source(f"{theirs}.weight", shape),), transposed=len(shape) == 2),
        f"{ours}.bias": one(f"{theirs}.bias", shape[-1]),
    }


GPT2 = Architecture(
    classes=("GPT2LMHeadModel", "GPT2Model"),
    read_config=read_config,
    harmless=HARMLESS,
    recipe=recipe,
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, which older versions saved
    embedding="wte.weight",
)
