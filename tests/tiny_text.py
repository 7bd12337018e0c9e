"""Tiny language models with tokenizers, as folders, and data sets with words in them."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 256}
ENCODER = SIZES | {"max_position_embeddings": 64}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
KINDS = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 4},
    "t5": T5,
}
WITH_CLS = ("bert", "roberta")  # <s> text </s>, as RoBERTa has them
TITLES = ["the", "red", "green", "blue", "wood", "metal", "glass", "lamp", "chair", "table", "cup", "story", "garden", "winter"]
PROMPTS = ["item", "is", "of", "category", "a", "A", "user", "chose", "these", "items", "oldest", "first", "."]
WORDS = [*TITLES, *PROMPTS, ",", ":", ";", "marker", *"0123456789"]


def save_model(kind: str, path: Path, headed: bool = False, seed: int = 0) -> Path:
    """A folder with the weights of a model and its tokenizer; `headed` adds a language-model head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    tokenizer = make_tokenizer(kind)
    special = {"pad_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **KINDS[kind], **special)
    torch.manual_seed(seed)
    (AutoModelForCausalLM if headed else AutoModel).from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_tokenizer(kind: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    if kind in WITH_CLS:
        frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        tokenizer.post_processor = frame
        special |= {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    else:  # decoders often have no padding token, and say that they pad on the left
        special |= {"bos_token": "<s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_data(folder: Path, items: int, users: int) -> list[str]:
    """Items with titles of one to nine words, the last one without any; users with three to eight items, and one with all.

    Returns:
        the titles.
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    titles = [" ".join(random.choice(TITLES, random.integers(1, 10))) for _ in range(items - 1)] + [""]
    catalogue = {"item_id": range(1, items + 1), "title": titles, "categories": ["wood"] * (items - 1) + [""]}
    pd.DataFrame(catalogue).to_parquet(folder / "items.parquet")
    chosen = [(user, random.choice(items, random.integers(3, 9)) + 1) for user in range(users)]
    rows = [(user, item, time) for user, own in chosen for time, item in enumerate(own)]
    rows += [(users, item, item) for item in range(1, items + 1)]  # so that every item occurs
    pd.DataFrame(rows, columns=["user_id", "item_id", "position"]).to_parquet(folder / "interactions.parquet")
    return titles
