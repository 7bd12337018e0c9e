"""Which process this is, from the launchers' variables; what does not fit is refused before any process meets another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ended, fork
from tiny import arguments, by_name, small

from lit_llmers import fit, processes
from lit_llmers.errors import UserError
from lit_llmers.preemption import Stopped
from lit_llmers.processes import Processes, launching
from lit_llmers.processes.launching import RankFailed
from lit_llmers.running import run

TWO = "stages.teacher.trainer={strategy: ddp, devices: 2, accelerator: cpu}"
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}


@pytest.fixture
def launched(monkeypatch):
    """Set a launcher's variables, and no other's."""

    def launched(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")] + list(TORCHRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    launched({})
    return launched


@pytest.mark.parametrize(
    ("variables", "here"),
    [
        ({}, Processes()),
        (TORCHRUN, Processes(3, 1, 4, 2, "torchrun")),
        (SRUN, Processes(2, 0, 4, 2, "srun")),
        (SRUN | TORCHRUN, Processes(3, 1, 4, 2, "torchrun")),
        (BATCH, Processes()),
        ({"WORLD_SIZE": "8"}, Processes()),
    ],
    ids=["a shell", "torchrun", "srun", "torchrun in a job", "a batch script is one process", "a variable left over"],
)
def test_the_launcher_says_which_process_this_is(variables, here):
    assert Processes.here(variables) == here


def test_a_variable_that_is_no_number():
    with pytest.raises(UserError, match="variables of srun.*SLURM_PROCID.*whole numbers"):
        Processes.here(SRUN | {"SLURM_PROCID": "two"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SRUN, r"2 processes \(trainer\.devices=2 x trainer\.num_nodes=1\), but srun started --ntasks=4 on 2 nodes"),
        (TORCHRUN, r"2 processes .* but torchrun started 4 processes on 2 nodes.*trainer\.devices=2 trainer\.num_nodes=2"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, r"--ntasks=2 on 2 nodes. Make them agree: start 2 on each of 1"),
    ],
)
def test_tasks_and_devices_that_disagree_are_refused_with_both_numbers(tmp_path, launched, monkeypatch, variables, message):
    def collective(*args, **kwargs):
        raise AssertionError("they must not meet")

    monkeypatch.setattr("torch.distributed.init_process_group", collective)
    launched(variables)
    with pytest.raises(UserError, match=message):
        run(small(tmp_path, TWO), "teacher")
    assert not list(tmp_path.iterdir()), "nothing is written, not by the stages before it either"


def test_the_command_says_so_too(tmp_path, launched, capsys):
    launched(SRUN | {"SLURM_PROCID": "0"})
    assert fit.main(["recipe=slmrec", *arguments(tmp_path, TWO), "stage=teacher"]) == 2
    assert "error (rank 0 of 4): Stage 'teacher' runs on 2 processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_machines_need_a_launcher(tmp_path, launched):
    with pytest.raises(UserError, match=r"one process was started.*slurm/submit\.sh.*torchrun --nnodes=2 --nproc-per-node=1"):
        run(small(tmp_path, "stages.teacher.trainer={strategy: ddp, devices: 1, num_nodes: 2}"), "teacher")


def test_a_record_is_for_as_many_processes_as_its_teacher(tmp_path):
    stages = by_name(small(tmp_path, TWO))
    assert {name: stage.processes for name, stage in stages.items() if stage.processes > 1} == {"teacher": 2, "signals": 2}


# ---- how a group ended -------------------------------------------------------------------------------------------------


def end(tmp_path: Path, exits: dict[int, tuple[int, float]], said: dict[int, tuple[int, str, float]]) -> None:
    """A group of two ended so: exit status and second by rank, and what each left word of."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {}
    for rank, (status, second) in exits.items():
        failures[rank] = ProcessFailure(local_rank=rank, pid=rank + 1, exitcode=status, error_file="<N/A>")
        failures[rank].timestamp = int(second)
    for rank, (status, error, moment) in said.items():
        (tmp_path / f"{rank}.json").write_text(json.dumps({"status": status, "error": error, "time": moment}))
    launching._explain(ChildFailedError("fit", failures), "teacher", 2, tmp_path)


