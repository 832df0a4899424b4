"""Read a config.json key by key, so that each is carried over, known to leave logits as they are, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lcpt.checkpoint import CheckpointError
from lcpt.utils.errors import first_line

HARMLESS = frozenset(  # that say how to load, name, train or sample a model, not what it computes
    "_attn_implementation _commit_hash _name_or_path architectures attn_implementation bos_token_id"
    " chunk_size_feed_forward do_sample dtype early_stopping eos_token_id forced_bos_token_id forced_eos_token_id"
    " gradient_checkpointing id2label initializer_range label2id length_penalty max_length min_length model_type"
    " num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores"
    " pad_token_id prefix problem_type repetition_penalty return_dict return_dict_in_generate sep_token_id"
    " task_specific_params temperature tokenizer_class top_k top_p torch_dtype transformers.js_config"
    " transformers_version typical_p unk_token_id use_cache".split()
)
SHOWN = 80  # characters of a value that is refused


class Settings:
    """Holds the keys of a config.json, or of a section in it, and which of them were read.

    A missing key and null mean the default, as in transformers. Every method raises CheckpointError that names the key.
    """

    def __init__(self, content: Mapping[str, Any], path: Path, section: str = ""):
        self.path, self.content, self._section = path, content, section
        self._read: set[str] = set()

    def size(self, key: str, default: int | None, least: int = 1) -> int:
        """Read a whole number; with the default None it must be there."""
        value = self._get(key, default)
        if type(value) is not int or value < least:
            self.refuse(key, f"it must be a whole number ≥ {least}")
        return value

    def size_if_there(self, key: str) -> int | None:
        """Read a whole number ≥ 1 that stands for another one where it is missing."""
        return None if self._get(key, None) is None else self.size(key, None)

    def positive(self, key: str, default: float | None) -> float:
        """Read a number > 0; with the default None it must be there."""
        value = self._get(key, default)
        if not (type(value) in (int, float) and value > 0):
            self.refuse(key, "it must be a number > 0")
        return float(value)

    def positive_if_there(self, key: str) -> float | None:
        """Read a number > 0 that stands for another one where it is missing."""
        return None if self._get(key, None) is None else self.positive(key, None)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            self.refuse(key, "it must be true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """Read a text that is one of the choices; returns what that one means."""
        value = self._get(key, default)
        if value not in list(choices):
            self.refuse(key, f"lcpt has {', '.join(choices)}")
        return choices[value]

    def names(self, key: str) -> list[str] | None:
        value = self._get(key, None)
        if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            self.refuse(key, "it must be a list of names")
        return value

    def section(self, key: str) -> Settings | None:
        """Return a section of its own, which must be checked to be all read, too; None for an empty one."""
        value = self._get(key, None)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "it must be a section")
        return Settings(value, self.path, f"{self._section}{key}.") if value else None

    def require(self, key: str, value: object, default: object, why: str) -> None:
        """Refuse any other value than the one that lcpt's models have."""
        if self._get(key, default) != value:
            self.refuse(key, why)

    def refuse(self, key: str, why: str) -> NoReturn:
        value = json.dumps(self.content.get(key), ensure_ascii=False)
        shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
        raise CheckpointError(f"{self.path}: {self._section}{key} is {shown}; {why}")

    def check_all_read(self, harmless: Iterable[str] = ()) -> None:
        """Refuse the first key that nobody has read, that is not harmless, and that is set to something."""
        for key in sorted(self.content.keys() - self._read - set(harmless)):
            if self.content[key] not in (None, False, [], {}):
                self.refuse(key, "lcpt does not know this key; delete it if the logits do not depend on it")

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.content.get(key)
        return default if value is None else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; name the folder of a model as transformers saves it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({first_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content
