"""Overrides: what Hydra cannot read is read as text or named, and nobody else is blamed for it."""

import re

import pytest

from lit_llmers import recipes
from lit_llmers.composing.overrides import quoted, readable
from lit_llmers.errors import UserError


@pytest.mark.parametrize(
    "text", ["~/data", "/home/josé/data", "/data/run=3", "/data (old)/x", "it's", "a#b;!&<>", "C:\\x\\it's", "/a[b]{c}"]
)
def test_a_text_that_hydra_has_no_grammar_for_is_taken_as_it_stands(text):
    config = recipes.compose("student", ["data=ml-1m", f"data.root={text}", f"stages.student.note={text}"])
    assert (config["data"]["root"], config["stages"]["student"]["note"]) == (text, text)


@pytest.mark.parametrize("text", ["/data", "~/data", "a,b", "it's", "C:\\x", "a\\'b", "x\\", ""])
def test_what_is_quoted_is_read_as_that_text(text):
    assert recipes.compose("student", [f"run.dir={quoted(text)}"])["run"]["dir"] == text


def test_what_hydra_reads_is_left_to_it():
    for override in ("seeds=[0,1]", "trainer.max_epochs=3", "data.root='~/x'", "teacher.lora={rank: 4}", "~stages.export"):
        assert readable(override) == override
    assert recipes.compose("student", ["data.generator={users: 9}", "seeds=[1, 2]"])["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("override", "form"),
    [
        ("seeds=0,1", "Write a list as seeds=[A,B], and a text with quotes"),
        ("seeds=range(0,3)", "seeds=[A,B]"),
        ("stages.student.model.dim=32,64", "stages.student.model.dim=[A,B]"),
        ("data.root=/a,b", "\"data.root='/a,b'\""),
    ],
)
def test_several_values_are_named_with_the_forms_of_a_list_and_of_a_text(override, form):
    with pytest.raises(UserError, match=f"'{re.escape(override)}' stands for several runs.*{re.escape(form)}"):
        recipes.compose("student", ["data=ml-1m", override])


@pytest.mark.parametrize("override", ["seeds=[0,1", "stages.student.model={layers: [}", "data.root='~/x", "data..root=x"])
def test_what_cannot_be_read_is_named(override):
    with pytest.raises(UserError, match=f"'{re.escape(override)}' does not read as a value"):
        recipes.compose("student", ["data=ml-1m", "data.root=/data", override])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("traine.max_epochs=2", "trainer.max_epochs"),
        ("stag=prepare", "stage"),
        ("+seedz=[0,1]", "seed"),
        ("++trainr.max_epochs=2", "trainer.max_epochs"),
        ("~seedz", "seed"),
    ],
)
def test_the_key_that_is_wrong_is_blamed_and_not_one_that_no_yaml_spells_out(override, nearest):
    key = override.lstrip("+~").partition("=")[0]
    with pytest.raises(UserError, match=rf"Unknown configuration key '{key}'\. Did you mean '{nearest}'\?"):
        recipes.compose("student", ["data=ml-1m", "data.root=/data", "student.optimizer.lr=1", "stages.student.x=1", override])


def test_a_plus_before_a_key_that_a_dataclass_knows_changes_nothing():
    given = ["data.generator.users=9", "stages.student.trainer.batch_size=4", "student.model.sparse=true"]
    assert recipes.compose("student", [f"+{each}" for each in given]) == recipes.compose("student", given)


@pytest.mark.parametrize("override", ["~stages.student.callbacks.0", "~stages.student.fusion", "~stages.student.fit.dim"])
def test_what_is_not_there_cannot_be_deleted(override):
    with pytest.raises(UserError, match=rf"There is no '{override[1:]}' to delete\. Leave '{override}' out\."):
        recipes.compose("student", [override])
