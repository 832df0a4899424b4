"""transformers' tokenizer of an export gives lcpt's ids for any text, and the text back."""

import json

import pytest

from lcpt.data import Tokenizer
from lcpt.data.tokenizer import train_tokenizer
from lcpt.model import GPT
from lcpt.model.huggingface.export_tokenizer import SpecialTokens, special_tokens, write_tokenizer
from lcpt.model.pretrained import Pretrained
from tests.model.conftest import config

TEXTS = [
    "",
    " ",
    "\n",
    "The river saw a green bird.",
    "  two blanks,   three,\ttab ",
    "\n\nlines\n\n\n  of text\n",
    "\r\n\u0085\u2028",
    "\u2581a mark\u2581\u2581 \u2581",
    "<s>no BOS</s><unk><0x41> <s>",
    "é è ñ — “quoted” ﬁ Å A\u030a",
    "🙂🏳️‍🌈 你好 نص",
    "12345 3.14159",
    "\0\x01\ufeff\u200b\ud7ff",
    "x" * 3000,
    "a b " * 500,
]


@pytest.fixture
def tokenizers(make_export, train_folder):
    """(transformers', lcpt's)"""
    from transformers import AutoTokenizer

    folder, _ = make_export()
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True), Tokenizer(train_folder / "tokenizer.model")


def test_ids_are_lcpts_and_the_text_comes_back(tokenizers):
    theirs, ours = tokenizers
    for text in TEXTS:
        expected = ours.encode(text)
        assert theirs(text).input_ids == theirs.encode(text) == [ours.bos_id, *expected], repr(text)
        assert theirs.encode(text, add_special_tokens=False) == expected
        assert theirs.convert_tokens_to_ids(theirs.tokenize(text)) == expected
        assert theirs.decode(expected) == ours.decode(expected) == text
        assert theirs.decode([ours.bos_id, *expected], skip_special_tokens=True) == text
        assert theirs.decode([ours.bos_id, *expected]) == "<s>" + text


def test_one_token_and_unfinished_characters_decode_as_lcpts(tokenizers):
    theirs, ours = tokenizers
    tokens = ours.encode("🙂 the river")
    for end in range(len(tokens)):
        assert theirs.decode(tokens[:end]) == ours.decode(tokens[:end])
        assert theirs.decode(tokens[end]) == ours.decode(tokens[end : end + 1])
    assert theirs.decode([1, 1]) == "<s><s>" and theirs.decode(1) == "<s>"


def test_a_batch_is_padded_on_the_left_with_a_token_that_no_text_has(tokenizers):
    theirs, ours = tokenizers
    batch = theirs(["the river", "", "\u0000é"], padding=True)
    longest = max(map(len, batch.input_ids))
    for text, row, mask in zip(["the river", "", "\u0000é"], batch.input_ids, batch.attention_mask, strict=True):
        expected = [ours.bos_id, *ours.encode(text)]
        assert row == [theirs.pad_token_id] * (longest - len(expected)) + expected
        assert mask == [0] * (longest - len(expected)) + [1] * len(expected)
    assert theirs.pad_token == "<unk>" and theirs.eos_token == theirs.bos_token == "<s>"


def test_the_vocabulary_is_lcpts(tokenizers, train_folder):
    theirs, ours = tokenizers
    assert theirs.vocab_size == len(theirs) == ours.vocab_size == 330
    vocabulary = theirs.get_vocab()
    assert sorted(vocabulary.values()) == list(range(330))
    assert theirs.convert_ids_to_tokens(list(range(330))) == sorted(vocabulary, key=vocabulary.get)
    assert theirs.convert_tokens_to_ids("no such piece") == theirs.unk_token_id == 0


def test_bos_is_left_out_on_demand(make_export):
    """As lm-evaluation-harness asks for it."""
    from transformers import AutoTokenizer

    folder, _ = make_export()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, add_bos_token=False)
    assert tokenizer("").input_ids == [] and 1 not in tokenizer("the river").input_ids


def test_it_is_saved_with_its_options(make_export, tmp_path):
    from transformers import AutoTokenizer

    folder, _ = make_export()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="right")
    tokenizer.save_pretrained(tmp_path / "to")
    again = AutoTokenizer.from_pretrained(tmp_path / "to", trust_remote_code=True)
    assert again("the\n<s>").input_ids == tokenizer("the\n<s>").input_ids
    assert again.padding_side == "right" and again.pad_token == "<unk>"
    again.save_pretrained(tmp_path / "to")  # over its own files


def test_learned_positions_are_its_longest_text(make_export):
    from transformers import AutoTokenizer

    from tests.model.conftest import CONFIGS

    folder, _ = make_export(CONFIGS["gpt2"])
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).model_max_length == 64


def trained_with(tokenizer) -> Pretrained:
    return Pretrained(folder=tokenizer.parent, model=GPT(config()), tokenizer=tokenizer, context=64, step=7, tokens=700)


def test_a_model_without_byte_pieces_is_padded_with_bos(tmp_path):
    """Its unknown token stands for characters of texts."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the small old river house walked"] * 9),
        model_writer=model, vocab_size=30, model_type="bpe", hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    special = special_tokens(trained_with(tmp_path / "tokenizer.model"))
    assert special.pad == special.bos == ("<s>", 1)


def test_ours_is_padded_with_the_unknown_token(tmp_path):
    model, _ = train_tokenizer(["the small old river house walked"] * 9, 300)
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert special_tokens(trained_with(tmp_path / "tokenizer.model")) == SpecialTokens(("<s>", 1), ("<unk>", 0))


def test_a_tokenizer_json_goes_out_as_it_is(make_export, tmp_path, monkeypatch):
    """transformers' own class opens it, without code of ours."""
    from tokenizers import Tokenizer as Json
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    written = Json(models.BPE())
    written.pre_tokenizer, written.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    written.train_from_iterator(["the small old river house walked"] * 9, trainer)
    written.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(Pretrained, "open_tokenizer", lambda self: type("Opened", (), {"bos_id": 0}))
    folder, _ = make_export()
    trained, bos = trained_with(tmp_path / "tokenizer.json"), ("<|endoftext|>", 0)
    special = SpecialTokens(bos, bos)
    assert special_tokens(trained) == special
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenization_lcpt.py"):
        (folder / name).unlink()
    write_tokenizer(trained, special, folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(found, PreTrainedTokenizerFast) and found.bos_token_id == found.eos_token_id == 0
    for text in TEXTS[:4] + TEXTS[9:]:
        assert found(text).input_ids == written.encode(text).ids
        assert found.decode(found(text).input_ids) == text
