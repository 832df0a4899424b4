"""Texts come back from a tokenizer.json of each kind, their bytes are counted, and none makes a separator."""

import json
import random
import shutil

import numpy as np
import pytest
import tokenizers

from lcpt.data import DataError, Tokenizer, open_tokenizer
from lcpt.data.json_tokenizer import SEPARATORS, JsonTokenizer
from tests.data.test_tokenizer import AWKWARD, random_texts
from tests.tiny_tokenizers import byte_level, change, with_fallback

KINDS = {
    "byte level": byte_level,
    "prepends a blank": with_fallback,
    "fallback alone": lambda path: with_fallback(path, prepend=False),
}


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path):
    return open_tokenizer(path)


@pytest.fixture
def mine(tmp_path):
    """A byte-level one to change."""
    return byte_level(tmp_path / "tokenizer.json")


def test_it_is_opened_by_its_name(path, prepared):
    tokenizer = open_tokenizer(str(path))
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.path == path and len(tokenizer.sha256) == 64
    described = json.loads(path.read_text())
    ids = [*described["model"]["vocab"].values(), *(token["id"] for token in described["added_tokens"])]
    assert tokenizer.vocab_size == max(ids) + 1
    assert isinstance(open_tokenizer(prepared / "tokenizer.model"), Tokenizer)


@pytest.mark.parametrize("text", [*AWKWARD, *random_texts(60)])
def test_texts_come_back_and_their_bytes_are_counted(tokenizer, text):
    """Two things are lost: the mark itself, which means a blank, and nothing else."""
    tokens = tokenizer.encode(text)
    expected = text if "ByteLevel" in described(tokenizer) else text.replace("▁", " ")
    assert tokenizer.decode([tokenizer.bos_id, *tokens]) == expected
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int64 and sizes.shape == (tokenizer.vocab_size,) and sizes[tokenizer.bos_id] == 0
    prepended = bool(tokens) and "Prepend" in described(tokenizer)
    assert sizes[tokens].sum() == len(expected.encode()) + prepended


def described(tokenizer):
    return tokenizer.path.read_text()


def test_it_encodes_and_decodes_as_the_library(tokenizer, path):
    """Where there is no special token's text, and characters are whole."""
    library = tokenizers.Tokenizer.from_file(str(path))
    for text in [text for text in (*AWKWARD, *random_texts(100)) if "<s>" not in text]:
        tokens = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokens and tokenizer.decode(tokens) == library.decode(tokens)


def test_broken_characters_and_numbers_beyond_the_vocabulary_decode(tokenizer):
    rare = tokenizer.encode("𝔸")[-4:]  # a token a byte
    assert tokenizer.decode([*rare[:3], *rare, tokenizer.vocab_size, 10**6]) == "\ufffd𝔸"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.bos_id]) == ""
    assert tokenizer.decode(np.array(rare)) == "𝔸"


def test_no_text_becomes_a_special_token(tokenizer):
    special = {token["id"] for token in json.loads(described(tokenizer))["added_tokens"] if token["special"]}
    draw = random.Random(3)
    for _ in range(200):
        text = "".join(draw.choices([*SEPARATORS, "<unk>", " ", "a", "<", "|", "\n", "é"], k=6))
        tokens = tokenizer.encode(text)
        assert not special & set(tokens) and tokenizer.decode(tokens) == text


def test_an_added_token_that_is_not_special_is_text(mine):
    tokenizer = open_tokenizer(mine)
    tokens = tokenizer.encode("a<think>b")
    assert len(tokens) == 3 and tokenizer.token_bytes()[tokens].tolist() == [1, 7, 1]
    assert tokenizer.decode(tokens) == "a<think>b"


@pytest.mark.parametrize(
    "special, first",
    [
        (["<|endoftext|>", "<|begin_of_text|>"], "<|begin_of_text|>"),
        (["</s>", "<s>", "<pad>"], "<s>"),
        (["<eos>", "<bos>"], "<bos>"),
        (["<|im_start|>", "<|endoftext|>"], "<|endoftext|>"),
    ],
)
def test_the_separator_is_the_first_of_the_list(tmp_path, special, first):
    tokenizer = open_tokenizer(byte_level(tmp_path / "tokenizer.json", special))
    assert tokenizer.bos == first and tokenizer.bos_id == special.index(first)


def test_documents_are_not_cut_or_padded(mine):
    """Whatever the file says of batches for another model."""
    library = tokenizers.Tokenizer.from_file(str(mine))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(mine))
    tokenizer = open_tokenizer(mine)
    text = "the birds sang to the house"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.bos_id not in tokenizer.encode(text)


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        open_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}


@pytest.mark.parametrize(
    "changes, remark",
    [
        ({"model": {"dropout": 0.1}}, "model.dropout 0.1 encodes at random; set it to null"),
        ({"decoder": None}, "is BPE with decoder none; known are byte-level BPE"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "is BPE with decoder WordPiece"),
        ({"decoder": {"type": "ByteFallback"}}, "is BPE with decoder ByteFallback"),  # the model has none
        ({"added_tokens": []}, "has none of the special tokens <|begin_of_text|> <s>"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(mine, changes, remark):
    assert remark in refusal(change(mine, **changes))


def test_another_model_is_named(mine):
    content = json.loads(mine.read_text())
    mine.write_text(json.dumps(content | {"model": UNIGRAM}))
    assert "is Unigram with decoder ByteLevel" in refusal(mine)


def test_a_separator_that_text_can_make_is_refused(mine):
    """Such as one that the model itself puts together."""
    content = json.loads(mine.read_text())
    token = len(content["model"]["vocab"]) + 10
    content["model"]["vocab"] |= {"<s": token, "<s>": token + 1}
    content["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    content["pre_tokenizer"]["use_regex"] = False
    content["added_tokens"] = [content["added_tokens"][0] | {"id": token + 1, "content": "<s>"}]
    mine.write_text(json.dumps(content))
    assert "makes its separator <s> from text, too" in refusal(mine)


@pytest.mark.parametrize("damage", ["empty", "half", "a byte", "no JSON", "list", "absent"])
def test_a_damaged_file_is_named(mine, damage):
    content = mine.read_bytes()
    place = content.index(b'"vocab"')
    files = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a byte": content[:place] + b"\xff" + content[place + 1 :],
        "no JSON": b"tokenizer",
        "list": b"[]",
    }
    if damage == "absent":
        mine.unlink()
    else:
        mine.write_bytes(files[damage])
    refusal(mine)


def test_a_copy_has_the_same_hash(path, tokenizer, tmp_path):
    shutil.copyfile(path, tmp_path / "copy.json")
    assert open_tokenizer(tmp_path / "copy.json").sha256 == tokenizer.sha256
