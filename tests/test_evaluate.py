"""The evaluation of a run, worked out again with plain loops."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import arguments, by_name, dataset, small

from lit_llmers import candidates as stored
from lit_llmers import evaluate, fit
from lit_llmers.backbones.popularity import Popularity
from lit_llmers.conf.schema import EvaluationConfig
from lit_llmers.conf.stages import EvaluateStage
from lit_llmers.data import GeneratorConfig
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.data.sources.demo import Demo
from lit_llmers.errors import UserError
from lit_llmers.files import read_json
from lit_llmers.metrics import ranking_metrics
from lit_llmers.models import load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.students.counting import CountingRecommender

KS = (1, 5, 10, 20)
CATALOGUE = """\
# A catalogue large enough for 999 candidates.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  first: {fit: sasrec, model: {dim: 8}}
  second: {fit: gru4rec, model: {dim: 8}}
  evaluate: {evaluate: test, of: [first, second]}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    planned = small(tmp_path_factory.mktemp("whole"), "trainer.max_epochs=1", "seeds=[0,1]")
    run(planned, "evaluate")
    return planned


def stages_of(whole, *overrides: str):
    return by_name(small(whole[0].run.folder.parents[1], "trainer.max_epochs=1", "seeds=[0,1]", *overrides))


def read(stage) -> dict:
    return json.loads((stage.folder / "evaluation.json").read_text())


def ranks_of(stage, model: dict) -> np.ndarray:
    return np.load(stage.folder / model["ranks"], allow_pickle=False)


def plain_scores(fitted, data: Dataset, user: int) -> tuple[np.ndarray, int, set[int]]:
    """Scores of the whole catalogue for one user, the test item and the items before it."""
    own = data.items[data.offsets[user] : data.offsets[user + 1]].astype(np.int64)
    model = load_model(fitted, data)
    items = torch.from_numpy(own[:-1][-fitted.config.sequences.max_length :])[None]
    with torch.no_grad():
        scores = (model.backbone.head(model.backbone(items, items > 0)[-1][0, -1]) @ model.item_table().T).double().numpy()
    return scores, int(own[-1]), set(own[:-1].tolist()) - {int(own[-1])}


def plain_rank(scores: np.ndarray, target: int, others: list[int]) -> float:
    above = sum(scores[item] > scores[target] for item in others)
    return above + 0.5 * sum(scores[item] == scores[target] for item in others)


def of_ranks(figures: dict) -> dict[str, float]:
    """What is worked out from ranks alone."""
    return {name: value for name, value in figures.items() if name not in ("users", "interactions") and "coverage" not in name}


def plain_metrics(ranks: list[float]) -> dict[str, float]:
    out = {}
    for k in KS:
        out[f"HR@{k}"] = sum(rank < k for rank in ranks) / len(ranks)
        out[f"NDCG@{k}"] = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) / len(ranks)
    return out | {"MRR": sum(1 / (rank + 1) for rank in ranks) / len(ranks)}


@pytest.mark.parametrize("name", ["teacher", "student", "item_embeddings"])
def test_ranks_and_metrics_equal_plain_loops(whole, name):
    stage = next(stage for stage in whole if stage.name == "evaluate")
    fitted = next(stage for stage in whole if stage.name == name)
    data = load_dataset(stage)
    entry = next(model for model in read(stage)["models"] if (model["name"], model["seed"]) == (name, fitted.seed))
    ranks = ranks_of(stage, entry)
    rows = EvaluationRows(data, "test", 8)
    assert len(ranks) == data.n_users == 150
    expected = []
    for row in range(0, 150, 3):
        scores, target, seen = plain_scores(fitted, data, int(rows.user[row]))
        others = [item for item in range(1, data.n_items + 1) if item != target and item not in seen]
        expected.append(plain_rank(scores, target, others))
    assert ranks[::3].tolist() == expected
    assert len(set(expected)) > 10
    figures = entry["metrics"]["all"]
    assert figures["users"] == figures["interactions"] == 150
    assert of_ranks(figures) == pytest.approx(plain_metrics(ranks.tolist()))


