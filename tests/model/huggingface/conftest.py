"""Tiny models of transformers with random weights, saved as published ones are, each with a tokenizer."""

import json
import shutil

import pytest
import torch

from tests.tiny_tokenizers import byte_level

V, CONTEXT = 416, 1024  # the tokenizer has fewer tokens
SHAPE = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=V,
    max_position_embeddings=CONTEXT,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=256)
MODELS = {  # name -> (model_type, options of its config)
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", dict(tie_word_embeddings=False, n_inner=88, activation_function="gelu_pytorch_tanh")),
    "llama 2": ("llama", dict(num_key_value_heads=4)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3, rms_norm_eps=1e-5)),
    "llama tied": ("llama", dict(tie_word_embeddings=True, head_dim=24, num_key_value_heads=1)),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10_000.0))),
    "llama yarn": ("llama", dict(rope_parameters=YARN)),
    "llama deepseek": ("llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.1, beta_fast=20.0))),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "qwen3 tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, attention_bias=True)),
    "qwen3 window": ("qwen3", dict(head_dim=16, use_sliding_window=True, sliding_window=40, max_window_layers=0)),
}


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """theirs(name) -> (model of MODELS in fp32, its folder, which is not to be changed)."""
    transformers = pytest.importorskip("transformers", reason="pip install lcpt[test]")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}

    def make(name):
        if name not in made:
            kind, options = MODELS[name]
            gpt2 = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=V, n_positions=CONTEXT, bos_token_id=0)
            shape = gpt2 | dict(eos_token_id=0) if kind == "gpt2" else SHAPE
            config = {"gpt2": "GPT2Config", "llama": "LlamaConfig", "qwen3": "Qwen3Config"}[kind]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape | options))
            with torch.no_grad():
                for parameter in model.parameters():  # a gain of one or a bias of zero would hide that it is not used
                    parameter.add_(0.05 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp("theirs") / name.replace(" ", "-")
            model.save_pretrained(folder)
            byte_level(folder / "tokenizer.json")
            made[name] = model.eval(), folder
        return made[name]

    return make


@pytest.fixture
def copy(theirs, tmp_path):
    """copy(name) -> a copy of its folder to change."""

    def make(name):
        return shutil.copytree(theirs(name)[1], tmp_path / "copy", dirs_exist_ok=True)

    return make


def edit(folder, **keys):
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    content = {key: value for key, value in (json.loads(path.read_text()) | keys).items() if value is not None}
    path.write_text(json.dumps(content))
    return folder
