"""Give lcpt's tokenizer transformers' interface. `lcpt export --format hf` copies this file beside tokenizer.model."""

import shutil
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from lcpt.data import Tokenizer


class LcptTokenizer(PreTrainedTokenizer):
    """Gives any text the ids that lcpt gives it, after BOS, which begins documents in training.

    A text is never read as a special token: "<s>" in it is three characters. `decode` gives it back exactly.
    add_bos_token: whether BOS comes first by default.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, add_bos_token: bool = True, **kwargs):
        self.vocab_file = vocab_file
        self._lcpt = Tokenizer(vocab_file)
        model = SentencePieceProcessor(model_file=str(vocab_file))
        self._pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
        self._numbers = {piece: number for number, piece in enumerate(self._pieces)}
        kwargs |= {"special_tokens_pattern": "bos" if add_bos_token else "none", "split_special_tokens": True}
        super().__init__(add_bos_token=add_bos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return self._numbers | self._added_tokens_encoder

    def _tokenize(self, text, **kwargs) -> list[str]:
        return [self._pieces[number] for number in self._lcpt.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._numbers.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to the text; special ones, which lcpt leaves out, are in it as they are written."""
        parts = []
        for is_special, run in groupby(tokens, set(self.all_special_tokens).__contains__):
            pieces = list(run)
            parts.append("".join(pieces) if is_special else self._lcpt.decode(self._numbers[x] for x in pieces))
        return "".join(parts)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        copy = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if copy.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, copy)
        return (str(copy),)


__all__ = ["LcptTokenizer"]
