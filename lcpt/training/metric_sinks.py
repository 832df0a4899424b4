"""Draw metrics in TensorBoard, and in Weights & Biases where a run asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

TAGS = {
    "tokens": "progress/tokens",
    "source_tokens": "data/source_tokens",
    "source_epochs": "data/source_epochs",
    "padding_fraction": "data/padding_fraction",
    "loss": "loss/train",
    "valid_loss": "loss/valid",
    "valid_bits_per_byte": "loss/valid_bits_per_byte",
    "valid_tokens_scored": "progress/valid_tokens_scored",
    "valid_bytes_scored": "progress/valid_bytes_scored",
    "learning_rate": "optimizer/learning_rate",
    "learning_rates": "optimizer/learning_rates",
    "grad_norm": "optimizer/grad_norm",
    "gradient_norms": "gradient_norms",
    "weight_norms": "weight_norms",
    "tokens_per_second": "speed/tokens_per_second",
    "tflops_per_second": "speed/tflops_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "seconds/step",
    "data_seconds": "seconds/data",
    "forward_seconds": "seconds/forward",
    "backward_seconds": "seconds/backward",
    "update_seconds": "seconds/update",
    "data_wait_fraction": "waiting/data_wait_fraction",
    "save_stall_fraction": "waiting/save_stall_fraction",
    "fastest_rank_seconds": "ranks/fastest_seconds",
    "slowest_rank_seconds": "ranks/slowest_seconds",
    "slowest_rank": "ranks/slowest",
    "peak_memory_bytes": "memory/peak_bytes",
}


class Sink(Protocol):
    """Takes rows of metrics, and prompts with what the model writes after them; may raise OSError."""

    def log(self, row: Mapping[str, Any]) -> None: ...
    def text(self, step: int, tag: str, prompt: str, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def tags(row: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a row by their tag: of a mapping, such as norms by layer, tag/key; of name/set, tag/set."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        metric, slash, of_set = name.partition("/")
        tag = TAGS.get(metric, f"other/{metric}") + slash + of_set
        if isinstance(value, Mapping):
            flat |= {f"{tag}/{key}": number for key, number in value.items()}
        elif value is not None and name != "step":
            flat[tag] = value
    return flat


class TensorBoard:
    """Writes event files, for a run that goes on from step `done`: points of later steps are dropped; at 0, all."""

    def __init__(self, folder: Path, config_yaml: str, done: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else 0)
        self._writer.add_text("config", _verbatim(config_yaml), done)
        for summary in hparams(hyperparameters(config_yaml), {"loss/train": None, "loss/valid": None}):
            self._writer._get_file_writer().add_summary(summary)

    def log(self, row: Mapping[str, Any]) -> None:
        for tag, value in tags(row).items():
            self._writer.add_scalar(tag, value, row["step"])

    def text(self, step: int, tag: str, prompt: str, text: str) -> None:
        self._writer.add_text(tag, f"prompt:\n\n{_verbatim(prompt)}\ncontinued:\n\n{_verbatim(text)}", step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs to a project of Weights & Biases. A continued run goes on in the same one there."""

    def __init__(self, project: str, folder: Path, config_yaml: str):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("run.wandb_project needs Weights & Biases: pip install wandb") from error
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=OmegaConf.to_container(OmegaConf.create(config_yaml)),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(tags(row), step=row["step"])

    def text(self, step: int, tag: str, prompt: str, text: str) -> None:
        self._run.log({tag: prompt + text}, step=step)

    def flush(self) -> None:
        pass  # it uploads on its own

    def close(self) -> None:
        self._run.finish()


def _verbatim(text: str) -> str:
    """Write text so that Markdown shows it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def build_sinks(folder: Path, wandb_project: str | None, config_yaml: str, done: int) -> list[Sink]:
    """Open the sinks of a run folder that goes on from step `done`."""
    sinks: list[Sink] = [TensorBoard(folder / "tensorboard", config_yaml, done)]
    if wandb_project is not None:
        sinks.append(WandB(wandb_project, folder, config_yaml))
    return sinks


def hyperparameters(config_yaml: str) -> dict[str, bool | float | str]:
    """Flatten the settings of model, training and parallelism: {"training.lr": 6e-4, …}."""
    flat: dict[str, bool | float | str] = {}

    def visit(section: Mapping[str, Any], name: str) -> None:
        for key, value in section.items():
            if isinstance(value, Mapping):
                visit(value, f"{name}.{key}")
            elif value is not None:
                flat[f"{name}.{key}"] = value if isinstance(value, bool | int | float) else str(value)

    config: Any = OmegaConf.to_container(OmegaConf.create(config_yaml))
    for name in ("model", "training", "parallel"):
        visit(config[name], name)
    return flat
