"""A recorded teacher and the same teacher beside the student say the same; a record goes on, and foreign ones are refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import BASE, assert_equal_weights, by_name, losses, small, weights
from tiny_text import save_model

from lit_llmers import record as record_stage
from lit_llmers.building import build_callbacks
from lit_llmers.callbacks.feature_distillation import KEY
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.loader import TrainingBatches
from lit_llmers.data.sequences import TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.files import read_json, write_json
from lit_llmers.models import build_model, load_dataset, load_model
from lit_llmers.record import OnlineTeacher, RecordedStates, open_signals
from lit_llmers.running import run
from lit_llmers.signals import SignalReader

MODES = ["last", "prefixes", "sequence"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A run folder with a trained teacher for every kind of training example; made when asked for."""
    made = {}

    def teacher(examples: str):
        if examples not in made:
            folder = tmp_path_factory.mktemp(examples)
            run(small(folder, f"sequences.examples={examples}", "trainer.max_epochs=1"), "teacher")
            made[examples] = folder
        return made[examples]

    return teacher


def stages(folder, examples: str, *overrides: str):
    return by_name(small(folder, f"sequences.examples={examples}", "trainer.max_epochs=1", *overrides))


def apart(folder, teacher_folder, examples: str, *overrides: str):
    """The same stages in a folder of their own, with the trained teacher: a record has one name however its files are cut."""
    planned = stages(folder, examples, *overrides)
    for name in ("prepare", "item_embeddings", "text", "teacher"):
        planned[name].folder.parent.mkdir(parents=True, exist_ok=True)
        planned[name].folder.symlink_to(stages(teacher_folder, examples)[name].folder)
    return planned


