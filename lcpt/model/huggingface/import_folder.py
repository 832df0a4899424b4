"""Import a model that transformers saved as an lcpt export: its weights, what its config.json says, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcpt.checkpoint import CheckpointError
from lcpt.data import AnyTokenizer, find_tokenizer, open_tokenizer
from lcpt.data.open_tokenizer import JSON
from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.huggingface.architecture import Architecture
from lcpt.model.huggingface.gpt2 import GPT2
from lcpt.model.huggingface.import_settings import HARMLESS, Settings, read_json
from lcpt.model.huggingface.import_tensors import TensorFiles, make_tensors
from lcpt.model.huggingface.llama import LLAMA
from lcpt.model.huggingface.qwen3 import QWEN3
from lcpt.model.pretrained import CONFIG, Pretrained, build_model, check_output, model_config, write_pretrained

ARCHITECTURES: dict[str, Architecture] = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}
OURS, OUR_PREFIX = "lcpt", "model."  # a model that lcpt exported for transformers


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Holds a model that was read from a folder of transformers, and how."""

    trained: Pretrained
    tokenizer: AnyTokenizer
    model_type: str
    widened: list[str]  # the narrower types whose values became fp32


def import_folder(source: str | Path, output: str | Path) -> Imported:
    """Write the model of a folder that transformers saved as an lcpt export; nothing of the folder is executed.

    The folder has config.json, model.safetensors (or several with model.safetensors.index.json) and tokenizer.json.
    Weights become fp32. Raises CheckpointError or DataError naming what is missing, damaged, or not in lcpt.
    """
    check_output(output)
    imported = read_folder(Path(source))
    write_pretrained(imported.trained, output)
    return imported


def read_folder(folder: Path) -> Imported:
    """Read a folder as import_folder does."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name one that holds {CONFIG}, safetensors and {JSON}")
    content = read_json(folder / CONFIG)
    model_type = content.get("model_type")
    if model_type == OURS:
        return _read_ours(folder, content)
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return _read_theirs(folder, content, ARCHITECTURES[model_type])
    known = ", ".join([*ARCHITECTURES, OURS])
    raise CheckpointError(f"{folder / CONFIG}: model_type is {model_type!r}; lcpt imports {known}")


def _read_theirs(folder: Path, content: dict[str, Any], architecture: Architecture) -> Imported:
    config, context = _read_config(Settings(content, folder / CONFIG), architecture)
    tokenizer = _open_tokenizer(folder / JSON, config)  # before the weights, which take longest
    files = TensorFiles(folder)
    tensors = make_tensors(
        files,
        architecture.recipe(config),
        prefix=architecture.prefix,
        ignored=architecture.ignored,
        tied=("lm_head.weight", architecture.embedding) if config.tie_embeddings else None,
    )
    trained = Pretrained(
        folder=folder, model=_model(config, tensors), tokenizer=tokenizer.path, context=context, step=0, tokens=0
    )
    return Imported(trained=trained, tokenizer=tokenizer, model_type=content["model_type"], widened=files.widened)


def _read_config(settings: Settings, architecture: Architecture) -> tuple[ModelConfig, int]:
    for name in settings.names("architectures") or []:
        if name not in architecture.classes:
            settings.refuse("architectures", f"lcpt has {', '.join(architecture.classes)}")
    if settings.content.get("quantization_config"):
        settings.refuse("quantization_config", "lcpt reads weights of bf16, fp16 and fp32; take the original model")
    try:
        config, context = architecture.read_config(settings)
    except CheckpointError:
        raise
    except ValueError as error:  # of ModelConfig and its sections
        raise CheckpointError(f"{settings.path} describes no model of lcpt: {error}") from None
    settings.check_all_read(HARMLESS | architecture.harmless)
    return config, context


def _model(config: ModelConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """Build a model around these tensors, which takes no memory but theirs: softmax layers have no other buffers."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _read_ours(folder: Path, content: dict[str, Any]) -> Imported:
    settings = Settings(content, folder / CONFIG).section("lcpt")
    section = settings.section("model") if settings else None
    if settings is None or section is None:
        raise CheckpointError(f"{folder / CONFIG} has no section lcpt.model; export the model again")
    config = model_config(section.content, folder / CONFIG)
    tokenizer = _open_tokenizer(find_tokenizer(folder), config)
    files = TensorFiles(folder)
    if foreign := [name for name in files.shapes if not name.startswith(OUR_PREFIX)]:
        raise CheckpointError(f"{files.place(foreign[0])} has no place in a model of lcpt")
    tensors = {name.removeprefix(OUR_PREFIX): files.read(name) for name in files.shapes}
    trained = Pretrained(
        folder=folder,
        model=build_model(config, tensors, folder),
        tokenizer=tokenizer.path,
        context=settings.size("context", None),
        step=settings.size("step", None, least=0),
        tokens=settings.size("tokens", None, least=0),
    )
    return Imported(trained=trained, tokenizer=tokenizer, model_type=OURS, widened=files.widened)


def _open_tokenizer(path: Path, config: ModelConfig) -> AnyTokenizer:
    """Open a folder's tokenizer. CheckpointError where there is none, or more tokens than the model has embeddings."""
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {JSON}; write one: in transformers, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, and the model {config.vocab_size} embeddings; take the "
            "tokenizer that it was trained with"
        )
    return tokenizer