def test_coverage_equals_plain_loops(whole):
    """Of all rows and of each group."""
    stage = next(stage for stage in whole if stage.name == "evaluate")
    fitted, data = next(stage for stage in whole if stage.name == "item_embeddings"), load_dataset(stage)
    figures = next(model for model in read(stage)["models"] if model["name"] == fitted.name)["metrics"]
    with np.load(stage.folder / "groups.npz") as file:
        head, short = file["head"], file["short"]
    groups = {"all": head | ~head, "head": head, "tail": ~head, "short": short, "long": ~short}
    shown = {name: np.zeros((len(KS), data.n_items + 1), bool) for name in groups}
    for user in range(150):
        scores, _, _ = plain_scores(fitted, data, user)
        scores[[0, *data.items[data.offsets[user] : data.offsets[user + 1] - 1]]] = -math.inf
        best = np.argsort(-scores)
        for name, inside in groups.items():
            for line, k in zip(shown[name], KS, strict=True):
                line[best[: k * inside[user]]] = True
    for name, lines in shown.items():
        for line, k in zip(lines, KS, strict=True):
            own = figures[name][f"coverage@{k}"]
            assert own == pytest.approx(line.sum() / data.n_items, abs=0.011), f"{name}: one item apart by rounding"
    assert len({figures[name]["coverage@10"] for name in groups}) > 2


@pytest.mark.parametrize("target", [1, 5])
def test_a_list_does_not_depend_on_the_held_out_item(target):
    data = dataset([[1, 1, 2, 3, target]], n_items=5)
    model, config = CountingRecommender(Popularity(5, data.training_pairs)), EvaluateStage("test", ["model"])
    rows = EvaluationRows(data, "test", 5)
    assert evaluate.coverage(model, rows, config, {"all": np.ones(len(rows), bool)})["all"]["coverage@10"] == pytest.approx(
        2 / 5
    )


def test_every_model_and_seed_is_there_with_its_size_and_speed(whole):
    stage = next(stage for stage in whole if stage.name == "evaluate")
    result = read(stage)
    found = [(model["name"], model["seed"]) for model in result["models"]]
    assert found == [("teacher", 0), ("student", 0), ("student", 1), ("control", 0), ("control", 1), ("item_embeddings", 0)]
    for model in result["models"]:
        fitted = next(s for s in whole if (s.name, s.seed) == (model["name"], model["seed"]))
        assert model["parameters"]["total"] == fitted.summary["parameters"]["total"]
        assert model["parameters"]["layers"] == {"teacher": 4, "student": 2, "control": 2, "item_embeddings": 2}[fitted.name]
        assert model["training"]["seconds"] == fitted.summary["train_seconds"] > 0
        assert model["inference"]["users_per_second"] == pytest.approx(150 / model["inference"]["seconds"])
    best = max(result["models"], key=lambda model: model["metrics"]["all"]["NDCG@10"])
    assert stage.summary == {"models": 6, "best": best["name"], "NDCG@10": best["metrics"]["all"]["NDCG@10"]}
    data = load_dataset(stage)
    assert result["alone"] == 0
    assert result["protocol"] == {
        "name": "full",
        "history": "masked",
        "split": "leave-one-out",
        "split_hash": data.fingerprint,
        "users": 150,
        "sample": None,
        "items": data.n_items,
        "interactions": 150,
        "candidates": None,
    }


