"""Serve a trained model to lm-evaluation-harness (lm_eval), as its model `lcpt`.

    python -m lcpt.evaluation.lm_eval_model --model lcpt --model_args pretrained=RUN,context=1024 --tasks …

is the harness's own command line that knows it: the harness looks for models in itself alone. Nothing here imports
transformers or reaches for the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lcpt.data import StreamedText
from lcpt.evaluation.scoring import score
from lcpt.evaluation.windows import Window, stack
from lcpt.model.generation import Sampling, generate
from lcpt.model.loss import token_losses
from lcpt.model.pretrained import open_pretrained
from lcpt.utils.progress import progress_bar

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = 1024  # of logits that are held at once
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

logger = logging.getLogger(__name__)


@register_model("lcpt")
class LcptLM(TemplateLM):
    """Scores and continues texts with the model of a run, a step or an export, `pretrained`.

    Every text begins with BOS, as documents did in training. context: tokens of a window (that of training); what is
    longer loses its beginning, BOS too, as with the harness's other models. batch_size: of scoring; it changes no
    number beyond rounding. Raises CheckpointError where the checkpoint is unusable or has no tokenizer, ValueError
    naming an argument that is out of its range.
    """

    def __init__(
        self,
        pretrained: str,
        context: int | None = None,
        batch_size: int | str = 1,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        max_batch_size: int | None = None,  # the harness hands it on, for batch sizes that are found by trial
    ):
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not known; it is {' or '.join(PRECISIONS)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size} must be a number ≥ 1")
        self.trained = open_pretrained(pretrained)
        self.tokenizer_of_text = self.trained.open_tokenizer()
        self.max_length = self.trained.context if context is None else int(context)
        if self.max_length < 1:
            raise ValueError(f"context {context} must be ≥ 1")
        positions = self.trained.model.config.max_positions
        if positions is not None and self.max_length > positions:
            raise ValueError(f"context {context} exceeds the {positions} learned positions of this model")
        self.batch_size = int(batch_size)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = self.trained.model.to(self._device, PRECISIONS[precision])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer_of_text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer_of_text.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused) -> list[int]:
        """Encode the text, after BOS unless add_special_tokens is False."""
        tokens = self.tokenizer_of_text.encode(string)
        return tokens if add_special_tokens is False else [self.eot_token_id, *tokens]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both so that the tokens of the continuation are those that it has after the context.

        Blanks at the context's end go to the continuation, whose words' tokens begin with them. Where a token of the
        whole reaches across the border, each is encoded alone: the score would leave out a part of the continuation.
        """
        before = context.rstrip()
        continuation = context[len(before) :] + continuation
        tokens, whole = self.tok_encode(before), self.tok_encode(before + continuation)
        if whole[: len(tokens)] == tokens:
            return tokens, whole[len(tokens) :]
        return tokens, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **unused) -> list:
        """Return (log p of the continuation's tokens in nats, whether each is the likeliest) of every request."""
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        # Those of like length go together, so that little is padded; the longest first, whose memory fails early.
        order = sorted(range(len(windows)), key=lambda n: -len(windows[n].inputs))
        results: list = [None] * len(windows)
        with progress_bar(total=len(windows), desc="scoring", hidden=disable_tqdm) as bar:
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                for n, result in zip(chosen, self._score([windows[n] for n in chosen]), strict=True):
                    results[n] = result
                bar.update(len(chosen))
        return results

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """Cut both from the left to what the model sees; the context's labels are -1."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds the context of {self.max_length}; "
                "give a larger context"
            )
        tokens = np.array((context + continuation)[-self.max_length - 1 :], dtype=np.int64)
        labels = tokens[1:].copy()
        labels[: len(labels) - len(continuation)] = -1
        return Window(0, tokens[:-1], labels)

    @torch.no_grad()
    def _score(self, windows: list[Window]) -> Iterator[tuple[float, bool]]:
        inputs, labels = (torch.from_numpy(x).to(self._device) for x in stack(windows))
        scored, weight = labels >= 0, self.model.head_weight
        hidden, labels = self.model.hidden(inputs)[scored], labels[scored]  # the head serves continuations alone
        counts = scored.sum(dim=1).tolist()
        log_p = -token_losses(hidden, weight, labels).double()
        right = likeliest(hidden, weight) == labels
        for row, same in zip(log_p.split(counts), right.split(counts), strict=True):
            yield row.sum().item(), bool(same.all())

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts in nats, cut into disjoint windows; the last is filled with context."""
        texts = [self.tokenizer_of_text.encode(request.args[0]) for request in requests]
        results = [0.0] * len(texts)
        scored = score(self.model, self._rolling_windows(texts), self.batch_size, self._device)
        with progress_bar(unit="tok", unit_scale=True, total=sum(map(len, texts)), hidden=disable_tqdm) as bar:
            for window, losses in scored:
                results[window.document] -= float(losses.sum(dtype=np.float64))
                bar.update(int((window.labels >= 0).sum()))
        return results

    def _rolling_windows(self, texts: Sequence[list[int]]) -> Iterator[Window]:
        for number, tokens in enumerate(texts):
            for pair in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1):
                yield self._window(*make_disjoint_window(pair))._replace(document=number)

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Continue each text, one after another, until a stop, which is left out, BOS or max_gen_toks tokens."""
        return [self._continue(*request.args) for request in progress_bar(requests, hidden=disable_tqdm)]

    def _continue(self, text: str, arguments: dict[str, Any]) -> str:
        given: dict[str, Any] = normalize_gen_kwargs(arguments)
        if unknown := sorted(given.keys() - UNDERSTOOD):
            logger.warning("lcpt has no %s; generation goes on without", ", ".join(unknown))
        limit = given["max_gen_toks"]
        if not 1 <= limit < self.max_length:
            raise ValueError(f"max_gen_toks {limit} must lie in 1 … {self.max_length - 1} (the context less a prompt)")
        prompt = self.tok_encode(text)[limit - self.max_length :]
        temperature = given["temperature"] if given["do_sample"] else 0.0
        sampling = Sampling(temperature, given.get("top_k") or None, given.get("top_p"))
        made = StreamedText(self.tokenizer_of_text, prompt, [stop for stop in given["until"] if stop])
        drawn = generate(self.model, torch.tensor([prompt], device=self._device), sampling, [None])
        parts = []
        for token in map(int, islice(drawn, limit)):
            if token == self.eot_token_id:
                break
            parts.append(made.add(token))
            if made.ended:
                break
        return "".join(parts) + made.finish()


def likeliest(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the token of the largest logit, int64 [N], of hidden [N, d] and weight [V, d]."""
    parts = [(rows @ weight.mT).argmax(-1) for rows in hidden.split(ROWS)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=hidden.device)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
