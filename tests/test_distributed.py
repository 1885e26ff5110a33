"""Which process this is, and what the processes hand each other."""

import os
import subprocess
import sys

import pytest
import torch

from genmodels import distributed
from tests.helpers.paths import ROOT

KNOWN = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "WORLD_SIZE")
SLURM = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_JOB_NAME")
KNOWN += ("LOCAL_WORLD_SIZE", *SLURM)


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets what this process was started with."""

    def set_all(**variables):
        for name in KNOWN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def test_one_process(environment):
    environment()
    assert (distributed.rank(), distributed.world()) == (0, 1) and distributed.is_first()
    assert [*distributed.share(3)] == [0, 1, 2]
    assert distributed.gather("a") == distributed.gather_to_all("a") == ["a"]
    assert torch.equal(distributed.gather_rows(torch.arange(3), 3), torch.arange(3))
    distributed.barrier()


def test_by_the_environment_of_torchrun_and_of_lightnings_launcher(environment):
    environment(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4)
    assert (distributed.rank(), distributed.world()) == (3, 4) and not distributed.is_first()
    assert distributed.local_rank() == 1 and [*distributed.share(9)] == [3, 7]
    environment(LOCAL_RANK=1, WORLD_SIZE=2)
    assert (distributed.rank(), distributed.world()) == (1, 2) and not distributed.is_first()
    with distributed.alone():
        assert (distributed.rank(), distributed.world()) == (0, 1) and distributed.is_first()
        assert [*distributed.share(2)] == [0, 1] and distributed.gather(1) == [1]
    assert distributed.rank() == 1


def test_a_number_of_the_cluster_without_a_count(environment):
    """One of several independent commands in sampling; of a training, a process to be joined."""
    environment(SLURM_PROCID=2)
    assert (distributed.rank(), distributed.world()) == (0, 1) and not distributed.is_first()


TORCHRUN = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
NODES = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
SRUN = {"SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2, "SLURM_STEP_ID": 0, "SLURM_PROCID": 1}


@pytest.mark.parametrize(
    ("variables", "nodes", "devices"),
    [
        ({}, 1, 1),
        ({}, 1, 2),  # Lightning starts the second
        ({"LOCAL_RANK": 1, "WORLD_SIZE": 2}, 1, 2),  # that second one
        (TORCHRUN, 1, 2),
        (NODES, 2, 2),
        ({"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}, 1, 1),
        (SRUN, 2, 2),
        ({"SLURM_NTASKS": 1}, 1, 1),
        ({"SLURM_NTASKS": 4, "SLURM_JOB_NAME": "bash"}, 1, 1),
        ({"SLURM_NTASKS": 4} | TORCHRUN, 1, 2),
    ],
)
def test_the_processes_that_the_config_counts(environment, variables, nodes, devices):
    environment(**variables)
    distributed.check_launch(nodes, devices)


@pytest.mark.parametrize(
    ("variables", "nodes", "devices", "start", "remedy"),
    [
        (TORCHRUN, 1, 1, "WORLD_SIZE=2: ", "write trainer.num_nodes=1 trainer.devices=2"),
        (NODES, 1, 2, "WORLD_SIZE=4: ", "write trainer.num_nodes=2 trainer.devices=2"),
        (TORCHRUN, 1, 4, "WORLD_SIZE=2: ", "torchrun --nproc_per_node 4 train.py"),
        (NODES, 4, 1, "LOCAL_WORLD_SIZE=2: ", "write trainer.num_nodes=2 trainer.devices=2"),
        ({"WORLD_SIZE": 2}, 1, 2, "WORLD_SIZE=2: ", "unset it"),
        ({"RANK": 0}, 1, 1, "RANK=0: ", "unset it"),
        ({"LOCAL_RANK": 1}, 1, 2, "LOCAL_RANK=1: ", "torchrun --nproc_per_node 2 train.py"),
        ({}, 2, 2, "trainer.num_nodes=2: ", "torchrun --nnodes 2 --nproc_per_node 2"),
        ({"SLURM_NTASKS": 4, "SLURM_PROCID": 0}, 1, 4, "SLURM_NTASKS=4: ", "start srun --nodes 1"),
        ({"SLURM_NTASKS": 4}, 1, 1, "SLURM_NTASKS=4: ", "without srun"),
        (SRUN, 1, 2, "SLURM_NTASKS=4: ", "srun --nodes 1 --ntasks-per-node 2 python train.py"),
    ],
)
def test_other_processes_than_the_config_counts(
    environment, variables, nodes, devices, start, remedy
):
    environment(**variables)
    with pytest.raises(ValueError) as error:
        distributed.check_launch(nodes, devices)
    assert str(error.value).startswith(start) and remedy in str(error.value)


def test_waiting_ends_with_the_process_that_started_this_one(environment, monkeypatch):
    environment(LOCAL_RANK=1)
    answers = iter([False, True])
    distributed.wait(lambda: next(answers))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(RuntimeError, match="the process that started this one has ended"):
        distributed.wait(lambda: False)


@pytest.mark.slow
def test_three_processes_gather(tmp_path):
    """Joined by the first thing that they hand each other."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "from genmodels import distributed as d\n"
        "number = d.rank()\n"
        "rows = torch.tensor([[float(i)] for i in d.share(2)]).reshape(-1, 1)\n"
        "assert torch.equal(d.gather_rows(rows, 2), torch.tensor([[0.0], [1.0]]))\n"
        "assert d.gather_to_all(number) == [0, 1, 2] and d.rank() == number\n"
        "assert d.gather(number) == ([0, 1, 2] if number == 0 else None)\n"
        "with d.alone():\n"
        "    assert d.gather(number) == [number]\n"
        "d.barrier()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_it_loads_no_accelerate():
    code = "import sys, genmodels.distributed; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
