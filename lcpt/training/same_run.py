"""Compare a config with the one that a checkpoint was saved under: what must be the same, and what has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from lcpt.checkpoint import read_state
from lcpt.data import DataConfig, Drawn, SourceConfig
from lcpt.model import ModelConfig
from lcpt.model.config_version import VERSION, upgrade_saved
from lcpt.training.config import SCHEDULE
from lcpt.training.phases import MAY_CHANGE, Phase, PhaseConfig, divide, phase_of
from lcpt.training.schedule import Schedule, check_no_jump

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.training.phase_data import OpenPhase

Changes = dict[str, tuple[Any, Any]]  # key -> (the value that the checkpoint was saved under, the value now)

CHANGEABLE = ("model.activation_checkpointing", "model.z_loss")  # what a model computes does not depend on them
UNSAID = {"data.mask_documents": False, "data.packing": "contiguous"}  # what training did before checkpoints said it
# Of what may change in a run, the settings that decide its result: on a finished run they would change nothing.
RECIPE = (*SCHEDULE, "parameter_groups", "weight_decay", "betas", "grad_clip", "precision")


def check_same_run(step: Path, config: Config, phases: Sequence[Phase]) -> None:
    """Raise ValueError, naming all that differs, if the run was begun with another model, seed, context or batch.

    Of phases, the one that the checkpoint is of must be the same; later ones may be others.
    """
    saved, state = _saved(step).model, read_state(step)
    then = UNSAID | saved_model(step) | state
    phase = phase_of(phases, state["step"])
    now = flatten(asdict(config.model), "model") | _batches(phase)
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
        raise ValueError(f"{step.parents[1]} was begun with {listed(differing)}; {remedy}name another run.dir")


def check_same_data(step: Path, phases: Sequence[OpenPhase]) -> None:
    """Raise ValueError if the run was begun with other data, or has come to another place in them."""
    state = read_state(step)
    opened = phase_of(phases, state["step"])
    then, now = state["data fingerprint"], opened.source.fingerprint
    if then != now:
        begun, origin = _saved_origin(step), opened.config.data.origin
        raise ValueError(
            f"{step.parents[1]} was begun with other data than {origin} (fingerprint {then[:12]}…, this is "
            f"{now[:12]}…){'' if begun == origin else f': with {begun}'}; set data.path or "
            "data.sources to what it was begun with, or name another run.dir"
        )
    drawn = {each.fingerprint: each for each in opened.drawn(state["step"]).values()}
    for path, each in saved_drawn(state).items():
        if (found := drawn.get(each.fingerprint)) is None or (found.tokens, found.order) != (each.tokens, each.order):
            others = f"{found.tokens:,} in {found.order}" if found else "nothing"
            raise ValueError(
                f"{step.parents[1]} has drawn {each.tokens:,} tokens of {path} in {each.order} by {step.name}, and "
                f"these phases draw {others}: keep the phases before that step and the longest context of each folder "
                "as they were, or name another run.dir"
            )


def check_not_finished_otherwise(step: Path, changes: Changes) -> None:
    """Raise ValueError if a finished run would have to be trained again for these changes to take effect."""
    idle = {
        name: values
        for name, values in changes.items()
        if name.removeprefix("training.") in RECIPE
        or name.startswith("phases[")
        and not name.endswith(".training.micro_batch")
    }
    if idle:
        raise ValueError(
            f"{step.parents[1]} is complete, and was trained with {listed(idle)}; name another run.dir, "
            "or train on with a larger training.max_steps"
        )


def check_rate(step: Path, config: Config, phases: Sequence[Phase]) -> None:
    """Raise ValueError if the learning rate would jump up at the first step after the checkpoint `step`.

    What a phase with a schedule of its own begins at was meant.
    """
    done = read_state(step)["step"]
    phase = phase_of(phases, done + 1)
    if not (config.training.allow_lr_jump or phase.has_schedule and phase.first_step == done + 1):
        check_no_jump(done, _saved_schedule(step, config), Schedule(config.training, phases))


def _saved_schedule(step: Path, config: Config) -> Schedule:
    saved = cast(dict, OmegaConf.to_container(_saved(step)))
    keys = (*SCHEDULE, "global_batch_tokens")
    given = {key: saved["training"][key] for key in keys if key in saved.get("training", {})}
    then = replace(
        config,
        training=replace(config.training, **given),
        data=replace(config.data, context=saved["data"]["context"]),
        phases=[PhaseConfig(**phase) for phase in saved.get("phases", [])],
    )
    return Schedule(then.training, divide(then))


def changed_settings(step: Path, config: Config) -> Changes:
    """List the settings that differ from those the checkpoint was saved under, and may.

    A key that it lacks meant today's default. The run's folder may have moved, and its data as well.
    """
    saved = flatten(_phases_apart(cast(dict, OmegaConf.to_container(_saved(step))))) | saved_model(step)
    now, defaults = flatten(_phases_apart(asdict(config))), _defaults(config)
    pairs = {name: (saved.get(name, defaults.get(name)), now.get(name)) for name in {**now, **saved}}
    return {
        name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ("run.dir", "model.version")
    }


def _phases_apart(config: dict) -> dict:
    """Give each phase a key of its own, so that what changes is a key in it."""
    phases = {f"phases[{number}]": phase for number, phase in enumerate(config.get("phases", []))}
    return {name: section for name, section in config.items() if name != "phases"} | phases


def shown(value: Any) -> str:
    """Write a setting's value as YAML and the command line have it."""
    return value if isinstance(value, str) else json.dumps(value)


