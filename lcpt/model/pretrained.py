"""Open a trained model from a run, a step or an export, and write it as an export.

    export/model.safetensors    every parameter and buffer by name, whole, fp32 or bf16
           config.json          the model's config, its training in three numbers, hashes of the other two files; of a
                                mean of checkpoints `mean_of`: their run, step and sha256
           tokenizer.model      SentencePiece; or tokenizer.json

A checkpoint serves to train on: in slices, with Adam's moments. An export serves to use the model, and to pass it on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcpt import __version__
from lcpt.checkpoint import CheckpointError, open_checkpoint, read_state, read_tensors
from lcpt.data import AnyTokenizer, find_tokenizer, open_tokenizer
from lcpt.data.atomic_folder import new_folder
from lcpt.data.open_tokenizer import SENTENCEPIECE, TOKENIZERS, name_in_folder
from lcpt.model.config_version import upgrade_saved
from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.weights import load_tensors, stored_state
from lcpt.utils.errors import first_line
from lcpt.utils.hashing import self_sha256, size_and_sha256
from lcpt.utils.tensor_files import save_tensors

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KEYS = {"schema_version", "lcpt_version", "step", "tokens", "context", "parameters", "model", "files", "sha256"}
REMEDY = "export the checkpoint again with lcpt export"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """Holds a trained model and where it comes from."""

    folder: Path  # the step or export that it comes from
    model: GPT  # fp32, on the CPU, in eval mode
    tokenizer: Path  # tokenizer.model or tokenizer.json; there is none where it was trained on a task
    context: int  # tokens of a sequence in training
    step: int
    tokens: int  # that it was trained on

    def open_tokenizer(self) -> AnyTokenizer:
        """Open its tokenizer. Raises CheckpointError where it was trained on a task."""
        self.check_tokenizer()
        return open_tokenizer(self.tokenizer)

    def check_tokenizer(self) -> None:
        if not self.tokenizer.exists():
            raise CheckpointError(
                f"{self.folder} has no tokenizer: it was trained on a task, not on text; "
                "lcpt evaluate --data synthetic:TASK is what there is to do with it"
            )


def load_pretrained(source: str | Path) -> GPT:
    """Load the model of an export, a run folder (its newest whole step) or a step folder: fp32, on the CPU, in eval
    mode; its `.config` is a ModelConfig.

    Raises CheckpointError naming the file that is missing, damaged or not understood.
    """
    return open_pretrained(source).model


def open_pretrained(source: str | Path) -> Pretrained:
    """Open a run folder (its newest whole step), a step folder or an export, after checking every file of it.

    Raises CheckpointError naming the file that is missing, damaged or not understood.
    """
    folder = Path(source)
    if is_export(folder):
        return _open_export(folder)
    return _open_step(*open_checkpoint(folder))


def write_export(source: str | Path, output: str | Path, dtype: str = "fp32") -> dict:
    """Export what `source` holds (see open_pretrained) to a new folder that appears whole or not at all; returns its
    config.json. dtype: fp32, or bf16, which halves the file and rounds the weights. Raises CheckpointError if `output`
    exists and is no empty folder, and DataError if it is being written.
    """
    check_output(output)
    return write_pretrained(open_pretrained(source), output, dtype=dtype)


def check_output(output: str | Path) -> None:
    """Raise CheckpointError if an export's place exists and is no empty folder."""
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is no empty folder; choose another --output")


def write_pretrained(
    trained: Pretrained, output: str | Path, mean_of: list[dict] | None = None, dtype: str = "fp32"
) -> dict:
    """Write a model as an export, as write_export does; mean_of: the checkpoints whose weights were averaged."""
    trained.check_tokenizer()
    state = stored_state(trained.model, dtype)
    tokenizer = name_in_folder(trained.tokenizer)
    with new_folder(output) as folder:
        shutil.copyfile(trained.tokenizer, folder / tokenizer)
        save_tensors(folder / WEIGHTS, state, metadata={"format": "pt"})
        content = {
            "schema_version": SCHEMA_VERSION,
            "lcpt_version": __version__,
            "step": trained.step,
            "tokens": trained.tokens,
            "context": trained.context,
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "model": asdict(trained.model.config),
            "files": {name: size_and_sha256(folder / name) for name in (WEIGHTS, tokenizer)},
        }
        content |= {"mean_of": mean_of} if mean_of else {}
        content["sha256"] = self_sha256(content)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return content