def test_groups_partition_the_test_users_and_have_their_own_metrics(whole):
    stage = next(stage for stage in whole if stage.name == "evaluate")
    data = load_dataset(stage)
    with np.load(stage.folder / "groups.npz", allow_pickle=False) as arrays:
        groups = dict(arrays)
    entry = read(stage)["models"][0]
    ranks = ranks_of(stage, entry)
    members = {"head": groups["head"], "tail": ~groups["head"], "short": groups["short"], "long": ~groups["short"]}
    for one, other in (("head", "tail"), ("short", "long")):
        assert entry["metrics"][one]["users"] + entry["metrics"][other]["users"] == 150
        assert min(entry["metrics"][one]["users"], entry["metrics"][other]["users"]) > 10
    for name, inside in members.items():
        figures = entry["metrics"][name]
        assert figures["users"] == inside.sum()
        assert of_ranks(figures) == pytest.approx(plain_metrics(ranks[inside].tolist()))
    count = np.zeros(data.n_items + 1, int)
    for item, part in zip(data.items, data.split, strict=True):
        count[item] += part == TRAIN
    targets = data.items[data.split == TEST]
    bounds = [0, 5, 10, 20, 50, 100, 200, 500, math.inf]
    for number, (low, high) in enumerate(pairwise(bounds)):
        inside = (count[targets] >= low) & (count[targets] < high)
        figures = entry["popularity"][number]
        assert figures["group"] == (f"{low}-{high - 1}" if high < math.inf else f"{low}+")
        assert figures["users"] == inside.sum()
        assert ((groups["popularity"] == number) == inside).all()
        if inside.any():
            assert figures["MRR"] == pytest.approx(plain_metrics(ranks[inside].tolist())["MRR"])


def test_head_and_short_worked_out_by_hand():
    train = [[1, 1, 1, 1, 2], [1, 2, 3], [2, 4]]
    data = dataset([[*history, 6, target] for history, target in zip(train, [1, 2, 4], strict=True)], n_items=10)
    groups = evaluate.row_groups(data, EvaluationRows(data, "test", 3))
    assert groups["head"].tolist() == [True, True, False], "2 of 10 items: 1 and 2, by training counts alone"
    assert groups["short"].tolist() == [False, True, True], "histories of 6, 4 and 3, of which 4 is the median"
    assert groups["popularity"].tolist() == [1, 0, 0], "item 1 occurs five times in training"


def test_targets_that_nothing_competes_with_are_counted(tmp_path):
    """Of four items: met all others, met them twice over, a target met before beside all others, lacks one, repeats one."""
    data = dataset([[1, 2, 3, 4], [1, 1, 2, 3, 2, 4], [4, 1, 2, 3, 4], [1, 2, 4], [1, 1, 2, 2, 3]], n_items=4)
    rows = EvaluationRows(data, "test", 2)
    assert evaluate.without_competitor(rows).tolist() == [True, True, True, False, False]
    model, config = CountingRecommender(Popularity(4, data.training_pairs)), EvaluateStage("test", ["model"])
    ranks = evaluate.rank_all(model, rows, config, None)[0]
    assert evaluate._alone(config, rows) == 3
    assert (ranks[:3] == 0).all()
    kept = EvaluateStage("test", ["model"], EvaluationConfig(mask_history=False))
    assert evaluate._alone(kept, rows) == 0
    with pytest.raises(UserError, match=r"Nothing competes with any of the 1 test items.*mask_history=false"):
        evaluate._alone(config, EvaluationRows(dataset([[1, 2, 3, 4]], n_items=4), "test", 2))


def test_a_run_in_which_no_target_has_a_competitor_ends_before_anything_is_trained(tmp_path):
    ids = list("abcd")
    pairs = [(f"u{user}", item, place) for user in range(4) for place, item in enumerate(ids[user:] + ids[:user])]
    pd.DataFrame(pairs, columns=["user_id", "item_id", "timestamp"]).to_parquet(tmp_path / "interactions.parquet")
    pd.DataFrame({"item_id": ids, "title": ids}).to_parquet(tmp_path / "items.parquet")
    planned = small(tmp_path / "runs", "data=local", f"data.path={tmp_path}", recipe="student")
    with pytest.raises(UserError, match=r"Nothing competes with any of the 4 test items: .* all other 3 items"):
        run(planned, None)
    assert [stage.verb for stage in planned if stage.folder.exists()] == ["prepare"]


