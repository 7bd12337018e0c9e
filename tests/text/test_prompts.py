"""Texts of items and of users' training histories, worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from tiny import dataset

from lit_llmers.data.dataset import TEST, TRAIN, VALID
from lit_llmers.errors import UserError
from lit_llmers.text.prompts import check_prompt, history_texts, item_texts

CATALOGUE = pd.DataFrame(
    {
        "item_id": ["1", "2", "3", "4"],
        "title": ["Red {lamp}", " Cup ", "", ""],
        "categories": ["Home, Light", "", "Books", ""],
        "text": ["Bright.", "", "", "Only this"],
    }
)


def words(texts: list[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def test_fields_are_joined_and_empty_ones_left_out():
    found = item_texts(CATALOGUE, ["title", "categories", "text"])
    assert found == ["Red {lamp}. Home, Light. Bright.", "Cup", "Books", "Only this"]
    assert item_texts(CATALOGUE, ["title"]) == ["Red {lamp}", "Cup", "", ""]


def test_a_prompt_is_filled_and_an_item_without_any_of_its_fields_has_no_text():
    found = item_texts(CATALOGUE, ["title", "categories", "text"], "The item {title} is of category {categories}.")
    assert found == [
        "The item Red {lamp} is of category Home, Light.",
        "The item Cup is of category .",
        "The item  is of category Books.",
        "",
    ]


def test_an_unknown_column():
    with pytest.raises(UserError, match=r"Unknown catalogue column \(fields\) 'titel'. Did you mean 'title'"):
        item_texts(CATALOGUE, ["titel"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Item {titel}", r"Unknown field in braces \(stages\.text\.prompt\) 'titel'. Did you mean 'title'"),
        ("Item {title.__class__}", r"'title\.__class__'"),
        ("Item {title!r}", r"has a format for 'title'. Write \{title\} alone"),
        ("Item {title:>9}", r"has a format for 'title'. Write \{title\} alone"),
        ("Item {}", "''"),
        ("Item {title", "'stages.text.prompt' is no prompt"),
        ("Item", "nothing in braces"),
    ],
)
def test_a_prompt_that_cannot_be_filled(prompt, message):
    with pytest.raises(UserError, match=message):
        check_prompt(prompt, ["title", "text"], "stages.text.prompt")
    check_prompt("{title} {{as such}}", ["title"], "stages.text.prompt")


def people(titles: list[str]):
    """u0 chose 1, 2, 3, 1 in training, then 4 and 5; u1 chose 5, 2, then 1, 3; u2 has one training item, without title."""
    part = [TRAIN] * 4 + [VALID, TEST]
    made = dataset([[1, 2, 3, 1, 4, 5], [5, 2, 1, 3], [6, 1, 2]], 6, [part, [0, 0, 1, 2], [0, 1, 2]])
    made.catalogue["title"] = titles
    return made


TITLES = ["one", "two", "three", "four", "five", ""]


def test_titles_of_training_items_oldest_first():
    found = history_texts(people(TITLES), words, 99, "Chose {history} .")
    assert found == ["Chose one; two; three; one .", "Chose five; two .", ""]
    assert history_texts(people(TITLES), words, 99, None)[1] == "A user chose these items, oldest first: five; two."


@pytest.mark.parametrize(
    ("limit", "first"),
    [(5, "two; three; one"), (4, "three; one"), (3, "one"), (2, "one"), (1, "one"), (6, "one; two; three; one")],
)
def test_the_latest_that_fit(limit, first):
    found = history_texts(people(TITLES), words, limit, "Chose {history} .")
    assert found[0] == f"Chose {first} ."


def test_the_limit_holds_where_tokens_of_parts_do_not_add_up():
    """A tokenizer that needs one more token for each pair of neighbours than for the two alone."""

    def more(texts: list[str]) -> np.ndarray:
        return words(texts) + np.array([text.count("; ") for text in texts])

    found = history_texts(
        people(TITLES), lambda texts: more([text.removesuffix("; ") for text in texts]), 6, "Chose {history} ."
    )
    assert found[0] == "Chose three; one ."
    assert more(found).max() <= 6


def test_tokens_around_every_text_count_once():
    def framed(texts: list[str]) -> np.ndarray:
        return words([text.replace(";", " ;") for text in texts]) + 2

    for limit, first in ((11, "one; two; three; one"), (10, "two; three; one"), (8, "three; one"), (7, "three; one")):
        assert history_texts(people(TITLES), framed, limit, "Chose {history} .")[0] == f"Chose {first} ."


def test_a_long_title_is_left_to_the_encoder_to_cut():
    titles = ["a very long title indeed", "two", "three", "four", "five", ""]
    assert history_texts(people(titles), words, 4, "Chose {history} .")[0] == "Chose a very long title indeed ."


def test_held_out_titles_reach_no_text():
    titles = ["one", "two", "three", "marker", "five", ""]
    assert not any("marker" in text for text in history_texts(people(titles), words, 99, None))
    titles = ["one", "two", "marker", "four", "five", ""]
    assert ["marker" in text for text in history_texts(people(titles), words, 99, None)] == [True, False, False]
