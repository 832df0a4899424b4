"""A step makes the host wait for the device once: it reads everything that it decides on together."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
STEPS = (3, 4)  # between whose ends reads are counted


class Reads(TorchDispatchMode):
    """Counts, while `on`, the operators that would wait for a GPU, by name."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if self.on and name in WAITING and not (name == "repeat_interleave" and (kwargs or {}).get("output_size")):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def count(self, owner, name):
        method = getattr(owner, name)

        def counted(*args, **kwargs):
            self.found[name] += self.on
            return method(*args, **kwargs)

        setattr(owner, name, counted)


def reads_of_a_step(config, yaml):
    from deepspeed.accelerator import get_accelerator

    from lcpt.training import job
    from lcpt.training.telemetry import Telemetry

    reads, note = Reads(), Telemetry.step
    for name in ("tolist", "cpu", "numpy"):
        reads.count(torch.Tensor, name)
    reads.count(type(get_accelerator()), "synchronize")

    def noted(self, row):
        note(self, row)
        reads.on = row["step"] in STEPS[:-1]

    Telemetry.step = noted
    with reads:
        assert job.run(config, yaml) == 0
    return +reads.found  # without zeros


@pytest.mark.parametrize(
    "world, overrides",
    [
        (1, ["training.precision=bf16"]),
        (2, ["training.precision=bf16", "model.activation_checkpointing=true"]),
        (1, ["parallel.zero_stage=0"]),
        (1, ["parallel.zero_stage=1"]),
        (2, ["training.precision=bf16", "parallel.zero_stage=2"]),
        (2, ["training.precision=bf16", "parallel.zero_stage=3"]),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, list) else str(x),
)
def test_one_read_a_step(run_ranks, tiny_yaml, tmp_path, world, overrides):
    from lcpt.config import load_config, to_yaml

    # On a CPU packed documents are attended to one by one, which reads their offsets.
    fixed = ["training.micro_batch=1", "checkpoint.every_steps=100", "data.mask_documents=false"]
    config = load_config(tiny_yaml, [f"run.dir={tmp_path}/run", *fixed, *overrides])
    for found in run_ranks(lambda: reads_of_a_step(config, to_yaml(config)), world):
        assert found == {"tolist": 1}
