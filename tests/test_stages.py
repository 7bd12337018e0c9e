"""Stages: which setting renames which folder, what needs what, and how a run skips, stops, goes on and stays alone."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from tiny import BASE, by_name, small

from lit_llmers import prepare as prepare_stage
from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.errors import UserError
from lit_llmers.files import read_json, remove
from lit_llmers.processes.locks import alone, sweep
from lit_llmers.running import run
from lit_llmers.stages import REVISIONS, describe

ALL = ["prepare", "item_embeddings", "text", "teacher", "signals", "student", "control", "evaluate", "export"]
RECIPE = """\
# For tests.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
repeat: [{repeat}]
stages:
{stages}
"""


def changed(folder, *overrides: str) -> list[str]:
    """Names of the stages that have another folder with these overrides."""
    before = {stage.label: stage.folder.name for stage in small(folder)}
    after = {stage.label: stage.folder.name for stage in small(folder, *overrides)}
    assert before.keys() == after.keys()
    return [label.removesuffix("-seed0") for label in before if before[label] != after[label]]


def planned(tmp_path, stages: str, repeat: str = "", *overrides: str):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(stages=textwrap.indent(textwrap.dedent(stages), "  "), repeat=repeat))
    return small(tmp_path, *overrides, recipe=str(path))


# ---- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["stages.student.callbacks=[]"], ["student", "evaluate", "export"]),
        (["stages.student.model.layers=4"], ["student", "control", "evaluate", "export"]),  # control is like it
        (["stages.control.model={base: ${teacher}, layers: 1}"], ["control", "evaluate"]),
        (["stages.teacher.optimizer.lr=0.01"], ["teacher", "signals", "student", "evaluate", "export"]),
        (["stages.text.dim=4"], ["text", "teacher", "signals", "student", "evaluate", "export"]),
        (["stages.item_embeddings.model.dim=16"], [s for s in ALL if s not in ("prepare", "text")]),
        (["teacher.seed=1"], ["teacher", "signals", "student", "control", "evaluate", "export"]),
        (["stages.signals.blocks=1"], ["signals", "student", "evaluate", "export"]),
        (["signals.dtype=float32"], ["signals", "student", "evaluate", "export"]),
        (["signals.online=true"], ["signals", "student", "evaluate", "export"]),
        (["evaluation.batch_size=3"], []),
        (["evaluation.cutoffs=[3,10]"], ["evaluate"]),
        (["evaluation.protocol=sampled-999"], ["evaluate"]),
        (["evaluation.users=9"], [s for s in ALL if s not in ("prepare", "text")]),
        (["stages.export.export=[onnx]"], ["export"]),
        (["trainer.max_epochs=7"], [s for s in ALL if s not in ("prepare", "text")]),
        (["sequences.examples=last"], ALL[3:]),  # the item embeddings say themselves that they train on every target
        (["sequences.max_length=9"], [s for s in ALL if s not in ("prepare", "text")]),
        (["seed=1"], ALL),
        (["data.k_core=2"], ALL),
        (["data.generator.seed=1"], ALL),
        (["logger=tensorboard"], []),
        (["logger=wandb", "logger.project=other"], []),
        (["trainer.accelerator=cpu"], []),
        (["trainer.checkpoint_every=77"], []),
        (["trainer.log_every=77"], []),
        (["stages.teacher.trainer.checkpoint_every=9"], []),
        (["signals.shard_rows=100"], []),
        (["stages.signals.batch_size=64"], []),
        (["stage=teacher"], []),
        (["only=teacher"], []),
        (["pairs=[]"], []),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_a_setting_renames_exactly_the_stages_that_it_affects(tmp_path, overrides, stages):
    assert changed(tmp_path, *overrides) == stages


@pytest.mark.parametrize(
    ("whole", "same"),
    [
        ("optimizer.weight_decay=0", "optimizer.weight_decay=0.0"),
        ("trainer.gradient_clip_val=1", "trainer.gradient_clip_val=1.0"),
        ("data.generator.mean_length=16", "data.generator.mean_length=16.0"),
        ("stages.student.model.dropout=0", "stages.student.model.dropout=0.0"),
        (
            "stages.student.callbacks=[{feature_distillation:{from:signals,cosine:1}}]",
            "stages.student.callbacks=[{feature_distillation:{from:signals,cosine:1.0}}]",
        ),
    ],
)
def test_a_whole_number_is_the_float_that_it_is_meant_for(tmp_path, whole, same):
    one, other = (by_name(small(tmp_path, given))["student"] for given in (whole, same))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("slmrec", "teacher.gradient_checkpointing"),
        ("bigrec", "teacher.gradient_checkpointing"),
        ("said", "teacher.gradient_checkpointing"),
        ("llmemb", "stages.text.contrast.gradient_checkpointing"),  # of the scale of the paper
    ],
)
def test_to_recompute_layers_changes_memory_and_no_artefact(tmp_path, recipe, key):
    scale = ["scale=paper"] if recipe == "llmemb" else []
    one, other = (small(tmp_path, *scale, f"{key}={value}", recipe=recipe) for value in ("false", "true"))
    assert one != other
    assert [stage.fingerprint for stage in one] == [stage.fingerprint for stage in other]


@pytest.mark.parametrize(
    ("part", "stages"),
    [
        ("callbacks.feature_distillation", ["student", "evaluate", "export"]),
        ("backbones.llm_decoder", ["teacher", "signals", "student", "control", "evaluate", "export"]),
        ("callbacks.feature_distillation backbones.llm_decoder", ["student", "evaluate", "export"]),
        ("callbacks.feature_distillation backbones.sasrec", []),
        ("callbacks.feature_distillation.from=signals", ["student", "evaluate", "export"]),
        ("callbacks.feature_distillation.from=others", []),
        ("evaluate", ["evaluate"]),
        ("callbacks.hint", []),
    ],
)
def test_a_part_whose_bug_is_mended_renames_what_was_made_with_it(tmp_path, monkeypatch, part, stages):
    before = {stage.name: stage.fingerprint for stage in small(tmp_path)}
    monkeypatch.setitem(REVISIONS, part, 1)
    after = {stage.name: stage.fingerprint for stage in small(tmp_path)}
    assert [name for name in before if before[name] != after[name]] == stages


def test_another_place_is_no_other_artefact(tmp_path):
    def names(folder, *overrides):
        return [stage.folder.name for stage in small(folder, *overrides)]

    assert names(tmp_path / "a") == names(tmp_path / "b", "run.name=other")


def test_content_of_the_data_renames_everything_and_their_place_nothing(tmp_path):
    def folder(name: str, rating: int):
        place = tmp_path / name / "set"
        place.mkdir(parents=True)
        (place / "interactions.csv").write_text(f"user_id,item_id,timestamp,rating\n1,1,1,{rating}\n")
        (place / "items.csv").write_text("item_id,title\n1,One\n")
        return place

    def names(path):
        return {stage.folder.name for stage in small(tmp_path, "data=local", f"data.path={path}")}

    one, copy, other = folder("one", 3), folder("copy", 3), folder("other", 4)
    assert names(one) == names(copy)
    assert not names(one) & names(other)


def test_other_files_of_a_base_make_another_teacher_and_another_student_of_it(tmp_path):
    """A checkpoint of adapters on a frozen base says nothing of the base."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASE["config"]))

    def names(recipe: str, weights: bytes) -> dict[str, str]:
        (base / "model.safetensors").write_bytes(weights)
        (base / "README.md").write_bytes(weights)
        given = ("teacher=local", f"teacher.path={base}", "teacher.prompt=false")
        return {stage.name: stage.fingerprint for stage in small(tmp_path / "runs", *given, recipe=recipe)}

    for recipe, fixed in (("slmrec", {"prepare", "item_embeddings"}), ("bigrec", {"prepare", "control", "popularity"})):
        one, other, again = (names(recipe, weights) for weights in (b"one", b"another", b"one"))
        assert one == again
        same = {name for name in one if one[name] == other[name]}
        assert same >= fixed
        assert not same & {"teacher", "student", "evaluate"}


