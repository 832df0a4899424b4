"""The GPT, what it costs, and a trained one read back."""

from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.pretrained import load_pretrained
from lcpt.model.weights import load_weights

__all__ = ["GPT", "ModelConfig", "load_pretrained", "load_weights"]
