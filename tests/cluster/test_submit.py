"""slurm/ without Slurm: what would be submitted, what a job does with an exit status, what is uploaded to W&B."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from slurm_user import ROOT, STAGE, SUBMIT, SYNC, bash, inherited

from lit_llmers import fit, recipes
from lit_llmers.composing.resolving import resolve


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return inherited(tmp_path_factory.mktemp("a site"))


def program(folder: Path, name: str, *lines: str) -> None:
    """A stand-in for a program, first on the PATH that `standing_in` makes."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def standing_in(folder: Path, environment: dict[str, str], **more: str) -> dict[str, str]:
    return environment | {"PATH": f"{folder}/bin:{os.environ['PATH']}", **more}


def written(path: Path) -> list[str]:
    """The words that a stand-in wrote down."""
    return path.read_text().split("\0")[:-1]


# ---- what would be submitted -----------------------------------------------------------------------------------------


class Call(list[str]):
    """The words of one call of sbatch."""

    @property
    def stage(self) -> str:
        return self[self.index(STAGE) + 2]

    @property
    def seeds(self) -> str:
        return self[self.index(STAGE) + 3]

    @property
    def overrides(self) -> list[str]:
        return self[self.index(STAGE) + 4 :]

    @property
    def after(self) -> set[str]:
        """The stages whose jobs it waits for; a job that waits goes when one of them fails."""
        ids = (self.option("dependency") or "afterok").split(":")
        assert ids[0] == "afterok"
        assert ("--kill-on-invalid-dep=yes" in self) == (len(ids) > 1)
        return {each.removeprefix("id-of-").split(".")[0] for each in ids[1:]}

    def option(self, name: str) -> str | None:
        return next((word.partition("=")[2] for word in self if word.startswith(f"--{name}=")), None)