@pytest.mark.parametrize("examples", MODES)
def test_the_record_and_the_teacher_itself_give_the_same_loss(teachers, examples):
    folder = teachers(examples)
    results = {}
    for name, overrides in {
        "online": ["signals.online=true"],
        "float32": ["signals.dtype=float32"],
        "float16": ["signals.dtype=float16"],
    }.items():
        planned = stages(folder, examples, *overrides)
        run(list(planned.values()), "signals")
        student, dataset = planned["student"], load_dataset(planned["student"])
        rows = TrainingRows(dataset, student.config.sequences)
        source = open_signals(planned["signals"], rows)
        assert isinstance(source, OnlineTeacher if name == "online" else RecordedStates)
        torch.manual_seed(0)
        model = build_model(student, dataset).eval()
        terms = build_callbacks(student.config, {"callbacks.feature_distillation.signals": source}, {})
        for term in terms:
            term.setup(None, model, "fit")
        model.log_dict = lambda values: None
        results[name] = []
        torch.manual_seed(0)
        for batch in TrainingBatches(rows, 16, seed=0):
            batch[KEY] = source.read(batch)
            assert batch[KEY].shape == (len(batch["target_row"]), 2, 16)
            results[name].append(model.training_step(batch, 0).item())
    online = np.array(results["online"])
    assert len(online) == len(TrainingBatches(rows, 16, seed=0))
    np.testing.assert_allclose(results["float32"], online, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(results["float16"], online, rtol=1e-3)
    assert results["float16"] != results["float32"]


def test_the_record_is_what_the_teacher_says_of_each_target_alone(teachers, tmp_path):
    """By target number: one history at a time, without batches, padding or shards."""
    planned = apart(tmp_path, teachers("prefixes"), "prefixes", "signals.dtype=float32", "signals.shard_rows=100")
    run(list(planned.values()), "signals")
    teacher, dataset = planned["teacher"], load_dataset(planned["teacher"])
    rows = TrainingRows(dataset, teacher.config.sequences)
    reader = SignalReader(planned["signals"].folder / "block_states")
    assert len(reader) == rows.targets
    assert len(reader.spec.shards) > 3
    model = load_model(teacher, dataset)
    for row in np.random.default_rng(0).permutation(len(rows))[:40]:
        items = torch.from_numpy(dataset.items[rows.start[row] : rows.stop[row] - 1].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.backbone(items, items > 0)
        expected = torch.stack([hidden[2][0, -1], hidden[4][0, -1]])
        torch.testing.assert_close(reader[torch.tensor([row])][0], expected, rtol=1e-4, atol=1e-5)


def test_students_of_both_are_the_same_after_training(teachers):
    folder = teachers("sequence")
    students = []
    for overrides in (["signals.online=true"], ["signals.dtype=float32"]):
        planned = stages(folder, "sequence", *overrides)
        run(list(planned.values()), "student")
        students.append(planned["student"])
    online, recorded = students
    for name in ("loss/task", "loss/deep_supervision", "loss/feature", "loss"):
        np.testing.assert_allclose(losses(online, name), losses(recorded, name), rtol=1e-4, err_msg=name)
    for key, value in weights(online).items():
        torch.testing.assert_close(value, weights(recorded)[key], rtol=1e-3, atol=1e-4, msg=key)


def test_online_stage_records_nothing(teachers):
    planned = stages(teachers("sequence"), "sequence", "signals.online=true")
    run(list(planned.values()), "signals")
    assert planned["signals"].summary["online"] is True
    assert not list(planned["signals"].folder.rglob("*.npy"))


# ---- interrupted -----------------------------------------------------------------------------------------------------


class Fault(Exception):
    """The process dies."""


def shards(stage) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((stage.folder / "block_states").glob("shard-*.npy"))}


@pytest.mark.parametrize("examples", ["last", "sequence"])
@pytest.mark.parametrize("calls", [0, 3, 7])  # a shard takes two or three
def test_a_record_that_failed_in_a_shard_goes_on_to_the_same_bits(teachers, tmp_path, monkeypatch, examples, calls):
    size = {"last": 20, "sequence": 150}[examples]
    overrides = (f"signals.shard_rows={size}", "stages.signals.batch_size=16")
    whole = apart(tmp_path / "whole", teachers(examples), examples, *overrides)
    run(list(whole.values()), "signals")
    planned = apart(tmp_path, teachers(examples), examples, *overrides)
    asked = []
    ask = record_stage.block_states

    def fail_later(*args):
        asked.append(args)
        if len(asked) > calls:
            raise Fault
        return ask(*args)

    with monkeypatch.context() as patch:
        patch.setattr(record_stage, "block_states", fail_later)
        with pytest.raises(Fault):
            run(list(planned.values()), "signals")
    kept = shards(planned["signals"])
    assert len(kept) < len(shards(whole["signals"]))
    assert bool(kept) == (calls > 0)
    assert not planned["signals"].done
    stamps = {path: path.stat().st_mtime_ns for path in planned["signals"].folder.rglob("shard-*.npy")}
    planned = stages(tmp_path, examples, "signals.shard_rows=7", "stages.signals.batch_size=16")  # it goes on as it was begun
    run(list(planned.values()), "signals")
    assert shards(planned["signals"]) == shards(whole["signals"])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "whole shards are not made again"
    assert planned["signals"].summary["rows"] == whole["signals"].summary["rows"]


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [SequenceConfig(5), SequenceConfig(8, "last")], ids=["shorter", "last"])
def test_a_record_of_other_targets_is_refused(teachers, other):
    planned = stages(teachers("sequence"), "sequence")
    run(list(planned.values()), "signals")
    with pytest.raises(UserError, match="is of another split.*run the stage that records it again"):
        open_signals(planned["signals"], TrainingRows(load_dataset(planned["signals"]), other))


def test_the_record_of_another_teacher_is_refused(teachers, tmp_path):
    planned = stages(teachers("sequence"), "sequence")
    run(list(planned.values()), "signals")
    other = stages(teachers("sequence"), "sequence", "stages.teacher.optimizer.lr=0.002")
    run(list(other.values()), "teacher")
    shutil.copytree(planned["signals"].folder, other["signals"].folder)
    with pytest.raises(UserError, match="was made by another stage or with other settings"):
        run(list(other.values()), "student")
    done = read_json(other["signals"].folder / "DONE")
    write_json(other["signals"].folder / "DONE", {key: value for key, value in done.items() if key != "fingerprint"})
    with pytest.raises(UserError, match="is of another teacher"):  # the record itself knows it too
        run(list(other.values()), "student")
    shutil.rmtree(other["signals"].folder)


