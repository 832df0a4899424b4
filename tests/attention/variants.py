"""The kinds of attention in every form that tests hold, and how a layer of one is built."""

import torch

from lcpt.attention import ATTENTION, Attention, AttentionConfig
from lcpt.attention.base import LinearCost, rotary_table
from lcpt.attention.feature_maps import FEATURE_MAPS
from lcpt.attention.summaries import SummariesConfig

BLOCK, D_MODEL, HEADS, HEAD_DIM = 4, 16, 4, 4
VARIANTS = {
    "softmax": ("softmax", {}),
    "softmax-window": ("softmax", {"window": 3}),
    "polynomial-2": ("polynomial", {"degree": 2}),
    "polynomial-2-no-shift": ("polynomial", {"degree": 2, "shift": 0.0}),
    "polynomial": ("polynomial", {}),
    "polynomial-no-shift": ("polynomial", {"shift": 0.0}),
    "polynomial-8": ("polynomial", {"degree": 8}),
    "polysketch": ("polysketch", {"size": 8}),
    "polysketch-2-blocks": ("polysketch", {"size": 8, "local_blocks": 2}),
    "polysketch-learned": ("polysketch", {"size": 8, "sketch": "learned", "levels": 2, "expansion": 3}),
    "polysketch-products": ("polysketch", {"size": 8, "sketch": "linear_products"}),
    "polysketch-no-shift": ("polysketch", {"size": 8, "sketch": "learned", "shift": 0.0}),
    "polysketch-gaussian": ("polysketch", {"size": 8, "sketch": "gaussian"}),
    "polysketch-srht": ("polysketch", {"size": 8, "sketch": "srht"}),
    "kernel-elu1": ("kernel", {"feature_map": "elu1"}),
    "kernel-relu": ("kernel", {"feature_map": "relu", "size": 6}),
    "kernel-favor": ("kernel", {"feature_map": "favor"}),
    "kernel-hedgehog": ("kernel", {"feature_map": "hedgehog"}),
    "kernel-sketch": ("kernel", {"feature_map": "sketch", "size": 9}),
    "lowrank": ("lowrank", {"summaries": SummariesConfig(number=2)}),
    "lowrank-table": ("lowrank", {"summaries": SummariesConfig(number=2, projection="table")}),
    "flurka-elu1": ("flurka", {"summaries": SummariesConfig(number=2)}),
    "flurka-favor": ("flurka", {"summaries": SummariesConfig(number=2), "feature_map": "favor"}),
    "flurka-table": ("flurka", {"summaries": SummariesConfig(2, "table"), "feature_map": "relu"}),
    "flurka-linear": ("flurka", {"summaries": SummariesConfig(3), "feature_map": "hedgehog", "local": "linear"}),
    "flurka-sketch": ("flurka", {"summaries": SummariesConfig(number=2), "feature_map": "sketch", "size": 9}),
    "fastmax-1": ("fastmax", {"order": 1}),
    "fastmax-2": ("fastmax", {"order": 2}),
    "feedforward-ffn": ("feedforward", {"map": "ffn"}),
    "feedforward-oglu": ("feedforward", {"map": "oglu", "layers": 2}),
    "feedforward-aoglu": ("feedforward", {"map": "aoglu"}),
    "sparse_qk-random": ("sparse_qk", {"keep": "random"}),
    "sparse_qk-learned": ("sparse_qk", {"keep": "learned"}),
    "sparse_hash-lsh": ("sparse_hash", {"hash": "lsh", "buckets": 2}),
    "sparse_hash-learned": ("sparse_hash", {"hash": "learned", "buckets": 2}),
    "sparse_hash-window": ("sparse_hash", {"hash": "lsh", "buckets": 2, "window": 3}),
}
FEATURES_IN = {name for _, own in VARIANTS.values() if (name := own.get("feature_map"))}
VARIANTS |= {
    f"{kind}-{name}": (kind, {"feature_map": name, **own})
    for name in FEATURE_MAPS
    if name not in FEATURES_IN
    for kind, own in (("kernel", {}), ("flurka", {"summaries": SummariesConfig(number=2)}))
}
VARIANTS |= {kind: (kind, {}) for kind in ATTENTION if kind not in {kind for kind, _ in VARIANTS.values()}}
NOT_ALL = [name for name in VARIANTS if name.startswith("sparse") or name == "softmax-window"]  # of the earlier tokens
DECIDING = [  # choose keys by scores, so that rounding may change the choice
    "sparse_qk-learned",
    "sparse_hash-lsh",
    "sparse_hash-learned",
    "sparse_hash-window",
]


def attention_config(variant, gate="none") -> AttentionConfig:
    kind, own = VARIANTS[variant]
    config = AttentionConfig(kind=kind, block_size=BLOCK)
    for name, value in own.items():
        setattr(getattr(config, kind), name, value)
    config.gate = gate
    return config


LINEAR = [name for name in VARIANTS if issubclass(attention_config(name).attention_of_layer(0), LinearCost)]


def build(variant, kv_heads=HEADS, gate="none", key_shift=True) -> Attention:
    torch.manual_seed(0)
    config = attention_config(variant, gate)
    config.key_shift = key_shift
    return config.attention_of_layer(0)(D_MODEL, HEADS, kv_heads, config)


def rotary(tokens):
    return rotary_table(torch.arange(tokens), HEAD_DIM, 10_000.0)