def test_the_batch_size_changes_nothing(whole):
    planned = stages_of(whole, "evaluation.batch_size=7")
    ours, theirs = planned["evaluate"], next(stage for stage in whole if stage.name == "evaluate")
    assert ours.folder == theirs.folder
    ours.run = replace(ours.run, folder=ours.run.folder / "again")
    ours.folder.mkdir(parents=True)
    evaluate.run(ours)
    for one, other in zip(read(ours)["models"], read(theirs)["models"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert (ranks_of(ours, one) == ranks_of(theirs, other)).all()


def test_the_figures_of_one_model_at_batch_sizes_of_1_7_and_64(whole):
    config = next(stage for stage in whole if stage.name == "evaluate").config
    fitted = next(stage for stage in whole if stage.name == "item_embeddings")
    data = load_dataset(next(stage for stage in whole if stage.name == "teacher"))
    rows, model = EvaluationRows(data, "test", 8), load_model(fitted, data)
    found, some = [], {"all": np.ones(len(rows), bool), "few": np.arange(len(rows)) % 9 == 0, "none": np.zeros(len(rows), bool)}
    for size in (1, 7, 64, 1000):
        settings = type(config)("test", ["model"], type(config.evaluation)(batch_size=size))
        found.append((evaluate.rank_all(model, rows, settings, None)[0], evaluate.coverage(model, rows, settings, some)))
    for ranks, shown in found[1:]:
        assert (ranks == found[0][0]).all()
        assert shown == found[0][1]
    assert shown.keys() == {"all", "few"}, "a group of nobody is shown nothing"


def test_batches_larger_than_the_data_train_and_evaluate(tmp_path):
    (tmp_path / "mine.yaml").write_text(CATALOGUE)
    settings = ["trainer.batch_size=100000", "evaluation.batch_size=100000", "trainer.max_epochs=2"]
    planned = by_name(small(tmp_path, *settings, recipe=str(tmp_path / "mine.yaml")))
    run(list(planned.values()), "evaluate")
    assert planned["first"].summary["epochs"] == 2
    assert {model["metrics"]["all"]["interactions"] for model in read(planned["evaluate"])["models"]} == {150}


def test_without_mask_the_history_competes(whole):
    stage, config = whole[0], next(stage for stage in whole if stage.name == "evaluate").config
    data = load_dataset(next(stage for stage in whole if stage.name == "teacher"))
    fitted = next(stage for stage in whole if stage.name == "item_embeddings")
    rows = EvaluationRows(data, "test", 8)
    model = load_model(fitted, data)
    settings = type(config.evaluation)(mask_history=False)
    free, _ = evaluate.rank_all(model, rows, type(config)("test", ["model"], settings), None)
    masked, _ = evaluate.rank_all(model, rows, config, None)
    assert (free >= masked).all()
    assert (free > masked).any()
    for row in range(0, 150, 10):
        scores, target, _ = plain_scores(fitted, data, int(rows.user[row]))
        assert free[row] == plain_rank(scores, target, [i for i in range(1, data.n_items + 1) if i != target])
    assert stage.name == "prepare"


def test_a_sample_of_users_has_their_ranks_and_is_named(whole, tmp_path, monkeypatch):
    stage = next(stage for stage in whole if stage.name == "evaluate")
    asked = replace(
        stage,
        config=replace(stage.config, evaluation=replace(stage.config.evaluation, users=40)),
        run=replace(stage.run, folder=tmp_path),
    )
    asked.folder.mkdir()
    evaluate.run(asked)
    found, groups = read(asked), np.load(asked.folder / "groups.npz")
    assert (found["protocol"]["users"], found["protocol"]["sample"], found["protocol"]["interactions"]) == (150, 40, 40)
    assert len(np.unique(groups["user"])) == 40
    for own, every in zip(found["models"], read(stage)["models"], strict=True):
        assert ranks_of(asked, own).tolist() == ranks_of(stage, every)[groups["user"]].tolist()
        assert own["metrics"]["all"]["users"] == 40


def test_a_sample_is_a_number_and_not_beside_the_users_of_a_file():
    with pytest.raises(UserError, match=r"evaluation\.users is 1\. Models are compared on 2 or more"):
        EvaluationConfig(users=1)
    with pytest.raises(UserError, match=r"evaluation\.candidates excludes evaluation\.users=5"):
        EvaluationConfig(users=5, candidates="mine.npy")


@pytest.mark.parametrize(("users", "sample"), [(None, None), (2, 2), (3, None), (9, None)])
def test_who_is_told_to_be_ranked_has_a_test_item_and_a_sample_is_smaller_than_all(users, sample):
    """Of four users one has nothing held out."""
    data = dataset([[1, 2, 3]] * 4, split=[[TRAIN, VALID, TEST]] * 3 + [[TRAIN, TRAIN, VALID]])
    stage = SimpleNamespace(config=EvaluateStage("test", ["model"], EvaluationConfig(users=users)))
    protocol = evaluate._protocol(stage, EvaluationRows(data, "test", 2, users), None)
    assert (protocol["users"], protocol["sample"], protocol["interactions"]) == (3, sample, sample or 3)


@pytest.mark.parametrize("listing", [False, True], ids=["while it ranks", "while it lists"])
def test_a_stopped_evaluation_goes_on_with_the_batch_at_hand(whole, listing, monkeypatch):
    planned = stages_of(whole, "evaluation.batch_size=11", f"evaluation.cutoffs=[10,{20 + listing}]")
    stage, expected = planned["evaluate"], read(by_name(whole)["evaluate"])["models"]
    rank_all, calls, batches = evaluate.rank_all, [], []

    def counted(*args):
        calls.append(args)
        batches.clear()
        return rank_all(*args)

    def stop_in_the_third() -> None:
        batches.append(None)
        if len(calls) == 3 and len(batches) == (20 if listing else 6):  # of 14 to rank, and as many to list
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "rank_all", counted)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "stop_if_asked", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(list(planned.values()), "evaluate")
    ranked, begun = read(stage)["models"], stage.folder / f"begun-{expected[2]['name']}-seed{expected[2]['seed']}.npz"
    assert len(ranked) == 2
    with np.load(begun) as earlier:
        found = earlier["ranks"]
        assert np.isnan(found).sum() == (0 if listing else 150 - 5 * 11)
    np.savez(begun, ranks=found, seconds=1000.0)
    run(list(planned.values()), "evaluate")
    models = read(stage)["models"]
    assert len(calls) == 7, "two, the one that was stopped, and four more"
    assert models[:2] == ranked, "the seconds that they took among them"
    assert 1000 < models[2]["inference"]["seconds"] < 1100
    assert not list(stage.folder.glob("begun-*"))
    assert [(model["name"], model["seed"]) for model in models] == [(model["name"], model["seed"]) for model in expected]
    for ours, theirs in zip(models, expected, strict=True):
        np.testing.assert_array_equal(ranks_of(stage, ours), ranks_of(by_name(whole)["evaluate"], theirs))


def test_a_trainer_on_the_cpu_keeps_the_evaluation_there(whole, monkeypatch):
    placed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evaluate.Recommender, "to", lambda model, device: placed.append(device) or model)
    (again := replace(by_name(whole)["evaluate"].run, folder=whole[0].run.folder / "placed")).folder.mkdir()
    stage = replace(by_name(whole)["evaluate"], run=again)
    stage.folder.mkdir()
    for accelerator, device in (("cpu", "cpu"), ("auto", "cuda:0")):
        fitted = by_name(whole)["item_embeddings"]
        settings = replace(fitted.config, trainer=replace(fitted.config.trainer, accelerator=accelerator))
        monkeypatch.setattr(fitted, "config", settings)
        data = load_dataset(stage)
        evaluate._evaluate(fitted, stage, data, None, evaluate.row_groups(data, EvaluationRows(data, "test", 1)))
        assert placed.pop() == torch.device(device)


