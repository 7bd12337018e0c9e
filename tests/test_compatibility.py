"""Recipes whose stages do not fit each other, which are refused before any of them runs."""

import pytest
from tiny import small

from lit_llmers.errors import UserError
from lit_llmers.stages import Stage

RECIPE = """\
# A teacher's word about each training target, for students of every kind.
defaults: [/base, /data: demo, /teacher: tiny-llama, /student: sasrec, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
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
            r"Set stages.student.sequences.targets_per_user=8, or per: user in stage 'lists'.",
        ),
        (
            ["stages.teacher.sequences.targets_per_user=0"],
            r"for all targets of.*Set stages.student.sequences.targets_per_user=0,",
        ),
        (
            ["stages.student.sequences.examples=last"],
            r"on the latest target of.*stages.student.sequences.examples=prefixes stages.student.sequences.targets_per_user=8,",
        ),
        (GRAPH, r"'student' trains on users, and none of their targets. Set per: user in stage 'lists'"),
        (
            ["stages.deep.sequences.max_length=5"],
            r"stage 'states' has.*'deep' trains on the latest 5.* Set stages.deep.sequences.targets_per_user=8.$",
        ),
        (
            ["stages.teacher={fit:bpr_mf,loss:{kind:bpr}}"],
            r"'teacher' cannot answer 'lists' after each training target.*per: user",
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
