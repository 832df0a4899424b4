"""Compose an experiment's config from its sections; read it from YAML, changed by section.key=value."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml.constructor import ConstructorError

from lcpt.checkpoint import CheckpointConfig
from lcpt.data import DataConfig, Task, is_task
from lcpt.model import ModelConfig
from lcpt.model.config_version import upgrade
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig
from lcpt.training.phases import PhaseConfig, divide
from lcpt.training.run_folder import RunConfig
from lcpt.utils import typed_yaml
from lcpt.utils.errors import one_line


class ConfigError(ValueError):
    """One line that names the key and the remedy."""


@dataclass
class Config:
    """Holds an experiment's config, section by section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    phases: list[PhaseConfig] = field(default_factory=list)

    def __post_init__(self):
        tokens, context = self.training.global_batch_tokens, self.data.context
        if tokens % context:
            raise ValueError(
                f"training.global_batch_tokens {tokens} is no multiple of data.context {context}; "
                f"take {max(1, round(tokens / context)) * context}"
            )
        if (most := self.model.max_positions) is not None and context > most:
            raise ValueError(
                f"data.context {context} exceeds model.max_positions {most}; raise it, or shorten the context"
            )
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "training.precision bf16 needs parallel.zero_stage 1, 2 or 3: at stage 0 nothing keeps an "
                "fp32 copy of the weights"
            )

        for path in (self.data.path, *self.data.valid_sets.values()):
            if path and is_task(path):
                Task(path, self.data.synthetic, self.model.vocab_size, "").scored(context)
                if self.training.sample_every_steps is not None:
                    raise ValueError(f"training.sample_every_steps needs text, and {path} has none; set it to null")
                if self.training.valid_tokens < context:
                    raise ValueError(
                        f"training.valid_tokens {self.training.valid_tokens} is less than a sample of {path}, "
                        f"data.context {context}"
                    )
        divide(self)  # raises where a phase is wrong

    def changed(self, sections: dict[str, dict[str, Any]]) -> Config:
        """Return this config with these keys changed, and without phases. Raises ValueError that names the key."""
        base = OmegaConf.structured(replace(self, phases=[]))
        _check_sections(base, OmegaConf.create(sections))
        try:
            return cast(Config, OmegaConf.to_object(OmegaConf.merge(base, sections)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{error.full_key}: {_one_line(error)}") from None

    @property
    def sequences(self) -> int:
        """The sequences of one optimizer step, over all ranks."""
        return self.training.global_batch_tokens // self.data.context


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the checked Config of a YAML file and of overrides 'section.key=value'. Raises ConfigError.

    path: a file, or the name of one that comes with lcpt, as gpt2-small-32k.
    """
    if not Path(path).is_file():
        path = named_configs().get(str(path)) or path
    if not Path(path).is_file():
        raise ConfigError(f"there is no config file {path}; `lcpt configs` lists those that come with lcpt by name")
    schema = OmegaConf.structured(Config)
    try:
        given = OmegaConf.create(typed_yaml.read_file(path))
    except Exception as error:  # a YAML parser's errors have no common class
        if isinstance(error, ConstructorError) and "duplicate key" in str(error.problem):
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise ConfigError(f"{path}, line {line}: {error.problem}; each key may stand there once") from error
        raise ConfigError(f"{path} is no readable YAML: {_one_line(error)}") from error
    try:
        _check_sections(schema, given)  # before any merge, which cannot say what does not fit
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        _apply(schema, given, override)
    try:
        _check_sections(schema, given)
        given = OmegaConf.create(typed_yaml.convert(schema, OmegaConf.to_container(given)))
        version = OmegaConf.select(given, "model.version")
        if version is not None and str(version).isdecimal():
            given.model = upgrade(given.model, int(version))
        merged = OmegaConf.merge(schema, given)
        if merged.data.sources is not None and OmegaConf.is_missing(merged.data, "path"):
            merged.data.path = None
        if missing := OmegaConf.missing_keys(merged):
            raise ConfigError(f"{path} does not set {', '.join(sorted(missing))}, which has no default")
        return cast(Config, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error.full_key or str(error.key), path)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or path}: {_one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(_one_line(error)) from error


def _apply(schema: DictConfig, given: DictConfig, override: str) -> None:
    """Change what an override 'section.key=value' says. Raises ConfigError that shows the override."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        OmegaConf.update(given, key, typed_yaml.read_override(schema, key, value), force_add=True)
    except IndexError:
        raise ConfigError(
            f"override {override!r}: the list has no such item; write all of it, such as [a, b]"
        ) from None
    except Exception as error:  # a YAML parser's errors have no common class
        raise ConfigError(f"override {override!r} cannot be read: {_one_line(error)}") from error


def named_configs() -> dict[str, Path]:
    """Find the configs that come with lcpt, by name: of the installed package, or of the checkout that it runs from."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {}


def to_yaml(config: Config) -> str:
    """Write every key with its value, as load_config reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_sections(schema: DictConfig, given, key: str = "") -> None:
    """Raise ConfigError where a value stands in the place of a section: OmegaConf would not say where."""
    if not OmegaConf.is_dict(given):
        raise ConfigError(f"{key or 'the config'} is a section with {', '.join(map(str, schema))}; set one of them")
    for name in given:
        section = schema._get_node(name) if name in schema else None
        if isinstance(section, DictConfig) and is_dataclass(section._metadata.object_type):
            _check_sections(section, given[name], f"{key}.{name}".lstrip("."))
        elif isinstance(section, DictConfig):
            _check_mapping(section, given[name], f"{key}.{name}".lstrip("."))
        if isinstance(section, ListConfig):
            _check_list(section, given[name], f"{key}.{name}".lstrip("."))


def _check_mapping(schema: DictConfig, given, key: str) -> None:
    """Raise ConfigError where a value stands in the place of a mapping with keys of its own."""
    if not (OmegaConf.is_dict(given) or (given is None and schema._is_optional())):
        raise ConfigError(f"{key} is a mapping, such as {{name: value}}; write {given} as one")


def _check_list(schema: ListConfig, given, key: str) -> None:
    """Raise ConfigError where something else stands in the place of a list, or in a list of sections one is wrong."""
    if OmegaConf.is_dict(given) and all(str(name).isdigit() for name in given):
        raise ConfigError(f"{key} is a list, none of whose items can be set alone; write all of it, such as [a, b]")
    if not (OmegaConf.is_list(given) or (given is None and schema._is_optional())):
        raise ConfigError(f"{key} is a list, such as [a, b]; write {given} as one")
    element = schema._metadata.element_type
    if not is_dataclass(element) or given is None:
        return
    for number, item in enumerate(given):
        _check_sections(OmegaConf.structured(element), item, f"{key}[{number}]")
        try:
            OmegaConf.merge(OmegaConf.structured(element), item)
        except ConfigKeyError as error:
            known = ", ".join(each.name for each in fields(element))
            raise ConfigError(f"unknown key {key}[{number}].{error.key}; known are {known}") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}[{number}].{error.full_key}: {_one_line(error)}") from error


def _unknown_key(key: str, path) -> str:
    section, _, name = key.rpartition(".")
    schema = OmegaConf.structured(Config)
    known = [str(k) for k in (OmegaConf.select(schema, section) if section else schema)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"unknown key {key} in {path} or the overrides; {hint}"


def _one_line(error: Exception) -> str:
    return one_line(str(error).split("\n    full_key")[0])
