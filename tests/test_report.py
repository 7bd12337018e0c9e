"""The report of a run is worked out from its files; here from a made-up run with known figures."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from tiny import dataset

from lit_llmers import report
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write
from lit_llmers.loggers import finish_loggers, make_loggers
from lit_llmers.metrics import ranking_metrics
from lit_llmers.processes.locks import alone
from lit_llmers.report import publish, summary_table, write_report
from lit_llmers.reporting import plots, sections
from lit_llmers.reporting.comparison import Comparison, Contender
from lit_llmers.reporting.comparison_report import write_report as write_comparison_report
from lit_llmers.reporting.results import Evaluated, Results

USERS, KS, SEEDS = 600, (1, 5, 10, 20), (0, 1, 2)
GROUPS = ["0-4", "5-9", "10-19", "20-49", "50+"]
PAPER = {
    "parameters": "13 %",
    "layers": "4 : 32",
    "training": "6.6 x",
    "inference": "8.0 x",
    "note": "Of another scale.",
}
INFO = {
    "name": "demo",
    "generated": True,
    "split": "leave-one-out",
    "k_core": 5,
    "min_interactions": 3,
    "counts": {"users": USERS, "items": 300, "interactions": 9000, "train": 7800, "valid": USERS, "test": USERS},
    "dropped": {"k_core=5": {"users": 12, "items": 4, "interactions": 61}, "items_without_interactions": 7},
    "notes": ["12 interactions repeat an item that the user had before; they are kept."],
}
COMMAND = "python -m lit_llmers.fit recipe=slmrec 'seeds=[0,1,2]'"


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(run: Path, levels: dict[str, float], seeds=SEEDS, until: str | None = None, generated: bool = True) -> Path:
    """A run folder; `levels`: how good each model is, from 0 (random) upwards."""
    rng = np.random.default_rng(0)
    repeated = {"student", "control"}
    stages = [{"name": "prepare", "seed": 0, "verb": "prepare"}]
    for name in levels:
        for seed in seeds if name in repeated else (0,):
            stages.append({"name": name, "seed": seed, "verb": "fit"})
    stages += [{"name": "evaluate", "seed": 0, "verb": "evaluate"}, {"name": "export", "seed": 0, "verb": "export"}]
    for stage in stages:
        label = f"{stage['name']}-seed{stage['seed']}" if stage["name"] in repeated else stage["name"]
        stage |= {"folder": f"{label}-abc123", "fingerprint": "abc123"}
    cut = next((i for i, s in enumerate(stages) if s["name"] == until), len(stages) - 1)
    ease = rng.gumbel(0, 1.5, USERS)  # some users are easier for all
    popularity = np.clip((rng.random(USERS) * 5).astype(np.int8), 0, 4)
    groups = {"user": np.arange(USERS), "popularity": popularity, "head": popularity > 2, "short": rng.random(USERS) < 0.5}
    rows = {"all": np.ones(USERS, bool), "head": groups["head"], "tail": ~groups["head"]}
    rows |= {"short": groups["short"], "long": ~groups["short"]}
    models = []
    for stage in stages[: cut + 1]:
        folder, name, seed = run / stage["folder"], stage["name"], stage["seed"]
        summary: dict = {}
        if stage["verb"] == "fit":
            fit_log(folder, name, levels[name], rng)
            settings = {"sequences": {"max_length": 50}, "trainer": {"patience": 4, "devices": 1}, "optimizer": {"lr": 0.001}}
            settings["model"] = {"dim": 8}
            (folder / "config.json").write_text(json.dumps({"settings": settings}))
            parameters = {"total": 260_000 if name == "teacher" else 140_000, "trainable": 90_000}
            size = {"layers": 8 if name == "teacher" else 4, "width": 64}
            speed = 900.0 if name == "teacher" else 1700.0
            summary = {
                "parameters": parameters,
                **size,
                "train_seconds": 21.0,
                "epochs": 12,
                "best": {"epoch": 9, "val/NDCG@10": 0.11},
            }
            noise = rng.normal(0, 0.7, USERS)
            ranks = np.floor(300 / (1 + np.exp(ease + noise + levels[name] + 0.3 * popularity))).astype(np.float32)
            models.append(
                {
                    "name": name,
                    "seed": seed,
                    "metrics": {
                        group: dict.fromkeys(("users", "interactions"), int(inside.sum())) | ranking(ranks[inside])
                        for group, inside in rows.items()
                    },
                    "popularity": [{"group": g, **ranking(ranks[popularity == i])} for i, g in enumerate(GROUPS)],
                    "parameters": {**parameters, **size},
                    "training": {"seconds": 21.0, "targets_per_second": speed, "epochs": 12},
                    "inference": {"seconds": 0.5, "users_per_second": 2000.0 if name == "teacher" else 3800.0},
                    "ranks": f"ranks-{name}-seed{seed}.npy",
                }
            )
            np.save((run / "evaluate-abc123").with_name(f"ranks-{name}-seed{seed}.npy"), ranks)
        if stage["verb"] == "evaluate":
            protocol = {"name": "full", "history": "masked", "split": "leave-one-out", "split_hash": "0f0f0f0f0f0f"}
            protocol |= {"users": USERS, "items": 300, "interactions": USERS, "candidates": None}
            legend = {group: f"definition of {group}" for group in ("head", "tail", "short", "long")}
            content = {"protocol": protocol, "ks": list(KS), "groups": legend, "models": models}
            write(folder / "evaluation.json", content)
            np.savez(folder / "groups.npz", **groups)
            for model in models:
                (run / model["ranks"]).rename(folder / model["ranks"])
        write(folder / "DONE", {"seconds": 25.5, "summary": summary, "git": {"commit": "c" * 40, "dirty": False}})
    about = {"recipe": "slmrec", "run": "default", "command": COMMAND, "data": INFO | {"generated": generated}}
    about |= {"stages": stages, "pairs": [["student", "control"]], "teacher": "teacher", "paper": PAPER}
    write(run / "run.json", about)
    packages = {"torch": "2.13.0", "lightning": "2.6.6"}
    machine = {"date": "2026-01-01T00:00:00+00:00", "cpu": "A CPU", "cores": 2, "gpus": [], "python": "3.11.7"}
    write(run / "environment.json", {**machine, "packages": packages, "git": {"commit": "a" * 40, "dirty": True}})
    return run


def ranking(ranks: np.ndarray) -> dict[str, float]:
    return ranking_metrics(torch.from_numpy(ranks), KS)


def fit_log(folder: Path, name: str, level: float, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 1210, 10):
        decay = np.exp(-step / 300)
        entry = {"step": step, "epoch": (step - 1) // 100, "time": 1.7e9 + step}
        terms = {"loss/task": 3.5 + 2 * decay + rng.normal(0, 0.08)}
        if name == "student":
            cosine, l2 = 0.3 + decay + rng.normal(0, 0.02), 1.2 + 3 * decay + rng.normal(0, 0.1)
            terms |= {"loss/feature/cosine": cosine, "loss/feature/l2": l2, "loss/feature": cosine + 0.1 * l2}
            terms |= {"loss/deep_supervision": 11 + 5 * decay + rng.normal(0, 0.2)}
        total = sum(value for key, value in terms.items() if key.count("/") == 1)
        if step % 100 == 0:
            entry["val/NDCG@10"] = max(0.0, 0.02 * level + 0.1 * (1 - decay) + rng.normal(0, 0.002))
        lines.append(json.dumps(entry | terms | {"loss": total}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 1210, "lo')


def section(text: str, title: str) -> str:
    return text.split(f"{title}\n", 1)[1].split("\n#", 1)[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A teacher better than the control, a student between them, three seeds; its report is written."""
    run = make_run(tmp_path_factory.mktemp("good") / "run", {"teacher": 2.2, "student": 2.0, "control": 1.6, "sasrec": 1.2})
    write_report(Results(run))
    return run


