"""Many runs, one table: what is asked, what is run, what is shared, what fails, and whether the figures are right."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from test_fit import HEAVY
from test_report import best_epoch, make_run
from tiny import arguments

from lit_llmers import comparable, compare, fit, jobs, recipes
from lit_llmers.errors import UserError
from lit_llmers.loggers import finish_loggers, make_loggers
from lit_llmers.processes.locks import alone
from lit_llmers.reporting import comparison_report
from lit_llmers.reporting.comparison import Comparison, Contender, comparison_table, figures, notes, read_comparison

LEVELS = {"sasrec": 1.6, "gru4rec": 1.4, "caser": 0.4}
METHOD = """\
defaults: [/base, /data: demo, /teacher: tiny-llama, /student: sasrec, /trainer: single, /logger: wandb, _self_]
repeat: [student, control]
pairs: [[student, control]]
stages:
  prepare: {{prepare: interactions}}
  student: {{like: "${{student}}", callbacks: [{{deep_supervision: {{blocks: 2, weight: {weight}}}}}]}}
  control: {{like: student, callbacks: []}}
  evaluate: {{evaluate: test, of: [student, control]}}
"""


# ---- the figures: made-up runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Three students of known levels, three seeds each, on the same users."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, {"student": level}) for name, level in LEVELS.items()}


def students(folders: dict[str, Path], reference: str | None = None) -> Comparison:
    return Comparison([Contender(name, run, "student") for name, run in reversed(folders.items())], reference=reference)


def ndcg(run: Path) -> np.ndarray:
    """NDCG@10 of every user, mean over the seeds, from the ranks alone."""
    ranks = np.stack([np.load(path) for path in sorted(run.glob("evaluate-*/ranks-student-*.npy"))]).astype(np.float64)
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean(0)


def test_the_best_is_the_reference_and_p_is_corrected_for_all_that_are_compared_with_it(folders):
    comparison = students(folders)
    assert list(comparison.models) == ["sasrec", "gru4rec", "caser"]
    ours = {name: ndcg(run) for name, run in folders.items()}
    raw = {name: stats.ttest_rel(ours[name], ours["sasrec"]).pvalue for name in ("gru4rec", "caser")}
    assert raw["caser"] < raw["gru4rec"]
    corrected = {"caser": 2 * raw["caser"], "gru4rec": max(raw["gru4rec"], 2 * raw["caser"])}
    for name in raw:
        against, gain = comparison.gain(name)
        assert (against, gain["p"]) == ("sasrec", pytest.approx(raw[name], rel=1e-4))
        assert gain["holm"] == pytest.approx(corrected[name], rel=1e-4)
        assert gain["relative"] == pytest.approx(ours[name].mean() / ours["sasrec"].mean() - 1, rel=1e-4)
    assert comparison.gain("sasrec") == (None, None)


def test_the_table_shows_mean_spread_gain_and_cost(folders):
    comparison = students(folders)
    header, rows = comparison_table(comparison)
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    values = comparison.values("gru4rec", lambda model: model["metrics"]["tail"]["NDCG@10"])
    assert cells["gru4rec"]["NDCG@10 tail"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert cells["sasrec"]["NDCG@10"].startswith("**")
    assert cells["sasrec"]["against sasrec"] == "reference"
    relative = ndcg(folders["caser"]).mean() / ndcg(folders["sasrec"]).mean() - 1
    _, gain = comparison.gain("caser")
    interval = f"[{100 * gain['relative_low']:+.1f}, {100 * gain['relative_high']:+.1f}]"
    assert cells["caser"]["against sasrec"] == f"{100 * relative:+.1f} % {interval}"
    assert cells["caser"]["p (Holm)"] == "< 0.001"
    assert (cells["caser"]["training"], cells["caser"]["parameters"], cells["caser"]["users/s"]) == ("21 s", "140,000", "3,800")
    text = "\n".join(notes(comparison))
    assert "corrected for 2 comparisons by Holm's method" in text
    assert "best on these very users" in text


def test_a_named_reference_is_what_all_are_compared_with(folders):
    comparison = students(folders, "caser")
    assert comparison.comparisons == [("sasrec", "caser"), ("gru4rec", "caser")]
    assert comparison.gain("sasrec")[1]["difference"] > 0
    assert "best on these very users" not in "\n".join(notes(comparison))


def test_each_method_is_compared_with_its_own_control(tmp_path):
    runs = [make_run(tmp_path / str(i), {"student": level, "control": 1.0}) for i, level in enumerate((1.5, 0.5))]
    rows = [Contender(f"{label}{end}", run, name) for label, run in zip("ab", runs, strict=True)
            for name, end in (("student", ""), ("control", "/control"))]  # fmt: skip
    comparison = Comparison(rows, [("a", "a/control"), ("b", "b/control")])
    assert list(comparison.models) == ["a", "a/control", "b", "b/control"], "in the order given"
    assert [figure["against"] for figure in figures(comparison)] == ["a/control", None, "b/control", None]
    assert comparison.gain("a")[1]["difference"] > 0 > comparison.gain("b")[1]["difference"]
    header, table = comparison_table(comparison)
    assert table[1][header.index("against its control")] == "-"


def test_what_is_written(folders, tmp_path, monkeypatch):
    comparison = students(folders)
    about = [(name, run, f"the command of {name}") for name, run in folders.items()]
    path = comparison_report.write_report(tmp_path, comparison, about, {"srgnn": "no luck"}, "the command of all")
    text = path.read_text()
    assert text.startswith("# Comparison on demo (")
    assert "**Generated data" in text
    assert "> - srgnn: no luck" in text
    assert text.count("p (Holm)") == 3, "table, note and differences"
    assert f"[caser]({os.path.relpath(folders['caser'], tmp_path)}/report.md): `the command of caser`" in text
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["caser"]["NDCG@10"]) == pytest.approx(ndcg(folders["caser"]).mean(), rel=1e-5)
    values = comparison.values("caser", lambda model: model["metrics"]["head"]["HR@10"])
    assert float(rows["caser"]["HR@10 head sd"]) == np.std(values, ddof=1)
    assert all(any(row[column] for row in rows.values()) for column in next(iter(rows.values()))), "no empty column"
    assert (rows["sasrec"]["against"], rows["caser"]["against"]) == ("", "sasrec")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    lines = comparison_report.summary_table(comparison).splitlines()
    assert lines[0] == "demo (generated data): leave-one-out, whole catalogue, history masked, 600 users, 3 seeds"
    assert max(map(len, lines)) <= 140
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = make_loggers({"logger": {"kind": "wandb"}}, tmp_path, group="g", name="compare", run_id="c", settings={})
    comparison_report.publish(tmp_path, comparison, loggers)
    finish_loggers(loggers)
    media = [path.name for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*.*")]
    assert sorted(name.rpartition(".")[2] for name in media) == ["json", "png"]


def test_a_report_says_on_what_and_how_long_each_model_trained(folders, tmp_path):
    runs = {name: shutil.copytree(run, tmp_path / name) for name, run in folders.items()}
    for path in runs["caser"].glob("student-*/config.json"):
        settings = json.loads(path.read_text())["settings"]
        settings["trainer"] |= {"patience": 9, "devices": 4}
        settings["optimizer"]["warmup_steps"] = None
        settings["loss"] = {"kind": "bce", "negatives": 2, "t": 0.75}
        path.write_text(json.dumps({"settings": settings}))
    (tmp_path / "comparison").mkdir()
    path = comparison_report.write_report(tmp_path / "comparison", students(runs), [], {}, "")
    (section,) = (part for part in path.read_text().split("\n## ") if part.startswith("Training settings"))
    assert "The models differ in `trainer.patience`, `loss`, `optimizer.warmup_steps`." in section
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["sasrec", "gru4rec", "caser"]
    assert [row[1:] for row in table[2:]] == [["4", "-", "-"]] * 2 + [["9", "{kind: bce, negatives: 2}", "null"]]
    assert "The same for all: `model={dim: 8}, sequences.max_length=50, optimizer.lr=0.001`." in section, (
        "where it ran is not among them"
    )


def test_a_folder_is_read_back_as_the_comparison_that_it_is_of(folders, tmp_path):
    made = tmp_path / "made"
    runs = {name: shutil.copytree(run, made / name) for name, run in folders.items()}
    paired = Comparison([Contender(name, run, "student") for name, run in runs.items()], [("caser", "sasrec")])
    given = {"best": students(runs), "named": students(runs, "caser"), "paired": paired}
    for name, comparison in given.items():
        (made / name).mkdir()
        comparison_report.write_report(made / name, comparison, [], {}, "")
    made.rename(tmp_path / "moved")
    for name, comparison in given.items():
        found = read_comparison(str(tmp_path / "moved" / name))
        assert figures(found) == figures(comparison)
        assert (found.opponent, notes(found)) == (comparison.opponent, notes(comparison))


def test_a_folder_without_a_comparison_is_refused_and_one_whose_run_is_begun_anew(folders, tmp_path):
    with pytest.raises(UserError, match=r"There is no comparison in .*nowhere: compare.json is missing. Give a folder that"):
        read_comparison(tmp_path / "nowhere")
    runs = {"sasrec": shutil.copytree(folders["sasrec"], tmp_path / "run")}
    comparison_report.write_report(tmp_path, students(runs), [], {}, "")
    (tmp_path / "run" / "evaluate-abc123" / "DONE").unlink()
    with pytest.raises(UserError, match=r"run has not evaluated 'student'. Give the comparison's command again"):
        read_comparison(tmp_path)


def test_a_run_that_has_other_settings_by_now_is_refused(folders, tmp_path):
    """As where the comparison was begun anew with them and stopped: its other runs still have the old ones."""
    runs = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("sasrec", "caser")}
    comparison_report.write_report(tmp_path, students(runs), [], {}, "")
    about = (runs["caser"] / "run.json").read_text()
    (runs["caser"] / "run.json").write_text(about.replace("evaluate-abc123", "evaluate-abc124"))
    (runs["caser"] / "evaluate-abc123").rename(runs["caser"] / "evaluate-abc124")
    with pytest.raises(UserError, match=r"caser is not what it was when .*compare.json was .* has evaluate-abc124. Give"):
        read_comparison(tmp_path)


def test_a_text_that_may_betray_held_out_items_is_warned_of_at_the_head(folders, tmp_path):
    runs = {name: shutil.copytree(run, tmp_path / name) for name, run in folders.items()}
    assert "WARNING" not in comparison_report.summary_table(students(runs))
    for name in ("sasrec", "caser"):
        about = json.loads((runs[name] / "run.json").read_text())
        about["stages"].append({"name": "text", "seed": 0, "verb": "encode", "folder": "text-1", "fingerprint": "1"})
        (runs[name] / "run.json").write_text(json.dumps(about | {"run": name}))
        (runs[name] / "text-1").mkdir()
        done = {"seconds": 1.0, "summary": {"leaking": ["llm_user_profile"]}}
        (runs[name] / "text-1" / "DONE").write_text(json.dumps(done))
    comparison, recipe = students(runs), about["recipe"]
    text = comparison_report.write_report(tmp_path, comparison, [], {}, "").read_text()
    warning = f"held-out items may have been seen.** Stage 'text' of {recipe}/caser, {recipe}/sasrec reads `llm_user_profile`"
    assert text.count("WARNING") == 1
    assert text.index(warning) < text.index("| model")
    assert warning.replace("**", "") in comparison_report.summary_table(comparison)


def test_a_training_that_still_rose_at_its_end_is_named_with_its_run(folders, tmp_path):
    runs = {name: shutil.copytree(run, tmp_path / name) for name, run in folders.items()}
    best_epoch(runs["caser"], "student-seed1", 11)
    comparison = students(runs)
    warning = "trainer.max_epochs ended slmrec/default: student (12, 1 of 3 seeds) in the best epoch"
    assert warning in comparison_report.write_report(tmp_path, comparison, [], {}, "").read_text()
    assert warning in comparison_report.summary_table(comparison)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(*given: str) -> int:
    return compare.main(list(given))


def table(out: str) -> tuple[str, list[str]]:
    """The header of the printed table, and the models in its rows."""
    lines = out.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("---"))
    return lines[rule - 1], [line.split()[0] for line in lines[rule + 1 : lines.index("", rule)]]


def tiny(folder: Path, *more: str) -> list[str]:
    return arguments(folder, "~stages.export", "trainer.max_epochs=1", *more, recipe="student")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data=demo"], "Nothing to compare. Give students=[NAME,...] or recipes=[NAME,...]"),
        (["students=[]"], "students=[] is empty"),
        (["students=[sasrec,]"], "has an empty place"),
        (["students=sasrec"], "students=sasrec is not a list. Write students=[sasrec,gru4rec]"),
        (["students=[sasrec,gru4rek]"], "Unknown student 'gru4rek'. Did you mean 'gru4rec'?"),
        (["students=[sasrec,sasrec]"], "names sasrec twice"),
        (["recipes=[slmrek]"], "Unknown recipe 'slmrek'. Did you mean 'slmrec'?"),
        (["recipes=[slmrec]", "students=[sasrec]", "student=gru4rec"], "not both"),
        (["students=[sasrec]", "recipe=student"], "Here it is recipes=[NAME, ...]"),
        (["students=[sasrec]", "stage=prepare"], "nothing to compare"),
        (["students=[sasrec]", "seeds=[0,"], "seeds=[0, is not a list. Write seeds=[0,1,2]"),
        (["students=[sasrec]", "seeds=[]"], "seeds=[] is empty"),
        (["students=[sasrec]", "seeds=[0,x]"], "seeds are whole numbers from 0"),
        (["students=[sasrec]", "seeds=[0,-1]"], "seeds are whole numbers from 0"),
        (["students=[sasrec]", "seeds=[1,1]"], "names 1 twice"),
        (["students=[sasrec]", "data=nowhere"], "Unknown option of data 'nowhere'"),
        (["students=[sasrec]", "trainer.max_epoch=1"], "Did you mean 'max_epochs'?"),
        (["students=[sasrec,gru4rec]", "reference=gru4re"], "Unknown reference 'gru4re'. Did you mean 'gru4rec'?"),
        (["students=[sasrec,gru4rec]", "reference="], "Unknown reference ''"),
    ],
)
def test_what_a_user_can_mend_is_said_before_anything_runs(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert main(*given) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert message in line
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy_and_lists_students_and_recipes():
    probe = f"import sys; from lit_llmers.compare import main; main(['-h']); print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert f"students: {', '.join(recipes.options('student'))}" in out
    assert all(f"  {name} " in out for name in recipes.available())


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Runs go on in this process, and their names are noted."""
    names: list[str] = []

    def start(given: list[str], *_: object) -> str | None:
        names.append(given[-1].removeprefix("run.name="))
        with contextlib.redirect_stdout(None):
            return "it failed" if fit.main(given) else None

    monkeypatch.setattr(jobs, "start", start)
    return names


