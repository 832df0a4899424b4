"""Read config values as they were written, from YAML and from overrides: their key's type decides what they mean.

YAML 1.1 decides by the look of a value: 1e3, 007, on and 12:30:45 become a float, an octal 7, True and a time in
seconds, also where a name was meant. Here every scalar stays text, but for null, until OmegaConf converts it to the
type of its key.
"""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, FloatNode, ListConfig, OmegaConf, UnionNode
from omegaconf.base import Node

NULL = ("null", "")  # of a text key that may be unset; ~ is the home folder
WORDS = {"true": True, "false": False}
NO_NUMBERS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}  # as YAML writes them


class _Loader(yaml.SafeLoader):
    """Loads plain scalars as text, null alone apart, and refuses a key that stands twice."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in found if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def read_file(path: str | Path) -> Any:
    """Read a YAML file as nested dicts, lists, text and None. Raises OSError, UnicodeError and yaml.YAMLError."""
    with open(path, encoding="utf-8") as file:
        return yaml.load(file, _Loader) or {}


def read_override(schema: DictConfig, key: str, value: str) -> Any:
    """Read the value of an override key=value: of a text key all its characters, of others as YAML."""
    kind, optional = type_of(schema, key)
    if kind is str:
        return None if optional and value in NULL else value
    return yaml.load(value, _Loader)


def type_of(schema: DictConfig, key: str) -> tuple[Any, bool]:
    """Return the type of a key, such as data.sources[0].weight, and whether it may be null; (None, False) where there
    is no such key."""
    node: Node | None = schema
    kind, optional = None, False
    for name in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(node, ListConfig):
            kind, optional = node._metadata.element_type, False
            node = OmegaConf.structured(kind) if is_dataclass(kind) else None
        elif not isinstance(node, DictConfig):
            return None, False
        elif not is_dataclass(node._metadata.object_type):  # a mapping, whose keys are free
            return node._metadata.element_type, False
        else:
            node = _node(node, name)
            if node is None:
                return None, False
            kind, optional = node._metadata.ref_type, node._is_optional()
    return kind, optional


def _node(schema: DictConfig, name: str) -> Node | None:
    """Return the node of a key, also of one whose value is missing; None where there is no such key."""
    return cast(Node | None, schema._get_node(name, validate_access=False))


def convert(schema: DictConfig, given: Any) -> Any:
    """Give a type to the text that OmegaConf would leave as it is: where a key takes true and false beside words, where
    a number is infinite or none, and where a key takes anything, as those of DeepSpeed do."""
    if not isinstance(given, dict):
        return given
    return {name: _convert(_node(schema, name), value) for name, value in given.items()}


def _convert(node: Node | None, value: Any) -> Any:
    if isinstance(node, UnionNode) and isinstance(value, str):
        return WORDS.get(value.lower(), value)
    if isinstance(node, FloatNode) and isinstance(value, str):
        return NO_NUMBERS.get(value.lower(), value)
    if isinstance(node, ListConfig) and isinstance(value, list) and is_dataclass(node._metadata.element_type):
        element = OmegaConf.structured(node._metadata.element_type)
        return [convert(element, item) for item in value]
    if not isinstance(node, DictConfig):
        return value
    if is_dataclass(node._metadata.object_type):
        return convert(node, value)
    return _by_look(value) if node._metadata.element_type is Any else value


def _by_look(value: Any) -> Any:
    """Read text as true, false or a decimal number where it looks like one."""
    if isinstance(value, dict):
        return {name: _by_look(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_by_look(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            pass
    return value
