"""Texts to vectors through a resumable record, and the vectors to a table of the size and width that a stage asks for."""

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_llmers.errors import UserError
from lit_llmers.files import digest
from lit_llmers.preemption import stop_if_asked
from lit_llmers.processes import PATIENCE, Processes
from lit_llmers.processes.locks import alone
from lit_llmers.signals import MANIFEST, SHARD_BATCHES, SignalReader, SignalSpec, SignalWriter, shard_rows
from lit_llmers.text.tables import has_vector

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

    from lit_llmers.text.transformer import TextEncoder

NO_VARIANCE = 1e-7  # of the first component's: what has no more is noise, which whitening would blow up
log = logging.getLogger(__name__)


@dataclass
class Work:
    """What encoding cost; what the record already held is not in it."""

    texts: int = 0
    tokens: int = 0
    cut: int = 0
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        measured = {"texts": self.texts, "tokens": self.tokens, "cut_texts": self.cut, "encode_seconds": self.seconds}
        return measured | {"tokens_per_second": self.tokens / seconds, "texts_per_second": self.texts / seconds}


@dataclass
class Recorder:
    """Encodes lists of texts, each into a record of its own below `folder`.

    A record is named by the encoder and by all its texts, so it is found again by an interrupted pass, and by other encode
    stages of the run that ask the same encoder for the same texts and go on differently.

    Args:
        encoder: reads the texts.
        identity: names the encoder with its weights and settings.
        folder: of the records.
        label: of the stage, for progress lines.
        mine: the processes that encode together, each its own shards.
        signs: the folder in which they give signs of life.
    """

    encoder: "TextEncoder"
    identity: str
    folder: Path
    label: str
    mine: Processes
    signs: Path
    own: Work = field(default_factory=Work)

    def cost(self) -> dict[str, float]:
        """What it has cost all processes together, which must all ask; the seconds are this one's."""
        texts, tokens, cut = self.mine.total(self.own.texts, self.own.tokens, self.own.cut)
        return Work(texts, tokens, cut, self.own.seconds).summary

    def __call__(self, texts: list[str]) -> np.ndarray:
        """`n` texts to `[n, D]` float32; an empty text has a row of zeros. Equal texts are read once, and have equal rows."""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        split = digest(list(distinct))
        folder = self.folder / digest([self.identity, self.encoder.width, split])
        started = time.perf_counter()
        if self.mine.world > 1 or not (folder / MANIFEST).is_file():  # several meet there, whatever each of them sees now
            with alone(folder, patience=PATIENCE) if self.mine.first else nullcontext():
                self._fill(folder, split, list(distinct))
        self.own.seconds += time.perf_counter() - started
        rows = np.array([distinct[text] for text in texts], dtype=np.int64)
        return SignalReader(folder, verify=False, remove=folder)[rows].numpy()

    def _fill(self, folder: Path, split: str, texts: list[str]) -> None:
        """Encode what is missing, and leave when all is there."""
        batch, mine = self.encoder.config.batch_size, self.mine
        with mine.first_goes_first():
            per_shard = shard_rows(folder, len(texts), SHARD_BATCHES * batch, mine.world)
            spec = SignalSpec("text", len(texts), (self.encoder.width,), "float32", self.identity, split, per_shard)
            writer = SignalWriter(folder, spec)
        for rows in writer.missing(mine.rank, mine.world):
            tokens = self.encoder.tokens([texts[row] for row in rows])
            filled = [row for row in rows if texts[row] and tokens[row - rows.start]]
            self.own.cut += self._cut([texts[row] for row in filled if self._full(tokens[row - rows.start])])
            with writer.shard(rows) as shard:
                empty = np.setdiff1d(rows, filled)
                shard.write(empty, np.zeros((len(empty), self.encoder.width), np.float32))
                for chosen in _by_length(filled, [len(tokens[row - rows.start]) for row in filled], batch):
                    shard.write(chosen, self.encoder.vectors([tokens[row - rows.start] for row in chosen]))
            self.own.texts += len(filled)
            self.own.tokens += sum(len(tokens[row - rows.start]) for row in filled)
            log.info("%-24s %d of %d texts", self.label, rows.stop, len(texts))
            stop_if_asked()
        if mine.first:
            mine.wait(self.signs, lambda: not writer.missing(), "the texts of the others")
            writer.finish()
        else:
            mine.wait(self.signs, (folder / MANIFEST).is_file, "the texts of the others")

    def _full(self, tokens: list[int]) -> bool:
        return len(tokens) >= self.encoder.config.max_tokens

    def _cut(self, texts: list[str]) -> int:
        return int((self.encoder.lengths(texts) > self.encoder.config.max_tokens).sum())


