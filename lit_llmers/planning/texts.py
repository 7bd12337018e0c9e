"""How long a catalogue's texts are in tokens, without the tokenizer: about so many letters each."""

import math
from dataclasses import dataclass

import numpy as np

from lit_llmers.conf.instruction import TuneStage
from lit_llmers.planning.data import Known
from lit_llmers.teachers.wording import INSTRUCTION

LETTERS = 3.5  # of a token, about
FRAME = 15  # tokens around an instruction, about


@dataclass(frozen=True)
class Lengths:
    """Tokens of texts, about: `mean`, and of the `longest`; `said` of the longest title, where a model says titles."""

    mean: float
    longest: int
    said: int = 0


def item_lengths(known: Known, columns: list[str], most: int) -> Lengths | None:
    """How long items' texts are, each cut at `most`; None where they are not known."""
    letters = _letters(known, columns)
    if letters is None:
        return None
    tokens = np.clip(letters / LETTERS, 1, most)
    return Lengths(float(tokens.mean()), math.ceil(tokens.max()))


def example_lengths(known: Known, config: TuneStage) -> Lengths | None:
    """How long a tune stage's prompts are with their responses; None where texts are not known."""
    told, title = _letters(known, config.fields), _letters(known, ["title"])
    if told is None or title is None:
        return None
    frame = FRAME + len(config.instruction or INSTRUCTION) / LETTERS
    mean, longest = (frame + (config.history * of(told) + of(title)) / LETTERS for of in (np.mean, np.max))
    said = max(1, min(config.max_tokens // 2, math.ceil(title.max() / LETTERS)))
    return Lengths(min(float(mean), config.max_tokens), min(math.ceil(longest), config.max_tokens), said)


def _letters(known: Known, columns: list[str]) -> np.ndarray | None:
    """`[n]` letters of each item's text."""
    if not known.exact:
        return None
    catalogue = known.dataset.catalogue
    return np.sum([catalogue[name].str.len().to_numpy() + 2 for name in columns if name in catalogue], 0)
