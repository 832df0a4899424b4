"""Describe an lcpt model to transformers. `lcpt export --format hf` copies this file beside the weights."""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


def _of_model(key: str) -> property:
    """Return a property under transformers' name for a key of lcpt's `model`."""
    return property(lambda config: config.lcpt.get("model", {}).get(key))


class LcptConfig(PreTrainedConfig):
    """Holds lcpt's own description of the model in `lcpt`, and gives what transformers asks for out of it.

    lcpt: `model`, the keys of an lcpt ModelConfig; `context`, the tokens of a sequence in training; `step` and
    `tokens`, how long it was trained; `lcpt_version`, which wrote it.
    """

    model_type = "lcpt"
    keys_to_ignore_at_inference = ["cache"]

    lcpt: dict[str, Any] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False  # where lcpt ties them, there is one matrix, and nothing for transformers to tie

    vocab_size = _of_model("vocab_size")
    hidden_size = _of_model("d_model")
    num_hidden_layers = _of_model("n_layers")
    num_attention_heads = _of_model("n_heads")

    @property
    def max_position_embeddings(self) -> int | None:
        """The tokens of a sequence in training. Only learned positions (lcpt's model.max_positions) end anywhere."""
        return self.lcpt.get("context")