# ---- several held-out interactions for a user ------------------------------------------------------------------------


def test_a_temporal_split_from_data_to_report(tmp_path):
    tables = Demo(GeneratorConfig(users=150, items=100, longest=20)).load()
    start = tables.interactions["user_id"].rank(method="dense").to_numpy()  # users come one after the other, and overlap
    times = 1_000_000_000 + 100 * start + 500 * tables.interactions["time"].to_numpy()
    tables.interactions.assign(timestamp=times).drop(columns="time").to_parquet(tmp_path / "interactions.parquet")
    tables.items.to_parquet(tmp_path / "items.parquet")
    (tmp_path / "mine.yaml").write_text(CATALOGUE)
    settings = ["data=local", f"data.path={tmp_path}", "data.split=temporal", "trainer.max_epochs=1"]
    planned = by_name(small(tmp_path / "runs", *settings, recipe=str(tmp_path / "mine.yaml")))
    run(list(planned.values()), "evaluate")
    stage = planned["evaluate"]
    data, figures = load_dataset(stage), read(stage)["models"][0]["metrics"]["all"]
    moment = np.sort(times)[int(0.8 * len(times))]
    trained = tables.interactions[times < moment]
    assert (data.split == TRAIN).sum() == len(trained)
    assert set(data.users) == set(trained["user_id"])
    assert set(data.catalogue["item_id"]) == set(trained["item_id"])
    rows, ranks = EvaluationRows(data, "test", 8), ranks_of(stage, read(stage)["models"][0])
    assert figures["interactions"] == len(rows) > figures["users"] == len(set(rows.user))
    assert of_ranks(figures) == pytest.approx(
        plain_metrics(ranks.tolist())
        | {f"Recall@{k}": np.mean([(ranks[rows.user == u] < k).mean() for u in set(rows.user)]) for k in KS}
    )


