"""Tiny bases on disk, as a user's local folder would hold them."""

from pathlib import Path

import pytest
import torch

SENTENCE = "Here is what a user chose so far oldest first Tell which item the will choose next Instruction Input Response"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
KINDS = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "qwen2": SIZES | {"num_key_value_heads": 2, "use_sliding_window": False},
    "mistral": SIZES | {"num_key_value_heads": 4, "sliding_window": 4},
}


@pytest.fixture(scope="session", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    """A causal language model of four layers with its head, and a tokenizer."""
    return save_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base"))


def save_base(kind: str, path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), initializer_range=0.2, **KINDS[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "#", ":", ",", ".", "\n", *sorted(set(SENTENCE.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
