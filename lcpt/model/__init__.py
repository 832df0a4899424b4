"""The GPT and what it costs."""

from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.weights import load_weights

__all__ = ["GPT", "ModelConfig", "load_weights"]
