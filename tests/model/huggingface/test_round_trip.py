"""In, out and in again: weights bit for bit, and the logits and ids of transformers' own model all the way."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lcpt.data import open_tokenizer
from lcpt.model.huggingface.export import write_hf_export
from lcpt.model.huggingface.import_folder import import_folder
from lcpt.model.pretrained import open_pretrained
from tests.model.conftest import CONFIGS
from tests.model.huggingface.conftest import CONTEXT, V, load

TEXTS = ["", "The river saw\n\na  green bird.", "é 🙂 \u2581 <s>", " 12 345 "]


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3 tied"])
def test_a_published_model_goes_through(theirs, tmp_path, name):
    from transformers import AutoTokenizer

    model, folder = theirs(name)
    import_folder(folder, tmp_path / "in")
    write_hf_export(tmp_path / "in", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "again")
    first, again = (load_file(tmp_path / place / "model.safetensors") for place in ("in", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    opened = [open_pretrained(tmp_path / place) for place in ("in", "again")]
    assert opened[0].model.config == opened[1].model.config and opened[0].context == opened[1].context == CONTEXT
    tokens, found = torch.randint(V, (2, 33)), load(tmp_path / "out")
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    prompt = tokens.clamp(min=1)
    assert torch.equal(found.generate(prompt, **options), model.generate(prompt, **options))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/tokenization_lcpt.py").exists()
    tokenizer, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True),
        opened[0].open_tokenizer(),
    )
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == found.generation_config.eos_token_id == ours.bos_id
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["nothing by default", "sparse_qk", "flurka"])
def test_a_model_of_lcpt_comes_back(make_export, tmp_path, name):
    folder, ours = make_export(replace(CONFIGS[name], vocab_size=330))
    import_folder(folder, tmp_path / "again")
    found = open_pretrained(tmp_path / "again")
    assert found.model.config == ours.config and (found.context, found.step, found.tokens) == (64, 7, 700)
    state = found.model.state_dict()
    assert all(torch.equal(state[key], x) and state[key].dtype == x.dtype for key, x in ours.state_dict().items())
    assert open_tokenizer(found.tokenizer).sha256 == open_tokenizer(folder / "tokenizer.model").sha256
