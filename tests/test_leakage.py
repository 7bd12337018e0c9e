"""What is held out reaches nothing that is trained: other test items, or other validation items, leave every bit the same."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import assert_equal_weights, by_name, small, weights
from tiny_text import save_model

from lit_llmers.data import GeneratorConfig
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.data.sources.demo import Demo
from lit_llmers.evaluate import row_groups
from lit_llmers.models import load_dataset
from lit_llmers.running import run
from lit_llmers.text.transformer import TextEncoder

SAME = {"test": "three-epochs", "valid": "one-epoch"}  # what each is compared with
TRAINED = ["item_embeddings", "teacher", "student", "control"]
FAMILIES = """\
# Every channel from a teacher or from text to a student.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text: {encode: tfidf, dim: 16, users: mean}
  reader: {fit: sasrec, model: {dim: 16, layers: 1}, fusion: [{frozen_adapter: {from: text, with_id: true}}]}
  lists: {record: ranking, of: reader, k: 10}
  user_lists: {record: ranking, of: reader, k: 10, per: user}
  sayer:
    tune: bigrec
    base: ${teacher}
    history: 4
    samples: 64
    vocabulary: 300
    instruction: Go on.
    validation_users: 20
    generation: {num_beams: 1, max_new_tokens: 8, embedder: tuned}
  said_lists: {record: ranking, of: sayer, k: 10, per: user}
  ranked:
    fit: gru4rec
    model: {dim: 8}
    fusion: [{add_projected: {from: text}}]
    callbacks:
      - ranking_distillation: {from: lists, loss: pairwise, groups: 2, pairs: 4}
      - response_distillation: {from: lists, k: 5}
  dual:
    fit: sasrec
    model: {dim: 8, layers: 1}
    initial: {items: text}
    fusion: [{dual_view: {from: text}}]
    callbacks:
      - self_distillation: {from: text, neighbours: 2}
      - embedding_distillation: {from: reader}
  gated: {fit: sasrec, model: {dim: 8, layers: 1}, fusion: [{popularity_gate: {from: text}}]}
  graph:
    fit: lightgcn
    model: {dim: 8, layers: 1}
    loss: {kind: bpr, negatives: 1}
    initial: {items: text, reduce: variance}
    callbacks:
      - alignment: {from: text, users: text}
      - ranking_distillation: {from: user_lists, k: 5}
  counted: {fit: item_knn}
  popular: {fit: popularity}
"""
FAMILY = ["reader", "sayer", "ranked", "dual", "gated", "graph", "counted", "popular"]


def replaced(interactions: pd.DataFrame, place: int) -> pd.DataFrame:
    """The same table with other items at `place` from the end of each user, popular ones; the catalogue stays whole."""
    changed = interactions.copy()
    train = interactions.groupby("user_id")["item_id"].apply(lambda items: items.iloc[:-2])
    at = interactions.groupby("user_id").nth(place).index
    at = at[interactions.loc[at, "item_id"].isin(train)]
    changed.loc[at, "item_id"] = np.random.default_rng(0).choice(train.value_counts().index[:30], len(at))
    return changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same recipe on the same data, on other test items, on other validation items and on one other training item.

    Where validation items differ there is one epoch, so that validation, which selects the epoch, has nothing to select.
    """
    folder = tmp_path_factory.mktemp("leakage")
    tables = Demo(GeneratorConfig(users=150, items=100, longest=20)).load()
    interactions = tables.interactions.rename(columns={"time": "timestamp"})[["user_id", "item_id", "timestamp"]]
    one = interactions.copy()
    one.loc[interactions.groupby("user_id").nth(-3).index[:1], "item_id"] = interactions["item_id"].iloc[-1]
    variants = {
        "one-epoch": (interactions, 1),
        "three-epochs": (interactions, 3),
        "test": (replaced(interactions, -1), 3),
        "valid": (replaced(interactions, -2), 1),
        "train": (one, 1),
    }
    made = {}
    for name, (table, epochs) in variants.items():
        path = folder / name / "set"
        path.mkdir(parents=True)
        table.to_parquet(path / "interactions.parquet")
        tables.items.to_parquet(path / "items.parquet")
        overrides = ("data=local", f"data.path={path}", f"trainer.max_epochs={epochs}", "stages.text.users=mean")
        planned = small(folder / name, *overrides)
        run(planned, "control" if name != "train" else "item_embeddings")
        made[name] = by_name(planned)
        if name != "train":
            recipe = folder / name / "families.yaml"
            recipe.write_text(FAMILIES)
            overrides = ("data=local", f"data.path={path}", f"trainer.max_epochs={min(epochs, 2)}")
            families = small(folder / name, *overrides, recipe=str(recipe))
            run(families, None)
            made[name] |= {stage: done for stage, done in by_name(families).items() if stage not in ("prepare", "text")}
    return made


def data_of(run) -> Dataset:
    return load_dataset(run["item_embeddings"])


def module_of(run) -> SequenceDataModule:
    config = run["student"].config
    return SequenceDataModule(data_of(run), config.sequences, 16, True, seed=0)


@pytest.mark.parametrize(("name", "part"), [("test", TEST), ("valid", VALID)])
def test_the_variants_differ_in_the_held_out_part_alone(runs, name, part):
    base, other = data_of(runs[SAME[name]]), data_of(runs[name])
    assert (base.split == other.split).all()
    assert base.catalogue.equals(other.catalogue)
    differs = base.items != other.items
    assert differs[base.split == part].mean() > 0.8
    assert not differs[base.split != part].any()
    counts = [np.bincount(data.items, minlength=data.n_items) for data in (base, other)]
    assert abs(counts[0] - counts[1]).max() > 3, "how often an item occurs at all differs too"


