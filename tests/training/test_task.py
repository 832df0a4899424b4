"""A run on a recall task: the same on one rank and two, with a loss over its answers alone, and no tokenizer."""

from pathlib import Path

import pytest
import torch

from lcpt.checkpoint import find_checkpoint, read_manifest
from lcpt.config import load_config
from lcpt.data import SyntheticConfig, Task, batch
from lcpt.evaluation import recall
from lcpt.model import GPT
from lcpt.training.optimizer import parameter_groups
from lcpt.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]

TASK = [
    "data.path=synthetic:mqar",
    "data.valid_path=synthetic:mqar",
    "data.synthetic.items=3",
    "training.max_steps=4",
    "training.warmup_steps=0",
]


@pytest.fixture(scope="module")
def run(train_ranks):
    return train_ranks(1, *TASK, "training.micro_batch=8")


def test_two_ranks_and_micro_batches_change_nothing(run, train_ranks):
    other = train_ranks(2, *TASK, "training.micro_batch=2")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in other.rows] == pytest.approx([row[key] for row in run.rows], rel=1e-5)
    assert other.rows[-1]["valid_loss"] == pytest.approx(run.rows[-1]["valid_loss"], rel=1e-5)


def test_the_loss_is_the_mean_over_answers(run):
    torch.manual_seed(0)
    model = GPT(run.config.model)
    task = Task("synthetic:mqar", SyntheticConfig(items=3), 330, "train")
    inputs, labels = (torch.from_numpy(x) for x in batch(task, 0, 0, 8, 32)[:2])
    expected = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=-1)
    assert run.rows[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_task_has_neither_bytes_nor_a_tokenizer(run):
    assert "valid_loss" in run.rows[-1] and "valid_bits_per_byte" not in run.rows[-1]
    assert "tokenizer.model" not in read_manifest(find_checkpoint(run.dir))["files"]


def test_it_goes_on_where_it_stopped_and_only_with_the_same_task(run, train_ranks):
    stopped = train_ranks(1, *TASK, "training.micro_batch=8", "training.stop_after_steps=2")
    train_ranks(1, *TASK, "training.micro_batch=8", "data.synthetic.items=2", dir=stopped.dir, code=2)
    again = train_ranks(1, *TASK, "training.micro_batch=8", dir=stopped.dir)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in run.rows]


def train(kind_of_model):
    """Recall of fresh samples after training as configs/compare/recall.yaml says."""
    config = load_config(ROOT / "configs/compare/recall.yaml")
    training, context, vocab_size = config.training, config.data.context, config.model.vocab_size
    torch.manual_seed(0)
    model = kind_of_model(config.model)
    task, fresh = (Task(config.data.path, config.data.synthetic, vocab_size, stream) for stream in ("train", "test"))
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), betas=tuple(training.betas))
    for step in range(training.last_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        inputs, labels = map(torch.from_numpy, batch(task, 0, step, config.sequences, context)[:2])
        loss, count = model(inputs, labels=labels)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
    answers = recall.answers(model, fresh, 64, context, 64, torch.device("cpu"))
    return recall.report(list(answers), context)["accuracy"]


class Attending(GPT):
    def __init__(self, config):
        config.attention.kind = "softmax"
        super().__init__(config)


class Averaging(Attending):
    """Its layers give the mean of all values so far, whatever is asked."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attention.attend = self.mean

    @staticmethod
    def mean(p, **_):
        return p.v.cumsum(1) / torch.arange(1, p.v.shape[1] + 1)[:, None, None], None


@pytest.mark.slow
def test_softmax_recalls_and_an_average_does_not():
    assert train(Attending) > 0.95
    assert train(Averaging) < 0.5
