"""From what a tuned language model says to items: generation, and the distance of what was said to every title.

BIGRec (arXiv 2308.08434), its second step: `D_i = ||h(said) - h(title_i)||`, h the last token's state after the last
layer, and the smaller the better. What differs from the official code (SAI990323/BIGRec @bb4dd0a): the history is left out of
the ranking where others leave it out; items with the same title keep their own places and have the same distance, so they tie.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_llmers.conf.instruction import GenerationConfig, TuneStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch
from lit_llmers.preemption import stop_if_asked
from lit_llmers.ranking import Catalogue
from lit_llmers.students.recommender import Recommender
from lit_llmers.teachers.base import load_causal
from lit_llmers.teachers.language_model import base_of, build_language_model, load_tuned, load_wording, read
from lit_llmers.teachers.transcript import Transcript, said_in
from lit_llmers.teachers.wording import Wording, pad_left

if TYPE_CHECKING:
    from lit_llmers.stages import Stage

EMBEDDED = 64  # titles at a time
SAYS_TITLES = 0.5  # of the histories; with fewer the model is warned of

log = logging.getLogger(__name__)


class Trie:
    """All that may be said, as token lists with their end: which token may come next?"""

    def __init__(self, responses: Iterable[Sequence[int]], end: int) -> None:
        self.end, self.root = end, {}  # type: ignore[var-annotated]
        for tokens in responses:
            node = self.root
            for token in tokens:
                node = node.setdefault(token, {})

    def after(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that may follow; after a whole response, or what is none, the end."""
        node = self.root
        for token in tokens:
            node = node.get(token, {})
        return list(node) or [self.end]


@dataclass
class Work:
    """What generation cost: histories asked, tokens read in prompts and said by best beams, titles of the catalogue said.

    Attributes:
        read: 0 where a transcript of an older version does not say.
        before: of the seconds, those that an interrupted pass has spent.
    """

    asked: int = 0
    read: int = 0
    said: int = 0
    exact: int = 0
    seconds: float = 0.0
    before: float = 0.0

    @property
    def summary(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {
            "generated_titles": self.asked,
            "titles_per_second": self.asked / seconds,
            "tokens_per_second": self.said / seconds,
            "said_is_a_title": self.exact / max(self.asked, 1),
        } | ({"prompt_tokens_per_second": self.read / seconds} if self.read else {})

    def warn(self, who: str) -> None:
        """Say that a model says titles too rarely, where it does."""
        if self.asked and (exact := self.exact / self.asked) < SAYS_TITLES:
            log.warning(
                "%s says a title of the catalogue after only %.0f %% of the histories; after the others the nearest titles are "
                "taken. Tune it for longer or on more histories, or let it say nothing else (generation.constrained=true)",
                who,
                100 * exact,
            )


class GroundedRecommender(Recommender):
    """Ranks items by the distance of their titles to what a language model says after a history.

    Scores are negative distances. What was said after a history is remembered, so a second question about it costs nothing.
    Items without a title cannot be meant: they are as far as the farthest title could be, `||h(said)|| + max ||h(title)||`.

    Args:
        model: says titles; of Hugging Face, or PEFT's wrapper around one.
        wording: of its prompts.
        config: how it is asked.
        base: another model, which embeds in its place.

    Raises:
        UserError: see `Wording.new_tokens`.
    """

    def __init__(self, model: Any, wording: Wording, config: GenerationConfig, base: Any = None) -> None:
        super().__init__(model)
        self.base, self.wording, self.config = base, wording, config
        self.limit = wording.new_tokens(config, getattr(model.config, "max_position_embeddings", None))
        titles = [tuple(ids) for ids in wording.responses if len(ids) > 1]  # an item without a title has the end alone
        self.trie = Trie(titles, wording.end) if config.constrained else None
        self.known = set(titles)
        self.work = Work()
        self.transcript: Transcript | None = None
        self.titles = [tuple(wording.title(title)) for title in wording.titles[1:]]
        self.forget()

    def forget(self) -> None:
        """The model will change: what was said and embedded holds no longer, and leaves its device."""
        self.memory: dict[tuple[int, ...], str] = {}
        self.vector: dict[tuple[int, ...], Tensor] = {}

    def keep(self, path: Path, others: Iterable[Path] = ()) -> None:
        """Keep what is said from now on in a file, and take from it and the others what an interrupted pass has said."""
        self.transcript = Transcript(path, others)

    def kept(self, paths: Iterable[Path]) -> Work:
        """What it cost to say what is kept in these files: all of a pass, its interruptions and other processes included."""
        entries = said_in(paths).values()
        said = [ids for entry in entries for ids in entry["said"]]
        read = sum(entry["read"] for entry in entries) if all("read" in entry for entry in entries) else 0
        return Work(len(said), read, sum(map(len, said)), self._titles(said), sum(entry["seconds"] for entry in entries))

    def item_table(self) -> None:
        """There are none: the vectors of titles, which are many times wider, belong to the distance."""

    # ---- saying ----------------------------------------------------------------------------------------------------------

    def say(self, histories: Sequence[Sequence[int]]) -> list[str]:
        """What the model says after each history of items, oldest first."""
        keys = [tuple(items)[-self.wording.history :] for items in histories]
        new = list(dict.fromkeys(key for key in keys if key not in self.memory))
        prompts = self.wording.prompts(new) if new else []
        order = sorted(range(len(new)), key=lambda row: -len(prompts[row]))
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            for row, tokens in zip(rows, self.generate([prompts[row] for row in rows]), strict=True):
                self.memory[new[row]] = self.wording.said(tokens)
        return [self.memory[key] for key in keys]

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """The best beam after each prompt, as tokens up to its end.

        Raises:
            Stopped: this process was asked to stop, and what was said is kept.
        """
        found = self.transcript.find(prompts) if self.transcript else None
        if found is None:
            started = time.perf_counter()
            said = self._best_beams(prompts)
            seconds = time.perf_counter() - started
            if self.transcript:
                self.transcript.add(prompts, said, seconds)
                stop_if_asked()
        else:
            said, seconds = found
            self.work.before += seconds
        self.work.asked += len(prompts)
        self.work.read += sum(map(len, prompts))
        self.work.said += sum(map(len, said))
        self.work.exact += self._titles(said)
        self.work.seconds += seconds
        return said

    def _titles(self, said: Iterable[Sequence[int]]) -> int:
        """How many of these are titles of the catalogue."""
        return sum(tuple(ids) in self.known for ids in said)

    @torch.no_grad()
    def _best_beams(self, prompts: list[list[int]]) -> list[list[int]]:
        from transformers import GenerationConfig as Settings

        wording = self.wording
        tokens, mask = (each.to(self.backbone.device) for each in pad_left(prompts, wording.end))
        settings = Settings(
            num_beams=self.config.num_beams,
            max_new_tokens=self.limit,
            do_sample=False,
            pad_token_id=wording.end,
            eos_token_id=wording.end,
        )
        width = tokens.shape[1]
        trie = self.trie
        bound = {"prefix_allowed_tokens_fn": lambda _, so_far: trie.after(so_far[width:].tolist())} if trie else {}
        out = self.backbone.generate(input_ids=tokens, attention_mask=mask.long(), generation_config=settings, **bound)
        return [ids[: ids.index(wording.end) + 1] if wording.end in ids else ids for ids in out[:, width:].tolist()]

    # ---- grounding -------------------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """Titles as `Wording.title` gives them to `[T, D]` float64; equal ones get the very same vector, made once."""
        new = sorted({ids for ids in texts if ids not in self.vector}, key=len)
        for start in range(0, len(new), EMBEDDED):
            some = new[start : start + EMBEDDED]
            self.vector |= dict(zip(some, self._states([list(ids) for ids in some]), strict=True))
        return torch.stack([self.vector[ids] for ids in texts]).double()

    @torch.no_grad()
    def _states(self, tokens: list[list[int]]) -> Tensor:
        model = self.backbone if self.base is None else self.base
        ids, mask = (each.to(model.device) for each in pad_left(tokens, self.wording.end))
        with ExitStack() as stack:
            if self.config.embedder == "base" and self.base is None:
                stack.enter_context(model.disable_adapter())
            states = read(model, ids, mask, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return states[:, -1].clone()  # a view would keep the states of all positions

    def tables(self) -> Catalogue:
        """Vectors of all titles, such that a dot product with `vectors` is `||h(said)||^2 - D^2`, float64.

        They are `[2 h(title), -||h(title)||^2, 0]`, and of items without a title, m the largest norm, `[0, -m^2, -2 m]`.
        """
        titles = self.embed(self.titles)
        square = titles.square().sum(1, keepdim=True)
        titled = torch.tensor([bool(title) for title in self.wording.titles[1:]], device=titles.device)[:, None]
        largest = square[titled].max()
        table = torch.cat([2 * titles * titled, -square.where(titled, largest), -2 * largest.sqrt() * ~titled], 1)
        return Catalogue(torch.cat([table.new_zeros(1, table.shape[1]), table]))

    def vectors(self, batch: Batch, tables: Catalogue) -> tuple[Tensor, Catalogue]:
        """`[h(said), 1, ||h(said)||]` of each history in `items`, and the catalogue."""
        histories = [items[items > 0].tolist() for items in batch["items"].cpu()]
        said = self.embed([tuple(self.wording.title(text)) for text in self.say(histories)])
        return torch.cat([said, said.new_ones(len(said), 1), said.norm(dim=1, keepdim=True)], 1), tables

    def top_items(self, batch: Batch, k: int, tables: Catalogue | None = None) -> tuple[Tensor, Tensor]:
        """As in every recommender; the scores are negative distances."""
        items, scores = super().top_items(batch, k, tables)
        norm = self.vectors(batch, tables or self.tables())[0][:, -1:]  # remembered
        distance = (norm.square() - scores).clamp(min=0).sqrt()
        return items, torch.where(items > 0, -distance, scores)


def load_grounded(stage: "Stage", dataset: Dataset) -> GroundedRecommender:
    """The language model of a tune stage at its best validation epoch, ready to rank."""
    config: TuneStage = stage.config
    wording = load_wording(stage, dataset)
    model = build_language_model(stage, wording)
    load_tuned(model, stage.folder / "best.ckpt")
    base = base_of(stage)
    other = load_causal(base, wording.tokenizer) if config.generation.embedder == "base" and not base.lora else None
    return GroundedRecommender(model, wording, config.generation, other).eval()
