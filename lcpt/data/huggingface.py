"""Stream Parquet files and Hugging Face datasets through `datasets`."""

from __future__ import annotations

import atexit
import glob
import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

from lcpt.data.errors import DataError
from lcpt.utils.errors import first_line


def read_parquet(name: str, location: str) -> Iterator[tuple[str, object, object]]:
    """Yield (file:row, id or None, text or None) of each row, rows counted from 1."""
    # One call a file: files of one folder may have different columns.
    return _rows(name, "parquet", split="train", data_files=glob.escape(location))


def read_hub(name: str, location: str) -> Iterator[tuple[str, object, object]]:
    """Yield the rows of hf:NAME or hf:NAME:SPLIT as read_parquet does; the split is "train" where none is given."""
    _, path, *split = location.split(":")
    if not path or len(split) > 1:
        raise DataError(f"{name}: not a dataset's name; write hf:NAME or hf:NAME:SPLIT")
    return _rows(name, path, split=split[0] if split else "train")


def _rows(name: str, path: str, **options: str) -> Iterator[tuple[str, object, object]]:
    datasets = _import_datasets()
    try:
        for number, row in enumerate(datasets.load_dataset(path, streaming=True, **options), start=1):
            yield f"{name}:{number}", row.get("id"), row.get("text")
    except Exception as error:  # whatever its many readers and the network raise
        raise DataError(f"{name}: cannot be read ({first_line(error)}); check the file, or name and network") from None


def _import_datasets() -> ModuleType:
    """Import late, it is slow and seldom needed, with its caches where they vanish at exit."""
    if "HF_DATASETS_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="lcpt-datasets-")
        atexit.register(folder.cleanup)
        # Not HF_HOME: the user's access token lives there.
        for cache in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
            os.environ.setdefault(cache, folder.name)
    import datasets

    datasets.disable_progress_bars()
    return datasets