def test_generated_data_is_said_first(good):
    lines = [line for line in (good / "report.md").read_text().splitlines() if line]
    assert lines[0] == "# slmrec on demo (default)"
    assert lines[1].startswith("**Generated data")
    assert "generated" in summary_table(Results(good))


def test_real_data_is_not_called_generated(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "control": 1.0}, seeds=(0,), generated=False)
    assert "enerated" not in write_report(Results(run)).read_text() + summary_table(Results(run))


def test_figures_among_candidates_are_called_so_wherever_they_stand(good, tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "control": 1.0}, seeds=(0,))
    path = run / "evaluate-abc123" / "evaluation.json"
    content = json.loads(path.read_text())
    write(path, content | {"protocol": content["protocol"] | {"name": "sampled-99", "candidates": "ab12"}})
    said = "Ranked among stored candidates (sampled-99): these figures do not compare with those of the whole catalogue."
    assert said in summary_table(Results(run))
    assert said in section(write_report(Results(run)).read_text(), "## Results on the test users")
    assert "do not compare" not in (good / "report.md").read_text() + summary_table(Results(good))


def test_the_verdict_is_worked_out_from_the_ranks(good):
    folder = good / "evaluate-abc123"

    def ndcg(name: str) -> float:
        ranks = np.stack([np.load(folder / f"ranks-{name}-seed{seed}.npy") for seed in SEEDS])
        return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())

    student, control = ndcg("student"), ndcg("control")
    text = (good / "report.md").read_text()
    expected = f"**student beats control: +{100 * (student / control - 1):.1f} % in test NDCG@10** "
    assert f"{expected}({student:.4f} against {control:.4f}; difference {student - control:+.4f}" in text
    assert "Over 3 seeds the difference goes from" in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("levels", "said"),
    [((2.0, 1.6, 1.6), "student is within noise of control"), ((2.0, 1.2, 1.9), "student loses to control")],
)
def test_noise_and_losses_are_called_so(tmp_path, levels, said):
    run = make_run(tmp_path, dict(zip(("teacher", "student", "control"), levels, strict=True)))
    assert said in write_report(Results(run)).read_text()
    assert said in summary_table(Results(run))


