"""Every text comes back exactly, and its bytes are accounted for."""

import io
import random

import numpy as np
import pytest
import sentencepiece

from lcpt.data import DataError, Tokenizer
from lcpt.data.tokenizer import _lines, _sample, train_tokenizer

AWKWARD = [
    "",
    " leading and trailing  ",
    "\r\nwindows\r\n",
    "\t\ttabs\t and \v\f",
    "runs     of  blanks\n\n\n  \n",
    "emoji 👩🏽‍🚀 flags 🇫🇷 naïve 漢字 ﷽",
    "\0 nul \ufeff bom \u2028 separator \x85 next line",
    "the tokenizer's own ▁ mark ▁▁ at ends▁",
    "▅ reserved, <s> </s> <unk> <0x41> as text",
    "\U0010ffff \ue000 \ufffd",
]


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return Tokenizer(prepared / "tokenizer.model")


def random_texts(count: int):
    draw = random.Random(7)
    ranges = [(1, 0x80), (9, 14), (0x20, 0x21), (0x80, 0x800), (0x2575, 0x2590), (0xE000, 0x110000)]
    for _ in range(count):
        yield "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(60)))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(tokenizer, text):
    check_round_trip(tokenizer, text)


def test_numbers_beyond_the_vocabulary_give_nothing(tokenizer):
    """A model may have more embeddings than there are pieces, and write them."""
    tokens = tokenizer.encode("the house")
    assert tokenizer.decode([tokenizer.vocab_size, *tokens, tokenizer.vocab_size + 7]) == "the house"


def test_random_texts_come_back(tokenizer):
    for text in random_texts(500):
        check_round_trip(tokenizer, text)


def check_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *tokens]) == text
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int64 and sizes.shape == (tokenizer.vocab_size,) and sizes[tokenizer.bos_id] == 0
    assert sizes[tokens].sum() == len(text.encode())


WITHOUT_BLANKS = {
    "DNA": lambda draw: "".join(draw.choices("ACGT", k=3000)),
    "Chinese": lambda draw: "".join(draw.choices("的一是不了人我在有他这中大来上国。，", k=3000)),
    "base64": lambda draw: "".join(draw.choices("ABCDEFGHabcdefgh0123456789+/", k=3000)),
    "one blank in 100,000": lambda draw: "".join(draw.choices("ACGT", k=100_000)) + " ",
}


@pytest.mark.parametrize("kind", WITHOUT_BLANKS)
def test_blanks_come_back_where_the_training_text_has_none(tmp_path, kind):
    draw = random.Random(1)
    model, _ = train_tokenizer([WITHOUT_BLANKS[kind](draw) for _ in range(8)], 320)
    (tmp_path / "m.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path / "m.model")
    assert tokenizer._processor.piece_to_id("▁") != tokenizer._processor.unk_id()
    for text in (" ", "a b", "ACGT ACGT  TTGA\n 的 ▁ ", *AWKWARD):
        check_round_trip(tokenizer, text)


def without_a_blank(path, **options):
    """A model of SentencePiece that has no piece for a blank."""
    model, draw = io.BytesIO(), random.Random(1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(draw.choices("ACGT", k=500)) for _ in range(20)]),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        minloglevel=3,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_an_older_model_without_a_blank_spells_it(tmp_path):
    path = without_a_blank(tmp_path / "old.model", vocab_size=300, byte_fallback=True, remove_extra_whitespaces=False)
    tokenizer = Tokenizer(path)
    for text in (" ", "a b", "ACGT ACGT  TTGA ▁ ", " ▁▁ "):
        check_round_trip(tokenizer, text)


def test_a_model_that_cannot_write_a_blank_is_refused(tmp_path):
    path = without_a_blank(tmp_path / "foreign.model", vocab_size=30)
    with pytest.raises(DataError, match="foreign.model: has no piece for a blank; train one with --vocab-size"):
        Tokenizer(path)


def test_training_is_deterministic_and_sees_awkward_lines(texts):
    assert train_tokenizer(texts, 500) == train_tokenizer(texts, 500)
    # SentencePiece by itself would drop each of these whole lines, and the word with them.
    for hidden in ("x" * 5000 + " ", "▁", "▅", "\0", "é" * 3000 + " "):
        model, fraction = train_tokenizer([*texts, (hidden + "zyzzyva ") * 300], 500)
        assert b"zyzzyva" in model and fraction == 1


def test_training_lines_lose_nothing():
    text = "a" * 2500 + "  word " * 600 + "\n  tail"
    pieces = list(_lines([text]))
    assert "".join(pieces) == text.replace("\n", "") and max(map(len, pieces)) <= 1000


def test_sampling_is_bounded_spread_and_deterministic():
    lines = [f"{n:07d}" for n in range(20_000)]
    kept, fraction = _sample(lines, 30_000)
    assert (kept, fraction) == _sample(lines, 30_000)
    assert 15_000 <= sum(map(len, kept)) <= 30_000 and fraction == len(kept) / 20_000
    assert 0.4 < sum(line >= "0010000" for line in kept) / len(kept) < 0.6
    assert _sample(lines, 10**6) == (lines, 1.0)


def test_unusable_models_are_refused(tmp_path):
    (tmp_path / "noise.model").write_bytes(b"noise")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("noise.model", "empty.model", "absent.model"):
        with pytest.raises(DataError, match=name):
            Tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    "size, remedy", [(50_000, "--vocab-size [0-9]+ or less"), (100, "--vocab-size [0-9]+ or more")]
)
def test_wrong_vocabulary_size_names_a_right_one(texts, size, remedy):
    with pytest.raises(DataError, match=remedy) as error:
        train_tokenizer(texts, size)
    assert "\n" not in str(error.value)
    right = int(str(error.value).split("--vocab-size ")[1].split()[0])
    train_tokenizer(texts, right)