def check_export(folder: Path, *, hashes: bool = True) -> dict:
    """Check every file of an export; returns its config.json. CheckpointError names the one that is not whole."""
    content = _read_config(folder / CONFIG)
    for name in (WEIGHTS, _tokenizer_of(content)):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {REMEDY}")
        if hashes and content["files"].get(name) != size_and_sha256(file):
            raise CheckpointError(
                f"{file} is damaged, or of another export: {CONFIG} states another size or sha256; {REMEDY}"
            )
    return content


def _tokenizer_of(content: dict) -> str:
    """Return the name of the tokenizer's file that an export's config.json lists."""
    return next((name for name in TOKENIZERS if name in content["files"]), SENTENCEPIECE)


def is_export(folder: Path) -> bool:
    """Return whether a folder is, or was meant to be, an export."""
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS))


def _open_export(folder: Path) -> Pretrained:
    content = check_export(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is no safetensors file ({first_line(error)}); {REMEDY}") from error
    model = build_model(model_config(content["model"], folder / CONFIG), tensors, folder / WEIGHTS)
    return Pretrained(
        folder=folder,
        model=model,
        tokenizer=folder / _tokenizer_of(content),
        context=content["context"],
        step=content["step"],
        tokens=content["tokens"],
    )


def _open_step(step: Path, manifest: dict) -> Pretrained:
    tensors, state = read_tensors(step, manifest), read_state(step)
    config, context = step_config(step)
    model = build_model(config, tensors, step)
    return Pretrained(
        folder=step,
        model=model,
        tokenizer=find_tokenizer(step),
        context=context,
        step=state["step"],
        tokens=state["tokens"],
    )


def step_config(step: Path) -> tuple[ModelConfig, int]:
    """Read (the model's config, the tokens of a sequence) of a step folder."""
    path = step / "config.yaml"
    try:
        given, state = OmegaConf.load(path), read_state(step)
        for key in (key for key in state if key == "data.context" or key.startswith("model.")):
            OmegaConf.update(given, key, state[key])  # what the run's phase has in place of it
        section, context = cast(dict, OmegaConf.to_container(given.model)), given.data.context
    except Exception as error:  # a YAML parser's errors have no common class
        raise CheckpointError(f"{path} is no config of a run ({first_line(error)}); use another checkpoint") from error
    return model_config(section, path), context


def _read_config(path: Path) -> dict:
    """Read config.json after checking all that can be wrong with it alone."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; name a folder that lcpt export wrote")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({first_line(error)}); {REMEDY}") from error
    if isinstance(content, dict) and "model_type" in content:
        raise CheckpointError(
            f"{path} is of transformers; make an export of it: lcpt import --from {path.parent} --output EXPORT"
        )
    if not isinstance(content, dict) or "schema_version" not in content:
        raise CheckpointError(f"{path} is not the one of an lcpt export: it states no schema_version; {REMEDY}")
    if content["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} is of schema {content['schema_version']}, this lcpt reads {SCHEMA_VERSION}; "
            "use the lcpt that wrote it"
        )
    if content.get("sha256") != self_sha256(content):
        raise CheckpointError(f"{path} does not match its own hash: it was damaged or edited; {REMEDY}")
    if differing := (content.keys() ^ KEYS) - {"mean_of"}:
        raise CheckpointError(
            f"{path} has keys too many or too few for schema {SCHEMA_VERSION}: "
            f"{', '.join(sorted(differing))}; use the lcpt that wrote it"
        )
    return content


def model_config(section: Mapping, path: Path) -> ModelConfig:
    """Build the checked ModelConfig of a section `model` that was saved with weights."""
    if "${" in json.dumps(section, default=str):  # a run saves values, never references to the environment
        raise CheckpointError(f"{path} refers to other values by ${{…}} in its model; give the values themselves")
    try:
        upgraded = upgrade_saved(section)
        return cast(ModelConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), upgraded)))
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        key = f"model.{error.full_key}: " if isinstance(error, OmegaConfBaseException) else ""
        raise CheckpointError(
            f"{path} describes no model of this lcpt: {key}{first_line(error)}; use the lcpt that wrote it"
        ) from error


def build_model(config: ModelConfig, tensors: Mapping[str, Tensor], source: Path) -> GPT:
    """Build a model in eval mode with the tensors of `source`. Raises CheckpointError naming one that does not fit."""
    with torch.random.fork_rng(devices=[]):  # building it draws the initial weights
        model = GPT(config)
    load_tensors(model, tensors, source)
    return model.eval()
