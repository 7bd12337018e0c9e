"""What stages left, read back: items without a vector, and models without those that they started from."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import assert_equal_weights, by_name, small

from lit_llmers import export
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.export import load_exported
from lit_llmers.files import read_json, sha256, write_json
from lit_llmers.models import build_model, load_dataset, load_item_table, load_model, load_weights
from lit_llmers.running import run
from lit_llmers.stages import TABLE, USER_TABLE, Stage
from lit_llmers.students.sequential import SequentialRecommender

RECIPE = """\
# For tests.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text: {encode: tfidf, dim: 12, users: mean}
  other: {encode: tfidf, dim: 6}
  plain: {fit: bpr_mf, model: {dim: 8}, loss: {kind: bpr, negatives: 1}}
  started: {like: plain, initial: {items: text, reduce: REDUCE, std: 0.3}}
  reader: {fit: alpharec, items: [text, other], loss: {kind: bpr, negatives: 1}}
  aligned: {like: plain, callbacks: [{alignment: {from: text}}]}
  beside: {like: plain, callbacks: [{alignment: {from: text, users: text}}]}
  masked: {like: plain, fit: lightgcn, callbacks: [{masked_reconstruction: {from: text}}]}
  hinted: {fit: sasrec, model: {dim: 8}, callbacks: [{embedding_distillation: {from: text}}]}
  near: {fit: sasrec, model: {dim: 8}, callbacks: [{self_distillation: {from: text}}]}
  fused: {fit: sasrec, model: {dim: 8}, fusion: [{frozen_adapter: {from: text}}]}
"""


def planned(folder, reduce: str = "pca", more: str = "") -> dict[str, Stage]:
    """A recipe whose encode stages are done."""
    (folder / "mine.yaml").write_text(RECIPE.replace("REDUCE", reduce) + more)
    stages = small(folder, recipe=str(folder / "mine.yaml"))
    run(stages, "other")
    return by_name(stages)


def leave(stage: Stage, file: str, table: np.ndarray) -> None:
    """Let a stage have left this table, and no checksum of it, as an older version did."""
    np.save(stage.folder / file, table)
    done = read_json(stage.folder / "DONE")
    done.pop("sha256", None)
    write_json(stage.folder / "DONE", done)


def silence(stage: Stage, items: np.ndarray | slice) -> np.ndarray:
    """Let an encode stage have found no text for these items; its table."""
    table = np.load(stage.folder / TABLE)
    table[items] = 0
    leave(stage, TABLE, table)
    return table


@pytest.mark.parametrize("reduce", ["pca", "variance"])
def test_what_has_no_vector_keeps_its_random_start_and_counts_nowhere(reduce, tmp_path):
    stages = planned(tmp_path, reduce)
    data = load_dataset(stages["plain"])
    silent = np.argsort(-data.popularity(), kind="stable")[:40]  # they are in most histories
    silence(stages["text"], silent)
    tables = []
    for name in ("plain", "started"):
        torch.manual_seed(0)
        tables.append([table.detach() for table in build_model(stages[name], data).backbone()])
    (users, items), (started_users, started) = tables
    told = np.setdiff1d(np.arange(1, data.n_items + 1), silent)
    assert torch.equal(started[silent], items[silent])
    assert not torch.isclose(started[told], items[told]).all(1).any()
    assert started[told].std(correction=0).item() == pytest.approx(0.3, rel=1e-5)
    user, item = data.training_pairs[np.isin(data.training_pairs[:, 1], told)].T
    assert 0 < len(set(user)) < data.n_users
    for number in range(data.n_users):
        met = item[user == number]
        torch.testing.assert_close(started_users[number], started[met].mean(0) if len(met) else users[number])


def test_tables_side_by_side_are_of_one_size_whoever_has_no_text(tmp_path):
    stages = planned(tmp_path)
    silence(stages["other"], slice(1, 90))
    table = load_item_table(stages["reader"], load_dataset(stages["reader"]))
    first, second = table[1:, :12], table[90:, 12:]
    assert not table[1:90, 12:].any()
    assert second.square().mean().item() == pytest.approx(first.square().mean().item(), rel=1e-5)


def test_a_model_wider_than_the_texts_can_give_is_named_by_its_stage(tmp_path):
    """In hint and rrd it is the teacher's start, and not the student, that asks for more."""
    teacher = "  teacher: {like: started, model: {dim: 13}}\n"
    with pytest.raises(UserError, match="but those of 'text' have 12"):
        planned(tmp_path, more=teacher)
    unknown = teacher.replace("dim: 13}", "dim: 13}, initial: {items: whole, reduce: pca}")
    stages = planned(tmp_path, more=f"  whole: {{encode: tfidf, dim: 12, reduce: all}}\n{unknown}")
    run([stages["whole"]], None)
    with pytest.raises(UserError, match=r"cannot be cut to 13 columns by pca.* Set stages\.teacher\.model\.dim=12 or less"):
        run([stages["teacher"]], None)


@pytest.mark.parametrize("name", ["started", "reader", "aligned"])
def test_a_table_without_any_vector_is_refused(name, tmp_path):
    stages = planned(tmp_path)
    silence(stages["text"], slice(None))
    with pytest.raises(UserError, match=r"Stage 'text' leaves no vector: all \d+ rows of its item_table.npy are zero"):
        run([stages[name]], None)