def data_position(opened: OpenPhase, step: int) -> dict:
    """Collect what decides the batches after a step, and what the model is in this phase."""
    drawn = {path: each._asdict() for path, each in opened.drawn(step).items()}
    return _batches(opened.phase) | {"data fingerprint": opened.source.fingerprint, "data drawn": drawn}


def saved_drawn(state: dict) -> dict[str, Drawn]:
    """Return what a run had drawn, by path, at a checkpoint with this state; nothing from before it was saved."""
    return {path: Drawn(**each) for path, each in state.get("data drawn", {}).items()}


def flatten(section: dict, name: str = "") -> dict[str, Any]:
    """Flatten nested keys: {"a": {"b": 1}} -> {"name.a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{name}.{key}".lstrip(".")
        items |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return items


def _batches(phase: Phase) -> dict:
    """Collect what is the same in all steps of a phase, and decides their result."""
    config = phase.config
    model = flatten(asdict(config.model), "model")
    changing = tuple(f"model.{key}" for key in MAY_CHANGE["model"]) if phase.number else ()
    return {
        "run.seed": config.run.seed,
        "data.context": config.data.context,
        "data.mask_documents": config.data.mask_documents,
        "data.packing": config.data.packing,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        **{key: value for key, value in model.items() if key.startswith(changing)},
    }


def listed(differing: Changes) -> str:
    return "; ".join(f"{name} {then}, this is {now}" for name, (then, now) in differing.items())


def _saved(step: Path) -> DictConfig:
    return cast(DictConfig, OmegaConf.load(step / "config.yaml"))


def _saved_origin(step: Path) -> str:
    """Name the training data of a checkpoint as DataConfig does."""
    data = _saved(step).data
    sources = None if data.get("sources") is None else [SourceConfig(**source) for source in data.sources]
    return DataConfig(path=data.path, sources=sources).origin


def saved_model(step: Path) -> dict[str, Any]:
    """Return the keys of the section `model`: one that it lacks has the value of its day."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), upgrade_saved(_saved(step).model))
    return flatten(cast(dict, OmegaConf.to_container(merged)), "model")


def _defaults(config: Config) -> dict[str, Any]:
    sections = (field.name for field in fields(config) if field.name != "phases")
    return flatten({name: asdict(type(getattr(config, name))()) for name in sections})
