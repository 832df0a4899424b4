"""Stream Hugging Face datasets through `datasets`."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

from lcpt.data.errors import DataError
from lcpt.utils.errors import first_line


def read_hub(name: str, location: str, field: str) -> Iterator[tuple[str, object, object]]:
    """Yield (name:row, id or None, text or None) of each row of hf:OWNER/NAME[/CONFIG][:SPLIT], rows counted from 1;
    the split is "train" where none is given."""
    path, _, split = location.removeprefix("hf:").partition(":")
    parts = path.split("/")
    owner_and_name, config = "/".join(parts[:2]), "/".join(parts[2:])
    if ":" in split or not all(parts):
        raise DataError(
            f"{name}: not a dataset's name; write hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, and :SPLIT behind it"
        )
    datasets = _import_datasets()
    number = 0
    try:
        for row in datasets.load_dataset(owner_and_name, config or None, split=split or "train", streaming=True):
            number += 1
            yield f"{name}:{number}", row.get("id"), row.get(field)
    except Exception as error:  # whatever its many readers and the network raise
        raise DataError(
            f"{name}: cannot be read ({first_line(error)}); check name, configuration and network"
        ) from None


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
    datasets.logging.set_verbosity_error()  # what is wrong is said once, in one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets
