"""Recipes whose stages do not fit each other, which are refused before any of them runs."""

from pathlib import Path

import pytest
from tiny import small

from lit_llmers import building
from lit_llmers.callbacks.embedding_distillation import EmbeddingDistillation
from lit_llmers.errors import UserError
from lit_llmers.stages import Stage

RECIPE = """\
# A teacher's word about each training target, for students of every kind.
defaults: [/base, /data: demo, /teacher: tiny-llama, /student: sasrec, /trainer: single, /logger: csv, _self_]
sequences: {targets_per_user: null}
stages:
  prepare: {prepare: interactions}
  text: {encode: tfidf, dim: 8, users: mean}
  teacher: {fit: sasrec, model: {dim: 8, layers: 1}}
  lists: {record: ranking, of: teacher, k: 7}
  states: {record: block_states, of: teacher, blocks: 1}
  student: {like: "${student}", callbacks: [{ranking_distillation: {from: lists}}]}
  deep: {fit: sasrec, model: {dim: 8, layers: 1}, callbacks: [{feature_distillation: {from: states}}]}
"""
GRAPH = ["student=lightgcn", "stages.student.callbacks=[{response_distillation:{from:lists}}]"]


def planned(folder, *overrides: str) -> list[Stage]:
    (folder / "mine.yaml").write_text(RECIPE)
    return small(folder, *overrides, recipe=str(folder / "mine.yaml"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student=caser"],  # in prefixes, of the same targets
        [
            "stages.student.sequences.examples=prefixes",
            "stages.student.sequences.max_length=4",
            "stages.student.sequences.targets_per_user=8",
        ],
        ["stages.teacher.sequences.examples=last", "sequences.targets_per_user=1"],
        [*GRAPH, "stages.lists.per=user"],
        ["stages.deep.sequences.max_length=5", "signals.online=true"],
        ["sequences.targets_per_user=0", "stages.student.sequences.max_length=5"],  # all of them, as recipes have it
    ],
    ids=" ".join,
)
def test_the_same_targets_however_rows_are_cut(overrides, tmp_path):
    assert planned(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.student.sequences.max_length=5"],
            r"'stages.student.callbacks.ranking_distillation.from': stage 'lists' has an answer for the latest 8 targets of a "
            r"user, as 'teacher' trains on, but 'student' trains on the latest 5 targets of a user. "
            r"Set stages.student.sequences.targets_per_user=8, or stages.lists.per=user.",
        ),
        (
            ["stages.teacher.sequences.targets_per_user=0"],
            r"for all targets of.*Set stages.student.sequences.targets_per_user=0,",
        ),
        (
            ["stages.student.sequences.examples=last"],
            r"on the latest target of.*stages.student.sequences.examples=prefixes stages.student.sequences.targets_per_user=8,",
        ),
        (GRAPH, r"'student' trains on users, and none of their targets. Set stages.lists.per=user"),
        (
            ["stages.deep.sequences.max_length=5"],
            r"stage 'states' has.*'deep' trains on the latest 5.* Set stages.deep.sequences.targets_per_user=8.$",
        ),
        (
            ["stages.teacher={fit:bpr_mf,loss:{kind:bpr}}"],
            r"'teacher' cannot answer 'lists' after each training target.*Set stages.lists.per=user",
        ),
        (
            ["stages.teacher.fit=bert4rec", "stages.lists.per=user"],
            r"'teacher' cannot answer 'states' after.*Record another one",
        ),
    ],
)
def test_other_targets_are_refused_with_a_cure(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("{ranking_distillation:{from:lists,temperature:0}}", "ranking_distillation: temperature is 0.0. It must be positive"),
        ("{ranking_distillation:{from:lists,temperature:-1}}", "ranking_distillation: temperature is -1.0. It must be"),
        ("{ranking_distillation:{from:lists,loss:bse}}", "'bse'.*'bce'"),
        ("{response_distillation:{from:lists,temperature:0}}", "response_distillation: temperature is 0"),
        (
            "{response_distillation:{from:lists,offset:nan}}",
            r"callbacks\[0\].response_distillation.offset' is nan",
        ),
        ("{ranking_distillation:{from:lists,weight:inf}}", "ranking_distillation.weight' is inf. It must be a finite number"),
        ("{ranking_distillation:{from:lists,weights:{position:nan}}}", "ranking_distillation.weights.position' is nan"),
        ("{alignment:{from:text,temperature:-1}}", "alignment: temperature is -1"),
        ("{embedding_distillation:{from:text,map:liner}}", "'liner'.*'linear'"),
        ("{self_distillation:{from:text,kind:soft_clip,temperature:0}}", "self_distillation: temperature is 0"),
        ("{sequence_contrast:{temperature:0}}", "sequence_contrast: temperature is 0"),
        ("{deep_supervision:{blocks:2,share:0}}", "deep_supervision: share is 0"),
        ("{deep_supervision:{blocks:1}}", "Stage 'student': deep_supervision: blocks is 1, so there is no inner block"),
        ("{alignment:{kind:mmd,projector:none}}", "Stage 'student': alignment: there is nothing to align the items with"),
        (
            "{ranking_distillation:{from:lists,k:9}}",
            "'stages.student.callbacks.ranking_distillation.k' is 9, but the lists of stage 'lists' have 7 items. Lower it, or "
            "set stages.lists.k=9",
        ),
        ("{response_distillation:{from:lists,k:8}}", "response_distillation.k' is 8, but the lists of stage 'lists' have 7"),
    ],
)
def test_a_callback_s_settings_are_refused_before_its_teacher_is_trained(callback, message, tmp_path):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, f"stages.student.callbacks=[{callback}]")


def test_what_only_the_student_tells_is_refused_as_early(tmp_path):
    """A fusion without two views, and signals of two encoders."""
    fused = ["+stages.student.fusion=[{frozen_adapter:{from:text}}]", "stages.student.callbacks=[{alignment:{kind:mmd}}]"]
    with pytest.raises(UserError, match="Stage 'student': alignment: there is nothing to align the items with"):
        planned(tmp_path, *fused)
    assert planned(tmp_path, fused[0].replace("frozen_adapter", "concat"), fused[1])
    of_two = ["student=lightgcn", "stages.student.callbacks=[{alignment:{from:teacher,users:text}}]"]
    with pytest.raises(UserError, match="signals have 12 numbers and the users' 8. Encode both with the same encoder"):
        planned(tmp_path, *of_two, "stages.teacher.model.dim=12")
    assert planned(tmp_path, *of_two)


def test_a_width_that_nobody_knows_yet_refuses_nothing(tmp_path):
    wide = ["stages.text.reduce=all", "student.model.dim=12"]
    assert planned(tmp_path, *wide, "stages.student.callbacks=[{alignment:{from:text,projector:none}}]")
    callback = "[{alignment:{from:teacher,users:text}}]"
    assert planned(tmp_path, *wide, "student=lightgcn", f"stages.student.callbacks={callback}")


def test_rehearsed_loss_terms_take_no_memory(tmp_path, monkeypatch):
    built = []
    plain = EmbeddingDistillation.build
    monkeypatch.setattr(EmbeddingDistillation, "build", lambda self, student: built.append(plain(self, student)) or built[-1])
    assert planned(tmp_path, "stages.student.callbacks=[{embedding_distillation:{from:text,kind:topology}}]")
    assert {weight.device.type for weight in built[0].parameters()} == {"meta"}


def test_vectors_that_a_stage_does_not_leave_are_refused_before_it_runs(tmp_path):
    graph = ["student=lightgcn", "stages.student.callbacks=[{masked_reconstruction:{from:text}}]"]
    message = (
        "callbacks.masked_reconstruction.from' needs vectors of users, but stage 'text' leaves none. Set stages.text.users"
    )
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *graph, "stages.text.users=null")
    assert planned(tmp_path, *graph)
    counted = [
        "stages.teacher.fit=popularity",
        "~stages.teacher.model",
        "stages.student.callbacks=[{alignment:{from:teacher}}]",
    ]
    with pytest.raises(UserError, match="callbacks.alignment.from' needs vectors of items, but stage 'teacher' leaves none"):
        planned(tmp_path, *counted)


def test_a_source_is_one_stage_by_its_name(tmp_path):
    message = r"ranking_distillation.from' is \['lists'\]. It takes the name of one stage: a record stage \(record: ranking\)"
    with pytest.raises(UserError, match=message):
        planned(tmp_path, "stages.student.callbacks=[{ranking_distillation:{from:[lists]}}]")


@pytest.mark.parametrize("view", ["noise", "edge_dropout"])
def test_a_callback_of_a_graph_is_refused_as_early(view, tmp_path):
    callback = f"[{{graph_contrast:{{view:{view},temperature:0}}}},{{masked_reconstruction:{{from:text}}}}]"
    with pytest.raises(UserError, match="graph_contrast: temperature is 0"):
        planned(tmp_path, "student=lightgcn", f"stages.student.callbacks={callback}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.student.model.heads=3"], "Stage 'student': SASRec's dim=8 cannot be cut into heads=3"),
        (["student=caser", "stages.student.model.window=0"], "Caser's window is 0"),
        (["+stages.student.fusion=[{dual_view:{from:text,heads:3}}]"], "dual_view cannot cut .*dim=8 into heads=3"),
        (
            ["sequences.examples=last", "+stages.student.fusion=[{frequency:{from:text,cosine_temperature:0}}]"],
            "frequency's cosine_temperature is 0",
        ),
        (["+stages.student.fusion=[{frozen_adapter:{from:text,layers:0}}]"], "A text adapter's layers is 0"),
        (["+stages.student.fusion=[{concat:{from:text}},{popularity_gate:{from:text}}]"], "Let it stand alone in 'fusion'"),
    ],
)
def test_a_student_s_and_a_fusion_s_settings_are_refused_as_early(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, "stages.student.callbacks=[]", "student.model.dim=8", *overrides)


@pytest.mark.parametrize(
    ("student", "key", "values", "bound"),
    [
        ("sasrec", "init_std", (-0.1, 0), "positive"),
        ("lightgcn", "init_std", (-1, 0.0), "positive"),
        ("sasrec", "ffn", (-1, 0), "at least 1"),
        ("bert4rec", "ffn", (0,), "at least 1"),
        ("caser", "horizontal", (-1, 0), "at least 1"),
        ("caser", "vertical", (-1, 0), "at least 1"),
        ("bpr-mf", "reg", (-1, -0.01), r"0 \(no effect\) or more"),
        ("mixgcf", "reg", (-1e-4,), r"0 \(no effect\) or more"),
    ],
)
def test_a_number_that_makes_no_model_or_one_that_cannot_learn_is_refused(student, key, values, bound, tmp_path):
    for value in values:
        with pytest.raises(UserError, match=rf"'stages.student.model.{key}' is {value}.*It must be {bound}"):
            small(tmp_path, f"student={student}", f"student.model.{key}={value}", recipe="student")


@pytest.mark.parametrize("value", [-0.2, 0.0])
def test_a_temperature_that_is_not_positive_is_refused(value, tmp_path):
    with pytest.raises(UserError, match=f"AlphaRec's temperature is {value}. It must be positive"):
        small(tmp_path, f"stages.student.model.temperature={value}", recipe="alpharec")


def test_a_constructor_that_needs_its_sources_waits_for_them(tmp_path, monkeypatch):
    def reads(self, items, weight=1.0):
        self.first = items[3]

    monkeypatch.setattr(EmbeddingDistillation, "__init__", reads)
    assert planned(tmp_path, "stages.student.callbacks=[{embedding_distillation:{from:text}}]")


def test_every_callback_can_be_made_before_anything_runs(tmp_path, caplog):
    """With its own defaults, whatever it reads."""
    caplog.set_level("DEBUG", "lit_llmers.composing.compatibility")
    fitting = {"graph_contrast": "lightgcn", "masked_reconstruction": "lightgcn"}
    source = {"ranking": "{from:lists}", "signals": "{from:states}", "items": "{from:text}", "users": "{from:text}"}
    for file in Path(building.__file__).with_name("callbacks").glob("*.py"):
        if (cls := building._class("callbacks", file.stem)) is not None:
            given = source[next(iter(cls.sources))] if cls.sources else "{}"
            given = given if file.stem != "deep_supervision" else "{blocks:2}"
            overrides = [f"student={fitting.get(file.stem, 'sasrec')}", "stages.lists.per=user"]
            assert planned(tmp_path, *overrides, f"stages.student.callbacks=[{{{file.stem}:{given}}}]"), file.stem
    assert not caplog.messages


@pytest.mark.parametrize(
    "added",
    [
        "stages.student.callbacks=[{self_distillation:{from:text}}]",
        "stages.student.callbacks=[{sequence_contrast:{}}]",
        "+stages.student.fusion=[{frequency:{from:text}}]",
    ],
)
def test_what_reads_whole_rows_refuses_a_student_that_hides_items_before_anything_runs(added, tmp_path):
    given = ["student=bert4rec", "stages.student.callbacks=[]", "sequences.examples=last", added]
    with pytest.raises(UserError, match="reads whole histories, but BERT4Rec .*student=sasrec"):
        planned(tmp_path, *given)


def test_a_callback_that_does_not_fit_names_students_that_do(tmp_path):
    with pytest.raises(UserError, match="self_distillation' does not fit BPRMF. It needs a student that reads"):
        planned(tmp_path, "student=bpr-mf", "stages.student.callbacks=[{self_distillation:{from:text}}]")
    with pytest.raises(UserError, match="graph_contrast' does not fit SASRec. It needs LightGCN or what is built on it"):
        planned(tmp_path, "stages.student.callbacks=[{graph_contrast:{}}]")


