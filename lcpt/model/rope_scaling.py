"""Stretch rotary positions beyond the context that a model was trained at: linear, Llama 3's, YaRN.

Notation: θ_i = base^(−2i/D) are the frequencies of RoPE, a position m is rotated by the angles m θ_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcpt.attention.base import cos_and_sin, rotary_frequencies


@dataclass
class LinearConfig:
    factor: float = 1.0  # positions are divided by it


@dataclass
class Llama3Config:
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # that the model was trained at, tokens


@dataclass
class YarnConfig:
    factor: float = 1.0
    original_context: int = 8192  # that the model was trained at, tokens
    beta_fast: float = 32.0  # what turns more often than this in the original context stays as it is
    beta_slow: float = 1.0  # what turns less often is divided by the factor
    attention_factor: float | None = None  # of cos and sin; None: 0.1 ln(factor) + 1


@dataclass
class RopeScalingConfig:
    kind: str = "none"  # none | linear | llama3 | yarn
    linear: LinearConfig = field(default_factory=LinearConfig)
    llama3: Llama3Config = field(default_factory=Llama3Config)
    yarn: YarnConfig = field(default_factory=YarnConfig)

    def __post_init__(self):
        if self.kind not in ("none", "linear", "llama3", "yarn"):
            raise ValueError(f"model.rope_scaling.kind is {self.kind!r}; it is none, linear, llama3 or yarn")
        for name in ("linear", "llama3", "yarn"):
            section = getattr(self, name)
            for key, value in vars(section).items():
                least = 1 if key in ("factor", "original_context") else 0
                if value is not None and not (least <= value < math.inf and value > 0):
                    bound = "≥ 1" if least else "> 0"
                    raise ValueError(f"model.rope_scaling.{name}.{key} is {value}; it must be {bound} and finite")
        for name, low, high in (
            ("llama3", "low_freq_factor", "high_freq_factor"),
            ("yarn", "beta_slow", "beta_fast"),
        ):
            section = getattr(self, name)
            if not getattr(section, low) < getattr(section, high):
                raise ValueError(f"model.rope_scaling.{name}.{low} must be less than {high}")


def scaled_rotary_table(
    positions: Tensor, head_dim: int, base: float, config: RopeScalingConfig
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the scaled angles of positions [T], each fp32 [T, 1, D/2]."""
    frequencies = rotary_frequencies(head_dim, base, positions.device)
    if config.kind == "linear":
        frequencies = frequencies / config.linear.factor
    elif config.kind == "llama3":
        frequencies = _llama3(frequencies, config.llama3)
    elif config.kind == "yarn":
        frequencies = _yarn(frequencies, head_dim, base, config.yarn)
    cos, sin = cos_and_sin(positions, frequencies)
    if config.kind == "yarn":
        factor = _attention_factor(config.yarn)
        cos, sin = cos * factor, sin * factor
    return cos, sin


def _llama3(frequencies: Tensor, config: Llama3Config) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, go over smoothly between (Llama 3.1's released code).

    With turns = original_context · θ / 2π of a frequency, its kept share is (turns − low) / (high − low), in [0, 1].
    """
    turns = config.original_context * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.factor


def _yarn(frequencies: Tensor, head_dim: int, base: float, config: YarnConfig) -> Tensor:
    """Blend θ and θ / factor by a ramp over the index of the frequency (YaRN, arXiv 2309.00071, its released code).

    The ramp begins and ends at the whole indices around those that turn beta_fast and beta_slow times.
    """

    def index(turns: float) -> float:
        return head_dim * math.log(config.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    start = max(math.floor(index(config.beta_fast)), 0)
    end = min(math.ceil(index(config.beta_slow)), head_dim - 1)
    indices = torch.arange(head_dim // 2, device=frequencies.device, dtype=torch.float64)
    kept = 1 - ((indices - start) / max(end - start, 0.001)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.factor


def _attention_factor(config: YarnConfig) -> float:
    return 0.1 * math.log(config.factor) + 1 if config.attention_factor is None else config.attention_factor