def test_of_one_user_there_are_figures_and_nothing_is_compared(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "student": 1.8, "control": 1.6})
    folder = run / "evaluate-abc123"
    for path in folder.glob("ranks-*.npy"):
        np.save(path, np.load(path)[:1])
    np.savez(folder / "groups.npz", **{name: array[:1] for name, array in np.load(folder / "groups.npz").items()})
    said = "student and control cannot be compared: one user alone was evaluated."
    assert said in write_report(Results(run)).read_text()
    assert said in summary_table(Results(run))
    comparison = Comparison([Contender(name, run, name) for name in ("student", "control")])
    assert write_comparison_report(tmp_path, comparison, [], {}, "").is_file()


def test_models_of_other_seeds_are_not_compared(tmp_path):
    run = make_run(tmp_path, {"student": 1.8, "control": 1.6})
    path = run / "evaluate-abc123" / "evaluation.json"
    content = json.loads(path.read_text())
    write(path, content | {"models": content["models"][:-1]})
    assert "cannot be compared: they were not evaluated with the same seeds." in write_report(Results(run)).read_text()


def test_any_metric_is_compared_and_none_for_another(good):
    results, ranks = Results(good), {}
    for name in ("student", "control"):
        ranks[name] = np.stack([np.load(good / "evaluate-abc123" / f"ranks-{name}-seed{seed}.npy") for seed in SEEDS])
    for metric, hits in (("HR@3", lambda ranks: ranks + 1 <= 3), ("HR@100", lambda ranks: ranks + 1 <= 100)):
        difference = hits(ranks["student"]).mean() - hits(ranks["control"]).mean()
        assert results.compare("student", "control", metric=metric)["difference"] == pytest.approx(difference)
    assert results.compare("student", "control") == results.gains["student", "control"]


def test_hits_that_models_share_by_hand(tmp_path):
    ranks = {("a", 0): [0, 3, 20, 9], ("a", 1): [0, 30, 5, 9.5], ("b", 0): [0, 12, 2, 1], ("none", 0): [50, 50, 50, 50]}
    models = [{"name": name, "seed": seed, "ranks": f"{name}{seed}.npy"} for name, seed in ranks]
    for model, each in zip(models, ranks.values(), strict=True):
        np.save(tmp_path / model["ranks"], np.array(each, dtype=np.float32))
    results = Evaluated({}, {"models": models}, tmp_path)
    assert results.shared_hits("a", "b") == pytest.approx((2 / 3 + 2 / 2) / 2)
    assert results.shared_hits("b", "a") == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert results.shared_hits("a", "a") == pytest.approx((1 / 3 + 1 / 2) / 2), "a seed is not compared with itself"
    assert results.shared_hits("a", "b", k=1) == 1
    assert (results.shared_hits("b", "b"), results.shared_hits("none", "a")) == (None, None)
    assert results.shared_hits("a", "none") == 0


def test_how_often_targets_were_met_in_training(tmp_path):
    run = make_run(tmp_path, {"student": 1.0}, seeds=(0,))
    with pytest.raises(UserError, match=r"There is no file .*prepare-abc123"):
        Results(run).target_popularity.sum()
    dataset([[1, 2, 3, 1], [1, 1, 1, 3], [1, 2, 4, 2]]).save(run / "prepare-abc123")
    assert Results(run).target_popularity.tolist() == [4, 0, 2], "the last two items of each are not trained on"


