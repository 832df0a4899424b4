"""Read rotary positions from a config.json: the keys of transformers 5, `rope_parameters`, and those before it."""

from __future__ import annotations

import math

from lcpt.model.huggingface.import_settings import Settings
from lcpt.model.rope_scaling import LinearConfig, Llama3Config, RopeScalingConfig, YarnConfig

ORIGINAL = "original_max_position_embeddings"  # the context before it was stretched
KINDS = {name: name for name in ("default", "linear", "llama3", "yarn")}


def read_rope(settings: Settings, context: int) -> tuple[float, RopeScalingConfig]:
    """Return (base, scaling). context: max_position_embeddings. Raises CheckpointError naming what lcpt does not have.

    Missing keys have the defaults of transformers.
    """
    settings.require("partial_rotary_factor", 1.0, 1.0, "lcpt's rotary positions turn whole heads")
    base, original = settings.positive("rope_theta", 10_000.0), settings.size_if_there(ORIGINAL)
    section, older = settings.section("rope_parameters"), settings.section("rope_scaling")
    if section and older:
        settings.refuse("rope_scaling", "there is rope_parameters too; delete one of them")
    section = section or older
    if section is None:
        return base, RopeScalingConfig()
    section.require("partial_rotary_factor", 1.0, 1.0, "lcpt's rotary positions turn whole heads")
    base = section.positive("rope_theta", base)
    legacy = section.choice("type", KINDS, "default")  # the name that rope_type had at first
    kind = section.choice("rope_type", KINDS, legacy)
    inside = section.size(ORIGINAL, context)
    scaling = _read_scaling(section, kind, original or inside, context)
    section.check_all_read()
    return base, scaling


def _read_scaling(section: Settings, kind: str, original: int, context: int) -> RopeScalingConfig:
    if kind == "linear":
        return RopeScalingConfig(kind, linear=LinearConfig(section.positive("factor", None)))
    if kind == "llama3":
        scaling = Llama3Config(
            factor=section.positive("factor", None),
            low_freq_factor=section.positive("low_freq_factor", None),
            high_freq_factor=section.positive("high_freq_factor", None),
            original_context=original,
        )
        return RopeScalingConfig(kind, llama3=scaling)
    if kind == "yarn":
        section.require("truncate", True, True, "lcpt's ramp begins and ends at whole frequencies")
        factor = section.positive("factor", context / original)
        yarn = YarnConfig(
            factor=factor,
            original_context=original,
            beta_fast=section.positive("beta_fast", 32.0),
            beta_slow=section.positive("beta_slow", 1.0),
            attention_factor=_attention_factor(section, factor),
        )
        return RopeScalingConfig(kind, yarn=yarn)
    return RopeScalingConfig()


def _attention_factor(section: Settings, factor: float) -> float | None:
    """Return what is given, or what DeepSeek's two keys make of the factor; None without: lcpt's own is YaRN's."""
    given = section.positive_if_there("attention_factor")
    scale, scale_all = (section.positive_if_there(key) for key in ("mscale", "mscale_all_dim"))
    if given is not None or scale is None or scale_all is None:
        return given
    return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
