"""Exports of small models that transformers opens, and tiny models of transformers; no home folder, no network."""

import json
import os
import shutil
import tempfile

import pytest
import torch
import torch.nn.functional as F

HOME = tempfile.TemporaryDirectory(prefix="lcpt-hf-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": HOME.name, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from lcpt.model import GPT  # noqa: E402  transformers, wherever it is imported, reads the environment once
from lcpt.model.huggingface.export import write_hf_export  # noqa: E402
from lcpt.model.pretrained import Pretrained, write_pretrained  # noqa: E402
from tests.model.conftest import config  # noqa: E402
from tests.tiny_tokenizers import byte_level  # noqa: E402

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


@pytest.fixture
def make_export(tmp_path, train_folder):
    """make_export(config, name="mine", **options) -> (folder that transformers opens, lcpt's model in it)."""

    def make(model_config=None, name="mine", **options):
        model = GPT(model_config or config()).eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                # No weight is what GPT() begins with, nor a seed.
                tensor.add_(1 if tensor.dtype == torch.int64 else 0.1 * torch.randn_like(tensor))
        trained = Pretrained(
            folder=tmp_path,
            model=model,
            tokenizer=train_folder / "tokenizer.model",
            context=64,
            step=7,
            tokens=700,
        )
        write_pretrained(trained, tmp_path / f"{name}-of-lcpt")
        write_hf_export(tmp_path / f"{name}-of-lcpt", tmp_path / name, **options)
        return tmp_path / name, model

    return make


@pytest.fixture
def make_model(make_export):
    """make_model(config) -> (transformers' model, lcpt's), in eval mode."""

    def make(model_config=None):
        folder, model = make_export(model_config)
        return load(folder), model

    return make


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def pad(rows, side, size, value):
    """Return rows of unlike lengths as one tensor [B, size], with `value` on that side of the shorter ones."""
    return torch.stack(
        [F.pad(row, (size - len(row), 0) if side == "left" else (0, size - len(row)), value=value) for row in rows]
    )