@pytest.mark.parametrize(("level", "said"), [(1.6, "does not clearly beat"), (0.9, "is worse than")])
def test_a_teacher_that_does_not_beat_the_control_is_a_warning(tmp_path, level, said):
    run = make_run(tmp_path, {"teacher": level, "student": 1.6, "control": 1.6})
    text = write_report(Results(run)).read_text()
    assert f"> **WARNING: the teacher {said} the control.**" in text
    assert f"WARNING: the teacher {said} the control." in summary_table(Results(run))


def test_of_two_controls_each_is_named_and_the_reason_said_once(tmp_path):
    run = make_run(tmp_path, {"teacher": 0.9, "student": 1.6, "control": 1.6, "sasrec": 1.6})
    about = json.loads((run / "run.json").read_text())
    write(run / "run.json", about | {"pairs": [["student", "control"], ["student", "sasrec"]]})
    text = write_report(Results(run)).read_text()
    assert "**WARNING: the teacher is worse than control.**" in text
    assert "**WARNING: the teacher is worse than sasrec.**" in text
    assert text.count("need not be the teacher's knowledge") == 1


def best_epoch(run: Path, stage: str, epoch: int, epochs: int = 12, **more: bool) -> None:
    """Have a stage of a made-up run, whose validations are of epochs 0 to 11, say which was best."""
    path = run / f"{stage}-abc123" / "DONE"
    done = json.loads(path.read_text())
    write(path, done | {"summary": done["summary"] | {"epochs": epochs, "best": {"epoch": epoch, "val/NDCG@10": 0.1} | more}})


def test_a_training_that_still_rose_at_its_last_epoch_is_a_warning(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.2, "student": 2.0, "control": 1.6, "sasrec": 1.2})
    results = Results(run)
    assert "WARNING" not in write_report(results).read_text() + summary_table(results), "the best epoch is 9 of 0 to 11"
    for stage in ("teacher", "student-seed0", "student-seed2"):
        best_epoch(run, stage, 11)
    best_epoch(run, "sasrec", 11, epochs=0)  # counted and not trained
    text = write_report(Results(run)).read_text()
    warning = "stopped too early.** trainer.max_epochs ended teacher (12), student (12, 2 of 3"
    assert warning in text
    assert text.index("student beats control") < text.index(warning) < text.index("## Results")
    assert warning.replace("**", "") in summary_table(Results(run))
    assert "lower rate" not in text


def test_so_is_a_plateau_that_did_not_come_to_its_lower_rate(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.2, "student": 2.0, "control": 1.6})
    best_epoch(run, "control-seed0", 9, lowered=True)
    assert "WARNING" not in write_report(Results(run)).read_text()
    best_epoch(run, "control-seed1", 9, lowered=False)
    warning = "trainer.max_epochs ended control (12, 1 of 3 seeds) in the best epoch, or before the lower rate"
    assert warning in write_report(Results(run)).read_text()


def test_a_training_without_validation_is_never_cut_short(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "control": 1.6}, seeds=(0,))
    best_epoch(run, "teacher", 11)
    log = run / "teacher-abc123" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "val/" not in line))
    assert "WARNING" not in write_report(Results(run)).read_text()


def test_main_table_has_every_metric_with_its_spread_and_the_best_bold(good):
    table = section((good / "report.md").read_text(), "## Results on the test users")
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns == ["model", "seeds", *(f"HR@{k}" for k in KS), "NDCG@5", "NDCG@10", "NDCG@20", "MRR"]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.strip("|").split("|")] for row in rows}
    models = json.loads((good / "evaluate-abc123" / "evaluation.json").read_text())["models"]
    for name in ("teacher", "student", "control", "sasrec"):
        values = [model["metrics"]["all"]["HR@10"] for model in models if model["name"] == name]
        cell = cells[name][columns.index("HR@10")].strip("*")
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        assert cell == f"{np.mean(values):.4f}{spread}"
    assert cells["teacher"][columns.index("MRR")].startswith("**")
    assert not cells["sasrec"][columns.index("MRR")].startswith("**")


def test_gains_are_paired_and_by_seed(good):
    table = section((good / "report.md").read_text(), "### Gains")
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["student against control", "student against teacher", "teacher against control"]
    assert all(row.split("|")[6].count(",") == 2 for row in rows)