def test_cut_offs_can_be_chosen_and_leave_the_trained_models_as_they_are(whole):
    planned = stages_of(whole, "evaluation.cutoffs=[50,10,500]")
    before = next(stage for stage in whole if stage.name == "evaluate")
    assert {stage.verb for stage in planned.values() if not stage.done} <= {"evaluate", "export"}
    run(list(planned.values()), "evaluate")
    stage = planned["evaluate"]
    assert read(stage)["ks"] == [10, 50, 500]
    for ours, theirs in zip(read(stage)["models"], read(before)["models"], strict=True):
        ranks, figures = ranks_of(stage, ours), ours["metrics"]["all"]
        assert (ranks == ranks_of(before, theirs)).all()
        assert figures["HR@10"] == theirs["metrics"]["all"]["HR@10"]
        assert figures["HR@50"] == pytest.approx((ranks < 50).mean())
        assert figures["HR@500"] == 1, "there are 100 items"
        assert figures["coverage@500"] == 1
        assert "HR@20" not in figures


@pytest.mark.parametrize("given", ["[5,20]", "[0,10]", "[]"])
def test_cut_offs_have_the_one_that_models_are_compared_by(whole, given):
    with pytest.raises(UserError, match="evaluation.cutoffs is .* with 10, by which models are compared"):
        stages_of(whole, f"evaluation.cutoffs={given}")


def test_a_seed_of_candidates_that_none_can_be_drawn_with():
    with pytest.raises(UserError, match=r"evaluation\.candidate_seed is -1\. It must be at least 0"):
        EvaluationConfig(candidate_seed=-1)


# ---- sampled candidates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "mine.yaml").write_text(CATALOGUE)
    planned = sampled_stages(folder)
    run(planned, None)
    return folder, by_name(planned)


