"""Write the model card of an export: what the model is, what it was trained on, how well it does, if files say so."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lcpt import __version__
from lcpt.data.errors import DataError
from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.model.pretrained import Pretrained

Rows = dict[str, Any]  # of a table: what it is -> its value; None where nothing says it


def check_license(license: str | None) -> None:
    """Raise ValueError unless it is an identifier, which the card's header can hold."""
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ValueError(f"license {license!r} is no identifier; give one such as apache-2.0, mit or other")


def model_card(trained: Pretrained, name: str, license: str | None) -> str:
    """Return the README.md of an export that is called `name`."""
    run = _Run(trained)
    stated = f"`{license}`" if license else "not stated. Ask whoever gave you this model before you use or pass it on."
    parts = [
        _header(license),
        f"# {name}",
        _summary(trained),
        "## Model\n\n" + _table(_model_rows(trained)),
        "## Data\n\n" + (_table(run.data()) or "The files that this model was exported from do not say."),
        "## Training\n\n" + _table(_length_rows(trained) | run.training()),
        "## Figures\n\n" + (_table(run.figures()) or "None were at hand when this model was exported."),
        "## Use\n\n" + _use(name),
        f"## Licence\n\nOf the weights: {stated}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(license: str | None) -> str:
    stated = [f"license: {license}"] if license else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", *stated, "tags:", "- lcpt"]
    return "\n".join([*lines, "- custom_code", "---"])


def _summary(trained: Pretrained) -> str:
    model = f"A language model of {trained.model.config.n_layers} layers with {_kinds(trained)} attention"
    length = f", trained for {trained.tokens:,} tokens at a context of {trained.context:,}" if trained.tokens else ""
    return f"{model}{length}. `lcpt export --format hf` of lcpt {__version__} wrote this folder."


def _kinds(trained: Pretrained) -> str:
    counted = Counter(trained.model.config.kinds)
    return ", ".join(kind if len(counted) == 1 else f"{kind} ({count})" for kind, count in counted.items())


def _model_rows(trained: Pretrained) -> Rows:
    config = trained.model.config
    positions = config.positions if config.max_positions is None else f"{config.positions}, {config.max_positions:,}"
    return {
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "layers": config.n_layers,
        "attention, by layers": _kinds(trained),
        "width": config.d_model,
        "heads": config.n_heads,
        "key-value heads": config.kv_heads,
        "head dimension": config.head_dim,
        "feed-forward": f"{config.feed_forward}, {config.ff_width:,}",
        "norm": config.norm,
        "positions": positions,
        "vocabulary": config.vocab_size,
        "one matrix for embedding and head": "yes" if config.tie_embeddings else "no",
    }


def _length_rows(trained: Pretrained) -> Rows:
    return {"steps": trained.step, "tokens": trained.tokens, "context": trained.context}


class _Run:
    """Reads what stands beside the weights: the config of a step, and the figures of its run. An export has neither."""

    def __init__(self, trained: Pretrained):
        self.step, self.folder = trained.step, trained.folder.parent.parent  # RUN/checkpoints/step-…
        path = trained.folder / "config.yaml"
        self.config = OmegaConf.load(path) if path.exists() else OmegaConf.create()
        self.state = _read(trained.folder / "state.json") if path.exists() else {}

    def _key(self, key: str) -> Any:
        return OmegaConf.select(self.config, key)

    def data(self) -> Rows:
        if sources := self._key("data.sources"):
            weighed = [f"{Path(source.path).name} ({source.weight:.0%})" for source in sources]
            return {"sources, by share of the tokens": ", ".join(weighed)}
        path = self._key("data.path")
        if path is None:
            return {}
        rows = {"folder": Path(path).name}
        try:
            manifest = load_manifest(path)
        except DataError:
            return rows
        if fingerprint_of(manifest) != self.state.get("data fingerprint"):  # other data stands there by now
            return rows
        return rows | {key: sum(shard[key] for shard in manifest["shards"]) for key in ("documents", "tokens", "bytes")}

    def training(self) -> Rows:
        named = {
            "tokens a step": "training.global_batch_tokens",
            "learning rate, at most": "training.lr",
            "steps of warm-up": "training.warmup_steps",
            "weight decay": "training.weight_decay",
            "precision": "training.precision",
            "seed": "run.seed",
        }
        return {name: self._key(key) for name, key in named.items()}

    def figures(self) -> Rows:
        """Return those of this step: a run's figures are of its last one."""
        rows: Rows = {}
        summary, evaluation = (_read(self.folder / name) for name in ("summary.json", "evaluation.json"))
        if summary.get("step") == self.step:
            rows |= {"training loss, nats a token": summary.get("loss"), "validation loss": summary.get("valid_loss")}
        if evaluation.get("step") == self.step and "bits_per_byte" in evaluation:
            data = Path(evaluation["data"]).name
            rows |= {f"{key.replace('_', ' ')} of {data}": evaluation[key] for key in ("bits_per_byte", "perplexity")}
            rows |= {
                "tokens scored": evaluation.get("tokens_scored"),
                "window, tokens": evaluation.get("window"),
                "precision of scoring": evaluation.get("precision"),
            }
        return rows


def _read(path: Path) -> dict:
    """Read JSON; {} where it is missing or broken, since a card can do without."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _table(rows: Rows) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _use(name: str) -> str:
    return f"""The code in this folder calls lcpt, which is to be installed with transformers: `pip install lcpt`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0], skip_special_tokens=True))
```

`lcpt import --from {name} --output EXPORT` makes an lcpt export of it, for `lcpt generate`, `lcpt evaluate` and more
training."""
