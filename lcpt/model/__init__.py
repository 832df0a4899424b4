"""The GPT and what it costs."""

from lcpt.model.gpt import GPT, ModelConfig

__all__ = ["GPT", "ModelConfig"]
