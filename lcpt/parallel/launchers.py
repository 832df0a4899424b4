"""Find a process's place among those of its job, from what a launcher set in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PSEUDO_STEPS = 0xFFFFFFF0  # SLURM's numbers from here on are no steps of srun: the batch script, a shell of salloc, …


class LauncherError(ValueError):
    """Says in one line what is missing in the environment, or contradicts itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """Names the variables of one launcher; a process was started by it if `rank` is set."""

    name: str
    rank: str
    world: str
    local_rank: tuple[str, ...]  # the first of them that is set


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    rank: int
    world: int
    local_rank: int  # among the processes of its machine

    def variables(self) -> dict[str, str]:
        """Return it as torchrun sets it, for PyTorch and DeepSpeed."""
        return {"RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(self.local_rank)}


# The first whose rank is set. mpirun in a SLURM job starts its helpers with srun, and its processes inherit those
# variables: so srun comes after MPI. Where srun itself sets PMI_*, both say the same.
LAUNCHERS = (
    Launcher(name="torchrun or deepspeed", rank="RANK", world="WORLD_SIZE", local_rank=("LOCAL_RANK",)),
    Launcher(
        name="Open MPI's mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        world="OMPI_COMM_WORLD_SIZE",
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    ),
    Launcher(
        name="MVAPICH's mpirun",
        rank="MV2_COMM_WORLD_RANK",
        world="MV2_COMM_WORLD_SIZE",
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
    ),
    Launcher(
        name="an MPI launcher (PMI)",
        rank="PMI_RANK",
        world="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    ),
)
SRUN = Launcher(name="srun", rank="SLURM_PROCID", world="SLURM_STEP_NUM_TASKS", local_rank=("SLURM_LOCALID",))
PMIX = "PMIX_RANK"  # which comes without a size


def find_place(environment: Mapping[str, str]) -> Place:
    """Find this process's place; alone, if no launcher started it. Raises LauncherError where that cannot be known.

    Launchers: torchrun and deepspeed (RANK, WORLD_SIZE, LOCAL_RANK), mpirun of Open MPI, MPICH, Intel MPI and MVAPICH
    (OMPI_COMM_WORLD_*, PMI_*, MV2_COMM_WORLD_*), srun (SLURM_*). All ranks meet at MASTER_ADDR and MASTER_PORT.
    """
    launcher = _launcher(environment)
    if launcher is None:
        return Place(rank=0, world=1, local_rank=0)
    world = _number(environment, launcher.world, launcher)
    rank = _number(environment, launcher.rank, launcher)
    if not rank < world:
        raise LauncherError(f"{launcher.rank}={rank} is no rank of a world of {launcher.world}={world}")
    if world == 1:
        return Place(rank=0, world=1, local_rank=0)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        remedy = (
            "start through launch/pretrain.sbatch, which sets them"
            if launcher is SRUN
            else "set them to the host of rank 0 and a free port there, such as mpirun -x MASTER_ADDR=node1 -x "
            "MASTER_PORT=29500"
        )
        raise LauncherError(f"{launcher.name} started {world} processes, but {_are_not_set(missing)}; {remedy}")
    local = next((name for name in launcher.local_rank if name in environment), launcher.local_rank[0])
    return Place(rank=rank, world=world, local_rank=_number(environment, local, launcher))


def is_first(environment: Mapping[str, str]) -> bool:
    """Check, without any error, whether this process is the one to speak for its job, as is one that knows no other."""
    try:
        launcher = _launcher(environment)
    except LauncherError:
        return True
    if launcher is None or launcher.world not in environment:
        return True
    return environment.get(launcher.rank, "0") == "0"


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    for launcher in LAUNCHERS:
        if launcher.rank in environment or launcher.world in environment:
            return launcher
    if _in_srun(environment):
        return SRUN
    if PMIX in environment:
        raise LauncherError(
            f"{PMIX} is set, but nothing says how many processes there are: start with torchrun, deepspeed, srun or "
            "mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return None


def _in_srun(environment: Mapping[str, str]) -> bool:
    """Check whether srun started this process: not the batch script, and not the shell of an allocation."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < PSEUDO_STEPS


def _number(environment: Mapping[str, str], name: str, launcher: Launcher) -> int:
    value = environment.get(name)
    if value is None:
        names = ", ".join((launcher.rank, launcher.world, launcher.local_rank[0]))
        raise LauncherError(
            f"{name} is not set, and {launcher.name} sets it: how many processes there are, and which one this is, "
            f"takes {names} together; set it, or unset the others for a single process"
        )
    if not value.isdigit():
        raise LauncherError(f"{name} is {value!r}, and {launcher.name} sets it to a number")
    return int(value)


def _are_not_set(names: list[str]) -> str:
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} not set"
