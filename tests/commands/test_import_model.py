"""`lcpt import`: says what it made, whose commands then take it; bad input is one line and exit code 2."""

import json
import sys

import pytest
import torch

from lcpt.commands import main as entry
from tests.tiny_tokenizers import byte_level


@pytest.fixture
def lcpt(monkeypatch, capsys):
    def call(*words):
        capsys.readouterr()  # what transformers said
        monkeypatch.setattr(sys, "argv", ["lcpt", *map(str, words)])
        code = entry.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install lcpt[test]")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=416, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    byte_level(tmp_path / "theirs/tokenizer.json")
    return tmp_path / "theirs"


def test_it_says_what_it_made_and_generate_takes_it(lcpt, folder, tmp_path):
    code, table, _ = lcpt("import", "--from", folder, "--output", tmp_path / "export")
    rows = dict(line.split(maxsplit=1) for line in table.splitlines() if not line.startswith("between"))
    assert code == 0 and rows["architecture"] == "gpt2" and rows["parameters"].endswith("fp32 (widened from bf16)")
    assert "64 tokens" in table and "416 embeddings" in table and "<|endoftext|> (token 0)" in table
    code, text, _ = lcpt("generate", "--checkpoint", tmp_path / "export", "--prompt", "naïve", "--max-tokens", 9)
    assert code == 0 and text.startswith("naïve")


def test_bad_input_is_one_line(lcpt, folder, tmp_path):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bert"}))
    for source in (folder, tmp_path / "absent"):
        code, said, error = lcpt("import", "--from", source, "--output", tmp_path / "export")
        assert (code, said) == (2, "") and error.startswith("error: ") and len(error.splitlines()) == 1
        assert str(source) in error
    assert not (tmp_path / "export").exists()