def sampled_stages(folder, *overrides: str):
    settings = ["data.generator.items=1500", "data.generator.users=300", "trainer.max_epochs=1", *overrides]
    return small(folder, "evaluation.protocol=sampled-999", *settings, recipe=str(folder / "mine.yaml"))


def test_candidates_are_stored_with_a_hash_that_is_in_the_result(sampled):
    stage = sampled[1]["evaluate"]
    path = stage.folder / "candidates.npy"
    protocol = read(stage)["protocol"]
    assert protocol["name"] == "sampled-999"
    assert protocol["candidates"] == hashlib.sha256(path.read_bytes()).hexdigest()
    candidates, data = np.load(path, allow_pickle=False), load_dataset(stage)
    rows = EvaluationRows(data, "test", 8)
    assert candidates.shape == (300, 999)
    for row in range(300):
        own = data.items[data.offsets[rows.user[row]] : data.offsets[rows.user[row] + 1]]
        assert not set(own.tolist()) & set(candidates[row].tolist())


@pytest.mark.parametrize("name", ["first", "second"])
def test_ranks_among_the_candidates_equal_plain_loops(sampled, name):
    stage, fitted = sampled[1]["evaluate"], sampled[1][name]
    data = load_dataset(stage)
    candidates = np.load(stage.folder / "candidates.npy", allow_pickle=False)
    entry = next(model for model in read(stage)["models"] if model["name"] == name)
    ranks = ranks_of(stage, entry)
    for row in range(0, 300, 20):
        scores, target, _ = plain_scores(fitted, data, row)
        close = np.abs(scores[candidates[row]] - scores[target]).min() < 1e-7  # rounding may decide
        if not close:
            assert ranks[row] == plain_rank(scores, target, candidates[row].tolist())
    figures = of_ranks(entry["metrics"]["all"])
    assert figures == pytest.approx(ranking_metrics(torch.from_numpy(ranks), KS))
    assert figures == pytest.approx(plain_metrics(ranks.tolist()))
    assert "coverage@10" not in entry["metrics"]["all"], "there is no list of the whole catalogue"


def test_candidates_are_drawn_by_their_seed_alone(sampled):
    folder, planned = sampled

    def hash_of(*overrides: str) -> str:
        stages = sampled_stages(folder, *overrides)
        run(stages, None)
        return read(by_name(stages)["evaluate"])["protocol"]["candidates"]

    first = read(planned["evaluate"])["protocol"]["candidates"]
    assert hash_of("evaluation.cutoffs=[10,11]") == first
    assert hash_of("evaluation.candidate_seed=1") != first


def test_a_kill_between_candidates_and_their_hash_is_mended(sampled, monkeypatch):
    folder, _ = sampled
    stages = sampled_stages(folder, "evaluation.cutoffs=[10,12]")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stored, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(stages, None)
    run(stages, None)
    assert by_name(stages)["evaluate"].done


