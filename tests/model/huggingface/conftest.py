"""Exports of small models that transformers opens, with nothing of it in the home folder and nothing from a network."""

import os
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