def test_groups_costs_and_the_papers_figures(good):
    text = (good / "report.md").read_text()
    head = np.load(good / "evaluate-abc123" / "groups.npz")["head"].sum()
    assert f"*head*: definition of head ({head} users)" in text
    assert "| student : teacher, this run | 54 % | 4 : 8 | 1.9 x | 1.9 x |" in text
    assert "| the paper | 13 % | 4 : 32 | 6.6 x | 8.0 x |" in text
    assert "Of another scale." in text


@pytest.mark.parametrize("speed", [{}, {"targets_per_second": 0.0}], ids=["older version", "counted"])
def test_a_training_without_a_known_speed_has_none(tmp_path, speed):
    run = make_run(tmp_path, {"teacher": 2.0, "student": 1.8, "control": 1.6}, seeds=(0,))
    evaluation = json.loads((run / "evaluate-abc123" / "evaluation.json").read_text())
    teacher = evaluation["models"][0]
    teacher["parameters"]["total"] = 0
    teacher["training"] = {"seconds": 21.0, "epochs": 12} | speed
    write(run / "evaluate-abc123" / "evaluation.json", evaluation)
    text = write_report(Results(run)).read_text()
    assert "| teacher | 8 | 64 | 0 | 90,000 | 12 | 21 s | - | 2,000 |" in text
    assert "| student | 4 | 64 | 140,000 | 90,000 | 12 | 21 s | 1,700 | 3,800 |" in text
    assert "| student : teacher, this run | - | 4 : 8 | - | 1.9 x |" in text


def test_protocol_data_and_command_are_there(good):
    text = (good / "report.md").read_text()
    assert "hash `0f0f0f0f0f0f`" in text
    assert "history masked" in text
    dropped = ["- Dropped, items that nobody has met: 3.", "- Dropped, k_core=5: 12 users, 4 items, 61 interactions."]
    assert "\n".join(dropped) in text, "of 7 items without interactions the filter took 4"
    assert INFO["notes"][0] in text
    assert COMMAND in text
    assert "| `student-seed2-abc123` | `cccccccccccc` |" in text
    assert "Last stage by commit `aaaaaaaaaaaa` with local changes." in text


def test_targets_that_nothing_competed_with_are_in_the_protocol(good):
    results = Results(good)
    assert "competes with" not in sections.protocol_section(results), "of a version that did not count them"
    results.evaluation["alone"] = 7
    assert f"**Nothing competes with 7 of the {USERS:,} held-out items**" in sections.protocol_section(results)


def test_every_plot_is_there_and_shown(good):
    names = {"comparison", "popularity-student-control", "validation"}
    names |= {f"losses-{name}" for name in ("teacher", "student", "control", "sasrec")}
    plots = {path.stem: path for path in (good / "plots").iterdir()}
    assert set(plots) == names
    text = (good / "report.md").read_text()
    for path in plots.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"](plots/{path.name})" in text


def test_a_group_without_a_gain_keeps_its_place():
    gains = [{"group": group, "rows": 9, "ours": 0.1, "theirs": 0.0, "relative": None} for group in GROUPS]
    gains[-1] |= {"theirs": 0.2, "relative": -0.5, "relative_low": -0.75, "relative_high": -0.25}
    results = SimpleNamespace(fits={"student": [], "control": []})
    figure, (left, right) = pyplot.subplots(1, 2)
    plots._levels(results, gains, "student", "control", left)
    plots._gain(gains, "student", "control", right)
    pyplot.close(figure)
    assert left.get_xlim() == right.get_xlim()
    assert right.get_xlim()[0] < 0, "the first group does not stand on the axis"