@pytest.mark.parametrize("recipe", ["slmrec", "bigrec"])
def test_a_base_is_the_same_wherever_it_lies(tmp_path, recipe, monkeypatch):
    for name in ("base", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(BASE["config"]))
    monkeypatch.chdir(tmp_path)

    def names(path) -> list[str]:
        given = ("teacher=local", f"teacher.path={path}", "teacher.prompt=false")
        return [stage.fingerprint for stage in small(tmp_path / "runs", *given, recipe=recipe)]

    one = names(tmp_path / "base")
    for path in (f"{tmp_path}/base/", "./base", "../" + tmp_path.name + "/base", tmp_path / "copy"):
        assert names(path) == one
    assert names("some/hub-name") != names("another/hub-name"), "whose files nobody has seen"


def test_candidates_are_the_same_wherever_they_lie(tmp_path):
    def names(name: str, content: str) -> list[str]:
        (tmp_path / name).write_text(content)
        return [stage.fingerprint for stage in small(tmp_path, f"evaluation.candidates={tmp_path / name}", recipe="student")]

    assert names("one.npy", "a") == names("two.npy", "a")
    assert changed(tmp_path, f"evaluation.candidates={tmp_path / 'one.npy'}") == ["evaluate"]
    assert names("one.npy", "a") != names("two.npy", "b")


