"""Build the GPT, count what it costs, and read a trained one back."""

from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.pretrained import load_pretrained
from lcpt.model.weights import load_weights

__all__ = ["GPT", "ModelConfig", "load_pretrained", "load_weights"]
