"""Read documents, each an (id, text), from a file or a Hugging Face dataset.

JSON lines and plain text are read here and not by `datasets`: its text reader turns "\r\n" into "\n", and its JSON
reader names neither file nor line of a broken record. For parquet and `hf:` see parquet.py and huggingface.py.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator

from lcpt.data.compressed import DAMAGE, read_chunks
from lcpt.data.errors import DataError
from lcpt.data.find_text import RECORDS, TextSource
from lcpt.data.huggingface import read_hub
from lcpt.data.parquet import read_parquet
from lcpt.utils.errors import first_line


def read_documents(source: TextSource) -> Iterator[tuple[str, str]]:
    """Yield the (id, text) of each document, in order, empty ones too; the text is exactly what the file holds.

    Raises DataError naming file and line for broken UTF-8, JSON or archives, and for records without a text.
    """
    field = source.text_field
    for where, identifier, text in READERS[source.kind](source.name, source.location, field):
        if not isinstance(text, str):
            raise DataError(
                f'{where}: "{field}" is {_describe(text)}; every record needs a string field "{field}", or name '
                "another with --text-field"
            )
        identifier = str(where if identifier in (None, "") else identifier).replace("\n", " ")
        try:
            (identifier + text).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: holds half of a surrogate pair, which is no text; repair the record") from None
        yield identifier, text


def _describe(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _read_records(name: str, location: str, field: str) -> Iterator[tuple[str, object, object]]:
    number = 0
    try:
        for number, line in enumerate(_split_lines(read_chunks(location)), start=1):
            where = f"{name}:{number}"
            record = _parse(where, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            if record is not None:
                yield where, record.get("id"), record.get(field)
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
        raise DataError(f"{where}: not a JSON object; expected one object with the text in a field a line")
    return record


def _read_text(name: str, location: str, _: str) -> Iterator[tuple[str, object, object]]:
    content = bytearray()
    try:
        for chunk in read_chunks(location):
            content += chunk
        yield name, None, content.removeprefix(codecs.BOM_UTF8).decode()
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


READERS = {**dict.fromkeys(RECORDS, _read_records), ".txt": _read_text, ".parquet": read_parquet, "hf": read_hub}
