"""How long a catalogue's texts are in tokens, without the tokenizer: about so many letters each."""

import math

import numpy as np

from lit_llmers.conf.stages import TuneStage
from lit_llmers.planning.data import Known
from lit_llmers.teachers.wording import INSTRUCTION

LETTERS = 3.5  # of a token, about
FRAME = 15  # tokens around an instruction, about


def mean_tokens(known: Known, columns: list[str], most: int) -> float | None:
    """Tokens of an item's text on average, each cut at `most`; None where the texts are not known."""
    letters = _letters(known, columns)
    return None if letters is None else float(np.minimum(letters / LETTERS, most).mean())


def example_tokens(known: Known, config: TuneStage) -> tuple[float, int] | None:
    """Tokens of a tune stage's prompt and response on average, and of the longest response; None where they are not known."""
    told, title = _letters(known, config.fields), _letters(known, ["title"])
    if told is None or title is None:
        return None
    frame = FRAME + len(config.instruction or INSTRUCTION) / LETTERS
    mean = frame + (config.history * told.mean() + title.mean()) / LETTERS
    longest = math.ceil(title.max() / LETTERS)
    return min(float(mean), config.max_tokens), max(1, min(config.max_tokens // 2, longest))


def _letters(known: Known, columns: list[str]) -> np.ndarray | None:
    """`[n]` letters of each item's text."""
    if not known.exact:
        return None
    catalogue = known.dataset.catalogue
    return np.sum([catalogue[name].str.len().to_numpy() + 2 for name in columns if name in catalogue], 0)
