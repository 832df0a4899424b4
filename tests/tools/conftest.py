import pytest

from lcpt.attention import AttentionConfig
from lcpt.checkpoint import Slice, commit_checkpoint, open_partial, write_piece
from lcpt.config import Config, to_yaml
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig
from lcpt.training.run_folder import RunConfig

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=330, attention=AttentionConfig(block_size=16))


@pytest.fixture
def call_tool(call_program):
    """call_tool(name, *arguments) -> (exit code, stdout, stderr) of tools/name.py, in this process."""

    return lambda name, *arguments: call_program(f"tools/{name}.py", *arguments)


@pytest.fixture
def model():
    return GPT(MODEL)


@pytest.fixture
def run_folder(model, train_folder, tmp_path):
    """A run with the steps 3 and 7, alike."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        to_yaml(Config(run=RunConfig("unused"), model=MODEL, data=DataConfig(path="unused", context=64)))
    )
    attachments = {"config.yaml": run / "config.yaml", "tokenizer.model": train_folder / "tokenizer.model"}
    weights = [Slice(name, tuple(x.shape), 0, x.flatten()) for name, x in model.state_dict().items()]
    for step in (3, 7):
        partial, state = open_partial(run / "checkpoints", step), {"step": step, "tokens": 128 * step}
        commit_checkpoint(partial, step, [write_piece(partial, 0, {"weights": weights})], state, attachments)
    return run