@pytest.mark.parametrize(
    ("exits", "said", "error", "message"),
    [
        ({0: (3, 1), 1: (3, 1)}, {}, Stopped, "SIGUSR1"),
        ({0: (143, 1), 1: (-15, 1)}, {}, Stopped, "SIGTERM"),
        (
            {0: (1, 7), 1: (-9, 7)},
            {0: (1, "RuntimeError: closed by peer", 7.5)},
            RankFailed,
            "rank 1 of 2 was killed by SIGKILL",
        ),
        ({0: (143, 7), 1: (-11, 7)}, {}, RankFailed, "rank 1 of 2 was killed by SIGSEGV. The same"),
        ({0: (-9, 40), 1: (1, 9)}, {1: (1, "ValueError: no", 9.1)}, RankFailed, "rank 1 of 2 failed: ValueError: no"),
        (
            {0: (1, 9), 1: (1, 9)},
            {0: (1, "RuntimeError: closed by peer", 9.4), 1: (1, "ValueError: no", 9.1)},
            RankFailed,
            "rank 1 of 2 failed: ValueError: no",
        ),
        ({0: (2, 9), 1: (2, 9)}, {0: (2, "Lower it.", 9.4), 1: (2, "Lower it.", 9.1)}, UserError, "^Lower it.$"),
        ({0: (3, 9), 1: (2, 9)}, {1: (2, "No space.", 9.1)}, UserError, "No space."),
        ({1: (70, 9)}, {}, RankFailed, "rank 1 of 2 ended with exit status 70"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_that_died_is_named_and_not_those_that_it_took_along(tmp_path, exits, said, error, message):
    with pytest.raises(error, match=message):
        end(tmp_path, exits, said)


@pytest.mark.parametrize(("alive", "status"), [(True, 0), (False, 1)])
def test_a_process_whose_launcher_died_while_it_started_ends(tmp_path, monkeypatch, alive, status):
    """It would hold its stage's folder and wait for the others."""
    before = fork(lambda: 0)
    assert ended(before) == 0
    monkeypatch.setenv(launching.OUTCOMES, str(tmp_path))
    monkeypatch.setenv(launching.LAUNCHER, str(os.getpid() if alive else before))
    assert ended(fork(lambda: launching._report_for_duty() or 0)) == status
    assert bool(list(tmp_path.glob("rank.*"))) == alive


# ---- waiting for rank 0 ------------------------------------------------------------------------------------------------


def test_the_others_wait_for_what_rank_0_does_alone(tmp_path, launched):
    """Two processes walk the list; the second does nothing and leaves when all is done."""
    launched({})
    program = [sys.executable, "-m", "lit_llmers.fit", "recipe=slmrec", *arguments(tmp_path), "stage=prepare"]

    def start(rank: int) -> subprocess.Popen:
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
        return subprocess.Popen(program, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    ranks = [start(1), start(0)]
    out = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], out
    assert out[0] == ("", ""), "rank 1 has nothing to say"
    assert "prepare                  done" in out[1][1]
    assert "Report:" in out[1][0]
    assert len(list(tmp_path.rglob("DONE"))) == 1


def test_waiting_ends_when_rank_0_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    monkeypatch.setattr(processes, "PAUSE", 0.02)
    stage = small(tmp_path)[0]
    with pytest.raises(RankFailed, match=r"Rank 1 of 2 waits for stage 'prepare'; rank 0 gave no sign of life in 0\.3 s"):
        Processes(1, 1, 2).wait_for(stage)


def test_waiting_goes_on_while_rank_0_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.4)
    monkeypatch.setattr(processes, "PAUSE", 0.02)
    monkeypatch.setattr(processes, "HEARTBEAT", 0.05)
    stage, until = small(tmp_path)[0], time.monotonic() + 1.2
    stage.folder.mkdir(parents=True)
    with Processes(0, 0, 2).sign_of_life(stage.folder):
        Processes(1, 1, 2).wait(stage.folder, lambda: time.monotonic() > until, "a moment")


def test_who_waits_can_be_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llmers.preemption._asked", signal.SIGUSR1)
    with pytest.raises(Stopped, match="SIGUSR1"):
        Processes(1, 1, 2).wait_for(small(tmp_path)[0])


# ---- one stage alone ---------------------------------------------------------------------------------------------------


def test_one_stage_alone(tmp_path, capsys):
    def main(only: str, *more: str) -> int:
        return fit.main(["recipe=slmrec", *arguments(tmp_path, *more), f"only={only}"])

    assert main("text") == 2
    assert "Stage 'text' (only=text) needs prepare: not done in" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.json"))
    assert main("prepare") == main("text") == 0
    assert not (tmp_path / "slmrec" / "default" / "report.md").exists(), "that is for the evaluate stage"
    assert main("text", "seeds=[0,1]") == 0, "it is done"
    assert main("texts") == 2
    assert "Unknown stage 'texts'. Did you mean 'text'?" in capsys.readouterr().err
    assert main("text", "stage=text") == 2
    assert "Leave one of them out" in capsys.readouterr().err
    assert sorted(path.parent.name.partition("-")[0] for path in tmp_path.rglob("DONE")) == ["prepare", "text"]


def test_one_repeated_stage_alone_is_run_for_all_seeds_and_the_report_follows_the_evaluation(tmp_path):
    common = ["recipe=student", *arguments(tmp_path, "seeds=[0,1]", "trainer.max_epochs=1", "~stages.export", recipe="student")]
    for only in ("prepare", "student", "evaluate"):
        assert not list(tmp_path.rglob("report.md"))
        assert fit.main([*common, f"only={only}"]) == 0
    assert len(list(tmp_path.rglob("student-seed?-*/DONE"))) == 2
    assert "not finished" not in next(tmp_path.rglob("report.md")).read_text()


def test_processes_that_are_started_for_one_seed_train_that_one(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("lit_llmers.running.launch", lambda name, count, arguments: launched.append((name, count)))
    stages = small(tmp_path, "seeds=[0,1]", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", recipe="student")
    run(stages, "prepare")
    for only in ("student-seed1", "student"):
        run(stages, None, only)
    assert launched == [("student-seed1", 2), ("student", 2), ("student", 2)], "the other seed's skip what is done"


def test_two_stages_of_a_run_are_worked_on_at_once_and_one_stage_is_not(tmp_path, monkeypatch):
    from lit_llmers.processes.locks import Busy, alone

    stages = by_name(small(tmp_path))
    run(list(stages.values()), "prepare")
    monkeypatch.setattr("lit_llmers.running.PATIENCE", 0.2)
    with alone(stages["item_embeddings"].folder):
        run(list(stages.values()), None, "text")
        with pytest.raises(Busy, match="Another process is working in .*item_embeddings"):
            run(list(stages.values()), None, "item_embeddings")
    assert [name for name, stage in stages.items() if stage.done] == ["prepare", "text"]


# ---- a job that Slurm started again ------------------------------------------------------------------------------------


def interrupted(folder: Path) -> None:
    """As a job leaves it that is stopped within the stage `item_embeddings`."""
    stages = by_name(small(folder))
    run(list(stages.values()), "item_embeddings")
    stage = stages["item_embeddings"]
    (stage.folder / "DONE").unlink()
    (stage.folder / "last.ckpt").write_bytes(b"half-way")


def test_a_requeued_job_with_other_settings_is_refused(tmp_path, capsys, monkeypatch):
    interrupted(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["recipe=slmrec", *arguments(tmp_path, "stages.item_embeddings.optimizer.lr=0.5"), "only=item_embeddings"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit.main(command) == 2
    error = capsys.readouterr().err
    assert "started again by Slurm" in error
    assert "stages.item_embeddings.optimizer.lr was 0.003 and is 0.5" in error
    assert "Give the settings that it began with" in error
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert fit.main(command) == 0, "a new job may have other settings"


def test_a_requeued_job_whose_needs_have_changed_is_refused(tmp_path, capsys, monkeypatch):
    interrupted(tmp_path)
    changed = arguments(tmp_path, "data.generator.seed=5")
    assert fit.main(["recipe=slmrec", *changed, "only=prepare"]) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert fit.main(["recipe=slmrec", *changed, "only=item_embeddings"]) == 2
    assert "a stage that it needs has changed (prepare), or the data have" in capsys.readouterr().err