def test_fingerprints_do_not_depend_on_the_process(tmp_path):
    code = "import sys; sys.path.insert(0, 'tests'); from tiny import small; "
    code += "print(*(stage.folder.name for stage in small('anywhere')))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == [stage.folder.name for stage in small(tmp_path)]


# ---- from a recipe to stages -----------------------------------------------------------------------------------------


def test_the_order_and_the_needs_of_slmrec(tmp_path):
    stages = small(tmp_path)
    assert [stage.name for stage in stages] == ALL
    needs = {stage.name: [need.name for need in stage.needs] for stage in stages}
    assert needs == {
        "prepare": [],
        "item_embeddings": ["prepare"],
        "text": ["prepare"],
        "teacher": ["prepare", "item_embeddings", "text"],
        "signals": ["prepare", "teacher"],
        "student": ["prepare", "item_embeddings", "signals"],
        "control": ["prepare", "item_embeddings"],
        "evaluate": ["prepare", "teacher", "student", "control", "item_embeddings"],
        "export": ["prepare", "student"],
    }


def test_like_takes_settings_and_what_stands_beside_it_wins(tmp_path):
    stages = by_name(small(tmp_path))
    student, control = stages["student"].config, stages["control"].config
    assert student.callbacks
    assert control.callbacks == []
    assert control == type(student)(**{**vars(student), "callbacks": []})


def test_like_follows_a_chain(tmp_path):
    stages = planned(
        tmp_path,
        """\
        prepare: {prepare: interactions}
        a: {fit: sasrec, model: {layers: 1}}
        b: {like: a, model: {layers: 2}}
        c: {like: b, optimizer: {lr: 0.1}}
        """,
    )
    c = by_name(stages)["c"].config
    assert (c.fit, c.model, c.optimizer.lr) == ("sasrec", {"layers": 2}, 0.1)


def test_like_in_a_circle(tmp_path):
    with pytest.raises(UserError, match="'like' goes in a circle: a -> b -> a"):
        planned(tmp_path, "prepare: {prepare: interactions}\na: {like: b}\nb: {like: a}")


def test_seeds_repeat_what_the_recipe_says_and_what_needs_it(tmp_path):
    stages = planned(
        tmp_path,
        """\
        prepare: {prepare: interactions}
        first: {fit: sasrec, model: {dim: 8}}
        second: {fit: llm_decoder, model: {base: "${teacher}", layers: 1}, items: [first]}
        record: {record: block_states, of: second, blocks: 1}
        other: {fit: gru4rec}
        evaluate: {evaluate: test, of: [first, second, other]}
        export: {export: [onnx], of: second}
        """,
        "first",
        "seeds=[3,5]",
        "seed=1",
    )
    assert [(stage.label, stage.seed) for stage in stages] == [
        ("prepare", 1),
        ("first-seed3", 3),
        ("first-seed5", 5),
        ("second-seed3", 3),
        ("second-seed5", 5),
        ("record-seed3", 3),
        ("record-seed5", 5),
        ("other", 1),
        ("evaluate", 1),
        ("export", 1),
    ]
    needs = {stage.label: [need.label for need in stage.needs] for stage in stages}
    assert needs["second-seed5"] == ["prepare", "first-seed5"]
    assert needs["record-seed3"] == ["prepare", "second-seed3"]
    assert needs["evaluate"] == ["prepare", "first-seed3", "first-seed5", "second-seed3", "second-seed5", "other"]
    assert needs["export"] == ["prepare", "second-seed3"], "the first seed's"