@pytest.mark.parametrize("name", ["test", "valid"])
def test_training_batches_are_the_same(runs, name):
    base, other = module_of(runs[SAME[name]]), module_of(runs[name])
    pairs = list(zip(base.train_dataloader(), other.train_dataloader(), strict=True))
    assert len(pairs) > 5
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["test", "valid"])
def test_every_trained_weight_and_item_table_is_the_same(runs, name):
    for stage in TRAINED:
        base, other = runs[SAME[name]][stage], runs[name][stage]
        assert base.folder.name != other.folder.name, "the data have another checksum"
        assert_equal_weights(weights(other), weights(base))
        tables = [(each.folder / "item_table.npy").read_bytes() for each in (base, other)]
        assert tables[0] == tables[1]
    for table in ("item_table.npy", "user_table.npy"):
        texts = [(runs[each]["text"].folder / table).read_bytes() for each in (name, SAME[name])]
        assert texts[0] == texts[1], table


@pytest.mark.parametrize("name", ["test", "valid"])
@pytest.mark.parametrize("stage", FAMILY)
def test_no_channel_of_distillation_knows_what_is_held_out(runs, name, stage):
    base, other = runs[SAME[name]][stage], runs[name][stage]
    assert base.folder.name != other.folder.name, "the data have another checksum"
    assert_equal_weights(weights(other), weights(base))


@pytest.mark.parametrize("name", ["test", "valid"])
@pytest.mark.parametrize("stage", ["signals", "lists", "user_lists", "said_lists"])
def test_what_the_teacher_says_is_the_same(runs, name, stage):
    base, other = (run[stage].folder for run in (runs[SAME[name]], runs[name]))
    shards = sorted(path.relative_to(base) for path in base.glob("*/shard-*.npy"))
    assert shards
    for shard in shards:
        assert (base / shard).read_bytes() == (other / shard).read_bytes()


def test_validation_does_not_see_the_test_items(runs):
    base, other = module_of(runs["three-epochs"]), module_of(runs["test"])
    for ours, theirs in zip(base.val_dataloader(), other.val_dataloader(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    best = {name: run["student"].summary["best"] for name, run in runs.items() if "student" in run and name != "train"}
    assert best["test"] == best["three-epochs"]
    assert best["valid"] != best["one-epoch"], "the validation figure does see the validation items"


@pytest.mark.parametrize("name", ["test", "valid"])
def test_popularity_is_counted_in_training_alone(runs, name):
    base, other = data_of(runs[SAME[name]]), data_of(runs[name])
    assert (base.popularity() == other.popularity()).all()
    assert base.popularity().sum() == (base.split == TRAIN).sum()
    everywhere = [row_groups_of_all(data) for data in (base, other)]
    for key in ("head", "popularity"):
        assert (everywhere[0][key] == everywhere[1][key]).all()


def row_groups_of_all(data: Dataset) -> dict[str, np.ndarray]:
    """The groups that items belong to, asked with every item as a target once."""
    rows = EvaluationRows(data, "test", 8)
    rows.target = np.resize(np.arange(1, data.n_items + 1), len(rows))
    return row_groups(data, rows)


def test_a_training_item_does_change_the_weights(runs):
    ours, theirs = weights(runs["train"]["item_embeddings"]), weights(runs["one-epoch"]["item_embeddings"])
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)


# ---- text --------------------------------------------------------------------------------------------------------------------

ENCODING = """\
# For tests.
defaults: [/base, /data: local, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text: {encode: transformer, model: MODEL, fields: [title], max_tokens: 40, users: USERS}
"""


def marked(folder, model, users: str, item: str, monkeypatch):
    """The users' vectors, and all texts that the encoder read, with the word `marker` as the title of one item."""
    chosen = {"a": "1 2 3 4 5", "b": "2 1 3 6 4", "c": "3 2 1 5 4"}  # 4 tests or validates, 6 validates, 5 tests or validates
    path = folder / users / item / "set"
    path.mkdir(parents=True)
    rows = [(user, each, time) for user, line in chosen.items() for time, each in enumerate(line.split())]
    pd.DataFrame(rows, columns=["user_id", "item_id", "position"]).to_parquet(path / "interactions.parquet")
    titles = dict(zip("123456", ["red lamp", "blue cup", "garden chair", "wood table", "glass", "metal story"], strict=True))
    frame = pd.DataFrame({"item_id": list(titles), "title": ["marker" if each == item else titles[each] for each in titles]})
    frame.to_parquet(path / "items.parquet")
    recipe = folder / f"{users}-{item}.yaml"
    recipe.write_text(ENCODING.replace("MODEL", str(model)).replace("USERS", users))
    texts = []
    read = TextEncoder.tokens
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "tokens", lambda self, given: texts.extend(given) or read(self, given))
        planned = by_name(small(path.parent, f"data.path={path}", recipe=str(recipe)))
        run(list(planned.values()), None)
    return np.load(planned["text"].folder / "user_table.npy"), texts


@pytest.mark.parametrize("users", ["history", "mean"])
def test_a_held_out_title_reaches_no_text_and_no_vector_of_a_user(tmp_path, users, monkeypatch):
    model = save_model("bert", tmp_path / "model")
    plain, texts = marked(tmp_path, model, users, "none", monkeypatch)
    assert len(texts) == (9 if users == "history" else 6)
    for item, number in (("4", 0), ("5", 0), ("6", 0), ("3", 3)):  # 3 is a training item of all three
        found, texts = marked(tmp_path, model, users, item, monkeypatch)
        assert texts.count("marker") == 1, "the text of the item itself"
        prompts = [text for text in texts if text.startswith("A user chose")]
        assert sum("marker" in text for text in prompts) == (number if users == "history" else 0)
        moved = np.abs(found - plain).max(1) > 1e-3
        assert moved.sum() == number, item
