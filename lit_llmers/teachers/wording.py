"""From histories to prompts and from titles to tokens, in our own words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_llmers.conf.instruction import GenerationConfig, TuneStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.errors import UserError
from lit_llmers.teachers.prompt import AFTER, BEFORE
from lit_llmers.text.prompts import item_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "These are the items that a user chose, one on a line, oldest first. Write the title of the next one."


class Wording:
    """How histories and titles become tokens.

    Args:
        tokenizer: of the language model.
        dataset: its catalogue has the titles; an item without one is left out of prompts and is never a response.
        config: of the stage.

    Attributes:
        titles: `[n+1]` texts, that of item 0 empty.
        sizes: `[n+1]` tokens of an item in a prompt, about.
        end: the token that ends a title, which is also what stands in the place of padding.
        longest: tokens of the longest response.

    Raises:
        UserError: no item has a title, a field is no column of the catalogue, or `max_tokens` leaves no room for any item in a
            prompt.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", dataset: Dataset, config: TuneStage) -> None:
        self.tokenizer, self.max_tokens = tokenizer, config.max_tokens
        self.history = min(config.history, config.sequences.max_length)
        self.instruction = config.instruction or INSTRUCTION
        self.titles = ["", *item_texts(dataset.catalogue, ["title"])]
        self.told = ["", *item_texts(dataset.catalogue, config.fields)]
        if not any(self.titles):
            raise UserError("No item has a title, so none can be said. Set data.columns.title to the column that names items.")
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if end is None:
            raise UserError("The base's tokenizer has no end-of-text token, so no title would end. Choose another base.")
        self.start, self.end = [] if start is None else [start], end
        self.sizes = np.array([0, *map(len, self._ids([told + "\n" for told in self.told[1:]]))], dtype=np.int64)
        self.responses = [[*ids, end] for ids in self._ids(self.titles)]
        self.longest = max(map(len, self.responses))
        self.room = min(self.longest, max(1, config.max_tokens // 2))  # that a prompt leaves for the response
        self.longest_prompt = config.max_tokens - self.room
        least = len(self.start) + len(self._ids([AFTER])[0]) + 1  # of an item its last token, and what comes after it
        if self.longest_prompt < least:
            raise UserError(
                f"max_tokens of the tune stage is {config.max_tokens}, which leaves no room for any item in a prompt. Choose "
                f"{min(least + self.longest, 2 * least - 1)} at the very least; an instruction and its items take some hundred."
            )

    def new_tokens(self, asked: GenerationConfig, positions: int | None) -> int:
        """How many tokens may be said after any prompt.

        Args:
            positions: of the language model, None where it has no bound; what is said after the longest prompt must fit too, so
                that what is said after another does not depend on those beside it.

        Raises:
            UserError: `max_new_tokens` is more than fits, or whole titles are asked for and one is longer.
        """
        most = None if positions is None else positions - self.longest_prompt
        limit, titles = asked.max_new_tokens or self.longest, f"The longest title of the catalogue takes {self.longest} tokens"
        if asked.max_new_tokens and most is not None and limit > most:
            raise UserError(
                f"generation.max_new_tokens is {limit}, but a prompt of max_tokens leaves {most} of the base's {positions} "
                f"positions. Choose {most} or less, or lower max_tokens."
            )
        if asked.constrained and limit < self.longest:
            raise UserError(
                f"{titles}, but generation.max_new_tokens is {limit}, and with generation.constrained whole titles are said. "
                f"Choose {self.longest} or more, or leave max_new_tokens out."
            )
        if asked.constrained and most is not None and most < self.longest:
            raise UserError(
                f"{titles}, but a prompt of max_tokens leaves {most} of the base's {positions} positions, and with "
                "generation.constrained whole titles are said. Lower max_tokens, shorten the title, or choose another base."
            )
        return limit if most is None else min(limit, most)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # whatever a catalogue says is text
        return self.tokenizer(texts, return_attention_mask=False, verbose=False, **plain)["input_ids"]

    def text(self, items: Sequence[int]) -> str:
        """The prompt for a history of items, oldest first."""
        told = "\n".join(self.told[item] for item in items if self.told[item])
        return BEFORE.format(instruction=self.instruction) + told + AFTER

    def prompts(self, histories: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts as tokens, each of the latest items that fit; a single item that does not fit loses its beginning."""
        kept = [list(items)[-self.history :] for items in histories]
        limit = self.longest_prompt - len(self.start)
        ids = self._ids([self.text(items) for items in kept])
        long = [row for row, tokens in enumerate(ids) if len(tokens) > limit]
        while long := [row for row in long if len(kept[row]) > 1 and len(ids[row]) > limit]:
            for row in long:
                kept[row].pop(0)
            for row, tokens in zip(long, self._ids([self.text(kept[row]) for row in long]), strict=True):
                ids[row] = tokens
        return [[*self.start, *tokens[-limit:]] for tokens in ids]

    def response(self, item: int) -> list[int]:
        """An item's title as tokens, with the end; one that is too long is cut."""
        return self.responses[item][: self.room]

    def title(self, text: str) -> list[int]:
        """A title by itself, as it is embedded: with the beginning of a text, without an end."""
        return [*self.start, *self._ids([text])[0][: self.max_tokens - len(self.start)]] or [self.end]

    def said(self, tokens: list[int]) -> str:
        """What was generated, up to its end, as a text."""
        stop = tokens.index(self.end) if self.end in tokens else len(tokens)
        as_it_stands = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(tokens[:stop], **as_it_stands)).strip()


def pad_left(tokens: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists of any lengths to `[B, L]` and its mask, padded before their beginning."""
    length = torch.tensor([len(ids) for ids in tokens])
    width = int(length.max())
    mask = torch.arange(width) >= width - length[:, None]
    return torch.full(mask.shape, pad).masked_scatter(mask, torch.tensor([token for ids in tokens for token in ids])), mask


def title_tokenizer(
    dataset: Dataset, fields: Sequence[str], vocabulary: int, instruction: str = INSTRUCTION
) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer trained on what prompts and responses say: nothing is unknown to it, nothing is downloaded.

    Args:
        fields: columns of the catalogue that prompts tell of; titles are read besides.
        vocabulary: its size at most; the 256 bytes and three special tokens are in it always.
        instruction: of the prompts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pad, start, end = "<pad>", "<s>", "</s>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[pad, start, end], initial_alphabet=alphabet, show_progress=False
    )
    frame = BEFORE.format(instruction=instruction) + AFTER
    told = item_texts(dataset.catalogue, list(dict.fromkeys(["title", *fields])))
    tokenizer.train_from_iterator([frame, *told], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, clean_up_tokenization_spaces=False
    )
