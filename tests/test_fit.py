"""The command line: quick answers, errors as a user sees them, exit status."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import arguments, by_name, small

from lit_llmers import fit, recipes
from lit_llmers.errors import UserError

HEAVY = ["torch", "lightning", "transformers", "peft", "wandb", "pandas", "numpy", "hydra", "omegaconf", "matplotlib"]
SECONDS = 6  # it takes under two on an idle machine; imports of torch alone would take more than that
PROBE = """\
import sys
from lit_llmers.fit import main
status = main(sys.argv[1:])
print("IMPORTED", *(name for name in {heavy} if name in sys.modules), file=sys.stderr)
sys.exit(status)
"""


def command(*given: str, cwd: Path | None = None) -> tuple[int, str, str, float]:
    started = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "lit_llmers.fit", *given],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    return found.returncode, found.stdout, found.stderr, time.monotonic() - started


def imported(*given: str) -> tuple[int, list[str]]:
    found = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *given], capture_output=True, text=True, check=False
    )
    last = found.stderr.splitlines()[-1].split()
    assert last[0] == "IMPORTED", found.stderr
    return found.returncode, last[1:]


def test_help_answers_at_once_and_lists_what_there_is(tmp_path):
    status, out, err, seconds = command("--help", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert seconds < SECONDS
    for name, path in recipes.available().items():
        assert f"  {name} " in out
        assert recipes.title(path) in out
    for group in recipes.GROUPS:
        line = next(line for line in out.splitlines() if line.startswith(f"  {group}="))
        assert line.split("=")[1].replace(",", "").split() == recipes.options(group)
    assert "stage=NAME" in out
    assert not list(tmp_path.iterdir())


def test_no_arguments_are_a_question_for_help():
    assert command()[1] == command("-h")[1] == fit.help_text() + "\n"


def test_a_wrong_recipe_answers_at_once_with_the_nearest(tmp_path):
    status, out, err, seconds = command("recipe=slmrek", "trainer.max_epochs=1", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert seconds < SECONDS
    assert err.strip() == f"error: Unknown recipe 'slmrek'. Did you mean 'slmrec'? There is: {', '.join(recipes.available())}."
    assert not list(tmp_path.iterdir())


def test_neither_help_nor_a_wrong_recipe_imports_anything_heavy():
    assert imported("--help") == (0, [])
    assert imported("data=demo") == (2, []), "no recipe at all"
    status, found = imported("recipe=nothing")
    assert status == 2
    assert not set(found) - {"hydra", "omegaconf"}


@pytest.mark.parametrize("given", ["trainer.max_epoch=1", "trainer.max_epochs=0", "evaluation.protocol=sampled", "seeds=[0,0]"])
def test_what_is_wrong_of_the_whole_run_is_refused_before_anything_heavy_is_imported(given):
    status, found = imported("recipe=slmrec", given)
    assert status == 2
    assert not set(found) - {"hydra", "omegaconf"}


def test_an_unknown_key_is_an_error_without_traceback_or_folder(tmp_path):
    status, out, err, _ = command("recipe=slmrec", "trainer.max_epoch=1", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert err.strip().startswith("error: Unknown configuration key 'trainer.max_epoch'. Did you mean 'max_epochs'?")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def main(*given: str) -> int:
    return fit.main(list(given))


def test_config_prints_what_the_recipe_composes_to(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("recipe=slmrec", "--config", "trainer.max_epochs=7", "scale=paper") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == recipes.compose("slmrec", ["trainer.max_epochs=7", "scale=paper"])
    assert printed["trainer"]["max_epochs"] == 7
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_the_memory_that_its_steps_free(capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(fit, "keep_memory", lambda: kept.append("kept"))
    monkeypatch.setattr(fit, "fit", lambda *_: kept.append("run"))
    assert main("recipe=slmrec") == 0
    assert kept == ["kept", "run"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.max_epochs=1"], "No recipe given. Add recipe=NAME with one of: alpharec"),
        (["recipe="], "Unknown recipe ''"),
        (["recipe=slmrec", "data=nowhere"], "Unknown option of data 'nowhere'"),
        (["recipe=slmrec", "logger=csv", "stage=teachr"], "Unknown stage 'teachr'. Did you mean 'teacher'?"),
        (["recipe=slmrec", "logger.kind=wand", "stage=prepare"], "Did you mean 'wandb'?"),
        (["recipe=slmrec", "data=local", "data.path=nowhere"], "nowhere"),
        (["recipe=slmrec", "data.root=FOLDER"], "data=demo is generated and reads no data.root"),
        (["recipe=slmrec", "data.path=FOLDER"], "reads no data.path. Say which data lie there: data=local."),
        (
            ["recipe=slmrec", "data.columns.user=buyer"],
            "data.columns.user names a column of a folder's tables, but demo is gen",
        ),
        (["recipe=slmrec", "data=ml-1m", "data.columns.time=when"], "tables, but ml-1m comes from its publisher. Leave it out"),
        (["recipe=slmrec", "logger=csv", "run.dir=/proc/runs"], "run folder /proc/runs/slmrec/default cannot be written"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert main(*given) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert message in line


def test_interrupted_says_that_it_can_go_on(capsys, tmp_path, monkeypatch):
    def interrupt(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_llmers.prepare.run", interrupt)
    assert main("recipe=slmrec", *arguments(tmp_path)) == 130
    assert "The same command goes on from here" in capsys.readouterr().err


def test_what_is_no_fault_of_the_user_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llmers.prepare.run", lambda stage: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main("recipe=slmrec", *arguments(tmp_path))


def test_an_error_in_a_stage_leaves_a_run_that_says_how_far_it_came(capsys, tmp_path, monkeypatch):
    def full(stage):
        raise UserError("No space left on the disk.")

    with monkeypatch.context() as patch:
        patch.setattr("lit_llmers.encode.run", full)
        assert main("recipe=slmrec", *arguments(tmp_path)) == 2
    run = tmp_path / "slmrec" / "default"
    assert sorted(path.name.partition("-")[0] for path in run.glob("*/DONE") for path in [path.parent]) == [
        "item_embeddings",
        "prepare",
    ]
    assert main("recipe=slmrec", *arguments(tmp_path), "stage=text") == 0
    report = (run / "report.md").read_text()
    assert "not finished" in report
    assert "teacher (seed 0)" in report
    assert " stage=" not in report, "the command that it names makes the whole run"
    assert "Report:" in capsys.readouterr().out


def test_a_report_that_other_settings_replace_is_said_beforehand(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="lit_llmers")
    first, second = small(tmp_path), small(tmp_path, "optimizer.lr=1e-4")
    folder, config = first[0].run.folder, recipes.compose("slmrec", [])
    folder.mkdir(parents=True)
    for given in (first, second):  # nothing was reported yet
        fit.describe_run(folder, config, ["recipe=slmrec"], given, False)
    assert "other settings" not in caplog.text

    evaluated = by_name(second)["evaluate"].folder
    evaluated.mkdir()
    (evaluated / "DONE").touch()
    fit.describe_run(folder, config, ["recipe=slmrec"], second, False)
    assert "other settings" not in caplog.text
    (folder / "report.md").write_text("# slmrec\n")
    for _ in range(2):  # said once: then the run is described as it is now
        fit.describe_run(folder, config, ["recipe=slmrec"], first, False)
        assert (folder / "report.md").read_text() == f"{fit.EARLIER}\n\n# slmrec\n", "in the report too, lest this command fail"
    assert caplog.text.count("holds the report of other settings, which this one's will replace; run.name=OTHER") == 1
