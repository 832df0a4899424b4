"""Open a tokenizer of either kind, and find the one of a folder: a SentencePiece model or a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from lcpt.data.json_tokenizer import JsonTokenizer
from lcpt.data.tokenizer import Tokenizer

SENTENCEPIECE, JSON = "tokenizer.model", "tokenizer.json"
TOKENIZERS = (SENTENCEPIECE, JSON)  # what a folder of ours calls it, by its kind; it has one of them
AnyTokenizer = Tokenizer | JsonTokenizer


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Open a tokenizer by its file: *.json is one of `tokenizers`, all else of SentencePiece.

    Raises DataError naming the file that is neither.
    """
    return JsonTokenizer(path) if name_in_folder(path) == JSON else Tokenizer(path)


def find_tokenizer(folder: str | Path) -> Path:
    """Return the path of a folder's tokenizer; where there is none, that of a SentencePiece model."""
    paths = [Path(folder) / name for name in TOKENIZERS]
    return next((path for path in paths if path.exists()), paths[0])


def name_in_folder(path: str | Path) -> str:
    """Return what a folder of ours calls a copy of this tokenizer."""
    return JSON if Path(path).suffix == ".json" else SENTENCEPIECE
