"""A folder prepared with a tokenizer.json: it has the file, its hash, documents apart, and ids of any size."""

import json
import shutil

import numpy as np
import pytest

from lcpt.data import Corpus, DataError, open_tokenizer, prepare, verify
from tests.tiny_tokenizers import byte_level, change, with_fallback

TEXTS = ["The house <|endoftext|> walked\n", "naïve 🐟 <s> </s>", " a ▁ mark "]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n")
    return tmp_path / "text.jsonl"


@pytest.fixture
def tokenizer(tmp_path):
    """Under a name of its own: the folder's copy is called tokenizer.json."""
    return byte_level(tmp_path / "gpt2.json")


@pytest.fixture
def folder(source, tokenizer, tmp_path):
    prepare([source], tmp_path / "data", tokenizer=tokenizer)
    return tmp_path / "data"


def test_the_folder_holds_it_and_every_document(folder, tokenizer):
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    corpus, opened = Corpus(folder), open_tokenizer(tokenizer)
    assert corpus.tokenizer == folder / "tokenizer.json" and corpus.tokenizer_sha256 == opened.sha256
    assert corpus.attachments == {"tokenizer.json": folder / "tokenizer.json"}
    assert (corpus.vocab_size, corpus.bos_id) == (opened.vocab_size, opened.bos_id)
    assert corpus.manifest["documents_not_exact"] == 0 and set(verify(folder).values()) == {""}
    assert opened.decode(corpus.read(0, corpus.tokens)) == "".join(TEXTS)


def test_no_text_separates_documents(folder):
    """Though one of them holds the separator's own text."""
    corpus = Corpus(folder)
    stream = corpus.read(0, corpus.tokens)
    assert np.flatnonzero(stream == corpus.bos_id).tolist() == corpus.document_starts(0, corpus.tokens).tolist()
    assert (stream == corpus.bos_id).sum() == len(TEXTS)


def test_a_document_that_does_not_come_back_is_counted(source, tmp_path):
    prepare([source], tmp_path / "data", tokenizer=with_fallback(tmp_path / "tokenizer.json"))
    assert Corpus(tmp_path / "data").manifest["documents_not_exact"] == 1  # the one with SentencePiece's mark


def test_workers_write_the_same_bytes(source, folder, tokenizer, tmp_path):
    prepare([source], tmp_path / "again", tokenizer=tokenizer, workers=2)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_damage_to_the_tokenizer_is_named(folder, tmp_path, damage):
    path = folder / "tokenizer.json"
    if damage == "missing":
        path.unlink()
    else:
        change(path, model={"fuse_unk": True})
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Corpus(folder)
    assert sum("tokenizer.json" in line for line in verify(folder).values()) == 1


def test_a_second_tokenizer_is_no_file_of_the_folder(folder, train_folder):
    shutil.copyfile(train_folder / "tokenizer.model", folder / "tokenizer.model")
    assert any(verify(folder).values())


def test_an_unusable_tokenizer_leaves_nothing(source, tokenizer, tmp_path):
    with pytest.raises(DataError, match="dropout"):
        prepare([source], tmp_path / "data", tokenizer=change(tokenizer, model={"dropout": 0.5}))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("largest, dtype", [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_beyond_two_bytes_are_kept(source, tokenizer, tmp_path, largest, dtype):
    """The separator has the largest id."""
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"] | {"<|endoftext|>": largest}
    added = [content["added_tokens"][0] | {"id": largest}]
    change(tokenizer, added_tokens=added, model={"vocab": vocabulary})
    prepare([source], tmp_path / "data", tokenizer=tokenizer)
    corpus = Corpus(tmp_path / "data")
    assert corpus.manifest["dtype"] == dtype and corpus.vocab_size == largest + 1
    assert corpus.document(1)[1][0] == corpus.bos_id == largest


def test_the_command_takes_it(call_program, source, tokenizer, tmp_path):
    code, said, warned = call_program(
        "tools/prepare_data.py", "--input", source, "--output", tmp_path / "data", "--tokenizer", tokenizer
    )
    assert code == 0 and f"vocabulary              {open_tokenizer(tokenizer).vocab_size}" in said
    assert "does not give" not in warned
