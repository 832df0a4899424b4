"""Compare a config with the one that a checkpoint was saved under: what must be the same, and what has changed."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from lcpt.checkpoint import read_state
from lcpt.data import DataConfig, SampleSource, SourceConfig
from lcpt.model import ModelConfig
from lcpt.model.config_version import VERSION, upgrade_saved
from lcpt.training.config import TrainingConfig
from lcpt.training.schedule import check_no_jump

if TYPE_CHECKING:
    from lcpt.config import Config

Changes = dict[str, tuple[Any, Any]]  # key -> (the value that the checkpoint was saved under, the value now)

CHANGEABLE = ("model.activation_checkpointing", "model.z_loss")  # what a model computes does not depend on them
UNSAID = {"data.mask_documents": False, "data.packing": "contiguous"}  # what training did before checkpoints said it
SCHEDULE = ("max_steps", "lr", "schedule", "warmup_steps", "final_lr_fraction", "decay_fraction")
# Of what may change in a run, the settings that decide its result: on a finished run they would change nothing.
RECIPE = (*SCHEDULE, "weight_decay", "betas", "grad_clip", "precision")


def check_same_run(step: Path, config: Config) -> None:
    """Raise ValueError, naming all that differs, if the run was begun with another model, seed, context or batch."""
    saved = _saved(step).model
    then = UNSAID | read_state(step) | _saved_model(step)
    now = _batches(config) | flatten(asdict(config.model), "model")
    differing = {
        name: (then.get(name), value)
        for name, value in now.items()
        if then.get(name) != value and name not in CHANGEABLE
    }
    if differing:
        version = saved.get("version", 1)
        of_model = any(name.startswith("model.") for name in differing)
        old = version < VERSION and of_model
        remedy = f"model.version={version} gives the defaults of that day; else " if old else ""
        raise ValueError(f"{step.parents[1]} was begun with {_listed(differing)}; {remedy}name another run.dir")


def check_same_data(step: Path, config: Config, source: SampleSource) -> None:
    """Raise ValueError if the run was begun with other data."""
    then = read_state(step)["data fingerprint"]
    if then != source.fingerprint:
        begun, now = _saved_origin(step), config.data.origin
        raise ValueError(
            f"{step.parents[1]} was begun with other data than {now} (fingerprint {then[:12]}…, this is "
            f"{source.fingerprint[:12]}…){'' if begun == now else f': with {begun}'}; set data.path or "
            "data.sources to what it was begun with, or name another run.dir"
        )


def check_not_finished_otherwise(step: Path, changes: Changes) -> None:
    """Raise ValueError if a finished run would have to be trained again for these changes to take effect."""
    idle = {name: values for name, values in changes.items() if name.removeprefix("training.") in RECIPE}
    if idle:
        raise ValueError(
            f"{step.parents[1]} is complete, and was trained with {_listed(idle)}; name another run.dir, "
            "or train on with a larger training.max_steps"
        )


def check_rate(step: Path, config: Config) -> None:
    """Raise ValueError if the learning rate would jump up at the first step after the checkpoint `step`."""
    saved = _saved(step).get("training", {})
    old = TrainingConfig(**{name: saved[name] for name in SCHEDULE if name in saved})
    if not config.training.allow_lr_jump:
        check_no_jump(read_state(step)["step"], old, config.training)


def changed_settings(step: Path, config: Config) -> Changes:
    """List the settings that differ from those the checkpoint was saved under, and may.

    A key that it lacks meant today's default. The run's folder may have moved, and its data as well.
    """
    saved = flatten(cast(dict, OmegaConf.to_container(_saved(step)))) | _saved_model(step)
    now, defaults = flatten(asdict(config)), _defaults(config)
    pairs = {name: (saved.get(name, defaults.get(name)), now.get(name)) for name in {**now, **saved}}
    return {
        name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ("run.dir", "model.version")
    }


def shown(value: Any) -> str:
    """Write a setting's value as YAML and the command line have it."""
    return value if isinstance(value, str) else json.dumps(value)


def data_position(config: Config, source: SampleSource) -> dict:
    """Collect what, beside the step, decides the next batch."""
    return _batches(config) | {"data fingerprint": source.fingerprint}


def flatten(section: dict, name: str = "") -> dict[str, Any]:
    """Flatten nested keys: {"a": {"b": 1}} -> {"name.a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{name}.{key}".lstrip(".")
        items |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return items


def _batches(config: Config) -> dict:
    return {
        "run.seed": config.run.seed,
        "data.context": config.data.context,
        "data.mask_documents": config.data.mask_documents,
        "data.packing": config.data.packing,
        "training.global_batch_tokens": config.training.global_batch_tokens,
    }


def _listed(differing: Changes) -> str:
    return "; ".join(f"{name} {then}, this is {now}" for name, (then, now) in differing.items())


def _saved(step: Path) -> DictConfig:
    return cast(DictConfig, OmegaConf.load(step / "config.yaml"))


def _saved_origin(step: Path) -> str:
    """Name the training data of a checkpoint as DataConfig does."""
    data = _saved(step).data
    sources = None if data.get("sources") is None else [SourceConfig(**source) for source in data.sources]
    return DataConfig(path=data.path, sources=sources).origin


def _saved_model(step: Path) -> dict[str, Any]:
    """Return the keys of the section `model`: one that it lacks has the value of its day."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), upgrade_saved(_saved(step).model))
    return flatten(cast(dict, OmegaConf.to_container(merged)), "model")


def _defaults(config: Config) -> dict[str, Any]:
    return flatten({section.name: asdict(type(getattr(config, section.name))()) for section in fields(config)})