def test_altered_candidates_are_refused(sampled):
    folder, planned = sampled
    stages = sampled_stages(folder, "evaluation.cutoffs=[10,13]")
    ours = by_name(stages)["evaluate"].folder
    ours.mkdir()
    for name in ("candidates.npy", "candidates.npy.json"):
        shutil.copy(planned["evaluate"].folder / name, ours)
    content = bytearray((ours / "candidates.npy").read_bytes())
    content[-1] ^= 1
    (ours / "candidates.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"candidates\.npy .*altered.*Remove it"):
        run(stages, None)
    assert not (ours / "evaluation.json").exists()
    (ours / "candidates.npy").unlink()  # as the message says
    run(stages, None)
    assert read(by_name(stages)["evaluate"])["protocol"]["candidates"] == read(planned["evaluate"])["protocol"]["candidates"]


def test_too_small_a_catalogue_for_the_protocol(whole):
    planned = stages_of(whole, "evaluation.protocol=sampled-999")
    with pytest.raises(UserError, match=r"sampled-999 needs 999 items.* user 'U\d+' .*Use evaluation.protocol=full"):
        run(list(planned.values()), "evaluate")


@pytest.mark.parametrize("given", ["protocol=sampled-999", "candidates=FILE"])
def test_candidates_that_cannot_be_are_refused_before_anything_is_trained(whole, tmp_path, given):
    """Be they too many for the catalogue, or of another split."""
    data = load_dataset(whole[-1])
    stored.save_candidates(tmp_path / "c.npy", np.ones((data.n_users, 2), np.int32), "another split")
    planned = small(tmp_path, "evaluation." + given.replace("FILE", str(tmp_path / "c.npy")))
    with pytest.raises(UserError, match="sampled-999 needs 999 items|c.npy holds candidates for the split another split"):
        run(planned, None)
    assert [stage.verb for stage in planned if stage.folder.exists()] == ["prepare"]


def test_the_users_own_file_of_candidates(sampled):
    folder, planned = sampled
    theirs = planned["evaluate"]
    stages = sampled_stages(folder, "evaluation.protocol=full", f"evaluation.candidates={theirs.folder / 'candidates.npy'}")
    run(stages, None)
    ours = by_name(stages)["evaluate"]
    assert ours.folder != theirs.folder
    for one, other in zip(read(ours)["models"], read(theirs)["models"], strict=True):
        assert (ranks_of(ours, one) == ranks_of(theirs, other)).all()
    protocol = read(ours)["protocol"]
    assert (protocol["name"], protocol["history"]) == ("candidates.npy", "as in the file")
    assert protocol["candidates"] == read(theirs)["protocol"]["candidates"]


def test_a_file_that_is_not_there_or_another_protocol_beside_it(sampled):
    with pytest.raises(UserError, match="There is no file nowhere.npy. Set evaluation.candidates"):
        sampled_stages(sampled[0], "evaluation.protocol=full", "evaluation.candidates=nowhere.npy")
    with pytest.raises(UserError, match="evaluation.candidates excludes evaluation.protocol=sampled-999"):
        sampled_stages(sampled[0], "evaluation.candidates=nowhere.npy")
    with pytest.raises(UserError, match="It must be an npy or a parquet file"):
        sampled_stages(sampled[0], "evaluation.protocol=full", "evaluation.candidates=some.csv")


@pytest.mark.parametrize("protocol", ["sampled", "sampled-0", "sampled-x", "sampled-99 "])
def test_protocols_have_a_number(sampled, protocol):
    with pytest.raises(UserError, match="Unknown evaluation protocol .* There is: full, and sampled-N with a number"):
        sampled_stages(sampled[0], f"evaluation.protocol={protocol!r}")


def test_a_sampled_protocol_of_any_number(sampled):
    stages = sampled_stages(sampled[0], "evaluation.protocol=sampled-20")
    run(stages, None)
    stage = by_name(stages)["evaluate"]
    assert np.load(stage.folder / "candidates.npy").shape == (300, 20)
    assert read(stage)["protocol"]["name"] == "sampled-20"


@pytest.mark.parametrize("student", ["sasrec", "bpr-mf"])
def test_selection_on_test_is_asked_for_by_name_and_said_first(tmp_path, student):
    given = [f"student={student}", "~stages.export"]
    switch = "evaluation.official_select_on_test=true"
    assert by_name(small(tmp_path, *given, recipe="student"))["student"].config.official_select_on_test is False
    assert fit.main(["recipe=student", *arguments(tmp_path, *given, switch, recipe="student")]) == 0
    stages = by_name(small(tmp_path, *given, switch, recipe="student"))
    (model,) = read_json(stages["evaluate"].folder / "evaluation.json")["models"]
    assert model["metrics"]["all"]["NDCG@10"] == pytest.approx(stages["student"].summary["best"]["val/NDCG@10"], abs=1e-6)
    report = (stages["student"].run.folder / "report.md").read_text()
    assert report.index("WARNING: epochs were chosen on the test items") < report.index("## Results")
    assert "the test part selects nothing" not in report
