"""Find the files and datasets behind what --input names, and count what is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lcpt.data.compressed import COMPRESSIONS
from lcpt.data.errors import DataError

RECORDS = (".jsonl", ".ndjson", ".json")  # a record a line
KINDS = (*RECORDS, ".txt", ".parquet")
KNOWN = f"{', '.join(RECORDS)} (a record a line) or .txt, also {', '.join(COMPRESSIONS)}; or .parquet"
HIDDEN = "hidden"  # what the names of macOS, notebooks and editors begin with a dot for


@dataclass(frozen=True)
class TextSource:
    """Names one input: `name` for manifests and errors, `location` a path or hf:NAME, `kind` a suffix or "hf"."""

    name: str
    location: str
    kind: str
    text_field: str = "text"  # of its records


@dataclass(frozen=True)
class Found:
    sources: list[TextSource]
    passed_over: dict[str, int]  # files of folders, by their ending; "hidden" ones, and those in hidden folders


def find_sources(inputs: Iterable[str | Path], text_field: str = "text") -> Found:
    """List the files and datasets behind the inputs; folders are walked in sorted order, through links too.

    Raises DataError for what is no text, and for a file that is given twice.
    """
    sources: list[TextSource] = []
    passed_over: Counter[str] = Counter()
    for given in map(str, inputs):
        path = Path(given)
        if given.startswith("hf:"):
            sources.append(TextSource(given, given, "hf", text_field))
        elif path.is_dir():
            below = list(_files(path, passed_over))
            if not below:
                raise DataError(f"{given}: no text found in this folder; expected files ending in {KNOWN}")
            sources += [TextSource(name, str(path / name), _kind(path / name), text_field) for name in below]
        elif not path.is_file():
            raise DataError(f"{given}: no such file or folder; check --input (a Hugging Face dataset is hf:NAME)")
        elif not _kind(path):
            raise DataError(f"{given}: unknown kind of file; expected one ending in {KNOWN}")
        else:
            sources.append(TextSource(path.name, given, _kind(path), text_field))
    _refuse_twice(sources)
    return Found(_told_apart(sources), dict(sorted(passed_over.items())))


def _files(folder: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Yield the text files below a folder, relative to it, sorted; count the others."""
    names, walked = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        inside = Path(parent).relative_to(folder)
        if here in walked:  # a link to a folder above it
            folders.clear()
            continue
        walked.add(here)
        hidden = any(part.startswith(".") for part in inside.parts)
        for name in files:
            if hidden or name.startswith("."):
                passed_over[HIDDEN] += 1
            elif _kind(Path(name)) and (Path(parent) / name).is_file():
                names.append((inside / name).as_posix())
            else:
                passed_over["".join(Path(name).suffixes[-1:]).lower() or "no ending"] += 1
    yield from sorted(names)


def _kind(path: Path) -> str:
    """Return the suffix below that of a compression, "" when it is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if packed and len(suffixes) > 1 else "" if packed or not suffixes else suffixes[-1]
    return "" if kind not in KINDS or (packed and kind == ".parquet") else kind


def _refuse_twice(sources: list[TextSource]) -> None:
    seen: dict[str, TextSource] = {}
    for source in sources:
        place = source.location if source.kind == "hf" else os.path.realpath(source.location)
        if place in seen:
            raise DataError(
                f"{source.location} is the same as {seen[place].location}; give it once: its text would count twice"
            )
        seen[place] = source


def _told_apart(sources: list[TextSource]) -> list[TextSource]:
    """Name those that share a name by their whole path."""
    names = Counter(source.name for source in sources)
    return [replace(each, name=each.location) if names[each.name] > 1 else each for each in sources]