def test_a_seed_more_leaves_the_other_seeds_alone(tmp_path):
    one = {stage.label: stage.folder.name for stage in small(tmp_path)}
    two = {stage.label: stage.folder.name for stage in small(tmp_path, "seeds=[0,1]")}
    assert two.keys() - one.keys() == {"student-seed1", "control-seed1"}
    assert {label for label in one if one[label] != two[label]} == {"evaluate"}
    assert two["student-seed0"].removeprefix("student-seed0") != two["student-seed1"].removeprefix("student-seed1")


BAD = [
    ("a: {fit: sasrec, items: [b]}\nb: {fit: sasrec}", "Stage 'a' needs stage 'b', which comes later"),
    ("b: {fit: sasrec}\na: {fit: sasrec, items: [c]}", "Stage 'a' needs stage 'c', which does not exist"),
    ("signals: {fit: sasrec}\na: {fit: sasrec, items: [signal]}", "does not exist. Did you mean 'signals'?"),
    ("more: {prepare: interactions}", "one stage that prepares the data, and 'mine' has prepare, more"),
    (
        "x: {encode: tfidf}\nt: {fit: sasrec, fusion: [{dual_view: {from: x, official_no_causal_mask: true}}]}",
        "t.fusion.dual_view' mixes all positions .*examples=prefixes, or last, or accept_visible_labels=true",
    ),
    ("t: {fit: sasrec, model: {official_no_causal_mask: true}}", "shows each position .*examples=prefixes, or accept_visible"),
    ("a: {fit: sasrec, encode: tfidf}", "Stage 'a' must have exactly one of .* it has fit, encode"),
    ("a: {model: {}}", "Stage 'a' must have exactly one of .* it has none"),
    ("a: {like: aa}", "Unknown stage in 'stages.a.like' 'aa'"),
    ("a: {fit: sasrec, modl: {}}", r"Unknown configuration key 'stages.a.modl'. Did you mean 'model'\?"),
    ("a: {fit: sasrec, model: {dims: 8}}", r"'stages.a.model.dims'. Did you mean 'dim'\?"),
    ("a: {fit: sasrec, trainer: {batchsize: 8}}", r"'stages.a.trainer.batchsize'. Did you mean 'batch_size'\?"),
    ("a: {fit: sasrek}", r"Unknown .*'sasrek'. Did you mean 'sasrec'\?"),
    ("a: {fit: llm_decoder, model: {layers: 1}}", "'stages.a.model.base' is missing"),
    ("a: {fit: llm_decoder, model: {base: '${teacher}', layers: 1}}", "'stages.a.items' is missing"),
    ("a: {fit: sasrec, callbacks: [{feature_distilation: {}}]}", r"Did you mean 'feature_distillation'\?"),
    ("a: {fit: sasrec, callbacks: [{deep_supervision: {block: 2}}]}", r"Did you mean 'blocks'\?"),
    (
        "a: {fit: sasrec, callbacks: [deep_supervision]}",
        r"'stages.a.callbacks\[0\]' is 'deep_supervision'. It must be a mapping, as {key: value}",
    ),
    ("a: {fit: sasrec, callbacks: [{deep_supervision: {}, alignment: {}}]}", r"'stages.a.callbacks\[0\]' must be one name"),
    ("a: {record: block_states, of: nobody}", "needs stage 'nobody'"),
    ("a: {record: block_states}", "'stages.a' is incomplete.*of"),
    ("a: {fit: sasrec, model: {layers: 3}}\nb: {record: block_states, of: a, blocks: 2}", "3 layers of stage 'a'"),
    ("a: {fit: sasrec, callbacks: [{distillation: {}}]}", "Unknown"),
    ("a: {fit: sasrec, items: prepare}", "stages.a.items"),
    ("a: {record: block_states, of: prepare}", "'prepare'"),
    ("t: {fit: sasrec}\na: {fit: sasrec, callbacks: [{feature_distillation: {from: t}}]}", "'t'"),
    ("a: {fit: sasrec, model: {layers: two}}\nb: {record: block_states, of: a, blocks: 2}", "layers"),
    ("t: {fit: sasrec}\na: {record: block_states, of: t, blocks: two}", "blocks"),
    ("t: {fit: sasrec}\na: {record: blockstates, of: t, blocks: 2}", "block_states"),
    ("t: {fit: sasrec}\na: {evaluate: test, of: [prepare]}", "'prepare'"),
    ("t: {fit: sasrec}\na: {evaluate: valid, of: [t]}", "test"),
    ("t: {fit: sasrec}\na: {export: [onxx], of: t}", "onnx"),
    ("t: {fit: sasrec}\na: {export: [onnx], of: prepare}", "'prepare'"),
    ("t: {fit: sasrec, optimizer: {lr: fast}}", r"stages.t.optimizer.lr"),
    ("t: {fit: sasrec, trainer: {accumulate_grad_batches: 2.5}}", r"stages.t.trainer.accumulate_grad_batches"),
    ("t: {fit: sasrec, trainer: {validate_every: 0}}", r"trainer.validate_every"),
    ("t: {fit: sasrec, sequences: {targets_per_user: -1}}", r"targets_per_user"),
    ("t: {fit: sasrec, optimizer: {warmup_steps: -1}}", r"warmup_steps"),
    ("t: {fit: sasrec, optimizer: {weight_decay: -1}}", r"optimizer.weight_decay is -1.0. It must be 0 or more"),
    ("t: {fit: sasrec, trainer: {limit_train_batches: 0}}", r"limit_train_batches is 0.* or null for all"),
    ("t: {fit: sasrec, trainer: {gradient_clip_val: -1}}", r"gradient_clip_val is -1.* or null for no limit"),
    ("t: {fit: sasrec, trainer: {gradient_clip_val: 0}}", r"gradient_clip_val is 0.* must be positive, or null for no limit"),
    ("t: {fit: sasrec, optimizer: {lr: .inf}}", r"stages.t.optimizer.lr' is inf. It must be a finite number"),
    ("t: {fit: sasrec, model: {init_std: .nan}}", r"stages.t.model.init_std' is nan"),
    (
        "t: {fit: sasrec, callbacks: [{ranking_distillation: {from: t, weights: {position: .nan}}}]}",
        r"stages.t.callbacks\[0\].ranking_distillation.weights.position' is nan. It must be a finite number",
    ),
    ("t: {fit: popularity, model: {dim: 3}}", r"'stages.t.model.dim'. It has no settings\.$"),
    ("t: {fit: sasrec, model: {dim: 0}}", r"'stages.t.model.dim' is 0. It must be at least 1"),
    ("t: {fit: sasrec, model: {heads: 0}}", r"'stages.t.model.heads' is 0"),
    ("t: {fit: sasrec, model: {dropout: 2}}", r"'stages.t.model.dropout' is 2.0. It is a share"),
    ("t: {fit: caser, model: {dropout: -0.5}}", r"'stages.t.model.dropout' is -0.5"),
    ("t: {fit: sasrec, sequences: {context: 8}}", r"sequences.context is 8.*below sequences.max_length, which is 8"),
    ("t: {fit: caser, sequences: {examples: prefixes, context: 2}}", r"context=2 has no effect .*examples=prefixes"),
    ("t: {fit: bert4rec, sequences: {context: 2}}", r"'stages.t': bert4rec .*hidden anywhere.*Leave sequences.context=2 out"),
    ("t: {fit: sasrec, loss: {negatives: 9}}", r"loss.negatives=9 has no effect with loss.kind=cross_entropy.*to 256"),
    ("t: {fit: sasrec, loss: {kind: bce, t: 0.5}}", r"loss.t=0.5 has no effect with loss.kind=bce.*choose loss.kind=gbce"),
    ("a: {encode: tfid}", "tfidf"),
]


