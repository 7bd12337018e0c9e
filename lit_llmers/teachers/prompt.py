"""The prompt around a history, as in E4SRec (arXiv 2312.02443): instruction ++ item vectors ++ response."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTRUCTION = "Here is what a user chose so far, oldest first. Tell which item the user will choose next."
BEFORE = "### Instruction:\n{instruction}\n\n### Input:\n"
AFTER = "\n\n### Response:\n"


def embed_prompt(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: bool | str) -> tuple[Tensor, Tensor]:
    """Vectors of the tokens before the items, beginning with BOS where the base has one, and of those after them.

    Args:
        model: has the table of token vectors.
        tokenizer: of that table.
        prompt: an instruction, or True for the default one.

    Returns:
        `[I, H]` and `[R, H]`.
    """
    instruction = prompt if isinstance(prompt, str) else INSTRUCTION
    before = tokenizer(BEFORE.format(instruction=instruction), add_special_tokens=False)["input_ids"]
    after = tokenizer(AFTER, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id, *before]
    embed: Any = model.get_input_embeddings()
    with torch.no_grad():
        return embed(torch.tensor(before, device=embed.weight.device)), embed(torch.tensor(after, device=embed.weight.device))
