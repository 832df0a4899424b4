"""Text that comes token by token is that of all tokens at once, and nothing of it is taken back."""

import random

import pytest

from lcpt.data import StreamedText, Tokenizer, open_tokenizer
from tests.data.test_json_tokenizer import KINDS


@pytest.fixture(scope="module")
def tokenizer(train_folder):
    return Tokenizer(train_folder / "tokenizer.model")


@pytest.fixture(scope="module", params=["SentencePiece", *KINDS])
def any_tokenizer(request, tokenizer, tmp_path_factory):
    if request.param == "SentencePiece":
        return tokenizer
    return open_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def stream(tokenizer, tokens, prompt=(), stops=()):
    """(What each token gave, the rest, whether it ended with a stop)."""
    text = StreamedText(tokenizer, prompt, stops)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.ended:
            break
    return pieces, text.finish(), text.ended


@pytest.mark.parametrize("prompt", ["", "The old ", "naïve 鮭", "\ufffd"])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_text_of_all_tokens(any_tokenizer, prompt, seed):
    """Of drawn tokens, most of which are bytes: valid characters of every length, and none, after any prompt."""
    tokenizer, draw = any_tokenizer, random.Random(seed)
    known, tokens = tokenizer.encode(prompt), []
    for _ in range(60):
        text = "".join(draw.choices(["a", "é", "鮭", "🐟", "\n", " the", "\ufffd"], k=3))
        tokens += tokenizer.encode(text) if draw.random() < 0.5 else draw.choices(range(2, tokenizer.vocab_size), k=5)
    pieces, rest, _ = stream(tokenizer, tokens, known)
    assert prompt + "".join(pieces) + rest == tokenizer.decode(known + tokens)
    for n in range(len(tokens)):
        assert tokenizer.decode(known + tokens).startswith(prompt + "".join(pieces[:n]))


def test_a_character_of_many_bytes_comes_whole(tokenizer):
    tokens = tokenizer.encode("a🐟é")
    assert len(tokens) == 1 + 4 + 2
    assert stream(tokenizer, tokens) == (["a", "", "", "", "🐟", "", "é"], "", False)
    assert stream(tokenizer, tokens[:3]) == (["a", "", ""], "\ufffd\ufffd", False)


def test_the_work_for_a_token_does_not_grow(tokenizer):
    decoded, decode = [], tokenizer.decode

    class Counting:
        def decode(self, tokens):
            decoded.append(len(tokens))
            return decode(tokens)

    text = "The old house walked under the green river 🐟. " * 20
    tokens = tokenizer.encode(text)
    pieces, rest, _ = stream(Counting(), tokens, tokenizer.encode(text))
    assert "".join(pieces) + rest == text and max(decoded) <= 32


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("the house. And", ["."], "the house"),
        ("the house. And", ["nowhere", "house", "And"], "the "),
        ("aab aabb", ["aabb"], "aab "),
        ("aaab", ["aab"], "a"),
        ("a🐟b", ["🐟"], "a"),
        ("abcd", ["abcd", "bc"], "a"),  # the one that is whole first
        ("the house", ["house", "ou"], "the h"),  # within one token, too
        ("abcd", ["bcd", "abcd"], ""),  # of two that end together, the longer
        ("the hou", ["house"], "the hou"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_it_ends_before_a_stop(tokenizer, text, stops, expected):
    """Whatever the tokens: those of the tokenizer, or one for each byte."""
    for tokens in (tokenizer.encode(text), [tokenizer.encode("🐟")[0] - 0xF0 + byte for byte in text.encode()]):
        pieces, rest, ended = stream(tokenizer, tokens, stops=stops)
        assert "".join(pieces) + rest == expected and ended == (text != expected)


def test_the_prompt_holds_no_part_of_a_stop(tokenizer):
    pieces, rest, ended = stream(tokenizer, tokenizer.encode("cd"), tokenizer.encode("ab"), ["bc"])
    assert "".join(pieces) + rest == "cd" and not ended