@pytest.mark.parametrize("name", ["started", "reader", "aligned"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_refused_by_who_reads_it(name, value, tmp_path):
    """And not called a loss that is not finite, which has another cure."""
    stages = planned(tmp_path)
    table = np.load(stages["text"].folder / TABLE)
    table[3, 1] = value
    leave(stages["text"], TABLE, table)
    with pytest.raises(
        UserError, match=r"'text' leaves vectors that are not finite: 1 of \d+ rows of its item_table.npy, first row 3"
    ):
        run([stages[name]], None)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, TABLE) for name in ("started", "reader", "aligned", "masked", "hinted", "fused")),
        *((name, USER_TABLE) for name in ("beside", "masked", "near")),
    ],
)
def test_a_table_of_another_number_of_rows_is_refused_by_who_reads_it(name, file, tmp_path):
    stages = planned(tmp_path)
    path = stages["text"].folder / file
    table = np.load(path)
    for other in (table[:-3], np.concatenate([table, table[-1:]]), table[:, 0]):
        leave(stages["text"], file, other)
        shape, folder = re.escape(str(list(other.shape))), re.escape(str(path.parent.resolve()))
        with pytest.raises(
            UserError, match=rf"{file} is {shape}, but .* need \[{len(table)}, D\].* Remove the folder {folder} "
        ):
            run([stages[name]], None)


@pytest.mark.parametrize(("source", "file"), [("text", TABLE), ("text", USER_TABLE), ("plain", TABLE)])
def test_a_table_that_was_altered_is_refused(source, file, tmp_path):
    """Any finite numbers would do for a student, who would learn from them without a word."""
    stages = planned(tmp_path, more="  learner: {like: plain, callbacks: [{embedding_distillation: {from: plain}}]}\n")
    reader = stages["learner" if source == "plain" else "masked"]
    run([*reader.needs], None)
    path = stages[source].folder / file
    table = np.load(path)
    np.save(path, np.random.default_rng(0).normal(size=table.shape).astype(np.float32))
    folder = re.escape(str(path.parent.resolve()))
    with pytest.raises(UserError, match=rf"{file} was altered: .* stage '{source}' left. Remove the folder {folder} and give"):
        run([reader], None)
    np.save(path, table)
    run([reader], None)


def test_a_table_without_a_checksum_is_read(tmp_path):
    stages = planned(tmp_path)
    leave(stages["text"], TABLE, np.load(stages["text"].folder / TABLE))
    run([stages["started"]], None)


def test_a_table_is_checked_once(tmp_path, monkeypatch):
    stages, read = planned(tmp_path), []
    monkeypatch.setattr("lit_llmers.models.sha256", lambda path: read.append(path) or sha256(path))
    for _ in range(2):
        load_item_table(stages["reader"], load_dataset(stages["reader"]))
    assert read == [stages[name].folder / TABLE for name in ("text", "other")]


def test_a_trained_model_needs_none_of_those_that_it_started_from(tmp_path):
    given = ["student.model.dim=8", "text.dim=8", "stages.export.export=[safetensors]", "trainer.max_epochs=1"]
    stages = small(tmp_path, *given, recipe="pad")
    run(stages, "export")
    student, exporting = by_name(stages)["student"], by_name(stages)["export"]
    data = load_dataset(student)
    before, served = load_model(student, data), load_exported(exporting.folder)
    for name in ("control", "aligned"):
        shutil.rmtree(by_name(stages)[name].folder)
    shutil.rmtree(exporting.folder)
    assert_equal_weights(load_model(student, data).state_dict(), before.state_dict())
    exporting.folder.mkdir()
    export.run(exporting)
    assert_equal_weights(load_exported(exporting.folder).state_dict(), served.state_dict())


def test_the_checkpoint_of_another_model_is_refused_and_named(tmp_path):
    wide, narrow = (SequentialRecommender(SASRec(20, 5, dim, layers=1)) for dim in (8, 4))
    torch.save({"state_dict": wide.state_dict()}, tmp_path / "best.ckpt")
    message = rf"{re.escape(str(tmp_path / 'best.ckpt'))}: The checkpoint is of another model: .* of another shape.*'backbone"
    with pytest.raises(UserError, match=message):
        load_weights(narrow, tmp_path / "best.ckpt")
    torch.save({"state_dict": {"backbone.more": torch.ones(1)} | wide.state_dict()}, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="0 tensors missing, 1 unknown.*'backbone.more'"):
        load_weights(wide, tmp_path / "best.ckpt")


@pytest.mark.parametrize("student", ["popularity", "item-knn"])
def test_what_is_counted_needs_no_second_training_interaction(student, tmp_path):
    """Of three interactions two are held out, so that no training row has a history and a target."""
    ids = [str(item) for item in range(6)]
    pairs = [(f"u{user}", ids[(user + step * step) % 6], step) for user in range(12) for step in range(3)]
    pd.DataFrame(pairs, columns=["user_id", "item_id", "timestamp"]).to_parquet(tmp_path / "interactions.parquet")
    pd.DataFrame({"item_id": ids, "title": ids}).to_parquet(tmp_path / "items.parquet")
    given = ["data=local", f"data.path={tmp_path}", f"student={student}"]
    stages = small(tmp_path / "runs", *given, recipe="student")
    run(stages, "evaluate")
    assert by_name(stages)["evaluate"].done
