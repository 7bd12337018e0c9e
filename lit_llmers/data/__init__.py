"""From a public or local data set to ordered, split interactions. The settings of that way are here."""

from dataclasses import dataclass, field

from lit_llmers.conf.typed import ADDED
from lit_llmers.errors import UserError, unknown

SPLITS = ("leave-one-out", "temporal", "given")
ORIGINS = ("attributes", "interactions")
SOURCES = ("demo", "movielens", "amazon", "folder")


@dataclass
class Columns:
    """Which column of the tables plays which part. `null` takes the first of the usual names that is there.

    Attributes:
        user, item: the ids; the item's column has the same name in both tables unless `catalogue_item` says otherwise.
        time: seconds, milliseconds, dates (ISO 8601) or an order number, ascending; usual names `timestamp`, and where there
            is no other that may be a time `position`. Beside a time a `position` orders what a user did at one time.
        rating: read only with `data.min_rating`.
        split: read only with `data.split=given`; train, valid (val, validation) or test.
        title: the item's title.
        categories: one or more columns, joined by commas; lists and `|` become commas.
        text: one or more columns with descriptions, joined by blanks. `[]` takes none.
    """

    user: str = "user_id"
    item: str = "item_id"
    catalogue_item: str | None = None
    time: str | None = None
    rating: str = "rating"
    split: str = "split"
    title: str = "title"
    categories: list[str] | None = None
    text: list[str] | None = None


@dataclass
class GeneratorConfig:
    """The generated catalogue and its readers (see `lit_llmers.data.sources.demo` for the model).

    Attributes:
        users, items: how many of each; the catalogue has at least four items per category.
        categories, themes, styles, makers: how many values each attribute of an item takes.
        series_share: share of the items that are parts of a series, read in order.
        shortest, mean_length, longest: items per user; geometric above the shortest, cut at the longest.
        interests: a user alternates between 2 and so many interests (a category and a theme each).
        longest_run: a user stays with an interest for 1 to so many items in a row; the number is a habit of the user.
        habit: probability that a step follows the alternation; otherwise the interest is drawn anew.
        resume: probability that the series left unfinished in the interest at hand goes on with its next part.
        drift: probability per item that the interest's theme moves to a neighbouring one.
        theme_weight, maker_weight, style_weight: log-odds that a new item shares the interest's theme, the maker of
            the last item in that interest, the style of the last item of all.
        popularity: exponent of Zipf's law over series and single items.
        seed: of the whole generator.
    """

    users: int = 2000
    items: int = 600
    categories: int = 12
    themes: int = 12
    styles: int = 8
    makers: int = 24
    series_share: float = 0.6
    shortest: int = 8
    mean_length: float = 16.0
    longest: int = 40
    interests: int = 3
    longest_run: int = 3
    habit: float = 0.9
    resume: float = 0.75
    drift: float = 0.1
    theme_weight: float = 2.5
    maker_weight: float = 1.5
    style_weight: float = 1.0
    popularity: float = 0.8
    seed: int = 0


@dataclass
class DataConfig:
    """One data set and how it is filtered and split.

    Attributes:
        name: of the data set, and of its folder below `root`.
        source: demo, movielens, amazon (both: from `root` or from the publisher) or folder (`path`).
        root: FOLDER that holds `<name>/interactions.*` and `<name>/items.*`.
        path: the folder of `data=local`.
        category: of the Amazon Reviews 2023 on the Hugging Face hub.
        columns: names in the tables of `root` and `path`.
        split: leave-one-out (the last item of a user tests, the one before validates), temporal (two moments, the same for
            all users, part training, validation and test; needs times, not positions) or given (column `split`).
        quantiles: of the times of all interactions, for the two moments of the temporal split.
        k_core: keep users and items with at least so many interactions, until all have them. 0: no filter.
        min_interactions: users with fewer are dropped.
        min_rating: interactions rated lower are dropped. null: ratings are not read.
        texts: texts that an LLM wrote, to be read besides: names of files beside the interactions, `llm_item_NAME` (texts of
            items, columns of the catalogue) or `llm_user_NAME` (texts of users).
        made_from: what is known of texts of items by name, `attributes` of the items or `interactions` of users, where no file
            beside them says it: see `lit_llmers.data.texts`.
    """

    name: str = "demo"
    source: str = "demo"
    root: str | None = None
    path: str | None = None
    category: str | None = None
    columns: Columns = field(default_factory=Columns)
    split: str = "leave-one-out"
    quantiles: list[float] = field(default_factory=lambda: [0.8, 0.9])
    k_core: int = 0
    min_interactions: int = 3
    min_rating: float | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    texts: list[str] = field(default_factory=list, metadata=ADDED)
    made_from: dict[str, str] = field(default_factory=dict, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise unknown("data.source", self.source, SOURCES)
        if self.split not in SPLITS:
            raise unknown("data.split", self.split, SPLITS)
        if len(self.quantiles) != 2 or not 0 < self.quantiles[0] < self.quantiles[1] < 1:
            raise UserError(f"data.quantiles is {self.quantiles}. It must be two ascending shares, such as [0.8,0.9].")
        if self.k_core < 0:
            raise UserError(f"data.k_core is {self.k_core}. It must be 0 (no filter) or a number of interactions.")
        least = 3 if self.split == "leave-one-out" else 1
        if self.min_interactions < least:
            raise UserError(
                f"data.min_interactions is {self.min_interactions}. With data.split={self.split} it must be at least "
                f"{least}{': one item each to train, validate and test' if least == 3 else ''}."
            )
        for name in self.texts:
            if not name.startswith(("llm_item_", "llm_user_")):
                raise UserError(f"data.texts has '{name}'. A file of texts is called llm_item_NAME or llm_user_NAME.")
        if len(set(self.texts)) < len(self.texts):
            raise UserError(f"data.texts is {self.texts}. It names a text twice.")
        for name, origin in self.made_from.items():
            if not name.startswith("llm_item_"):
                raise UserError(
                    f"data.made_from has '{name}'. It is about texts of items, llm_item_NAME; those of users count as leaking."
                )
            if origin not in ORIGINS:
                raise unknown(f"origin of a text (data.made_from.{name})", str(origin), ORIGINS)