def _by_length(rows: list[int], lengths: list[int], size: int) -> Iterable[np.ndarray]:
    """Batches of texts of about one length, the longest first, so that memory runs out at once or never."""
    order = np.asarray(rows, dtype=np.int64)[np.argsort(-np.asarray(lengths), kind="stable")]
    return (order[start : start + size] for start in range(0, len(order), size))


@dataclass(frozen=True)
class Projection:
    """Principal components, whitened or not, and one common factor.

    Whitening: Zhang et al., "Are ID Embeddings Necessary? Whitening Pre-trained Text Embeddings for Effective Sequential
    Recommendation", ICDE 2024 (arXiv 2402.10602), by principal components and in one group.
    """

    components: "PCA | None"
    factor: float

    @classmethod
    def fit(cls, vectors: np.ndarray, reduce: int | str | None, seed: int, whiten: bool = False) -> "Projection":
        """The projection of `vectors` `[n, D]` onto `reduce` components: `all` is min(n - 1, D), None leaves the vectors alone.

        Args:
            whiten: all components get one variance; those in which the vectors do not differ are not among `all`.

        The factor makes the mean square of the projected entries 1, so tables of all encoders have the same size.

        Raises:
            UserError: there are not so many components.
        """
        if reduce is None:
            return cls(None, _factor(vectors))
        from sklearn.decomposition import PCA

        possible, given = min(vectors.shape), f"{len(vectors)} texts with vectors of width {vectors.shape[1]}"
        number = max(1, min(len(vectors) - 1, vectors.shape[1])) if isinstance(reduce, str) else reduce
        if number > possible:
            raise UserError(f"reduce={reduce} is more than {given} can give. Choose reduce={possible} or less, or null.")
        exact = vectors.astype(np.float64) if whiten else vectors  # in float32 noise looks like a small variance
        components = PCA(number, whiten=whiten, random_state=seed).fit(exact)
        if whiten:
            variance = components.explained_variance_
            differ = int((variance > NO_VARIANCE * variance[0]).sum())
            if differ < (1 if isinstance(reduce, str) else reduce):
                raise UserError(
                    f"reduce={reduce} asks for more components to whiten than the {differ} in which {given} differ. "
                    "Lower it, or drop whiten."
                )
            if differ < number:
                components = PCA(differ, whiten=True, random_state=seed).fit(exact)
        return cls(components, _factor(components.transform(exact)))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """`[N, D]` to `[N, d]` float32; a row of zeros is no vector and stays so, and equal rows stay equal."""
        filled = has_vector(vectors)
        kept = vectors[filled]
        if self.components is not None:  # a matrix product rounds equal rows differently
            distinct, place = np.unique(kept, axis=0, return_inverse=True)
            kept = self.components.transform(distinct)[place.reshape(-1)]
        out = np.zeros((len(vectors), kept.shape[1]), np.float32)
        out[filled] = kept * self.factor
        return out


def _factor(vectors: np.ndarray) -> float:
    return 1 / (float(np.sqrt(np.mean(np.square(vectors, dtype=np.float64)))) or 1.0)
