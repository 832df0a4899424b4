"""Read a model's config that was saved with weights: a key that it lacks means the value of the day it was saved.

A config that people write has the defaults of today. One that is saved has every key of its day, and model.version. To
add a key whose default changes the model, or to change a default, raise VERSION and write down in BEFORE what the
missing key meant until then. A key whose default leaves the model as it was needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from omegaconf import DictConfig, OmegaConf

VERSION = 2
BEFORE = {  # version -> keys of the section `model` that it added or gave another default, and their values before it
    2: {
        "attention.key_shift": False,
        "attention.polynomial.shift": 0.0,
        "attention.polysketch.shift": 0.0,
        "attention.polysketch.sketch": "learned",
        "attention.flurka.feature_map": "elu1",
    },
}


def check_version(version: int) -> None:
    if not 1 <= version <= VERSION:
        raise ValueError(f"model.version is {version}; this lcpt knows 1 to {VERSION}: use the lcpt that wrote it")


def upgrade(section: Mapping, version: int) -> DictConfig:
    """Return a section `model` of this version with every key that it lacks and that meant something else then.

    The result is of today's VERSION: its missing keys have today's defaults. ValueError for an unknown version.
    """
    check_version(version)
    upgraded = cast(DictConfig, OmegaConf.create(dict(section)))
    for added in range(VERSION, version, -1):
        for key, value in BEFORE[added].items():
            if OmegaConf.select(upgraded, key) is None:
                OmegaConf.update(upgraded, key, value)
    upgraded.version = VERSION
    return upgraded


def upgrade_saved(section: Mapping) -> DictConfig:
    """Upgrade a section that was saved with weights; without a version, it is of version 1."""
    return upgrade(section, section.get("version", 1))