@pytest.mark.parametrize(
    ("stages", "message"),
    BAD,
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, stages, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, "prepare: {prepare: interactions}\n" + stages)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.prepare.k_core=9", r"no settings of its own: stages.prepare.k_core.*data.KEY=VALUE"),
        ("stages.prepare.prepare=interaction", r"Unknown kind of data to prepare 'interaction'. Did you mean 'interactions'\?"),
        ("~stages.prepare", "one stage that prepares the data, and 'slmrec' has none"),
    ],
)
def test_what_is_said_of_the_data_is_not_said_of_the_stage_that_prepares_them(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        small(tmp_path, override)


def test_the_stage_that_prepares_the_data_may_have_any_name(tmp_path):
    stages = planned(tmp_path, "interactions: {prepare: interactions}\nfloor: {fit: popularity}")
    run(stages, None)
    assert [stage.done for stage in stages] == [True, True]


def test_repeat_of_an_unknown_stage(tmp_path):
    with pytest.raises(UserError, match=r"Unknown stage in 'repeat' 'studnet'. Did you mean 'student'\?"):
        small(tmp_path, "repeat=[studnet]")


@pytest.mark.parametrize("wrong", ["seeds=[]", "seeds=0", "seeds=[0,0]", "seeds=[a]", "seeds=[0,-1]", "seed=-1", "seed=x"])
def test_seeds_that_are_none(tmp_path, wrong):
    with pytest.raises(UserError, match=f"{wrong.partition('=')[0]} is .*whole number"):
        small(tmp_path, wrong)


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lit_llmers.running")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lit_llmers.running"]


