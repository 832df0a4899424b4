"""Write a tokenizer as transformers opens it: a SentencePiece model with our own code, a tokenizer.json with none."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lcpt.model.pretrained import Pretrained

CODE = Path(__file__).parent / "remote_code"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Holds the tokens that transformers asks for, (text, id) each. BOS ends a text too: it separates documents."""

    bos: tuple[str, int]
    pad: tuple[str, int]

    def ids(self) -> dict[str, int]:
        """Return them as in config.json and generation_config.json."""
        return {"bos_token_id": self.bos[1], "eos_token_id": self.bos[1], "pad_token_id": self.pad[1]}


def special_tokens(trained: Pretrained) -> SpecialTokens:
    """Find the special tokens of a model. Raises CheckpointError where it was trained on a task: it has none."""
    number = trained.open_tokenizer().bos_id
    if trained.tokenizer.suffix == ".json":
        bos = _text_of(trained.tokenizer, number), number
        return SpecialTokens(bos, bos)
    model = SentencePieceProcessor(model_file=str(trained.tokenizer))
    # Where unknown characters are spelled by bytes, no text has an unknown token, so that it can stand for padding.
    pad = model.unk_id() if model.piece_to_id("<0x00>") != model.unk_id() else number
    return SpecialTokens((model.id_to_piece(number), number), (model.id_to_piece(pad), pad))


def write_tokenizer(trained: Pretrained, special: SpecialTokens, folder: Path) -> None:
    """Write the tokenizer's own file, tokenizer_config.json and the code that it needs into the folder of an export."""
    config = {
        "bos_token": special.bos[0],
        "eos_token": special.bos[0],
        "pad_token": special.pad[0],
        "padding_side": "left",  # for `generate`, which goes on where a row ends
        "clean_up_tokenization_spaces": False,
    }
    if trained.model.config.max_positions is not None:
        config["model_max_length"] = trained.model.config.max_positions
    if trained.tokenizer.suffix == ".json":
        name, config["tokenizer_class"] = "tokenizer.json", "PreTrainedTokenizerFast"
    else:
        name, config["tokenizer_class"] = "tokenizer.model", "LcptTokenizer"
        model = SentencePieceProcessor(model_file=str(trained.tokenizer))
        config["unk_token"] = model.id_to_piece(model.unk_id())
        config["auto_map"] = {"AutoTokenizer": ["tokenization_lcpt.LcptTokenizer", None]}
        shutil.copyfile(CODE / "tokenization_lcpt.py", folder / "tokenization_lcpt.py")
    shutil.copyfile(trained.tokenizer, folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _text_of(tokenizer: Path, number: int) -> str:
    """Return how a tokenizer.json writes a special token."""
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    return next(token["content"] for token in added if token["id"] == number)
