"""What stages left, read back: items without a vector, and models without those that they started from."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import assert_equal_weights, by_name, small

from lit_llmers import export
from lit_llmers.errors import UserError
from lit_llmers.export import load_exported
from lit_llmers.models import TABLE, USER_TABLE, build_model, load_dataset, load_item_table, load_model
from lit_llmers.running import run
from lit_llmers.stages import Stage

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


def planned(folder, reduce: str = "pca") -> dict[str, Stage]:
    """A recipe whose encode stages are done."""
    (folder / "mine.yaml").write_text(RECIPE.replace("REDUCE", reduce))
    stages = small(folder, recipe=str(folder / "mine.yaml"))
    run(stages, "other")
    return by_name(stages)


def silence(stage: Stage, items: np.ndarray | slice) -> np.ndarray:
    """Let an encode stage have found no text for these items; its table."""
    table = np.load(stage.folder / TABLE)
    table[items] = 0
    np.save(stage.folder / TABLE, table)
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
    np.save(stages["text"].folder / TABLE, table)
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
        np.save(path, other)
        shape, folder = re.escape(str(list(other.shape))), re.escape(str(path.parent.resolve()))
        with pytest.raises(
            UserError, match=rf"{file} is {shape}, but .* need \[{len(table)}, D\].* Remove the folder {folder} "
        ):
            run([stages[name]], None)


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
