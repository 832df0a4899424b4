"""From the environment of every launcher to rank, world and local rank, and what cannot be known is one line."""

import json
import multiprocessing
import os
import socket

import pytest
import torch

from lcpt.parallel import groups
from lcpt.parallel.launchers import LauncherError, find_place, is_first

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}


def torchrun(rank, world, local):
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}


def srun(rank, world, local):
    return SRUN | {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": str(local)}


def open_mpi(rank, world, local):
    names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_RANK"
    return dict(zip(names, map(str, (rank, world, local, rank)), strict=True))


def mpich(rank, world, local):
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(world), "MPI_LOCALRANKID": str(local)}


def mvapich(rank, world, local):
    names = "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"
    return dict(zip(names, map(str, (rank, world, local)), strict=True))


def mpirun_in_slurm(rank, world, local):
    """Its helpers, one a node, are tasks of srun: their variables are of another count."""
    return srun(rank // 4, world // 4, 0) | open_mpi(rank, world, local)


def srun_with_pmi2(rank, world, local):
    return srun(rank, world, local) | {"PMI_RANK": str(rank), "PMI_SIZE": str(world)}


LAUNCHERS = (torchrun, srun, open_mpi, mpich, mvapich, mpirun_in_slurm, srun_with_pmi2)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_understood(launcher):
    place = find_place(launcher(5, 8, 1) | MEET)
    assert (place.rank, place.world, place.local_rank) == (5, 8, 1)
    assert place.variables() == torchrun(5, 8, 1)
    assert not is_first(launcher(5, 8, 1)) and is_first(launcher(0, 8, 0))


@pytest.mark.parametrize("launcher", [torchrun, srun, open_mpi, mpich, mvapich])
def test_a_single_process_needs_no_address(launcher):
    assert find_place(launcher(0, 1, 0)).world == 1


@pytest.mark.parametrize(
    "environment",
    [
        {},
        MEET,
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the batch script
        SRUN | {"SLURM_STEP_ID": "4294967291"},  # the same, in other versions
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},  # the shell of salloc
    ],
    ids=str,
)
def test_a_process_that_nothing_started_is_alone(environment):
    place = find_place(environment)
    assert (place.rank, place.world, place.local_rank) == (0, 1, 0) and is_first(environment)


UNKNOWN = {
    "RANK without WORLD_SIZE": (MEET | {"RANK": "3"}, "WORLD_SIZE is not set"),
    "WORLD_SIZE without RANK": (MEET | {"WORLD_SIZE": "3"}, "RANK is not set"),
    "no LOCAL_RANK": (MEET | {"RANK": "1", "WORLD_SIZE": "3"}, "LOCAL_RANK is not set"),
    "a rank too many": (MEET | torchrun(3, 3, 0), "RANK=3 is no rank of a world of WORLD_SIZE=3"),
    "no number": (MEET | torchrun(0, "two", 0), "WORLD_SIZE is 'two'"),
    "torchrun without an address": (torchrun(0, 2, 0), "MASTER_ADDR and MASTER_PORT are not set"),
    "srun without its variables": (MEET | SRUN, "SLURM_PROCID is not set"),
    "srun without a count": (MEET | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is not set"),
    "srun without an address": (srun(1, 8, 1), "launch/pretrain.sbatch"),
    "mpirun without an address": (open_mpi(1, 8, 1), "mpirun -x MASTER_ADDR"),
    "mpirun without a port": (open_mpi(1, 8, 1) | {"MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    "MPI without a size": (MEET | {"PMI_RANK": "1"}, "PMI_SIZE is not set"),
    "MPI without a local rank": (MEET | {"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
    "PMIx alone": (MEET | {"PMIX_RANK": "1"}, "PMIX_RANK is set"),
}


@pytest.mark.parametrize("environment, words", UNKNOWN.values(), ids=UNKNOWN)
def test_a_world_that_cannot_be_known_is_refused(environment, words):
    with pytest.raises(LauncherError) as caught:
        find_place(environment)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment, speaks",
    [
        (MEET | {"RANK": "3"}, True),  # as far as it knows it is alone
        ({"PMIX_RANK": "3"}, True),
        ({"WORLD_SIZE": "4"}, True),
        (open_mpi(3, 4, 3), False),  # rank 0 lacks the address too
        (MEET | SRUN | {"SLURM_PROCID": "3"}, False),
    ],
    ids=str,
)
def test_who_says_that_a_job_is_refused(environment, speaks):
    assert is_first(environment) == speaks


def start(environments):
    """One process for each environment, without what launchers set here; what each found in its group, or why not."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(environment, queue)) for environment in environments]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return sorted(found, key=json.dumps)


def _process(environment, queue):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        groups.join(environment.get("choice", "auto"))
        queue.put([groups.rank(), groups.world_size(), os.environ["LOCAL_RANK"], groups.all_gather(groups.rank())])
        groups.leave()
    except groups.SetupError as error:
        queue.put(str(error))


@pytest.fixture
def meeting_place():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@pytest.mark.parametrize("launcher", [torchrun, srun, open_mpi, mpich, srun_with_pmi2])
def test_processes_of_a_launcher_meet(launcher, meeting_place):
    found = start([launcher(rank, 2, rank) | meeting_place for rank in range(2)])
    assert found == [[0, 2, "0", [0, 1]], [1, 2, "1", [0, 1]]]


def test_a_process_alone_needs_no_port_of_others():
    assert start([{}]) == [[0, 1, "0", [0]]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_without_its_gpu_is_said_by_all(meeting_place, culprit):
    """One node of a job has no working GPU: both ranks end with the same line."""
    environments = [torchrun(rank, 2, 0) | meeting_place for rank in range(2)]
    environments[culprit]["choice"] = "cuda"
    first, second = start(environments)
    assert first == second and "no working GPU" in first and first.startswith("rank 1: ") == bool(culprit)