def test_an_altered_shard_is_named(teachers, tmp_path):
    planned = apart(tmp_path / "whole", teachers("sequence"), "sequence", "signals.shard_rows=200")
    run(list(planned.values()), "signals")
    copied = stages(tmp_path, "sequence", "signals.shard_rows=200")
    for name in ("prepare", "item_embeddings", "text", "teacher", "signals"):
        shutil.copytree(planned[name].folder, copied[name].folder)
    shard = copied["signals"].folder / "block_states" / "shard-00002.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002\.npy was altered.*run the stage that records it again"):
        run(list(copied.values()), "student")
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"shard-00002\.npy is damaged"):
        run(list(copied.values()), "student")
    shutil.rmtree(copied["signals"].folder)  # the cure that the message names
    run(list(copied.values()), "student")
    assert shards(copied["signals"]) == shards(planned["signals"])
    run(list(planned.values()), "student")
    assert_equal_weights(weights(copied["student"]), weights(planned["student"]))


def test_a_teacher_that_the_blocks_do_not_divide(teachers):
    with pytest.raises(UserError, match="4 layers of stage 'teacher' cannot be cut into the 3 equal blocks"):
        stages(teachers("sequence"), "sequence", "stages.signals.blocks=3")


def test_a_teacher_that_overflows_half_precision_is_refused_and_named(teachers, tmp_path, monkeypatch):
    planned = apart(tmp_path, teachers("last"), "last", "signals.shard_rows=50")
    ask = record_stage.block_states
    with monkeypatch.context() as patch:
        patch.setattr(record_stage, "block_states", lambda *args: ask(*args) * 1e6)
        with pytest.raises(UserError, match="does not fit float16. Record with signals.dtype=float32"):
            run(list(planned.values()), "signals")
    assert not shards(planned["signals"])


def test_an_unknown_signal(teachers):
    with pytest.raises(UserError, match=r"Unknown signal \(record\) 'block_state'. Did you mean 'block_states'\?"):
        stages(teachers("last"), "last", "stages.signals.record=block_state")


# ---- rankings --------------------------------------------------------------------------------------------------------


RANKING = """\
# A teacher's lists for each target and each user, and a student that reads nothing of them.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  teacher: {fit: sasrec, model: {dim: 8, layers: 1, init_std: 0.5}}
  graph: {fit: lightgcn, model: {dim: 8, layers: 1}, loss: {kind: bpr, negatives: 1}}
  reader: {like: teacher, sequences: {context: 5}}
  targets: {record: ranking, of: teacher, k: 7}
  after_context: {record: ranking, of: reader, k: 7}
  users: {record: ranking, of: teacher, k: 7, per: user}
  graph_users: {record: ranking, of: graph, k: 7, per: user}
"""


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    (folder / "lists.yaml").write_text(RANKING)
    planned = small(folder, "trainer.max_epochs=1", recipe=str(folder / "lists.yaml"))
    run(planned, None)
    return by_name(planned)


def test_a_list_longer_than_the_catalogue_is_refused_before_the_teacher_trains(ranked, tmp_path):
    (tmp_path / "lists.yaml").write_text(RANKING.replace("k: 7, per", "k: 999, per"))
    planned = small(tmp_path, recipe=str(tmp_path / "lists.yaml"))
    n_items = load_dataset(ranked["users"]).n_items
    assert n_items < 999
    with pytest.raises(UserError, match=rf"stages.users.k is 999, but the catalogue has {n_items} items. Choose {n_items} or"):
        run(planned, None)
    assert [stage.verb for stage in planned if stage.folder.exists()] == ["prepare"]


def history(data, user: int, at: int) -> set[int]:
    return set(data.items[data.offsets[user] : at].tolist())


