"""Configure the data of training."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lcpt.data.errors import DataError
from lcpt.data.mixture import SourceConfig, check_sources
from lcpt.data.synthetic import SyntheticConfig, is_task
from lcpt.utils.home_folder import expand_home


@dataclass
class DataConfig:
    """Says what to train on.

    path, valid_path: prepared folders, or synthetic:TASK. sources: prepared folders to mix, in place of path. context:
    tokens of a sequence. mask_documents: a document does not see those before it in its sequence.
    valid: validation sets {name: path}, in place of valid_path.
    packing: contiguous, sequences are windows of the text; best_fit, documents no longer than the context stay whole.
    """

    path: Optional[str] = MISSING  # noqa: UP045  OmegaConf reads this annotation on every Python
    valid_path: Optional[str] = None  # noqa: UP045
    context: int = 8192
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    sources: Optional[list[SourceConfig]] = None  # noqa: UP045
    valid: Optional[dict[str, str]] = None  # noqa: UP045
    mask_documents: bool = True
    packing: str = "contiguous"

    def __post_init__(self):
        self.path, self.valid_path = expand_home(self.path), expand_home(self.valid_path)
        if self.valid:
            self.valid = {
                name: expand_home(path) if isinstance(path, str) else path for name, path in self.valid.items()
            }
        if self.context < 1:
            raise DataError(f"data.context is {self.context}; it must be 1 or more tokens")
        if self.path is None and self.sources is None:
            raise DataError("neither data.path nor data.sources is set; set one of them")
        if self.path is not None and self.sources is not None:
            raise DataError("data.path and data.sources are both set; set one of them to null")
        if self.sources is not None:
            check_sources(self.sources)
        if self.packing not in ("contiguous", "best_fit"):
            raise DataError(f"data.packing is {self.packing}; it is contiguous or best_fit")
        if self.packing == "best_fit" and not self.mask_documents:
            raise DataError("data.packing best_fit puts unrelated documents together; set data.mask_documents=true")
        if self.packing == "best_fit" and is_task(self.path or ""):
            raise DataError(f"data.packing best_fit needs documents, and {self.path} has none; set it to contiguous")
        if self.valid_path and self.valid:
            raise DataError("data.valid_path and data.valid are both set; set one of them to null")
        for name, path in self.valid_sets.items():
            if self.valid and not re.fullmatch(r"[^\s/]+", name):
                raise DataError(f"data.valid: {name!r} is no name; take one without blanks and slashes")
            if not isinstance(path, str):
                raise DataError(f"{valid_key(name)} is {path}; it takes one folder or task")
            if is_task(self.path or "") != is_task(path):
                raise DataError(
                    f"{valid_key(name)} is {path} and training takes {self.origin}; take text for both or a "
                    "task for both, which gives fresh samples"
                )

    @property
    def valid_sets(self) -> dict[str, str]:
        """Map each validation set's name to its folder or task, in order; that of valid_path has the name ""."""
        return {"": self.valid_path} if self.valid_path else dict(self.valid or {})

    @property
    def origin(self) -> str:
        """Name the training data, for messages: the path, or each source with its weight."""
        if self.sources is None:
            return self.path or "nothing"
        return f"data.sources {', '.join(f'{source.path} {source.weight}' for source in self.sources)}"


def valid_key(name: str) -> str:
    """Name the key of a validation set, for messages."""
    return f"data.valid.{name}" if name else "data.valid_path"