def test_failure_takes_nothing_along_and_the_same_command_does_the_rest(tmp_path, started, monkeypatch, capsys):
    command = ["students=[sasrec,gru4rec]", "seeds=[0,1]", *tiny(tmp_path)]
    root = tmp_path / "compare" / "demo"
    goes_on = jobs.start
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "start", lambda given, *_: "no memory" if "student=gru4rec" in given else goes_on(given))
        assert main(*command) == 1
    said = capsys.readouterr()
    assert "error: gru4rec failed: no memory" in said.err
    assert table(said.out)[1] == ["sasrec"]
    assert "> - gru4rec: no memory" in (root / "report.md").read_text()
    assert main(*command) == 0
    assert started == ["sasrec", "gru4rec"], "the first is not run again"
    folders = [root / "student" / name for name in ("sasrec", "gru4rec")]
    (prepared,), (linked,) = (list(folder.glob("prepare-*")) for folder in folders)
    assert linked.resolve() == prepared.resolve(), "the data are prepared once"
    assert (root / "student" / "gru4rec" / "report.md").is_file()
    capsys.readouterr()
    (root / "environment.json").write_text((root / "environment.json").read_text().replace('"date": "', '"date": "on another '))
    assert main(*command, "reference=gru4rec") == 0
    assert "on another" in (root / "report.md").read_text(), "nothing was worked out here"
    assert started == ["sasrec", "gru4rec"], "nothing is"
    assert "against gru4rec" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "start", lambda *_: "no memory")
        assert main(*command, "trainer.batch_size=8") == 1
    assert "sasrec" not in capsys.readouterr().out, "figures of other settings are no substitute"