@pytest.mark.parametrize(("stage", "of"), [("targets", "teacher"), ("after_context", "reader")])
def test_lists_at_each_target_are_a_full_sort_without_what_came_before(ranked, stage, of):
    data, teacher = load_dataset(ranked[stage]), ranked[of]
    rows = TrainingRows(data, teacher.config.sequences)
    source, model = open_signals(ranked[stage], rows), load_model(teacher, data)
    table, seen_targets = model.item_table(), 0
    for batch in list(TrainingBatches(rows, 8, seed=0))[:3]:
        items, scores = source.read(batch)
        users = model(batch).user
        assert items.shape == scores.shape == (len(users), 7)
        owner = batch["user"].repeat_interleave((batch["target"] > 0).sum(1))
        for nth, (user, number) in enumerate(zip(owner.tolist(), batch["target_row"].tolist(), strict=True)):
            row = int(np.searchsorted(rows.target_offset, number, side="right")) - 1
            at = int(rows.stop[row] - rows.target_offset[row + 1] + number)
            target = int(data.items[at])
            excluded = history(data, user, at) - {target}
            expected = (table @ users[nth]).detach().numpy().copy()
            expected[[0, *excluded]] = -np.inf
            order = np.argsort(-expected, kind="stable")[:7]
            np.testing.assert_allclose(scores[nth], expected[order], rtol=1e-5, atol=1e-6)
            assert not excluded & set(items[nth].tolist())
            seen_targets += target in items[nth].tolist()
    assert seen_targets, "the target may be in its own list"


def test_a_student_of_other_rows_reads_what_the_teacher_said_of_its_targets(ranked):
    """By number: a teacher that reads context before its targets has more rows of them than the student."""
    data = load_dataset(ranked["targets"])
    with_context, without = (TrainingRows(data, ranked[name].config.sequences) for name in ("reader", "teacher"))
    assert len(with_context) > len(without)
    assert with_context.fingerprint == without.fingerprint
    source = open_signals(ranked["after_context"], without)
    said: dict[int, list[int]] = {}
    for batch in TrainingBatches(with_context, 8, seed=0):
        said |= dict(zip(batch["target_row"].tolist(), source.read(batch)[0].tolist(), strict=True))
    assert sorted(said) == list(range(without.targets))
    for batch in TrainingBatches(without, 8, seed=0):
        assert source.read(batch)[0].tolist() == [said[number] for number in batch["target_row"].tolist()]


@pytest.mark.parametrize(("stage", "of"), [("users", "teacher"), ("graph_users", "graph")])
def test_lists_of_users_leave_out_their_training_history_and_know_nothing_after_it(ranked, stage, of):
    data = load_dataset(ranked[stage])
    source = open_signals(ranked[stage], TrainingRows(data, ranked["teacher"].config.sequences))
    model = load_model(ranked[of], data)
    user = torch.arange(data.n_users)
    items, scores = source.read({"target_row": user, "user": user, "target": user})
    stop = [int(data.offsets[u] + (data.split[data.offsets[u] : data.offsets[u + 1]] == 0).sum()) for u in user.tolist()]
    for u in range(0, data.n_users, 7):
        met = data.items[data.offsets[u] : stop[u]][-8:].astype(np.int64)
        batch = {
            "user": user[u : u + 1],
            "items": torch.from_numpy(met)[None],
            "mask": torch.ones(1, len(met), dtype=torch.bool),
        }
        vectors, catalogue = model.vectors(batch, model.tables())
        expected = (catalogue.table @ vectors[0]).detach().numpy().copy()
        expected[[0, *history(data, u, stop[u])]] = -np.inf
        np.testing.assert_allclose(scores[u], np.sort(expected)[::-1][:7], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(expected[items[u]], scores[u], rtol=1e-5, atol=1e-6)


def test_lists_do_not_depend_on_how_many_are_made_at_once(ranked, tmp_path, monkeypatch):
    made = ranked["targets"]
    own = replace(made, run=replace(made.run, folder=tmp_path))
    own.folder.mkdir()
    seen, many = [], record_stage.seen_before
    monkeypatch.setattr(record_stage, "MET", 50)
    monkeypatch.setattr(record_stage, "seen_before", lambda *given: seen.append(many(*given)) or seen[-1])
    record_stage.run(own)
    assert max(len(each["seen_row"]) for each in seen) < 50 + 30, "and the last history"
    for name in record_stage.Rankings.names:
        one, other = (np.load(stage.folder / name / "shard-00000.npy") for stage in (made, own))
        np.testing.assert_array_equal(one, other)


def test_a_shard_is_of_so_many_batches_and_a_pass_stops_inside_of_it(teachers, tmp_path, monkeypatch):
    planned, asked = apart(tmp_path, teachers("sequence"), "sequence", "stages.signals.batch_size=1"), []
    monkeypatch.setattr(record_stage, "SHARD_BATCHES", 8)

    def stop_at_the_eleventh() -> None:
        asked.append(None)
        if len(asked) == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record_stage, "stop_if_asked", stop_at_the_eleventh)
        with pytest.raises(KeyboardInterrupt):
            run(list(planned.values()), "signals")
    assert len(shards(planned["signals"])) == 1
    run(list(planned.values()), "signals")
    assert len(shards(planned["signals"])) > 10


