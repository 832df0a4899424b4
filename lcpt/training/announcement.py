"""Say at the start of a run what is trained, on what and where, and at its end what came out and what to do next."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.training.parameter_groups import describe_groups
from lcpt.utils.provenance import device_name

if TYPE_CHECKING:
    from lcpt.config import Config


def start_block(config: Config, parameters: int, step: int, tokens: int, world: int, device: torch.device) -> str:
    """Describe a run that begins or goes on after `step`; tokens: of the whole run."""
    model, training, parallel = config.model, config.training, config.parallel
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(model.kinds).items())
    valid = ", ".join(filter(None, config.data.valid_sets.values())) or "nothing"
    ranks = f"{world} ranks, each with {device_name(device)}" if world > 1 else device_name(device)
    batch = f"{training.global_batch_tokens:,} a step"
    shared = f", {parallel.sequence} to a sequence" if parallel.sequence > 1 else ""
    rules = training.parameter_groups
    rows = {
        "run": f"{config.run.dir}: {f'after step {step:,}' if step else 'new'}, to step {training.last_step:,}, "
        f"{tokens:,} tokens",
        "model": f"{parameters:,} parameters, {model.d_model} wide; layers: {kinds}",
        **({"groups": describe_groups(rules, model)} if rules else {}),
        "data": f"{config.data.origin}, {config.data.context:,} tokens of context, {batch}",
        "validation": valid,
        "device": f"{ranks}{shared}; {training.precision}, ZeRO stage {parallel.zero_stage}",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def end_block(folder: Path, summary: dict) -> str:
    """Describe a finished run by its summary.json."""
    valid = summary.get("valid_bits_per_byte")
    measured = f"loss {summary['loss']:.3f}" if summary.get("loss") is not None else "no loss"
    if valid is not None:
        measured += f", valid {valid:.3f} bits/byte"
    rows = {
        "finished": f"step {summary.get('step', 0):,}, {summary.get('tokens', 0):,} tokens: {measured}",
        "written to": f"{folder} (summary.json, metrics.jsonl, checkpoints/)",
        "next": f"lcpt evaluate --checkpoint {folder} --data TEXT --output {folder}/evaluation.json",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())