def test_what_somebody_else_writes_below_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "start", lambda *_: "no memory")
    half = tmp_path / "compare" / "demo" / "student" / "sasrec" / "student-1" / ".last.ckpt.5.tmp"
    with alone(half.parent):
        half.write_bytes(b"being written")
        assert main("students=[sasrec]", *tiny(tmp_path)) == 1
    assert half.exists()


def test_a_run_goes_on_with_its_own_command(tmp_path, started):
    command = ["students=[sasrec]", *tiny(tmp_path / "a folder"), "run.name=mine"]
    root, (run,) = comparable.planned_runs(comparable.parse(command))
    assert root == tmp_path / "a folder" / "compare" / "mine"
    assert main(*command) == 0
    assert (root / "report.md").is_file()
    before = (run.evaluation.folder / "DONE").stat().st_mtime_ns
    assert fit.main(run.arguments) == 0
    assert (run.evaluation.folder / "DONE").stat().st_mtime_ns == before
    assert run.done
    fit._mark_as_earlier(run.folder / "report.md")  # as where a command with other settings died before its own report
    assert not run.done


def test_methods_share_their_control(tmp_path, started, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, weight in (("one", 0.1), ("two", 0.3)):
        Path(f"{name}.yaml").write_text(METHOD.format(weight=weight))
    command = ["recipes=[one.yaml,two.yaml]", *(o for o in tiny(tmp_path) if not o.startswith("~"))]
    assert main(*command) == 0
    header, rows = table(capsys.readouterr().out)
    assert rows == ["control", "one", "two"]
    assert "against its control" in header
    root = tmp_path / "compare" / "demo"
    (control,) = (root / "two" / "default").glob("control-*")
    assert control.is_symlink()
    assert control.resolve().parent == (root / "one" / "default").resolve()

    shutil.rmtree(root / "one")
    assert main(*command) == 0, "links that lead nowhere are mended"
    assert all((path / "DONE").is_file() for path in root.glob("*/default/*-*") if path.name != "report")


def test_a_record_that_was_removed_leaves_no_link_behind(tmp_path):
    record, run = tmp_path / "one" / "default" / "encoded" / "ab12", SimpleNamespace(folder=tmp_path / "two" / "x", stages=[])
    record.mkdir(parents=True)
    (record / "manifest.json").touch()
    link = run.folder / "encoded" / "ab12"
    compare.share(run, tmp_path)
    assert link.resolve() == record.resolve()
    shutil.rmtree(record)
    compare.share(run, tmp_path)
    assert not link.is_symlink()


def test_labels_name_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(METHOD.format(weight=0.1))
    Path("two.yaml").write_text(METHOD.format(weight=0.3))
    given = ["students=[sasrec,gru4rec]", "student.model.layers=2", *(o for o in tiny(tmp_path) if not o.startswith("~"))]

    def called(names: str) -> dict[tuple[str, str], str]:
        return comparable.labels(comparable.planned_runs(comparable.parse([f"recipes=[{names}]", *given]))[1])

    assert called("one.yaml") == {
        ("sasrec", "student"): "sasrec",
        ("sasrec", "control"): "sasrec/control",
        ("gru4rec", "student"): "gru4rec",
        ("gru4rec", "control"): "gru4rec/control",
    }
    both = called("one.yaml,two.yaml")
    assert both["two/sasrec", "student"] == "two/sasrec"
    assert both["one/sasrec", "control"] == both["two/sasrec", "control"] == "sasrec/control", "two controls: which is said"
    shutil.copy("two.yaml", "control.yaml")
    students = given.pop(0)
    same = called("one.yaml,control.yaml")
    assert (same["control", "student"], same["one", "control"]) == ("control", "one/control"), "no two models have one label"
    given.insert(0, students)
    Path("more").mkdir()
    shutil.copy("two.yaml", "more/one.yaml")
    with pytest.raises(UserError, match="Two recipes are called 'one/sasrec'"):
        called("one.yaml,more/one.yaml")
    plain = called("one.yaml,student")
    assert plain["one/gru4rec", "control"] == plain["student/gru4rec", "student"] == "student/gru4rec"


def test_a_choice_is_for_the_recipes_that_have_it(tmp_path):
    given = [f"run.dir={tmp_path}", "logger=csv", "seeds=[0]"]
    with_text, without = comparable.planned_runs(comparable.parse(["recipes=[llm2x,said]", "text=minilm", *given]))[1]
    assert "text=minilm" in with_text.arguments
    assert not [argument for argument in without.arguments if argument.startswith("text")]
    assert next(stage for stage in with_text.stages if stage.name == "text").config.model == "minilm"
    with pytest.raises(UserError, match="Recipe 'said' has no text to choose. Its stage .*Leave 'text=minilm' out"):
        comparable.planned_runs(comparable.parse(["recipes=[said,student]", "text=minilm", *given]))


def test_a_word_about_a_stage_is_for_the_recipes_that_have_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shallow.yaml").write_text((recipes.folder() / "rrd.yaml").read_text())
    Path("built.yaml").write_text("defaults: [shallow, _self_]\n")
    given = [f"run.dir={tmp_path}", "logger=csv", "seeds=[0]", "students=[lightgcn]"]
    word = "stages.lists.per=user"
    plain, ranked, built = comparable.planned_runs(comparable.parse(["recipes=[student,rrd,built.yaml]", word, *given]))[1]
    assert word not in plain.arguments
    assert word in ranked.arguments
    assert word in built.arguments, "it has the stage from the file that it is built on"
    with pytest.raises(UserError, match="Unknown stage 'lists'"):
        comparable.planned_runs(comparable.parse(["recipes=[student]", word, *given]))


def test_runs_on_other_data_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(METHOD.format(weight=0.1))
    Path("two.yaml").write_text(METHOD.format(weight=0.1) + "evaluation: {mask_history: false}\n")
    assert main("recipes=[one.yaml,two.yaml]", *[o for o in tiny(tmp_path) if not o.startswith("~")]) == 2
    assert "'one' and 'two' cannot be compared: evaluation.mask_history is True in one and False" in capsys.readouterr().err