def test_a_users_list_is_read_at_each_of_his_targets(ranked):
    data = load_dataset(ranked["users"])
    rows = TrainingRows(data, ranked["teacher"].config.sequences)
    batch = next(iter(TrainingBatches(rows, 8, seed=0)))
    items, _ = open_signals(ranked["users"], rows).read(batch)
    alone, _ = open_signals(ranked["users"], rows).read({**batch, "target": batch["target"][:, 0]})
    owner = torch.arange(8).repeat_interleave((batch["target"] > 0).sum(1))
    assert torch.equal(items, alone[owner])


@pytest.mark.parametrize("stage", ["targets", "users"])
def test_the_lists_of_drawn_targets_alone_can_be_read(ranked, stage):
    data = load_dataset(ranked[stage])
    rows = TrainingRows(data, ranked["teacher"].config.sequences)
    batch, source = next(iter(TrainingBatches(rows, 8, seed=0))), open_signals(ranked[stage], rows)
    drawn = torch.tensor([0, 3, 4, 11])
    for some, every in zip(source.read(batch, drawn), source.read(batch), strict=True):
        assert torch.equal(some, every[drawn])


SCORER = """\
# The lists of an LLM that scores items, as E4SRec does.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  items: {fit: sasrec, model: {dim: 8, layers: 1, init_std: 0.5}}
  teacher: {fit: llm_decoder, items: [items], model: {base: BASE, layers: 2}}
  targets: {record: ranking, of: teacher, k: 7, batch_size: 16}
  users: {record: ranking, of: teacher, k: 7, per: user, batch_size: 16}
"""


@pytest.fixture(scope="module", params=["sequence", "last, in a prompt"])
def scored(request, tmp_path_factory):
    folder, (examples, _, prompted) = tmp_path_factory.mktemp("scored"), request.param.partition(", ")
    base = BASE
    if prompted:
        lora = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
        base = {"name": "own", "path": str(save_model("llama", folder / "base", headed=True)), "prompt": True, "lora": lora}
    (folder / "scorer.yaml").write_text(SCORER.replace("BASE", json.dumps(base)))
    given = [f"sequences.examples={examples}", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "optimizer.lr=0.01"]
    planned = small(folder, *given, recipe=str(folder / "scorer.yaml"))
    run(planned, None)
    stages = by_name(planned)
    model = load_model(stages["teacher"], load_dataset(stages["teacher"]))
    assert bool(len(model.backbone.before)) == bool(prompted)
    return stages, model


def asked_alone(model, met: np.ndarray, excluded: set[int]) -> np.ndarray:
    """The scores of the catalogue after one history by itself, without batch or padding."""
    items = torch.from_numpy(met.astype(np.int64))[None]
    with torch.no_grad():
        scores = (model.encode(items, items > 0) @ model.item_table().T)[0].numpy().copy()
    scores[[0, *excluded]] = -np.inf
    return scores


