"""Configure training; loop.py, engine.py and schedule.py read this."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from lcpt.training.bad_steps import BadStepsConfig
from lcpt.training.parameter_groups import ParameterGroup
from lcpt.training.profiling import ProfileConfig
from lcpt.utils.home_folder import expand_home

# The keys that decide the learning rate of a step.
SCHEDULE = ("max_steps", "lr", "schedule", "schedule_counts", "warmup_steps", "final_lr_fraction", "decay_fraction")


@dataclass
class TrainingConfig:
    max_steps: int = 10_000  # sets the schedule
    stop_after_steps: Optional[int] = None  # noqa: UP045  stops early, and changes nothing else
    global_batch_tokens: int = 2**19  # of one optimizer step, over all ranks
    micro_batch: int = 1  # sequences a rank holds at one time
    lr: float = 6e-4
    schedule: str = "cosine"  # cosine | wsd
    schedule_counts: str = "steps"  # steps | tokens: what its progress is measured in; phases may have other batches
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2  # of all steps, wsd only
    allow_lr_jump: bool = False  # a continued run may go on at a far higher rate than it ended with
    weight_decay: float = 0.1  # of matrices; vectors are not decayed
    parameter_groups: list[ParameterGroup] = field(default_factory=list)  # rules, of which the first that fits counts
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0  # of the global norm
    precision: str = "fp32"  # fp32 | bf16
    compile: str = "auto"  # torch.compile of the blocks: auto (on a GPU) | true | false
    device: str = "auto"  # auto: a GPU if there is one; cuda; cpu
    init_from: Optional[str] = None  # noqa: UP045  a run, a step or an export whose weights to start from
    branch_from: Optional[str] = None  # noqa: UP045  one whose moments and place in the data to take too
    valid_every_steps: int = 250
    valid_tokens: int = 2**18  # scored at each validation: labels of text, tokens of a task's samples
    sample_every_steps: Optional[int] = None  # noqa: UP045  the model continues a text, for TensorBoard and samples.jsonl
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    norms_every_steps: int = 100  # norms of each layer's gradient and weights; 0: never
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    hang_seconds: float = 30.0  # without progress on a rank, and ten times its longest wait: a hang; 0: never

    def __post_init__(self):
        self.init_from, self.branch_from = expand_home(self.init_from), expand_home(self.branch_from)
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"training.schedule is {self.schedule!r}; it is cosine or wsd")
        if self.schedule_counts not in ("steps", "tokens"):
            raise ValueError(f"training.schedule_counts is {self.schedule_counts!r}; it is steps or tokens")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"training.precision is {self.precision!r}; it is fp32 or bf16")
        self.compile = str(self.compile).lower()  # YAML knows true and false as booleans
        if self.compile not in ("auto", "true", "false"):
            raise ValueError(f"training.compile is {self.compile!r}; it is auto, true or false")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"training.device is {self.device!r}; it is auto, cuda or cpu")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas is {list(self.betas)}; AdamW takes two numbers in [0, 1)")
        for name in (
            "max_steps",
            "stop_after_steps",
            "global_batch_tokens",
            "micro_batch",
            "valid_every_steps",
            "valid_tokens",
            "sample_every_steps",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"training.{name} is {value}; it must be ≥ 1")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ValueError(f"training.warmup_steps is {self.warmup_steps}; it must lie in 0 … {self.max_steps - 1}")
        if self.init_from and self.branch_from:
            raise ValueError(
                "training.init_from and training.branch_from are both set; init_from begins with the weights alone, "
                "branch_from with moments and place in the data too: set one of them"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"training.lr is {self.lr}; it must be > 0 and finite")
        for name in ("weight_decay", "grad_clip", "hang_seconds", "norms_every_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be ≥ 0 and finite")
        for name in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must lie in 0 … 1")

    def norms_due(self, step: int) -> bool:
        return self.norms_every_steps > 0 and step % self.norms_every_steps == 0

    def sample_due(self, step: int) -> bool:
        every = self.sample_every_steps
        return every is not None and (step == self.max_steps or step % every == 0)

    @property
    def last_step(self) -> int:
        return self.max_steps if self.stop_after_steps is None else min(self.max_steps, self.stop_after_steps)
