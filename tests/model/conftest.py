"""A run that was trained a little, and its export."""

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.checkpoint import Slice, commit_checkpoint, open_partial, write_piece
from lcpt.config import Config, to_yaml
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.pretrained import write_export
from lcpt.model.rope_scaling import Llama3Config, RopeScalingConfig
from lcpt.training.run_folder import RunConfig

PUBLISHED = {  # the options of models that others have published, in a small shape
    "gpt2": dict(
        feed_forward="gelu_tanh",
        bias=True,
        positions="learned",
        max_positions=64,
        attention=AttentionConfig("softmax", key_shift=False, qk_norm="none", bias=True),
    ),
    "llama": dict(
        n_kv_heads=1,
        norm="rms_norm",
        norm_eps=1e-6,
        feed_forward="swiglu",
        d_ff=24,
        tie_embeddings=False,
        rope_base=500.0,
        rope_scaling=RopeScalingConfig("llama3", llama3=Llama3Config(factor=4.0, original_context=32)),
        attention=AttentionConfig("softmax", key_shift=False, qk_norm="none"),
    ),
    "qwen3": dict(
        n_kv_heads=1,
        norm="rms_norm",
        norm_eps=1e-6,
        feed_forward="swiglu",
        attention=AttentionConfig("softmax", key_shift=False, qk_norm="rms_norm", qk_norm_eps=1e-6, head_dim=12),
    ),
}
FILES = ("model.safetensors", "config.json", "tokenizer.model")
V = 50


def config(kind="polysketch", sketch="learned", **changes):
    attention = AttentionConfig(kind=kind, block_size=4, polysketch=PolysketchConfig(sketch=sketch, size=8))
    shape = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": V, "attention": attention}
    return ModelConfig(**shape | changes)


CONFIGS = {kind: config(kind) for kind in ATTENTION} | {
    **{name: config(**options) for name, options in PUBLISHED.items()},
    "gaussian": config(sketch="gaussian"),
    "nothing by default": config(
        n_layers=5,
        n_heads=4,
        n_kv_heads=2,
        d_ff=24,
        rope_base=500.0,
        activation_checkpointing=True,
        attention=AttentionConfig(
            kind="softmax",
            pattern=["polysketch", "polynomial", "softmax"],
            block_size=8,
            polynomial=PolynomialConfig(degree=2),
            polysketch=PolysketchConfig(sketch="gaussian", size=6, expansion=3, local_blocks=2),
        ),
    ),
}


@pytest.fixture
def make_run(tmp_path):
    """make_run(config, name="run") -> (run folder of a model after 7 steps, that model)."""

    def make(model_config=None, name="run"):
        model = GPT(model_config or config())
        with torch.no_grad():
            for tensor in model.state_dict().values():
                # No weight is what GPT() begins with, nor a seed.
                tensor.add_(1 if tensor.dtype == torch.int64 else 0.1 * torch.randn_like(tensor))
        run = tmp_path / name
        run.mkdir()
        whole = Config(run=RunConfig("unused"), model=model.config, data=DataConfig(path="unused", context=64))
        (run / "config.yaml").write_text(to_yaml(whole))
        (run / "tokenizer.model").write_text("a tokenizer")
        attachments = {file: run / file for file in ("config.yaml", "tokenizer.model")}
        weights = [Slice(n, tuple(x.shape), 0, x.flatten()) for n, x in model.state_dict().items()]
        partial = open_partial(run / "checkpoints", 7)
        commit_checkpoint(
            partial, 7, [write_piece(partial, 0, {"weights": weights})], {"step": 7, "tokens": 700}, attachments
        )
        return run, model

    return make


@pytest.fixture
def run(make_run):
    return make_run()[0]


@pytest.fixture
def export(run, tmp_path):
    """An export folder of its own."""
    write_export(run, tmp_path / "export")
    return tmp_path / "export"