def test_done_stages_are_skipped_and_said_to_be(tmp_path, lines):
    stages = small(tmp_path)
    ran = run(stages, "text")
    assert [stage.name for stage in ran] == ["prepare", "item_embeddings", "text"], "stage=NAME stops after it"
    assert [stage.name for stage in stages if stage.done] == ["prepare", "item_embeddings", "text"]
    assert sorted(path.name for path in (tmp_path / "slmrec" / "default").iterdir()) == sorted(
        stage.folder.name for stage in ran
    )
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    before = len(lines())
    run(small(tmp_path), "text")
    assert [line.split("(")[0].split() for line in lines()[before:]] == [
        [name, "done", "before,", "skipped"] for name in ("prepare", "item_embeddings", "text")
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps
    run(small(tmp_path, "stages.text.dim=4"), "text")
    assert [line.split()[:2] for line in lines()[-4:]] == [
        ["prepare", "done"],
        ["item_embeddings", "done"],
        ["text", "starts"],
        ["text", "done"],
    ]


def test_an_unknown_stage_to_stop_at(tmp_path):
    with pytest.raises(UserError, match=r"Unknown stage 'teachr'. Did you mean 'teacher'\?"):
        run(small(tmp_path), "teachr")
    assert not (tmp_path / "slmrec").exists()


def test_done_comes_last_and_holds_seconds_and_summary(tmp_path, monkeypatch):
    stages = small(tmp_path)
    prepare = stages[0]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_stage, "run", lambda stage: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(stages, "prepare")
    assert not prepare.done
    assert json.loads((prepare.folder / "config.json").read_text())["settings"]["source"] == "demo"
    run(stages, "prepare")
    done = json.loads((prepare.folder / "DONE").read_text())
    assert done["summary"] == prepare.summary
    assert prepare.summary["counts"]["users"] == 150
    assert done["seconds"] > 0
    newest = max((path.stat().st_mtime_ns, path.name) for path in prepare.folder.iterdir())
    assert newest[1] == "DONE"


def test_the_seconds_of_a_stage_are_those_of_all_its_starts_killed_or_moved(tmp_path, monkeypatch):
    stage = small(tmp_path)[0]
    kept = stage.folder / "seconds.json"
    monkeypatch.setattr("lit_llmers.running.EVERY", 0.05)

    def killed(stage) -> None:
        while not kept.is_file() or read_json(kept) < 0.5:
            time.sleep(0.01)
        shutil.copytree(stage.folder, tmp_path / "as it was", ignore=shutil.ignore_patterns(".*"))

    with monkeypatch.context() as patch:
        patch.setattr(prepare_stage, "run", lambda stage: killed(stage) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([stage], None)
    shutil.rmtree(stage.folder)
    shutil.copytree(tmp_path / "as it was", stage.folder)
    for path in stage.folder.rglob("*"):
        os.utime(path, (time.time() + 300_000,) * 2)  # copied, three days later
    run([stage], None)
    assert 0.5 < read_json(stage.folder / "DONE")["seconds"] < 60
    assert not kept.exists()


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / "stage-123" / "deep").mkdir(parents=True)
    places = [".run.json.5.tmp", "stage-123/.items.npy.123.tmp", "stage-123/deep/.shard-00001.npy.77.tmp"]
    for place in (*places, "stage-123/items.npy", "kept.tmp"):
        (tmp_path / place).write_bytes(b"half")
    with alone(tmp_path), pytest.raises(UserError, match="Another process"), alone(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["items.npy", "kept.tmp"]


def test_a_refused_process_removes_nothing(tmp_path):
    with alone(tmp_path):
        (tmp_path / ".run.json.5.tmp").write_bytes(b"being written")
        with pytest.raises(UserError, match="Another process"), alone(tmp_path):
            pass
        assert (tmp_path / ".run.json.5.tmp").exists()


def test_describe_is_json(tmp_path):
    described = json.loads(json.dumps(describe(small(tmp_path))))
    assert [entry["name"] for entry in described] == ALL
    assert described[5]["folder"] == f"student-seed0-{described[5]['fingerprint']}"


# ---- alone in the run folder -----------------------------------------------------------------------------------------

HOLD = """\
import sys
from pathlib import Path
from lit_llmers.processes.locks import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="Another process is working in .*run.name=OTHER"), alone(tmp_path / "run"):
        pass
    with alone(tmp_path / "another"):
        pass
    held.kill()  # the lock goes with the process, however it goes
    held.communicate()
    with alone(tmp_path / "run"):
        pass


def test_a_stage_waits_for_a_sibling_that_sweeps_its_folder(tmp_path, monkeypatch):
    """A job of the same run removes what was left half-written there, which takes a while on a slow file system."""
    (prepare,) = small(tmp_path, "stage=prepare")[:1]
    prepare.folder.mkdir(parents=True)
    (prepare.folder / ".items.npy.77.tmp").write_bytes(b"left by kill -9")
    sweeping = threading.Event()

    def remove_slowly(path):
        sweeping.set()
        time.sleep(0.5)
        remove(path)

    monkeypatch.setattr("lit_llmers.processes.locks.remove", remove_slowly)
    sibling = threading.Thread(target=sweep, args=(prepare.run.folder,))
    sibling.start()
    sweeping.wait()
    run([prepare], None)
    sibling.join()
    assert prepare.done


def test_what_a_sibling_removes_meanwhile_does_not_end_a_sweep(tmp_path, monkeypatch):
    real, half = os.scandir, tmp_path / "text-2" / "deep" / ".items.npy.77.tmp"
    for folder in (tmp_path / "student-1" / "wandb" / "gone", half.parent):
        folder.mkdir(parents=True)
    half.write_bytes(b"left by kill -9")

    def scandir(path):
        if (folder := tmp_path / path).name == "gone":
            folder.rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "student-1", "text-2", "wandb"]


def test_a_link_to_a_stage_that_is_gone_gives_way(tmp_path):
    """In a comparison, runs link the stages that others have done; one that is moved, or whose twin is removed, has none."""
    (prepare,) = small(tmp_path, "stage=prepare")[:1]
    prepare.folder.parent.mkdir(parents=True)
    prepare.folder.symlink_to("../twin/" + prepare.folder.name)
    run([prepare], None)
    assert prepare.done
    assert not prepare.folder.is_symlink()


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with (
        pytest.raises(UserError, match=r"run folder .*runs.* cannot be written.*run\.dir=FOLDER"),
        alone(tmp_path / "runs" / "slmrec"),
    ):
        pass


def test_a_run_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"), alone(tmp_path / "run"):
        pass


def test_the_plan_alone_writes_nothing(tmp_path):
    resolve(recipes.compose("slmrec", [f"run.dir={tmp_path / 'runs'}"]))
    assert not (tmp_path / "runs").exists()


def test_what_another_stage_left_is_not_read(tmp_path):
    """Where it was copied to the place of this one, or renamed."""
    mine, other = (by_name(small(tmp_path, f"stages.item_embeddings.model.dim={dim}")) for dim in (6, 4))
    copied, copy = other["item_embeddings"], mine["item_embeddings"]
    run(list(other.values()), "item_embeddings")
    shutil.copytree(copied.folder, copy.folder)
    message = (
        f"DONE has the fingerprint {copied.fingerprint}, stage 'item_embeddings' has {copy.fingerprint}. Remove the folder"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        run(list(mine.values()), "teacher")
    assert not (mine["teacher"].folder / "config.json").exists()
    shutil.rmtree(copy.folder)  # as the message says
    run(list(mine.values()), "item_embeddings")


def test_a_stage_keeps_the_commit_of_the_code_that_made_it(tmp_path, monkeypatch):
    (prepare,) = small(tmp_path, "stage=prepare")[:1]
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr("lit_llmers.environment.code", lambda: {"commit": next(commits), "dirty": False})
    for _ in range(2):
        run([prepare], None)
    assert read_json(prepare.folder / "DONE")["git"] == {"commit": "a" * 40, "dirty": False}
