"""Train and use a SentencePiece BPE tokenizer that gives every text back exactly."""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from lcpt.data.errors import DataError
from lcpt.utils.errors import first_line

TRAINING_BYTES = 256 * 2**20  # the trainer holds its text in memory, and merges settle long before this
MARK = "\u2581"  # SentencePiece's own mark for a blank: in a text it would come back as a blank

# The trainer drops a whole line that is too long or holds one of its reserved characters, and says nothing.
RESERVED = re.compile("[\n\0\u2581\u2585]")
PIECE = re.compile(r".{1,1000}(?= |$)|.{1,1000}")  # 1,000 characters stay below its 4,192 bytes


class Tokenizer:
    """Reads a SentencePiece model from a file.

    Attributes: path, sha256 (of the file), vocab_size, bos (its text), bos_id. Raises DataError for a file that is no
    such model, for a model without a BOS piece, which is our document separator, and for one that cannot write a blank.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
            raise DataError(
                f"tokenizer {path}: {reason}; give a .model file written by SentencePiece, or a tokenizer.json"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.bos_id = self._processor.bos_id()
        if self.vocab_size == 0 or self.bos_id < 0:
            raise DataError(f"tokenizer {path}: has no BOS piece, our document separator; train one with --vocab-size")
        self.bos = self._processor.id_to_piece(self.bos_id)
        self._spelled = self._find_spelled()
        self._newline = self._find_newline()

    def encode(self, text: str) -> list[int]:
        """Encode the text as token ids, without BOS."""
        if self._newline is None:
            return self._encode_line(text)
        tokens = []
        for line in text.split("\n"):
            tokens += self._encode_line(line)
            tokens.append(self._newline)
        return tokens[:-1]

    def _encode_line(self, text: str) -> list[int]:
        for character, spelled in self._spelled.items():
            if character in text:
                first, *others = map(self._encode_line, text.split(character))
                return first + [token for part in others for token in spelled + part]
        return self._processor.encode(text)

    def _find_spelled(self) -> dict[str, list[int]]:
        """Return the byte pieces of each character that the model would not give back.

        It takes a mark for a blank; and a blank for a mark, where the text that it was trained on had no blanks.
        """
        no_blank = self._processor.piece_to_id(MARK) == self._processor.unk_id()
        characters = MARK + " " * no_blank
        pieces = {c: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in c.encode()] for c in characters}
        if all(map(self._processor.is_byte, sum(pieces.values(), []))):
            return pieces
        if no_blank:
            raise DataError(f"tokenizer {self.path}: has no piece for a blank; train one with --vocab-size")
        return {}

    def _find_newline(self) -> int | None:
        """Return the newline's id if no token reaches across a newline, as in our own models.

        Line by line such a model gives the same tokens three times as fast, in a tenth of the memory.
        """
        with_newline = [n for n in range(self.vocab_size) if "\n" in self._processor.id_to_piece(n)]
        if len(with_newline) != 1:
            return None
        newline = with_newline[0]
        alone = self._processor.encode("\n a") == [newline, *self._processor.encode(" a")]
        return newline if alone else None

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode token ids; BOS and other control pieces, and ids beyond the vocabulary, give nothing."""
        return self._processor.decode([int(token) for token in tokens if token < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes that each token decodes to, int64 [vocab_size]; 0 for BOS and other control pieces.

        Their sum over a document is its length in bytes whenever the round trip is exact. (A foreign tokenizer that
        puts a blank before every text counts that one byte too many.)
        """
        processor = self._processor
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.vocab_size):
            if processor.is_byte(token):
                sizes[token] = 1
            elif not (processor.is_control(token) or processor.is_unknown(token)):
                sizes[token] = len(processor.id_to_piece(token).replace(MARK, " ").encode())
        return sizes


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tuple[bytes, float]:
    """Train on the texts; the same texts always give the same bytes.

    Returns the model file's content and the fraction of the lines that was used: below 1 when the texts exceed
    TRAINING_BYTES. Raises DataError when vocab_size does not suit the texts.
    """
    lines, fraction = _sample(_lines(texts), TRAINING_BYTES)
    if not any(map(str.strip, lines)):
        raise DataError("the input holds no text to train a tokenizer on; check --input")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            required_chars=MARK,  # or text without blanks, such as DNA, gives none
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise DataError(_training_error(str(error), vocab_size)) from None
    return model.getvalue(), fraction


def _training_error(message: str, vocab_size: int) -> str:
    if found := re.search(r"too high .* <= (\d+)", message):
        return f"vocabulary of {vocab_size} is too large for this text; use --vocab-size {found[1]} or less"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"vocabulary of {vocab_size} is too small for this text; use --vocab-size {found[1]} or more"
    return f"cannot train a tokenizer of {vocab_size} pieces ({first_line(RuntimeError(message))}); give more text"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut the texts into pieces that the trainer takes."""
    for text in texts:
        for line in RESERVED.split(text):
            yield from PIECE.findall(line)


def _sample(lines: Iterable[str], limit: int) -> tuple[list[str], float]:
    """Pick lines of at most `limit` bytes in all by a hash of their number; also return the fraction that was kept.

    Whenever the limit is passed the threshold halves, so one pass does and memory stays bounded.
    """
    kept, total, count, threshold = [], 0, 0, 2**32
    for count, line in enumerate(lines, start=1):
        draw = zlib.crc32(count.to_bytes(8, "little"))
        if draw >= threshold:
            continue
        kept.append((draw, line))
        total += len(line.encode())
        while total > limit:
            threshold //= 2
            kept = [pair for pair in kept if pair[0] < threshold]
            total = sum(len(text.encode()) for _, text in kept)
    return [line for _, line in kept], len(kept) / max(count, 1)