def dry_run(folder: Path, environment: dict[str, str], *given: str) -> tuple[dict[str, Call], str]:
    """Run what --dry-run prints, as the shell script that it is, with an sbatch that only writes down how it is called.

    Returns:
        the calls, by `stage.recipe.run`, in their order; and what was printed.
    """
    printed = bash(SUBMIT, "--dry-run", *given, env=environment, cwd=folder)
    assert printed.returncode == 0, printed.stderr
    calls = folder / "calls"
    calls.mkdir()
    program(
        folder,
        "sbatch",
        'for word; do [[ $word != --job-name=* ]] || name=${word#*=}; done; echo "id-of-$name"',
        f'printf "%s\\0" "$@" >"{calls}/$(ls "{calls}" | wc -l | xargs printf %03d) $name"',
    )
    done = bash("-euc", printed.stdout, env=standing_in(folder, environment), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    found = {path.name.split(" ", 1)[1]: Call(written(path)) for path in sorted(calls.iterdir())}
    shutil.rmtree(calls)
    return found, printed.stdout


def test_a_recipe_becomes_a_chain_of_jobs(tmp_path, environment):
    calls, _ = dry_run(tmp_path, environment, "recipe=slmrec", "seeds=[3,7]", "stages.text.fields=['the title', genre]")
    by_stage = {call.stage: call for call in calls.values()}
    assert [f"{stage}.slmrec.default" for stage in by_stage] == list(calls)
    assert {stage: call.after for stage, call in by_stage.items()} == {
        "prepare": set(),
        "item_embeddings": {"prepare"},
        "text": {"prepare"},
        "teacher": {"prepare", "item_embeddings", "text"},
        "signals": {"prepare", "teacher"},
        "student": {"prepare", "item_embeddings", "signals"},
        "control": {"prepare", "item_embeddings"},
        "evaluate": {"prepare", "teacher", "student", "control", "item_embeddings"},
        "export": {"prepare", "student"},
    }
    assert {stage: call.option("array") for stage, call in by_stage.items() if call.option("array")} == {
        "student": "0-1",
        "control": "0-1",
    }
    assert {stage: call.seeds for stage, call in by_stage.items() if call.seeds != "all"} == {
        "student": "3 7",
        "control": "3 7",
    }
    assert {stage for stage, call in by_stage.items() if call.option("gres")} == {
        "item_embeddings", "teacher", "signals", "student", "control", "evaluate"
    }  # fmt: skip
    folder = tmp_path / "runs" / "slmrec" / "default"
    assert (folder / "slurm").is_dir()
    for stage, call in by_stage.items():
        assert call.overrides == ["recipe=slmrec", "seeds=[3,7]", "stages.text.fields=['the title', genre]"]
        assert (call.option("nodes"), call.option("ntasks-per-node"), call.option("chdir")) == ("1", "1", str(tmp_path))
        assert call.option("output") == str(folder / "slurm" / f"{stage}-{'%A_%a' if call.option('array') else '%j'}.out")
        assert {"--account=us", "--cpus-per-task=1", "--signal=USR1@60", "--nice=10"} <= set(call)
        assert call.option("partition") is None
    assert by_stage["teacher"].option("time") == "24:00:00"


def test_a_teacher_on_many_gpus_gets_its_nodes_and_the_rest_one_gpu_or_none(tmp_path, environment):
    many = ["trainer=zero3", "trainer.devices=8", "trainer.num_nodes=2", "trainer.batch_size=16", "run.name=wide"]
    calls, _ = dry_run(tmp_path, environment, "recipe=slmrec", "scale=paper", *many, "stage=student")
    asked = {call.stage: (call.option("nodes"), call.option("ntasks-per-node"), call.option("gres")) for call in calls.values()}
    wide, single, none = ("2", "8", "gpu:8"), ("1", "1", "gpu:1"), ("1", "1", None)
    assert asked == {
        "prepare": none,
        "item_embeddings": single,
        "teacher": wide,
        "signals": wide,
        "student": wide,
    }
    assert all(call.option("array") is None and "run.name=wide" in call.overrides for call in calls.values())
    assert not any(word.startswith(("stage=", "only=")) for call in calls.values() for word in call.overrides)


def test_what_is_done_is_not_submitted_and_a_sweep_runs_what_is_alike_once(tmp_path, environment, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_data = ["data.generator.users=150", "data.generator.items=130"]
    first_value = [*small_data, "logger=csv", "student=sasrec", "run.name=few-student-sasrec"]
    assert fit.main(["recipe=rd", *first_value, "stage=prepare"]) == 0
    prepared, text, *_ = resolve(recipes.compose("rd", first_value))
    first = prepared.run.folder
    begun = first.with_name("few-student-gru4rec") / text.folder.name
    begun.mkdir(parents=True)
    calls, printed = dry_run(
        tmp_path, environment, "--sweep", "student=[sasrec,gru4rec]", "recipe=rd", *small_data, "run.name=few"
    )
    own = ("student", "control", "evaluate", "export")
    assert list(calls) == [
        *(f"{stage}.rd.few-student-sasrec" for stage in ("text", "teacher", "lists", *own)),
        *(f"{stage}.rd.few-student-gru4rec" for stage in ("text", *own)),
    ]
    assert "# prepare: done before\n" in printed
    assert calls["student.rd.few-student-gru4rec"].option("dependency") == "afterok:id-of-lists.rd.few-student-sasrec"
    assert calls["student.rd.few-student-gru4rec"].overrides[-2:] == ["student=gru4rec", "run.name=few-student-gru4rec"]
    second = first.with_name("few-student-gru4rec")
    links = {path.name.rpartition("-")[0]: path for path in second.iterdir() if path.is_symlink()}
    assert set(links) == {"prepare", "teacher", "lists"}, "text was begun before, so it is not replaced"
    assert all(path.resolve() == (first / path.name).resolve() and path.is_dir() for path in links.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "No recipe given"),
        (("recipe=slmrek",), "Did you mean 'slmrec'"),
        (("recipe=slmrec", "stage=techer"), "no stage 'techer'"),
        (("recipe=slmrec", "only=teacher"), "say stage=teacher"),
        (("recipe=slmrec", "--dryrun"), "Unknown option --dryrun"),
        (("recipe=slmrec", "--sweep", "student"), "is not KEY=VALUE,VALUE"),
        (("recipe=slmrec", "--sweep", "seeds=[[0],[1]]"), "a value cannot be a list"),
        (("recipe=rd", "--sweep", "student=sasrec,item-knn"), "this was student=item-knn of --sweep student=sasrec,item-knn"),
    ],
)
def test_what_cannot_be_submitted_is_said(tmp_path, environment, given, said):
    done = bash(SUBMIT, "--dry-run", *given, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_chain_is_submitted_whole_or_not_at_all(tmp_path, environment):
    program(tmp_path, "squeue")
    program(tmp_path, "scancel", f'echo "$@" >"{tmp_path}/cancelled"')
    program(tmp_path, "sbatch", f'n=$(cat "{tmp_path}/n" 2>/dev/null || echo 41); echo $((n + 1)) >"{tmp_path}/n"',
            'echo "$((n + 1));here"; ((n < 43)) || { echo "error: QOS limit" >&2; exit 1; }')  # fmt: skip
    done = bash(SUBMIT, "recipe=slmrec", env=standing_in(tmp_path, environment), cwd=tmp_path)
    assert done.returncode == 1
    assert "QOS limit" in done.stderr
    assert "its jobs were cancelled again: 42 43" in done.stderr
    assert (tmp_path / "cancelled").read_text() == "42 43\n"


def test_a_run_whose_jobs_are_in_the_queue_gets_no_second_chain(tmp_path, environment):
    program(tmp_path, "squeue", f'echo "17|{tmp_path}/runs/slmrec/default"; echo "18|{tmp_path}/runs/slmrec/default-2"')
    program(tmp_path, "sbatch", "exit 9")
    done = bash(SUBMIT, "recipe=slmrec", env=standing_in(tmp_path, environment), cwd=tmp_path)
    assert done.returncode == 2
    assert "are in the queue: 17. Wait for them, or scancel them first." in done.stderr


# ---- what a job does -------------------------------------------------------------------------------------------------


def job(folder: Path, environment: dict[str, str], status: int, seeds: str, **variables: str) -> tuple[int, list[str], str]:
    """Run a job's script with a stand-in srun; return its status, the words that srun got, and what was requeued."""
    program(folder, "srun", f'printf "%s\\0" "$@" >"{folder}/srun"; exit {status}')
    program(folder, "scontrol", f'[[ $1 != show ]] && echo "$@" >>"{folder}/scontrol" || echo " PreemptTime=$PREEMPTED"')
    (folder / "scontrol").write_text("")
    slurm = {"SLURM_JOB_ID": "12", "PREEMPTED": "None", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "4", **variables}
    done = bash(STAGE, environment["SITE_FILE"], "student", seeds, "recipe=slmrec", "a=[x y]",
                env=standing_in(folder, environment, **slurm), cwd=folder)  # fmt: skip
    return done.returncode, written(folder / "srun"), (folder / "scontrol").read_text().strip()


@pytest.mark.parametrize(
    ("status", "again"), [(0, ""), (1, ""), (2, ""), (3, "requeue 12"), (137, ""), (138, "requeue 12"), (143, "")]
)
def test_a_job_is_queued_again_only_when_it_was_told_to_stop(tmp_path, environment, status, again):
    ended, words, requeued = job(tmp_path, environment, status, "all")
    assert (ended, requeued) == (status, again)
    assert words[-6:] == [f"{sys.prefix}/bin/python", "-m", "lit_llmers.fit", "recipe=slmrec", "a=[x y]", "only=student"]


def test_a_job_that_made_room_for_another_is_queued_again(tmp_path, environment):
    assert job(tmp_path, environment, 143, "all", PREEMPTED="2026-11-21T11:55:11")[::2] == (143, "requeue 12")


def test_a_task_of_an_array_runs_its_own_seed_and_requeues_itself_alone(tmp_path, environment):
    array = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "1"}
    _, words, requeued = job(tmp_path, environment, 3, "3 7 11", **array)
    assert words[-4:] == ["recipe=slmrec", "a=[x y]", "seeds=[7]", "only=student"]
    assert requeued == "requeue 10_1"


