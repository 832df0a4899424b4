"""Turn tokens into text while they come: every character as soon as no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence

from lcpt.data.open_tokenizer import AnyTokenizer

CONTEXT = 16  # tokens that are decoded again with each new one, more than those of the characters held back
REPLACEMENT = "\ufffd"  # what a byte decodes to that is no UTF-8, or not yet


class StreamedText:
    """Decodes the continuation of a prompt, given as its tokens without BOS, up to the first of the texts `stops`.

    Attributes: ended, whether a stop has come; no stop is part of the text. Adding a token takes the same time however
    long the text is.
    """

    def __init__(self, tokenizer: AnyTokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._decode = tokenizer.decode
        self._tokens = list(prompt[-CONTEXT:])
        self._given = len(self._decode(self._tokens))  # characters of their text that were handed on
        self._stops = stops
        self._may_be_stop = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is certain with this token, and was not before it."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        # The last three bytes may be the beginning of a character; a byte before them stays what it is.
        certain = max(len(text.rstrip(REPLACEMENT)), len(text) - 3, self._given)
        new, self._given = text[self._given : certain], certain
        if len(self._tokens) >= 2 * CONTEXT:
            self._tokens = self._tokens[-CONTEXT:]
            self._given = len(self._decode(self._tokens)) - (len(text) - certain)
        return self._before_stop(new)

    def finish(self) -> str:
        """Return the rest: no token comes any more."""
        if self.ended:
            return ""
        return self._before_stop(self._decode(self._tokens)[self._given :]) + self._may_be_stop

    def _before_stop(self, new: str) -> str:
        text = self._may_be_stop + new
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:  # the first that is whole, so that it matters not how tokens cut the text
            self.ended, self._may_be_stop = True, ""
            return text[: min(found)[1]]
        beginnings = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._may_be_stop = text[len(text) - held :]
        return text[: len(text) - held]
