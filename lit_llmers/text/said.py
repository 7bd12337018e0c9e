"""SAID: one vector for each item, from which a language model says the item's text.

Source: Hu et al., "Enhancing Sequential Recommendation via LLM-based Semantic Embedding Learning", WWW 2024 companion
(doi 10.1145/3589335.3648307): `-sum_t log p_LLM(w_t | projector(e_i), w_<t)` over the tokens of the text of item i, where a
table of vectors e and the projector are trained. No official code is known; what the paper leaves open is chosen here: the
projector is an MLP with one inner layer, the text ends with the end-of-text token, whose loss counts, and the language model
is frozen unless `train_base` is set.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones.items import item_embedding
from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, TrainingBatches
from lit_llmers.errors import UserError
from lit_llmers.processes.averages import part_of_mean
from lit_llmers.stages import Stage
from lit_llmers.teachers.base import BaseConfig, load_causal, load_tokenizer
from lit_llmers.teachers.language_model import kept_tokenizer
from lit_llmers.teachers.lora import with_lora
from lit_llmers.teachers.prompt import AFTER, BEFORE
from lit_llmers.teachers.wording import title_tokenizer
from lit_llmers.text.learning import Learner, learn
from lit_llmers.text.transformer import base_of

INSTRUCTION = "Here is an item. Say what is known about it."
IGNORED = -100  # label of a token that is not learnt
INIT_STD = 0.001  # small beside what is learned: two items are alike by their texts alone


@dataclass(frozen=True)
class Texts:
    """What is to be said of the items that have a text.

    Attributes:
        item: `[R]` items 1..n.
        tokens: R texts, each with its end.
        before, after: tokens around the vector.
    """

    item: np.ndarray
    tokens: list[list[int]]
    before: list[int]
    after: list[int]

    @property
    def lengths(self) -> np.ndarray:
        """`[R]` tokens of each text."""
        return np.array(list(map(len, self.tokens)), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.item)

    @classmethod
    def of(cls, texts: list[str], tokenizer: Any, max_tokens: int, prompt: bool | str) -> "Texts":
        """Texts as tokens, each cut to `max_tokens` with its end.

        Raises:
            UserError: there is no text, or the tokenizer has no end.
        """
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if end is None:
            raise UserError("The base's tokenizer has no end-of-text token, so no text would end. Choose another base.")
        ids = partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
        item = np.array([index for index, text in enumerate(texts, 1) if text], dtype=np.int64)
        if not len(item):
            raise UserError(f"The {len(texts)} item texts hold no word. Name text columns in the stage's fields.")
        said = ids([text for text in texts if text], split_special_tokens=True)["input_ids"]  # what a catalogue says is text
        frame: tuple[list[int], list[int]] = ([], [])
        if prompt:
            instruction = prompt if isinstance(prompt, str) else INSTRUCTION
            frame = (ids(BEFORE.format(instruction=instruction))["input_ids"], ids(AFTER)["input_ids"])
        before = frame[0] if start is None else [start, *frame[0]]
        return cls(item, [[*tokens[: max_tokens - 1], end] for tokens in said], before, frame[1])


class TextBatches(TrainingBatches):
    """Shuffled batches of items of like length; see `TrainingBatches` for how they go on.

    A batch has `row` `[B]`, `item` `[B]`, and `tokens` `[B, T]`, right-padded with `IGNORED`.
    """

    rows: Any

    def collate(self, index: np.ndarray) -> Batch:
        chosen = [self.rows.tokens[row] for row in index]
        padded = torch.full((len(chosen), max(map(len, chosen))), IGNORED)
        for row, tokens in enumerate(chosen):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        return {"row": torch.from_numpy(index), "item": torch.from_numpy(self.rows.item[index]), "tokens": padded}


class SoftTokens(Learner):
    """A table of item vectors and a projector that makes a token of each, before a causal language model.

    Args:
        model: of Hugging Face, or PEFT's wrapper around one; what of it has no gradient stays as it is.
        texts: what is said, and what stands around the vector.
        n_items: rows of the table but one.
    """

    def __init__(self, stage: Stage, model: Any, texts: Texts, n_items: int) -> None:
        super().__init__(stage)
        self.model, self.before, self.after = model, texts.before, texts.after
        dim, width = stage.config.dim, model.get_input_embeddings().weight.shape[1]
        self.items = item_embedding(n_items, dim, INIT_STD)
        self.projector = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))

    def token_losses(self, batch: Batch) -> Tensor:
        """The loss of every token of the texts, `[N]` float32, row by row."""
        labels = batch["tokens"]  # [B, T]
        embed, learnt = self.model.get_input_embeddings(), labels != IGNORED
        said = embed(labels.clamp(min=0))
        soft = self.projector(self.items(batch["item"]))[:, None].to(said.dtype)
        before, after = (embed(labels.new_tensor(ids).expand(len(labels), -1)) for ids in (self.before, self.after))
        x = torch.cat([before, soft, after, said], 1)
        mask = F.pad(learnt, (x.shape[1] - labels.shape[1], 0), value=True)
        from_the_token_before = {"logits_to_keep": labels.shape[1] + 1}
        out = self.model(inputs_embeds=x, attention_mask=mask.long(), use_cache=False, **from_the_token_before)
        return F.cross_entropy(out.logits[:, :-1][learnt].float(), labels[learnt], reduction="none")

    def loss(self, batch: Batch) -> Tensor:
        return part_of_mean(self.token_losses(batch), batch, self)


def base_with_seed(stage: Stage) -> BaseConfig:
    """The stage's base; one from scratch draws its weights from the stage's seed plus its own."""
    base = base_of(stage.config)
    return replace(base, seed=base.seed + stage.seed)


def tokenizer_of(stage: Stage, dataset: Dataset) -> Any:
    """The base's tokenizer, or the one that is kept with the stage, trained on the texts the first time."""
    config: EncodeStage = stage.config
    return load_tokenizer(base_of(config)) or kept_tokenizer(
        stage, lambda: title_tokenizer(dataset, config.fields, config.vocabulary)
    )