def test_the_environment_is_a_venv_conda_or_a_container(tmp_path, environment):
    (tmp_path / "etc" / "profile.d").mkdir(parents=True)
    (tmp_path / "etc" / "profile.d" / "conda.sh").write_text('conda() { echo "$@ ${UNSET_VARIABLE}" >activated; }\n')
    program(tmp_path, "conda", f'[[ $* == "info --base" ]] && echo "{tmp_path}"')
    for given, expected in [
        ("conda:llm", ["python"]),
        ("container:my image.sif", ["apptainer", "exec", "--nv", "--bind", str(tmp_path), "my image.sif", "python"]),
    ]:
        site = tmp_path / "site.sh"
        site.write_text(f"source {shlex.quote(str(ROOT))}/slurm/site.sh\nENVIRONMENT={shlex.quote(given)}\n")
        _, words, _ = job(tmp_path, environment | {"SITE_FILE": str(site)}, 0, "all")
        assert words[2:-5] == expected
    assert (tmp_path / "activated").read_text().split() == ["activate", "llm"]
    site.write_text(f"source {shlex.quote(str(ROOT))}/slurm/site.sh\nENVIRONMENT=poetry\n")
    assert "Write venv:FOLDER" in bash(SUBMIT, "recipe=x", env=environment | {"SITE_FILE": str(site)}).stderr
    site.write_text(f"source {shlex.quote(str(ROOT))}/slurm/site.sh\nENVIRONMENT=venv:nowhere\n")
    missing = bash(SUBMIT, "--dry-run", "recipe=x", env=environment | {"SITE_FILE": str(site)})
    assert missing.returncode == 2
    assert f"There is no nowhere/bin/python. Say in {site} which ENVIRONMENT" in missing.stderr


# ---- W&B, afterwards -------------------------------------------------------------------------------------------------


def test_offline_parts_are_uploaded_once_and_not_before_their_stage_is_done(tmp_path, environment):
    run = tmp_path / "a run"

    def part(stage: str, done: bool = True, synced: bool = False) -> str:
        name = stage.partition("-")[0]
        folder = run / stage / "wandb" / f"offline-run-20260101_000000-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").touch()
        if synced:
            (folder / f"run-{name}.wandb.synced").touch()
        if done:
            (run / stage / "DONE").touch()
        return folder.name

    part("teacher-abc", synced=True)
    student, report = part("student-def"), part("report", done=False)
    part("control-123", done=False)
    (run / "evaluate-456").mkdir()
    done = bash(SYNC, str(run), "--dry-run", env=environment)
    assert done.returncode == 0, done.stderr
    assert "to upload: 2; uploaded before: 1; not done yet: control-123" in done.stdout
    assert "Would sync 2 run(s)" in done.stderr, "it is W&B's own command that is asked"
    assert {student, report} == set(re.findall(r"offline-run-\S+?(?=/)", done.stderr))
    assert bash(SYNC, str(tmp_path / "no"), env=environment).returncode == 2
