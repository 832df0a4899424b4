"""Write a trained model as a folder that transformers opens: `lcpt export --format hf`.

    model.safetensors        every parameter and buffer of lcpt by name after `model.`, fp32 or bf16
    config.json              model_type lcpt; under `lcpt` the model's config and its training in three numbers
    generation_config.json   where a text begins and ends
    *_lcpt.py                the code in remote_code/, which calls lcpt
    tokenizer.model, or tokenizer.json; tokenizer_config.json
    README.md                the model card

Nothing here imports transformers, and nothing in the folder is a pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from lcpt import __version__
from lcpt.data.atomic_folder import new_folder
from lcpt.model.huggingface.card import check_license, model_card
from lcpt.model.huggingface.export_tokenizer import CODE, SpecialTokens, special_tokens, write_tokenizer
from lcpt.model.pretrained import Pretrained, check_output, open_pretrained
from lcpt.model.weights import DTYPES, stored_state
from lcpt.utils.tensor_files import save_tensors

PREFIX = "model."  # of lcpt's names, which are those of an attribute of LcptForCausalLM


def write_hf_export(source: str | Path, output: str | Path, dtype: str = "fp32", license: str | None = None) -> dict:
    """Export what `source` holds (see open_pretrained) to a new folder that appears whole or not at all; returns its
    config.json.

    dtype: fp32 or bf16. license: an identifier for the card, such as apache-2.0. Raises CheckpointError for a model
    without a tokenizer or an `output` that exists, DataError if that is being written, ValueError for the others.
    """
    check_output(output)
    check_license(license)
    trained = open_pretrained(source)
    state = stored_state(trained.model, dtype)
    special = special_tokens(trained)
    config = _config(trained, dtype, special)
    card = model_card(trained, Path(output).absolute().name, license)
    with new_folder(output) as folder:
        tensors = {PREFIX + name: tensor for name, tensor in state.items()}
        save_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
        write_tokenizer(trained, special, folder)
        for name in ("configuration_lcpt.py", "modeling_lcpt.py"):
            shutil.copyfile(CODE / name, folder / name)
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", special.ids())
        (folder / "README.md").write_text(card)
    return config


def _config(trained: Pretrained, dtype: str, special: SpecialTokens) -> dict:
    return {
        "model_type": "lcpt",
        "architectures": ["LcptForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lcpt.LcptConfig",
            "AutoModelForCausalLM": "modeling_lcpt.LcptForCausalLM",
        },
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        **special.ids(),
        "lcpt": {
            "model": asdict(trained.model.config),
            "context": trained.context,
            "step": trained.step,
            "tokens": trained.tokens,
            "lcpt_version": __version__,
        },
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
