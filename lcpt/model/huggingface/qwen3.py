"""Qwen3 of transformers: Llama with an RMSNorm of every head's queries and keys, and perhaps a sliding window."""

from __future__ import annotations

from dataclasses import replace

from lcpt.model.gpt import ModelConfig
from lcpt.model.huggingface import llama
from lcpt.model.huggingface.import_settings import Settings
from lcpt.model.huggingface.import_tensors import Made, one

FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(settings: Settings) -> tuple[ModelConfig, int]:
    return llama.read_decoder(
        settings,
        vocab_size=151936,
        d_ff=22016,
        context=32768,
        head_dim=128,
        qk_norm="rms_norm",
        window=_window(settings),
    )


def _window(settings: Settings) -> int | None:
    """Return the window of all layers. CheckpointError where some have one: lcpt has one setting for all of softmax."""
    layers, given = settings.size("num_hidden_layers", 32), settings.names("layer_types")
    window = settings.size("sliding_window", 4096) if settings.flag("use_sliding_window") else None
    without = settings.size("max_window_layers", 28, least=0) if window else layers
    types = given or [FULL if layer < without else SLIDING for layer in range(layers)]
    key = "layer_types" if given else "max_window_layers"
    if len(types) != layers:
        settings.refuse(key, f"it must name each of the {layers} layers")
    if set(types) == {FULL}:
        return None
    if set(types) != {SLIDING}:
        settings.refuse(key, "lcpt's softmax layers have a sliding window all, or none has")
    if window is None:
        settings.refuse(key, "use_sliding_window is false; they must agree")
    return window


def recipe(config: ModelConfig) -> dict[str, Made]:
    made = llama.recipe(config)
    for layer in range(config.n_layers):
        for x in "qk":
            name = f"layers.{layer}.self_attn.{x}_norm.weight"
            made[f"blocks.{layer}.attention.{x}_norm.weight"] = one(name, config.head_dim)
    return made


QWEN3 = replace(
    llama.LLAMA,
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    read_config=read_config,
    harmless=frozenset({"attention_dropout", "max_window_layers", "sliding_window"}),
    recipe=recipe,
)
