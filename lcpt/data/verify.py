"""Verify every file of a prepared folder against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcpt.data.errors import DataError
from lcpt.data.manifest import MANIFEST, load_manifest
from lcpt.data.open_tokenizer import find_tokenizer
from lcpt.data.shard_files import check_shard, check_tokenizer
from lcpt.utils.progress import progress_bar


def verify(folder: str | Path) -> dict[str, str]:
    """Read the whole folder; returns {file: "" when whole, else one line naming the damage}.

    Without a whole manifest nothing else can be judged, so then it stands alone in the answer. Raises DataError when
    `folder` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that prepare_data.py wrote")
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return {MANIFEST: str(error)}
    found = {MANIFEST: "", find_tokenizer(folder).name: _damage(check_tokenizer, folder, manifest)}
    for shard in progress_bar(manifest["shards"], desc="verifying", unit="shard"):
        found[shard["file"]] = _damage(check_shard, folder, manifest, shard, True)
    for path in sorted(folder.iterdir()):
        if path.name not in found:
            found[path.name] = f"{path}: not a file of this corpus; remove it"
    return found


def _damage(check: Callable[..., object], *arguments: object) -> str:
    """Run a check; return the line that names the damage it finds, "" where it finds none."""
    try:
        check(*arguments)
    except DataError as error:
        return str(error)
    return ""
