"""A small catalogue of titles, and language models that say them."""

from typing import Any

import torch
from tiny import dataset

from lit_llmers.conf.instruction import TuneStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.teachers.base import BaseConfig, load_causal
from lit_llmers.teachers.lora import with_lora
from lit_llmers.teachers.wording import Wording, title_tokenizer

TITLES = [
    f"{adjective} {noun}" for adjective in ("Red", "Old", "Wild", "Last", "Lost") for noun in ("River", "Sea", "City of Glass")
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
BASE = {"name": "tiny", "config": SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


def titled(histories: list[list[int]], titles: list[str] = TITLES, **settings: Any) -> Dataset:
    """A data set of these histories over items with these titles."""
    data = dataset(histories, len(titles), **settings)
    return Dataset(**{**vars(data), "catalogue": data.catalogue.assign(title=titles)})


def settings(**given: Any) -> TuneStage:
    return TuneStage(**{"tune": "bigrec", "base": BASE, "vocabulary": 320, "max_tokens": 256} | given)


def wording_of(data: Dataset, **given: Any) -> Wording:
    config = settings(**given)
    return Wording(title_tokenizer(data, config.fields, config.vocabulary), data, config)


def language_model(wording: Wording, lora: dict[str, Any] | None = None, **given: Any) -> Any:
    """Random weights, and with `lora` adapters that change nothing yet."""
    base = BaseConfig.of(BASE | {"lora": lora} | given)
    model = load_causal(base, wording.tokenizer)
    if base.lora:
        torch.manual_seed(1)
        model = with_lora(model, base.lora)
    return model.eval()


def as_if_tuned(model: Any) -> Any:
    """Other numbers in all that trains."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.6)
    return model
