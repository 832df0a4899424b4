"""Give an lcpt model transformers' interface. `lcpt export --format hf` copies this file beside the weights.

The model itself is lcpt's: nothing is computed here but what padding asks for.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lcpt.model import GPT
from lcpt.model.generation import PIECE
from lcpt.model.pretrained import model_config

from .configuration_lcpt import LcptConfig


class LcptCache(Cache):
    """Holds what the model keeps of the tokens so far. In layers of linear cost that does not grow with them.

    Rows that began after equally many padding tokens share a state, so that none ever sees the padding.
    """

    is_croppable = False  # a state cannot forget its last token
    is_linear = [False]  # transformers then hands over the tokens alone that `get_seq_length` does not count

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self):
        self.columns = 0  # of input_ids that were read, padding among them
        self.states = []  # (rows int64 [N], lcpt's cache of these rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    def extend(self, model: GPT, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Read the next tokens int64 [B, T] of each row -> the last block's output [B, T, d_model], 0 at padding."""
        if not tokens.shape[1]:
            raise ValueError("the cache holds all of these; give the whole text, or an attention_mask as long as it is")
        refuse_padding(mask, tokens.shape[1] if self.states else 1)
        if self.states:
            groups = [(rows, 0, state) for rows, state in self.states]
        else:
            starts = text_starts(tokens, mask)
            groups = [((starts == start).nonzero()[:, 0], start, None) for start in starts.unique().tolist()]
        hidden = tokens.new_zeros(*tokens.shape, model.config.d_model, dtype=model.head_weight.dtype)
        self.states = []
        for rows, start, state in groups:
            pieces = []
            for piece in tokens[rows, start:].split(PIECE, dim=1):  # what its layers need does not grow with the prompt
                x, state = model.extend(piece, state)
                pieces.append(x)
            hidden[rows, start:] = torch.cat(pieces, dim=1)
            self.states.append((rows, state))
        self.columns += tokens.shape[1]
        return hidden

    def batch_select_indices(self, indices: Tensor):
        """Let row n go on from what is now row indices[n]."""
        chosen = []
        for rows, state in self.states:
            found, places = (indices[:, None] == rows).nonzero(as_tuple=True)
            if len(found):
                chosen.append((found, state.select(places)))
        self.states = chosen

    def reorder_cache(self, beam_idx: Tensor):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        rows = torch.cat([rows for rows, _ in self.states]).sort().values
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int):
        raise ValueError("a state of lcpt cannot forget tokens; begin with a new cache")


class LcptForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps lcpt's GPT, `.model`."""

    config_class = LcptConfig
    base_model_prefix = "model"
    _is_stateful = True  # refuses assisted generation, which takes tokens back
    _no_split_modules = ["Block"]

    def __init__(self, config: LcptConfig):
        super().__init__(config)
        self.model = GPT(model_config(config.lcpt["model"], Path(config.name_or_path or "") / "config.json"))
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder, *args, output_loading_info=False, **kwargs):
        """Load as every model of transformers, but raise ValueError for a file with weights too few or too many."""
        model, loaded = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        for key, said in (("missing_keys", "has no"), ("unexpected_keys", "has, and this model has not,")):
            if loaded[key]:
                raise ValueError(f"model.safetensors of {folder} {said} {', '.join(sorted(loaded[key]))}; get it again")
        return (model, loaded) if output_loading_info else model

    def _init_weights(self, module):
        """Fill what no file holds. The weights are drawn by GPT, or read from the file."""
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def get_input_embeddings(self):
        return self.model.embedding

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("lcpt's vocabulary is that of its tokenizer; train a model with the larger one")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: LcptCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits [B, T, V], with labels the loss before them, with use_cache=True or a cache the cache too.

        attention_mask [B, T], with a cache [B, past + T]: 0 at padding, which may stand before a row's tokens or after
        them. labels int64 [B, T]: those of input_ids, shifted here, -100 where none counts. logits_to_keep: of the last
        so many positions, of these positions, or 0, of all. With a cache there is no gradient.
        """
        if use_cache and cache is None:
            cache = LcptCache()
        if not (cache is None or hasattr(cache, "extend")):
            raise ValueError(f"cache is a {type(cache).__name__}; give what this model returned as its cache, or none")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.autocast(input_ids.device.type, enabled=False):  # lcpt computes in the dtype of its weights
            if cache is None:
                hidden = self._hidden(input_ids, attention_mask)
            else:
                hidden = cache.extend(self.model, input_ids, attention_mask)
            logits = hidden[:, kept] @ self.model.head_weight.mT
        loss = None
        if labels is not None:
            if attention_mask is not None:  # a row's first token has nothing before it to be told from
                starts = text_starts(input_ids, attention_mask[:, -input_ids.shape[1] :])[:, None]
                labels = labels.scatter(1, starts, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            if self.training and torch.is_grad_enabled():
                loss = loss + self.model.aux_loss()
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output.to_tuple() if return_dict is False else output

    def _hidden(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last block's output [B, T, d_model]; that of padding means nothing."""
        starts = text_starts(tokens, mask)[:, None]
        if mask is None or not starts.any():  # nothing that stands after a text changes it
            return self.model.hidden(tokens)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        turned = self.model.hidden(tokens.gather(1, (columns + starts) % len(columns)))  # the padding goes to the end
        back = (columns - starts) % len(columns)
        return turned.gather(1, back[..., None].expand_as(turned))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        refuse_padding(attention_mask, 1)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)


def refuse_padding(mask: Tensor | None, last: int):
    """Raise ValueError if the mask [B, T] has padding in the last columns, after which a text is to go on."""
    if mask is not None and not mask[:, -last:].all():
        raise ValueError("a text cannot go on after padding; pad on the left: tokenizer.padding_side = 'left'")


def text_starts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return how many padding tokens stand before each row's own, int64 [B], by a mask [B, T] that is 0 at padding."""
    if mask is None:
        return torch.zeros_like(tokens[:, 0])
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}; it must be that of input_ids, {list(tokens.shape)}")
    real = mask != 0
    starts = real.int().argmax(dim=1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    if ((columns >= starts[:, None]) & (columns < (starts + real.sum(dim=1))[:, None]) != real).any():
        raise ValueError("attention_mask has a hole; padding stands before a row's tokens or after them")
    return starts


__all__ = ["LcptCache", "LcptForCausalLM"]