@pytest.mark.parametrize(
    "callback",
    ["{embedding_distillation:{from:text,map:none}}", "{alignment:{from:text,projector:none}}"],
)
def test_vectors_of_two_widths_that_nothing_maps_are_refused_before_anything_runs(callback, tmp_path):
    added = f"stages.student.callbacks=[{callback}]"
    message = "compares vectors as they are, but those of 'student' have 12 numbers and those of 'text' 8"
    with pytest.raises(UserError, match=message):
        planned(tmp_path, added, "student.model.dim=12")
    assert planned(tmp_path, added, "student.model.dim=8")
    assert planned(tmp_path, added.replace("none", "linear"), "student.model.dim=12")


@pytest.mark.parametrize(
    ("fusion", "wide"), [("frozen_adapter", 12), ("concat", 12), ("dual_view", 24), ("popularity_gate", 36)]
)
def test_the_width_of_what_a_fusion_leaves_is_known_before_anything_runs(fusion, wide, tmp_path):
    teacher = [
        "stages.teacher.model.dim=12",
        f"+stages.teacher.fusion=[{{{fusion}:{{from:text}}}}]",
        "~stages.states",
        "~stages.deep",
    ]
    compared = "stages.student.callbacks=[{embedding_distillation:{from:teacher,map:none}}]"
    with pytest.raises(UserError, match=f"those of 'student' have 8 numbers and those of 'teacher' {wide}"):
        planned(tmp_path, *teacher, compared, "student.model.dim=8")
    assert planned(tmp_path, *teacher, compared, f"student.model.dim={wide}")
    aligned = "stages.student.callbacks=[{alignment:{from:teacher,projector:none}}]"
    with pytest.raises(UserError, match=f"those of 'student' have 8 numbers and those of 'teacher' {wide}"):
        planned(tmp_path, *teacher, aligned, "student.model.dim=8")
    copied = ["stages.student.callbacks=[]", "+stages.student.initial={items:teacher,reduce:null}"]
    message = (
        f"'stages.student.initial' copies vectors as they are, but those of 'teacher' have {wide} numbers and the item table"
    )
    with pytest.raises(UserError, match=f"{message} of 'student' 8. Set stages.student.initial.reduce=pca"):
        planned(tmp_path, *teacher, *copied, "student.model.dim=8")
    assert planned(tmp_path, *teacher, *copied, f"student.model.dim={wide}", "+stages.student.fusion=[{dual_view:{from:text}}]")
    cut = ["stages.student.callbacks=[]", "+stages.student.initial={items:teacher,reduce:variance}"]
    assert planned(tmp_path, *teacher, *cut, f"student.model.dim={wide}")
    message = (
        f"columns of the item table of 'student', but those of 'teacher' have {wide}. Set stages.student.model.dim={wide} or"
    )
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *teacher, *cut, f"student.model.dim={wide + 1}")


def test_a_teacher_cannot_stand_beside_a_student_that_asks_for_lists(tmp_path):
    online = ["signals.online=true", "~stages.deep"]
    assert planned(tmp_path, *online), "its states are asked for"
    with pytest.raises(
        UserError, match="signals.online=true has no effect: stage 'lists' records lists.*Leave signals.online out"
    ):
        planned(tmp_path, *online, "~stages.states")


@pytest.mark.parametrize("callback", ["ranking_distillation", "response_distillation"])
@pytest.mark.parametrize("per", ["target", "user"])
def test_a_student_that_fills_gaps_reads_no_list(callback, per, tmp_path):
    given = ["student=bert4rec", f"stages.lists.per={per}", f"stages.student.callbacks=[{{{callback}:{{from:lists}}}}]"]
    with pytest.raises(
        UserError, match=r"after all of a user's, but BERT4Rec .* a user's list leaves out every item that stood"
    ):
        planned(tmp_path, *given)


def test_vectors_of_users_need_a_student_that_has_users(tmp_path):
    aligned = "stages.student.callbacks=[{alignment:{from:text,users:text}}]"
    message = r"'stages.student.callbacks.0.alignment.users' has no effect: SASRec has no table of users. Leave it out, as "
    with pytest.raises(UserError, match=message + "stages.student.callbacks.0.alignment.users=null"):
        planned(tmp_path, aligned)
    assert planned(tmp_path, aligned, "stages.student.callbacks.0.alignment.users=null")
    assert planned(tmp_path, aligned, "student=lightgcn")
    shipped = ["student=sasrec", "stages.student.callbacks.0.alignment.users=null"]
    assert small(tmp_path, *shipped, recipe="rlmrec-con")