def said_vectors(stage: Stage, dataset: Dataset, texts: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors `[n+1, dim]` float32, zero for the padding and for items without text, and what they cost.

    Raises:
        UserError: the base cannot be had, or has too few positions.
    """
    config: EncodeStage = stage.config
    L.seed_everything(stage.seed, verbose=False)
    base, tokenizer = base_with_seed(stage), tokenizer_of(stage, dataset)
    said = Texts.of(texts, tokenizer, config.max_tokens, base.prompt)
    model: Any = load_causal(base, tokenizer)
    longest = len(said.before) + 1 + len(said.after) + config.max_tokens
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"The base '{base.name}' has {positions} positions, but stage '{stage.name}' needs {longest}. Lower max_tokens."
        )
    if not config.train_base:
        model.requires_grad_(False)
    elif base.lora:
        model = with_lora(model, base.lora)
    learner = SoftTokens(stage, model, said, dataset.n_items)
    batches = TextBatches(said, stage.config.trainer.batch_size, stage.seed)  # type: ignore[arg-type]
    throughput = learn(stage, learner, batches)
    table = np.zeros((dataset.n_items + 1, config.dim), np.float32)
    table[said.item] = learner.items.weight.detach().numpy()[said.item]
    tokens, seconds = throughput.rows * float(said.lengths.mean()), max(throughput.seconds, 1e-9)
    trainable = [parameter.numel() for parameter in learner.parameters() if parameter.requires_grad]
    return table / np.sqrt(np.mean(np.square(table[said.item]))), {
        "model": base.name,
        "trainable": sum(trainable),
        "vocabulary": len(tokenizer),
        "epochs": throughput.epochs,
        "tokens": round(tokens),
        "train_seconds": throughput.seconds,
        "tokens_per_second": tokens / seconds,
    }
