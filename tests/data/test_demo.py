"""The generated catalogue: the same every time, and with a signal in order and in text."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lit_llmers.data import DataConfig, GeneratorConfig
from lit_llmers.data.sources import source_of
from lit_llmers.data.sources.demo import Demo
from lit_llmers.errors import UserError
from lit_llmers.prepare import build

SMALL = GeneratorConfig(users=1200, items=240, categories=6)


@pytest.fixture(scope="module")
def tables():
    return Demo(SMALL).load()


def test_the_same_every_time_and_another_with_another_seed(tables) -> None:
    again, other = Demo(SMALL).load(), Demo(replace(SMALL, seed=1)).load()
    pd.testing.assert_frame_equal(tables.interactions, again.interactions)
    pd.testing.assert_frame_equal(tables.items, again.items)
    assert not tables.items.equals(other.items)
    assert Demo(SMALL).fingerprint() == Demo(replace(SMALL)).fingerprint() != Demo(replace(SMALL, seed=1)).fingerprint()


def test_sizes_and_form(tables) -> None:
    assert tables.info["generated"]
    assert "generated" in tables.info["notes"][0]
    assert len(tables.items) == SMALL.items
    assert tables.items["title"].is_unique
    assert (tables.items[["categories", "text"]] != "").all().all()
    lengths = tables.interactions.groupby("user_id").size()
    assert len(lengths) == SMALL.users
    assert lengths.min() == SMALL.shortest
    assert lengths.max() <= SMALL.longest
    assert lengths.mean() == pytest.approx(SMALL.mean_length, rel=0.05)
    assert not tables.interactions.duplicated(["user_id", "item_id"]).any()


def test_series_are_read_in_order(tables) -> None:
    parts = tables.items["title"].str.extract(r"^(?P<series>.*), Part (?P<part>\d+)$").assign(item_id=tables.items["item_id"])
    rows = tables.interactions.merge(parts.dropna(), on="item_id", sort=False)
    part = rows["part"].astype(int)
    assert (part == rows.groupby(["user_id", "series"]).cumcount() + 1).all()
    assert 0.1 < (part > 1).sum() / len(tables.interactions) < 0.6


def test_interests_alternate_in_runs_of_the_users_own_length() -> None:
    tables = Demo(replace(SMALL, items=600, habit=1.0)).load()
    category = tables.items.set_index("item_id")["categories"].str.split(", ").str[1]
    regular, interests, lengths = 0, set(), set()
    for _, row in tables.interactions["item_id"].map(category).groupby(tables.interactions["user_id"]):
        starts = np.flatnonzero(np.append(True, row.to_numpy()[1:] != row.to_numpy()[:-1]))
        runs, names = np.diff(starts)[1:], row.to_numpy()[starts]  # the first and the last run may be cut short
        period = len(set(names))
        regular += len(set(runs)) <= 1 and all(names[period:] == names[:-period])
        interests.add(period)
        lengths.update(runs)
    assert regular / SMALL.users > 0.95  # a category that is used up breaks the rule
    assert interests >= {2, 3}
    assert lengths >= {1, 2, 3}


def test_text_names_the_attributes(tables) -> None:
    _, category, theme = tables.items["categories"].str.split(", ", expand=True).to_numpy().T
    assert len(set(category)) == SMALL.categories
    for text, name in zip(tables.items["text"], category, strict=True):
        assert name.lower().rstrip("s") in text or name in ("Cookery", "Animation"), text
    phrases = tables.items["text"].str.extract(r" about (.*?), made by ")[0]
    assert pd.DataFrame({"theme": theme, "phrase": phrases}).groupby("theme")["phrase"].nunique().eq(1).all()


def test_order_beats_popularity_and_more_than_the_last_item_counts(tables) -> None:
    """HR@10 of counts under leave-one-out: popularity, what follows the last item, what goes with any of the past."""
    dataset = build(tables, DataConfig(generator=SMALL))
    n = dataset.n_items + 1
    histories = np.split(dataset.items, dataset.offsets[1:-1])
    follows, together = np.zeros((n, n)), np.zeros((n, n))
    for history in histories:
        train = history[:-2]
        np.add.at(follows, (train[:-1], train[1:]), 1)
        together[np.ix_(train, train)] += 1
    popularity = dataset.popularity().astype(float)
    together /= np.sqrt(np.outer(popularity + 1, popularity + 1))

    def hit_rate(score) -> float:
        hits = 0
        for history in histories:
            past, target = history[:-1], history[-1]
            s = score(past).copy()
            s[past] = -1
            hits += (s > s[target]).sum() < 10
        return hits / len(histories)

    by_popularity = hit_rate(lambda past: popularity)
    by_last = hit_rate(lambda past: follows[past[-1]] + popularity / popularity.sum())
    by_all = hit_rate(lambda past: together[past].sum(axis=0))
    assert by_last > 2 * by_popularity
    assert by_all > 1.2 * by_last


def test_the_next_items_attributes_are_those_of_earlier_ones(tables) -> None:
    items = tables.items.set_index("item_id")
    attributes = items["categories"].str.split(", ", expand=True).set_axis(["department", "category", "theme"], axis=1)
    attributes["maker"] = items["text"].str.extract(r"made by (.*?)\.")[0]
    rows = tables.interactions.join(attributes, on="item_id")
    for name in ("category", "theme", "maker"):
        chance = (rows[name].value_counts(normalize=True) ** 2).sum()
        lags = [rows[name] == rows.groupby("user_id")[name].shift(k) for k in (1, 2, 3)]
        full = rows.groupby("user_id").cumcount() >= 3
        assert lags[0][full].mean() > 1.5 * chance, name
        assert np.any(lags, axis=0)[full].mean() > 1.5 * lags[0][full].mean(), name  # more is said further back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 20}, r"data\.generator\.items is 20"),
        ({"themes": 99}, r"data\.generator\.themes is 99.*between 1 and 14"),
        ({"shortest": 2}, "shortest"),
        ({"interests": 1}, r"data\.generator\.interests is 1"),
        ({"longest": 200}, r"data\.generator\.longest is 200"),
        ({"users": 0}, r"data\.generator\.users is 0\. It must be at least 1"),
        ({"users": -1}, r"data\.generator\.users is -1"),
        ({"longest_run": 0}, r"data\.generator\.longest_run is 0\. It must be at least 1"),
        ({"seed": -1}, r"data\.generator\.seed is -1\. It must be at least 0"),
        ({"series_share": 2.0}, r"data\.generator\.series_share is 2\.0\. It must be between 0 and 1"),
        ({"series_share": -1.0}, r"data\.generator\.series_share is -1"),
        ({"habit": 2.0}, r"data\.generator\.habit is 2"),
        ({"resume": float("nan")}, r"data\.generator\.resume is nan"),
        ({"drift": -0.1}, r"data\.generator\.drift is -0\.1"),
    ],
)
def test_impossible_parameters(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_of(DataConfig(generator=replace(SMALL, **change)))
