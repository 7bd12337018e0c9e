"""The generated catalogue: a shop that does not exist, with readers whose next item follows from meaning and order.

Items. Each belongs to a family, which is a single item or a series of three to six parts. A family has a category, a
theme, a style and a maker, all named in title, categories and description; so an item that few have bought says by its
text what it is like. Families are popular by Zipf's law.

Users. A user has two or three interests, each a category and a theme, and a habit: so many items of one interest in a
row, then the next interest, and round again. At each step

1. the interest at hand is the one that the habit names (or, seldom, any of the user's);
2. if the last item of that interest left a series unfinished, its next part comes with probability `resume`, however
   many items of other interests lie between;
3. otherwise a new family is begun: of the interest's category, drawn with log-odds for the interest's theme, for
   the maker of the last item in that interest, for the style of the very last item, and for popularity.

The interest's theme drifts to a neighbour now and then, so what is recent counts. No user has an item twice, and part
k+1 is never had before part k. To predict the next item one has to tell from the past which interest is due, find its
last item at whatever distance, and join that item's series, theme and maker with the style of another item; the last
item alone says little.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lit_llmers.data import Columns, GeneratorConfig
from lit_llmers.data.interactions import Tables, check_tables
from lit_llmers.data.sources.demo_words import CATEGORIES, MAKERS, STYLES, THEMES
from lit_llmers.data.table import Table
from lit_llmers.errors import UserError

VERSION = 1  # of the generator: a change that alters its output raises it


@dataclass(frozen=True)
class Catalogue:
    """Attributes of n items as codes, each `[n]` int64; `part` counts from 1 to `parts`, the length of the family."""

    family: np.ndarray
    part: np.ndarray
    parts: np.ndarray
    category: np.ndarray
    theme: np.ndarray
    style: np.ndarray
    maker: np.ndarray
    log_popularity: np.ndarray  # [n] float, of the family


@dataclass(frozen=True)
class Demo:
    """The generated data set; the same parameters give the same data."""

    parameters: GeneratorConfig

    def __post_init__(self) -> None:
        p = self.parameters
        for name, words in (("categories", CATEGORIES), ("themes", THEMES), ("styles", STYLES), ("makers", MAKERS)):
            if not 1 <= getattr(p, name) <= len(words):
                raise UserError(f"data.generator.{name} is {getattr(p, name)}. It must be between 1 and {len(words)}.")
        for name, least in (("users", 1), ("longest_run", 1), ("seed", 0)):
            if getattr(p, name) < least:
                raise UserError(f"data.generator.{name} is {getattr(p, name)}. It must be at least {least}.")
        for name in ("series_share", "habit", "resume", "drift"):
            if not 0 <= getattr(p, name) <= 1:
                raise UserError(f"data.generator.{name} is {getattr(p, name)}. It must be between 0 and 1.")
        if p.items < 4 * p.categories:
            raise UserError(
                f"data.generator.items is {p.items}. With {p.categories} categories it must be at least {4 * p.categories}."
            )
        if not 3 <= p.shortest <= p.mean_length <= p.longest:
            raise UserError("data.generator: shortest (at least 3), mean_length and longest must ascend.")
        if not 2 <= p.interests <= p.categories:
            raise UserError(f"data.generator.interests is {p.interests}. It must be between 2 and data.generator.categories.")
        if p.longest * 2 > p.items:
            raise UserError(f"data.generator.longest is {p.longest}. It must be at most half of data.generator.items.")

    def fingerprint(self) -> dict[str, Any]:
        return {"generator": asdict(self.parameters), "version": VERSION}

    def load(self) -> Tables:
        rng = np.random.default_rng(self.parameters.seed)
        catalogue = make_catalogue(self.parameters, rng)
        users, items = make_interactions(self.parameters, catalogue, rng)
        return self.describe(catalogue, users, items, rng)

    def describe(self, catalogue: Catalogue, users: np.ndarray, items: np.ndarray, rng: np.random.Generator) -> Tables:
        """Give the items their words and the interactions their ids: `[N]` user and item codes -> tables."""
        table = describe_items(catalogue, rng)
        position = np.arange(len(users)) - np.searchsorted(users, users)
        interactions = pd.DataFrame(
            {
                "user_id": np.array([f"U{u:05d}" for u in range(self.parameters.users)], dtype=object)[users],
                "item_id": table["item_id"].to_numpy()[items],
                "position": position,
            }
        )
        info = {"generated": True, "notes": ["The data are generated: no real user, item or maker is in them."]}
        origin = "the generated catalogue"
        return check_tables(Table.of(interactions, origin), Table.of(table, origin), Columns(), info=info)


def make_catalogue(p: GeneratorConfig, rng: np.random.Generator) -> Catalogue:
    """Draw families until there are `p.items` items; the order of items says nothing about them."""
    lengths: list[int] = []
    while sum(lengths) < p.items:
        series = rng.random() < p.series_share / (p.series_share + (1 - p.series_share) * 4.5)  # 4.5: mean parts of a series
        lengths.append(min(int(rng.integers(3, 7)) if series else 1, p.items - sum(lengths)))
    n, parts = len(lengths), np.array(lengths)
    category = rng.permutation(np.arange(n) % p.categories)
    theme = rng.integers(p.themes, size=n)
    style = rng.integers(p.styles, size=n)
    # a maker works in two categories: four makers (or fewer) stand behind each category
    maker = (category * 2 + rng.integers(4, size=n)) % p.makers
    popularity = -p.popularity * np.log1p(rng.permutation(n))
    family = np.repeat(np.arange(n), parts)
    part = np.arange(p.items) - np.repeat(np.cumsum(parts) - parts, parts) + 1
    order = rng.permutation(p.items)
    family, part = family[order], part[order]
    of = (parts[family], category[family], theme[family], style[family], maker[family], popularity[family])
    return Catalogue(family, part, *of)


def make_interactions(p: GeneratorConfig, c: Catalogue, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Let all users act step by step: user and item codes `[N]`, ordered by user and time."""
    n_users, n_items = p.users, p.items
    lengths = np.minimum(p.shortest + rng.geometric(1 / (p.mean_length - p.shortest + 1), n_users) - 1, p.longest)
    n_interests = rng.integers(2, p.interests + 1, n_users)
    category = rng.permuted(np.tile(np.arange(p.categories), (n_users, 1)), axis=1)[:, : p.interests]  # [U, I]
    theme = rng.integers(p.themes, size=(n_users, p.interests))
    run = rng.integers(1, p.longest_run + 1, n_users)
    start = rng.integers(0, run * n_interests)
    following = _next_parts(c)
    seen = np.zeros((n_users, n_items), bool)
    last_of = np.full((n_users, p.interests), -1)  # last item per interest
    last = np.full(n_users, -1)
    chosen = np.full((n_users, p.longest), -1)
    beginnings = c.part == 1
    for step in range(int(lengths.max())):
        u = np.flatnonzero(lengths > step)  # [A] users who go on
        interest = ((start[u] + step) // run[u]) % n_interests[u]
        strays = rng.random(len(u)) >= p.habit
        interest = np.where(strays, (rng.random(len(u)) * n_interests[u]).astype(int), interest)
        moves = rng.random(len(u)) < p.drift
        theme[u, interest] = (theme[u, interest] + moves * rng.choice((-1, 1), len(u))) % p.themes
        before = last_of[u, interest]
        part = np.where(before >= 0, following[before], -1)
        resumes = (part >= 0) & (rng.random(len(u)) < p.resume)
        odds = (
            c.log_popularity
            + p.theme_weight * (c.theme == theme[u, interest, None])
            + p.maker_weight * ((before >= 0)[:, None] & (c.maker == c.maker[before, None]))
            + p.style_weight * ((last[u] >= 0)[:, None] & (c.style == c.style[last[u], None]))
            - 8.0 * (c.category != category[u, interest, None])  # another category only when this one is used up
        )  # [A, n]
        odds[seen[u] | ~beginnings] = -np.inf
        begun = np.argmax(odds + rng.gumbel(size=odds.shape), axis=1)  # a draw from softmax(odds)
        item = np.where(resumes, part, begun)
        chosen[u, step] = last[u] = last_of[u, interest] = item
        seen[u, item] = True
    users = np.repeat(np.arange(n_users), lengths)
    return users, chosen[chosen >= 0]


def _next_parts(c: Catalogue) -> np.ndarray:
    """The item that is the next part of each item's series, or -1: `[n]`."""
    place = {(f, k): i for i, (f, k) in enumerate(zip(c.family, c.part, strict=True))}
    return np.array([place.get((f, k + 1), -1) for f, k in zip(c.family, c.part, strict=True)])


def describe_items(c: Catalogue, rng: np.random.Generator) -> pd.DataFrame:
    """Write title, categories and description of every item from its attributes; titles are unique."""
    taken: set[str] = set()
    names = []
    for f in range(c.family.max() + 1):
        i = int(np.flatnonzero(c.family == f)[0])
        theme, style = THEMES[c.theme[i]], STYLES[c.style[i]]
        pairs = [(a, b) for a in style.adjectives for b in theme.nouns]
        options = [f"The {a} {b}" for a, b in pairs]
        options += [f"{t} of {CATEGORIES[c.category[i]].title_word}" for t in options]
        options += [f"{t} by {MAKERS[c.maker[i]]}" for t in options]
        options += [f"{t} {number}" for number in range(2, 100) for t in options[: len(pairs)]]
        draw = [options[k] for k in rng.permutation(len(pairs))] + options[len(pairs) :]
        names.append(next(t for t in draw if t not in taken))
        taken.add(names[-1])
    rows = []
    for i in range(len(c.family)):
        category, theme, style, maker = (
            CATEGORIES[c.category[i]],
            THEMES[c.theme[i]],
            STYLES[c.style[i]],
            MAKERS[c.maker[i]],
        )
        name, part, parts = names[c.family[i]], c.part[i], c.parts[i]
        text = f"{style.phrase.capitalize()} {category.noun} about {theme.phrase}, made by {maker}."
        if parts > 1:
            text += f" Part {part} of {parts} of the series '{name}'."
        rows.append(
            {
                "item_id": f"I{i + 1:05d}",
                "title": f"{name}, Part {part}" if parts > 1 else name,
                "categories": f"{category.department}, {category.name}, {theme.name}",
                "text": text,
            }
        )
    return pd.DataFrame(rows)