def assert_best(items: torch.Tensor, scores: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][: len(items)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(expected[items], scores, rtol=1e-4, atol=1e-4)


def test_lists_of_an_llm_are_what_it_says_after_each_history_alone(scored):
    stages, model = scored
    data = load_dataset(stages["targets"])
    rows = TrainingRows(data, stages["teacher"].config.sequences)
    source, first = open_signals(stages["targets"], rows), set()
    for number in np.random.default_rng(0).permutation(rows.targets)[:40]:
        (user,), (at,) = rows.places(np.array([number]))
        row = np.searchsorted(rows.target_offset, number, side="right") - 1
        expected = asked_alone(model, data.items[rows.start[row] : at], history(data, user, at) - {int(data.items[at])})
        key = torch.tensor([number])
        (items,), (scores,) = source.read({"target_row": key})
        assert_best(items, scores, expected)
        first.add(int(items[0]))
    assert len(first) > 3, "it says something else after another history"


def test_lists_of_an_llm_for_users_leave_out_all_that_they_met(scored):
    stages, model = scored
    data = load_dataset(stages["users"])
    source = open_signals(stages["users"], TrainingRows(data, stages["teacher"].config.sequences))
    for user in range(0, data.n_users, 10):
        stop = int(data.offsets[user] + (data.split[data.offsets[user] : data.offsets[user + 1]] == 0).sum())
        expected = asked_alone(model, data.items[data.offsets[user] : stop][-8:], history(data, user, stop))
        one = torch.tensor([user])
        (items,), (scores,) = source.read({"target_row": one, "user": one, "target": one})
        assert_best(items, scores, expected)


@pytest.mark.parametrize("stage", ["targets", "users"])
def test_lists_of_another_split_are_refused(ranked, stage):
    data, sequences = load_dataset(ranked[stage]), ranked["teacher"].config.sequences
    assert open_signals(ranked[stage], TrainingRows(data, sequences)).k == 7
    shorter = TrainingRows(data, SequenceConfig(5))
    if stage == "targets":
        with pytest.raises(UserError, match="is of another split.*run the stage that records it again"):
            open_signals(ranked[stage], shorter)
    else:
        assert open_signals(ranked[stage], shorter).k == 7, "a user's list is the same whatever his targets are"
    swapped = replace(data, users=data.users[::-1].copy())  # the same interactions, of other users
    with pytest.raises(UserError, match="is of another split.*run the stage that records it again"):
        open_signals(ranked[stage], TrainingRows(swapped, sequences))


@pytest.mark.parametrize("stage", ["targets", "users"])
def test_lists_of_another_teacher_are_refused(ranked, stage):
    made = ranked[stage]
    other = replace(made.need("teacher"), seed=1)
    foreign = replace(made, needs=[other if need.name == "teacher" else need for need in made.needs])
    rows = TrainingRows(load_dataset(made), ranked["teacher"].config.sequences)
    shutil.copytree(made.folder, foreign.folder)
    with pytest.raises(UserError, match="is of another teacher"):
        open_signals(foreign, rows)
    shutil.rmtree(foreign.folder)


def test_a_graph_has_no_list_for_a_target(tmp_path):
    (tmp_path / "lists.yaml").write_text(RANKING.replace("of: graph, k: 7, per: user", "of: graph, k: 7"))
    message = "'graph' cannot answer 'graph_users' after each training target.*Set stages.graph_users.per=user"
    with pytest.raises(UserError, match=message):
        small(tmp_path, recipe=str(tmp_path / "lists.yaml"))


def test_a_callback_refuses_a_record_of_another_kind(tmp_path):
    text = RANKING + "  student: {fit: sasrec, model: {dim: 8}, callbacks: [{feature_distillation: {from: users}}]}\n"
    (tmp_path / "lists.yaml").write_text(text)
    with pytest.raises(UserError, match="needs a record of block_states, but stage 'users' records ranking"):
        small(tmp_path, recipe=str(tmp_path / "lists.yaml"))