@pytest.mark.parametrize(
    ("users", "said"),
    [
        ((2, 2, 2, 2, 2), None),
        ((0, 2, 2, 2, 2), None),
        ((2, 2, 2, 2, 1), "Not shown: 50+ (one user, and an interval takes two)"),
        ((1, 0, 2, 2, 1), "Not shown: 0-4, 50+ (one user each, and an interval takes two)"),
    ],
)
def test_a_group_of_one_user_is_left_out_and_that_is_said(tmp_path, users, said):
    run = make_run(tmp_path, {"student": 2.0, "control": 1.6}, seeds=(0,))
    path = run / "evaluate-abc123" / "groups.npz"
    rows = np.arange(USERS)
    popularity = np.full(USERS, 2)
    user = rows.copy()
    for index, number in enumerate(users):  # two interactions of each of these users
        popularity[(rows // 10 == index) & (rows % 10 < 2 * number)] = index
        user[rows // 10 == index] = 10 * index + rows[rows // 10 == index] % 10 // 2
    np.savez(path, **dict(np.load(path)) | {"popularity": popularity, "user": user})
    (figure,) = (figure for name, figure in plots._figures(Results(run)) if name.startswith("popularity"))
    assert figure.get_supxlabel() == (said or "")


def test_a_loss_has_not_the_colour_of_a_gain():
    sides = {"gain": (0.1, 0.3), "loss": (-0.3, -0.1), "chance": (-0.1, 0.3)}
    gains = [
        {"group": name, "rows": 9, "theirs": 0.5, "relative": low + high, "relative_low": 2 * low, "relative_high": 2 * high}
        for name, (low, high) in sides.items()
    ]
    figure, axes = pyplot.subplots()
    plots._gain(gains, "student", "control", axes)
    pyplot.close(figure)
    assert [container.lines[0].get_color() for container in axes.containers] == [plots.GAIN, plots.LOSS, plots.CHANCE]


def test_a_gain_beyond_the_axis_is_said_in_words_at_its_edge():
    ends = [(0.5, 1), (3, 4)]
    gains = [{"group": "5-9", "rows": 9, "relative": at, "relative_low": low, "relative_high": 9} for low, at in ends]
    figure, axes = pyplot.subplots()
    plots._gain(gains, "student", "control", axes)
    pyplot.close(figure)
    (words,) = axes.texts
    assert (words.get_text(), words.xy) == ("▲\n+400 %", (1, axes.get_ylim()[1]))


@pytest.mark.parametrize("relative", [2.08, 9.0])
def test_so_is_one_without_bounds_and_a_dot_is_never_cut_by_the_edge(relative):
    gains = [{"group": "5-9", "rows": 9, "relative": relative, "relative_low": None, "relative_high": None}]
    gains += [{"group": "10-19", "rows": 9, "relative": 2.0, "relative_low": 1.5, "relative_high": 9.0}]
    figure, axes = pyplot.subplots()
    plots._gain(gains, "student", "control", axes)
    pyplot.close(figure)
    (words,) = axes.texts
    assert (words.get_text(), words.xy) == (f"△\n{100 * relative:+.0f} %", (0, axes.get_ylim()[1]))
    assert [line for line in axes.lines if line.get_markerfacecolor() == "white"] == []


def test_titles_and_words_stay_within_the_plot():
    gains = [{"group": group, "rows": 9, "ours": 0.0, "theirs": 0.0, "relative": None} for group in GROUPS[:3]]
    gains += [{"group": GROUPS[3], "rows": 9, "relative": -0.2, "relative_low": None, "relative_high": None}]
    gains += [{"group": GROUPS[4], "rows": 9, "relative": -0.3, "relative_low": -0.5, "relative_high": -0.1}]
    with plots._style(), plots._figure(SimpleNamespace(subject="slmrec on demo"), columns=2) as (figure, (_, right)):
        plots._gain(gains, "student", "control", right)
        figure.canvas.draw()
        width, right_end = figure.bbox.x1, right.get_tightbbox().x1
        tops, top = [text.get_window_extent().y1 for text in right.texts], right.get_window_extent().y1
    assert right_end <= width, "the title is cut"
    assert max(tops) <= top, "what is said of a group stands above the axis"


def test_a_gain_whose_interval_has_no_bounds_is_hollow_and_that_is_said():
    gains = [{"group": "5-9", "rows": 9, "relative": 2.0, "relative_low": None, "relative_high": None}]
    figure, axes = pyplot.subplots()
    plots._gain(gains, "student", "control", axes)
    pyplot.close(figure)
    assert "hollow: too few hits for one" in axes.get_title()
    assert [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"] == ["white"]


def test_one_loss_is_one_curve_and_several_say_what_they_are(good):
    figure, (one, several) = pyplot.subplots(1, 2)
    plots._losses("control", Results(good).fits["control"], one)
    plots._losses("student", Results(good).fits["student"], several)
    pyplot.close(figure)
    assert one.get_title() == "Training loss of control (moving average; first of 3 seeds strong)"
    assert "student by term (" in several.get_title()
    assert (one.get_legend() is None, several.get_legend() is None) == (True, False)
    assert one.get_ylabel() == "loss, mean over targets"
    assert several.get_ylabel() == "loss, mean over targets; terms before their weights"


def drawn(*logs: list[dict[str, float]]):
    """The losses of a model with these metrics, one list for each seed, on axes that were drawn."""
    figure, axes = pyplot.subplots()
    plots._losses("student", [SimpleNamespace(metrics=log) for log in logs], axes)
    figure.canvas.draw()
    pyplot.close(figure)
    return axes


def test_a_loss_of_one_step_is_a_dot_and_of_several_a_line():
    step = {"step": 1, "loss": 3.0, "loss/task": 2.0, "loss/feature": 1.0}
    axes = drawn([step], [step])
    assert {line.get_marker() for line in axes.lines} == {"o"}
    left, right = axes.get_xlim()
    assert [step for step in axes.get_xticks() if left < step < right] == [1], "there is no step 1.02"
    assert {line.get_marker() for line in drawn([step, step | {"step": 2}]).lines} == {""}


@pytest.mark.parametrize(("low", "high", "minor"), [(0.2, 5.0, "0.2 0.3 0.4 0.6 2 3 4"), (0.04, 900.0, "")])
def test_a_logarithmic_axis_has_plain_numbers(low, high, minor):
    axes = drawn([{"step": 1, "loss": high, "loss/task": low, "loss/feature": 1.0}])
    (bottom, top), ticks = axes.get_ylim(), axes.yaxis
    assert axes.get_yscale() == "log"
    assert "1" in [label.get_text() for label in ticks.get_ticklabels()]
    shown = zip(ticks.get_minorticklocs(), ticks.get_ticklabels(minor=True), strict=True)
    assert " ".join(label.get_text() for place, label in shown if bottom < place < top and label.get_text()) == minor


def test_the_metrics_of_all_stages_are_merged(good):
    entries = [json.loads(line) for line in (good / "metrics.jsonl").read_text().splitlines()]
    assert {(entry["stage"], entry["seed"]) for entry in entries} >= {("student", 0), ("student", 2), ("teacher", 0)}
    assert len([entry for entry in entries if entry["stage"] == "teacher"]) == 120


def test_terminal_table(good):
    lines = summary_table(Results(good)).splitlines()
    assert lines[0].split() == ["model", "layers", "parameters", "HR@10", "NDCG@10", "MRR", "users/s"]
    assert [line.split()[0] for line in lines[2:6]] == ["teacher", "student", "control", "sasrec"]
    assert max(map(len, lines[:6])) <= 100


def test_a_run_stopped_after_the_teacher(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "student": 1.8, "control": 1.6}, until="teacher")
    text = write_report(Results(run)).read_text()
    assert "**This run is not finished.** Not done: student (seed 0), student (seed 1)" in text
    assert "| teacher | 0 | 12 | 0.1100 |" in text
    assert "## Results" not in text
    assert {path.stem for path in (run / "plots").iterdir()} == {"losses-teacher", "validation"}
    assert "not done" in summary_table(Results(run))


def test_a_run_before_its_first_stage(tmp_path):
    stages = [{"name": "prepare", "seed": 0, "verb": "prepare", "folder": "prepare-abc", "fingerprint": "abc"}]
    about = {"recipe": "slmrec", "run": "default", "command": COMMAND, "data": {}, "stages": stages, "pairs": []}
    write(tmp_path / "run.json", about | {"teacher": None})
    assert "Not done: prepare" in write_report(Results(tmp_path)).read_text()


def test_models_that_no_pair_names(tmp_path):
    run = make_run(tmp_path, {"gru4rec": 1.0}, seeds=(0,))
    text = write_report(Results(run)).read_text()
    assert "gru4rec" in section(text, "## Results on the test users")
    assert "### Gains" not in text


def test_plots_of_an_earlier_state_go(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0}, seeds=(0,))
    (run / "plots").mkdir()
    (run / "plots" / "losses-student.png").write_bytes(b"old")
    write_report(Results(run))
    assert not (run / "plots" / "losses-student.png").exists()


def test_one_teacher_is_compared_with_every_seed(good):
    gain = Results(good).compare("teacher", "control")
    assert len(gain["by_seed"]) == 3
    assert gain["difference"] == pytest.approx(np.mean(gain["by_seed"]))


def test_tables_and_plots_reach_wandb(good, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = {"logger": {"kind": "wandb"}}
    loggers = make_loggers(config, tmp_path, group="slmrec/default", name="report", run_id="report-abc", settings={})
    publish(Results(good), loggers)
    finish_loggers(loggers)
    media = [path.name for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*.*")]
    assert sum(name.endswith(".png") for name in media) == len(list((good / "plots").iterdir()))
    assert sum(name.endswith(".table.json") for name in media) == 1


def test_a_control_that_never_hits_has_no_relative_gain(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.0, "student": 1.8, "control": -40.0}, seeds=(0,))
    text = write_report(Results(run)).read_text()
    assert "**student beats control in test NDCG@10**" in text
    assert "One seed only" in text


def test_command(good, capsys):
    assert report.main([f"run={good}"]) == 0
    assert f"Report: {good / 'report.md'}" in capsys.readouterr().out
    assert report.main(["--help"]) == 0
    assert "usage: python -m lit_llmers.report run=DIR" in capsys.readouterr().out
    for arguments, message in (
        ([], "No run given"),
        (["rnu=x"], "Did you mean 'run'"),
        ([f"run={good}/x"], "no run in"),
    ):
        assert report.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="no run in"):
        Results(good / "nowhere")


def test_stages_name_their_device_where_several_machines_took_part(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.2, "student": 2.0, "control": 1.6, "sasrec": 1.2})

    def table() -> str:
        return section(write_report(Results(run)).read_text(), "## To do it again")

    assert "| device |" not in table()
    for name, device in (("teacher", "NVIDIA H100"), ("evaluate", "AMD EPYC, 2 cores")):
        for done in run.glob(f"{name}*/DONE"):
            done.write_text(json.dumps(json.loads(done.read_text()) | {"device": device}))
    (of_teacher,) = [line for line in table().splitlines() if line.startswith("| teacher |")]
    assert "| device |" in table()
    assert of_teacher.endswith("| NVIDIA H100 |")


def test_who_has_no_vector_and_how_fast_texts_were_read(tmp_path):
    run = make_run(tmp_path, {"teacher": 2.2, "student": 2.0, "control": 1.6})
    assert "## Text" not in write_report(Results(run)).read_text()
    about = json.loads((run / "run.json").read_text())
    tables = {"items": 98, "without_text": 44, "users": 1200, "users_without_vector": 7}
    read = {"model": "minilm", "texts": 54, "tokens": 5400, "tokens_per_second": 1350.4}
    titles = {"generated_titles": 1200, "said_is_a_title": 0.973, "tokens_per_second": 350.0}
    for name, verb, summary in (
        ("text", "encode", tables | read),
        ("again", "encode", tables | read | {"tokens": 0, "texts": 0, "tokens_per_second": 0.0}),
        ("words", "encode", {"items": 98, "without_text": 0}),
        ("lists", "record", titles | {"prompt_tokens_per_second": 2000.0}),
        ("older", "record", titles),
        ("waits", "encode", None),
    ):
        about["stages"].append({"name": name, "seed": 0, "verb": verb, "folder": f"{name}-abc123", "fingerprint": "abc123"})
        if summary is not None:
            (run / f"{name}-abc123").mkdir()
            write(run / f"{name}-abc123" / "DONE", {"seconds": 1.0, "summary": summary, "device": "NVIDIA H100"})
    write(run / "run.json", about)
    lines = section(write_report(Results(run)).read_text(), "## Text").splitlines()
    assert [line for line in lines if "H100" in line] == [
        "| text | 0 | minilm | 98 | 44 | 1,200 | 7 | 54 | 5,400 | 1,350 | NVIDIA H100 |",
        "| again | 0 | minilm | 98 | 44 | 1,200 | 7 | - | - | - | NVIDIA H100 |",
        "| words | 0 | TF-IDF | 98 | 0 | - | - | - | - | - | NVIDIA H100 |",
        "| lists | 0 | 1,200 | 97 % | 2,000 | 350 | NVIDIA H100 |",
        "| older | 0 | 1,200 | 97 % | - | 350 | NVIDIA H100 |",
    ]


def test_the_command_waits_for_a_run_that_writes_its_own_report(good, capsys, monkeypatch):
    monkeypatch.setattr(report, "PATIENCE", 0)
    with alone(good, deep=False), atomic_write(good / "report.md") as temporary:
        temporary.write_text("half")
        assert report.main([f"run={good}"]) == 2
        assert "Another process is working in" in capsys.readouterr().err
        assert temporary.read_text() == "half"
        temporary.write_text("whole")
    assert (good / "report.md").read_text() == "whole"
