"""Read documents, each an (id, text), from files, folders and Hugging Face datasets.

JSON lines and plain text are read here and not by `datasets`: its text reader turns "\r\n" into "\n", and its JSON
reader names neither file nor line of a broken record. Parquet and `hf:` go through `datasets` (see huggingface.py).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lcpt.data.compressed import COMPRESSIONS, DAMAGE, read_chunks
from lcpt.data.errors import DataError
from lcpt.data.huggingface import read_hub, read_parquet
from lcpt.utils.errors import first_line

KNOWN = ".jsonl, .json (a record a line) or .txt, also .gz, .xz, .zst; or .parquet"


@dataclass(frozen=True)
class TextSource:
    """Names one input: `name` for manifests and errors, `location` a path or hf:NAME, `kind` a suffix or "hf"."""

    name: str
    location: str
    kind: str


def find_sources(inputs: Iterable[str | Path]) -> list[TextSource]:
    """List the files and datasets behind the inputs, folders walked recursively in sorted order."""
    sources = []
    for given in map(str, inputs):
        path = Path(given)
        if given.startswith("hf:"):
            sources.append(TextSource(given, given, "hf"))
        elif path.is_dir():
            below = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if _kind(p) and p.is_file())
            if not below:
                raise DataError(f"{given}: no text found in this folder; expected files ending in {KNOWN}")
            sources += [TextSource(name, str(p), _kind(p)) for name, p in below]
        elif not path.is_file():
            raise DataError(f"{given}: no such file or folder; check --input (a Hugging Face dataset is hf:NAME)")
        elif not _kind(path):
            raise DataError(f"{given}: unknown kind of file; expected one ending in {KNOWN}")
        else:
            sources.append(TextSource(path.name, given, _kind(path)))
    return sources


def read_documents(source: TextSource) -> Iterator[tuple[str, str]]:
    """Yield the (id, text) of each document, in order, empty ones too; the text is exactly what the file holds.

    Raises DataError naming file and line for broken UTF-8, JSON or archives, and for records without a text.
    """
    for where, identifier, text in READERS[source.kind](source.name, source.location):
        if not isinstance(text, str):
            raise DataError(f'{where}: "text" is {_describe(text)}; every record needs a string field "text"')
        identifier = str(where if identifier in (None, "") else identifier).replace("\n", " ")
        try:
            (identifier + text).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: holds half of a surrogate pair, which is no text; repair the record") from None
        yield identifier, text


def _kind(path: Path) -> str:
    """Return the suffix below that of a compression, "" when it is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if packed and len(suffixes) > 1 else "" if packed or not suffixes else suffixes[-1]
    return "" if kind not in READERS or (packed and kind == ".parquet") else kind


def _describe(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _read_records(name: str, location: str) -> Iterator[tuple[str, object, object]]:
    number = 0
    try:
        for number, line in enumerate(_split_lines(read_chunks(location)), start=1):
            where = f"{name}:{number}"
            record = _parse(where, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            if record is not None:
                yield where, record.get("id"), record.get("text")
    except DAMAGE as error:
        raise DataError(_damaged(f"{name}:{number + 1}", error)) from None


def _parse(where: str, line: bytes) -> dict | None:
    try:
        text = line.decode()
        if not text.strip():
            return None
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(where, error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON ({first_line(error)}); expected one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: not a JSON object; expected one object with a field "text" a line')
    return record


def _read_text(name: str, location: str) -> Iterator[tuple[str, object, object]]:
    content = bytearray()
    try:
        for chunk in read_chunks(location):
            content += chunk
        yield name, None, content.decode()
    except DAMAGE as error:
        raise DataError(_damaged(f"{name}:{content.count(10) + 1}", error)) from None
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(f"{name}:{content.count(10, 0, error.start) + 1}", error)) from None


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that is still open: a book can be one line of many chunks
    for chunk in chunks:
        *closed, rest = chunk.split(b"\n")
        for line in closed:
            yield b"".join((*parts, line))
            parts = []
        parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    return f"{where}: not valid UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _damaged(where: str, error: Exception) -> str:
    return f"{where}: cannot be read further ({first_line(error)}); the file is damaged or cut short, fetch it again"


READERS = {
    ".jsonl": _read_records,
    ".json": _read_records,
    ".txt": _read_text,
    ".parquet": read_parquet,
    "hf": read_hub,
}
