"""Use a tokenizer.json of the Hugging Face library `tokenizers`: byte-level BPE, or BPE as SentencePiece writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lcpt.data.errors import DataError
from lcpt.utils.errors import first_line

MARK = "\u2581"  # a blank, in the tokens of those that are like SentencePiece
SEPARATORS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>", "</s>")  # in order


class JsonTokenizer:
    """Reads a tokenizer.json, with the interface of Tokenizer; text is never read as a special token.

    Attributes: path, sha256 (of the file), vocab_size (the largest id and one), bos, bos_id (the first of SEPARATORS
    that is a special token of the file). Raises DataError for a file that is no such tokenizer, has no separator, or
    whose tokens do not stand for bytes of text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            described = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except OSError as error:
            raise DataError(f"tokenizer {path}: {error.strerror}; give a tokenizer.json") from None
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"tokenizer {path}: is no tokenizer.json ({first_line(error)})") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer.no_truncation()  # a document is read to its end
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        spell = _speller(described, self.path)
        self._bytes = [b""] * self.vocab_size  # what each token decodes to
        for piece, number in vocabulary.items():
            self._bytes[number] = spell(piece)
        for number, token in added.items():
            self._bytes[number] = b"" if token.special else token.content.encode()
        self._blanks = _stripped_blanks(described)
        self.bos = next((token for token in SEPARATORS if token in special), "")
        if not self.bos:
            raise DataError(
                f"tokenizer {path}: has none of the special tokens {' '.join(SEPARATORS)}, one of which separates "
                "documents; add one to it"
            )
        self.bos_id = special[self.bos]
        if any(self.bos_id in self.encode(text) for text in (self.bos, f"a{self.bos}b", f" {self.bos} ")):
            raise DataError(f"tokenizer {path}: makes its separator {self.bos} from text, too; take another tokenizer")

    def encode(self, text: str) -> list[int]:
        """Encode the text as token ids, without BOS or any other special token.

        What looks like a special token is encoded as the characters that it has. An added token that is not special,
        such as <think> of Qwen3, stays one token, which decodes to its text.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode token ids; special tokens, and ids beyond the vocabulary, give nothing."""
        size = self.vocab_size
        content = b"".join([self._bytes[token] for token in tokens if token < size])
        # The library replaces a good character, too, where a broken one follows, so that streamed text would change.
        text = content.decode(errors="replace")
        return text[min(self._blanks, len(text) - len(text.lstrip(" "))) :]

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes that each token decodes to, int64 [vocab_size]; 0 for special tokens.

        Their sum over a document is its length in bytes whenever the round trip is exact, and one more with a tokenizer
        that puts a blank before every text.
        """
        return np.array([len(content) for content in self._bytes], dtype=np.int64)


def _speller(described: dict, path: Path):
    """Return the function from a token to the bytes that it stands for. Raises DataError where tokens have none."""
    model = described["model"]
    decoders = {part["type"] for part in _parts(described.get("decoder"))}
    if model.get("type") == "BPE" and model.get("dropout"):
        raise DataError(f"tokenizer {path}: model.dropout {model['dropout']} encodes at random; set it to null")
    if model.get("type") == "BPE" and "ByteLevel" in decoders:
        return _spell_byte_level
    if model.get("type") == "BPE" and model.get("byte_fallback") and "ByteFallback" in decoders:
        return _spell_with_fallback
    found = f"{model.get('type', 'another model')} with decoder {' '.join(sorted(decoders)) or 'none'}"
    raise DataError(
        f"tokenizer {path}: is {found}; known are byte-level BPE (GPT-2, Llama 3, Qwen) and BPE with byte fallback "
        "(Llama 2, Gemma)"
    )


def _parts(described: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a decoder, or those in its sequences."""
    if described and described["type"] == "Sequence":
        for part in described["decoders"]:
            yield from _parts(part)
    elif described:
        yield described


def _stripped_blanks(described: dict) -> int:
    """Count the blanks that the decoder takes from the beginning of a text, which the encoder put there."""
    for part in _parts(described.get("decoder")):
        if part["type"] == "Strip" and part["content"] == " ":
            return part["start"]
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return 1
    return 0


def _byte_alphabet() -> dict[str, int]:
    """Map the characters that GPT-2 writes bytes with to these: printable ones as they are, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(character in BYTES for character in token):
        return bytes([BYTES[character] for character in token])
    return token.encode()


def _spell_with_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(MARK, " ").encode()
