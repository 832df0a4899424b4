"""A folder that lcpt wrote for transformers is read back bit for bit, whatever kinds of attention it has."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from lcpt.model import GPT
from lcpt.model.huggingface.import_folder import import_folder
from lcpt.model.pretrained import open_pretrained
from tests.model.conftest import config
from tests.tiny_tokenizers import byte_level

V = 416
CONFIGS = {
    "polysketch": config(vocab_size=V),
    "seeds and buffers": config(kind="sparse_hash", vocab_size=V),
    "sketch that is drawn": config(sketch="gaussian", vocab_size=V, tie_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def written(request, tmp_path):
    """(model, folder), written by hand as the agreed format is."""
    return write(GPT(CONFIGS[request.param]), tmp_path / "theirs")


def write(model, folder):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1 if tensor.dtype == torch.int64 else 0.1 * torch.randn_like(tensor))
    folder.mkdir()
    section = {"model": asdict(model.config), "context": 64, "step": 7, "tokens": 700, "lcpt_version": "0"}
    content = {"model_type": "lcpt", "architectures": ["LcptForCausalLM"], "auto_map": {"AutoModel": "x"}}
    (folder / "config.json").write_text(json.dumps(content | {"lcpt": section, "vocab_size": V}))
    tensors = {f"model.{name}": x.contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    byte_level(folder / "tokenizer.json")
    return model, folder


def test_it_is_bit_equal(written, tmp_path):
    model, folder = written
    done = import_folder(folder, tmp_path / "export")
    assert (done.model_type, done.widened) == ("lcpt", [])
    opened = open_pretrained(tmp_path / "export")
    assert opened.model.config == model.config and (opened.context, opened.step, opened.tokens) == (64, 7, 700)
    expected, found = model.state_dict(), opened.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "export/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    tokens = torch.randint(V, (2, 19))
    assert torch.equal(opened.model(tokens), model.eval()(tokens))


@pytest.fixture
def folder(tmp_path):
    return write(GPT(config(vocab_size=V)), tmp_path / "theirs")[1]


def test_a_sentencepiece_model_comes_along_where_that_is_its_tokenizer(folder, train_folder, tmp_path):
    """Beside a tokenizer.json that was made from it, the model itself is taken."""
    shutil.copyfile(train_folder / "tokenizer.model", folder / "tokenizer.model")
    import_folder(folder, tmp_path / "export")
    assert (tmp_path / "export/tokenizer.model").exists() and not (tmp_path / "export/tokenizer.json").exists()


@pytest.mark.parametrize(
    "changes, remark",
    [
        ({"lcpt": None}, "has no section lcpt.model"),
        ({"lcpt": {"context": 64}}, "has no section lcpt.model"),
        ({"lcpt": {"model": {"n_layers": 2}, "step": 1, "tokens": 1}}, "another model"),
        ({"lcpt": {"model": {"colour": 2}}}, "describes no model of this lcpt"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(folder, tmp_path, changes, remark):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=remark):
        import_folder(folder, tmp_path / "export")


@pytest.mark.parametrize("key", ["context", "step", "tokens"])
def test_a_missing_number_is_named(folder, tmp_path, key):
    content = json.loads((folder / "config.json").read_text())
    del content["lcpt"][key]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lcpt.{key} is null; it must be a whole number"):
        import_folder(folder, tmp_path / "export")


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"theirs has no tokenizer.json; write one"):
        import_folder(folder, tmp_path / "export")


def test_a_foreign_tensor_is_named(folder, tmp_path):
    save_file({"embedding.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embedding.weight has no place in a model of lcpt"):
        import_folder(folder, tmp_path / "export")
