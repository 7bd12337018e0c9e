"""An LLM that reads a history of item vectors and scores items: E4SRec (arXiv 2312.02443) with SLMRec's head.

SLMRec: "Distilling Large Language Models into Small for Sequential Recommendation", ICLR 2025 (arXiv 2405.17890).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.items import copy_table
from lit_llmers.errors import UserError
from lit_llmers.teachers.base import BaseConfig, load_base
from lit_llmers.teachers.lora import add_lora
from lit_llmers.teachers.prompt import embed_prompt


class LLMDecoder(Backbone):
    """`instruction ++ W_in E[items] + b ++ response -> decoder -> W_score h_last`, scored against the same table E.

    The first `layers` layers of a Hugging Face decoder run on vectors, so its token table is dropped after the prompt's
    rows were taken from it, and there is no language-model head. With LoRA the base and the prompt are frozen, else all
    trains; the two projections always do. Padding lies to the left of all, is masked, and is not counted in positions.

    Args:
        item_table: `[n+1, d]`. Frozen, it is no part of the state dict: it belongs to the stage that made it.
        max_length: longest history.
        base: a `BaseConfig` or a mapping with its keys.
        layers: how many of the base's layers to keep.
        dropout: probability, on the item vectors.
        train_items: train the item table too.

    Raises:
        UserError: see `load_base`; or the base has too few positions for `max_length`.
    """

    items: Tensor  # type: ignore[assignment]
    before: Tensor
    after: Tensor

    def __init__(
        self,
        item_table: Tensor,
        max_length: int,
        base: BaseConfig | Mapping[str, Any],
        layers: int,
        dropout: float = 0.0,
        train_items: bool = False,
    ) -> None:
        super().__init__()
        config = BaseConfig.of(base)
        self.base, tokenizer = load_base(config, layers)
        self.layers, self.width, self.dim = layers, self.base.config.hidden_size, item_table.shape[1]

        table = item_table.detach().clone().float()
        table[0] = 0
        if train_items:
            self.items = nn.Parameter(table)
        else:
            self.register_buffer("items", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.input_proj = nn.Linear(self.dim, self.width)
        self.score = nn.Linear(self.width, self.dim, bias=False)

        empty = torch.empty(0, self.width, dtype=self.base.dtype)
        before, after = embed_prompt(self.base, tokenizer, config.prompt) if tokenizer else (empty, empty)
        for name, vectors in {"before": before, "after": after}.items():
            if tokenizer:
                self.register_parameter(name, nn.Parameter(vectors, requires_grad=config.lora is None))
            else:
                self.register_buffer(name, vectors, persistent=False)
        self.base.set_input_embeddings(None)  # type: ignore[arg-type]
        if config.lora:
            add_lora(self.base, config.lora)

        positions = getattr(self.base.config, "max_position_embeddings", None)
        needed = len(before) + max_length + len(after)
        if positions is not None and needed > positions:
            raise UserError(
                f"The base '{config.name}' has {positions} positions, but max_length={max_length} with the prompt "
                f"needs {needed}. Lower max_length or choose another base."
            )

    def embed(self, items: Tensor) -> Tensor:
        return F.embedding(items, self.items, padding_idx=0)

    def initialise(self, items: Tensor) -> None:
        copy_table(self.items, items)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if every_position and len(self.after):
            raise UserError(
                "With a prompt the response tokens come after the last item, so only one position of a row can be read."
                " Use examples=prefixes to train on every position, or teacher.prompt=false."
            )
        vectors = self.input_proj(self.dropout(x))  # [B, L, H]
        if len(self.before):
            vectors, mask = self._put_in_prompt(vectors, mask)
        states = self.base(
            inputs_embeds=vectors.to(self.base.dtype),
            attention_mask=mask,  # causality, and the fast path where nothing is padded, are the base's business
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        return list(states) if every_position else [state[:, -1:] for state in states]

    def _put_in_prompt(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, L, H]` and `[B, L]` to `[B, I+L+R, H]` and its mask: padding, instruction, items, response."""
        rows, length, _ = vectors.shape
        whole = torch.cat([self.before.expand(rows, -1, -1), vectors, self.after.expand(rows, -1, -1)], 1)
        column = torch.arange(whole.shape[1], device=mask.device)
        padding = length - mask.sum(1, keepdim=True)  # [B, 1]
        # until here padding is between instruction and items, where it would count in a sliding attention window
        source = torch.where(column < padding + len(self.before), (column - padding).clamp(min=0), column)
        return whole.gather(1, source[..., None].expand_as(whole)), column >= padding

    def head(self, state: Tensor) -> Tensor:
        return self.score(state.to(self.score.weight.dtype))

    def item_table(self) -> Tensor:
        return self.items

    def serving_size(self) -> int:
        frozen = 0 if isinstance(self.items, nn.Parameter) else self.items.numel()
        return super().serving_size() + frozen
