"""What language models are made of, without their weights: from a folder, from the cache, or known by name."""

from dataclasses import replace
from typing import Any

from lit_llmers.teachers.base import READ, BaseConfig


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


def _qwen2(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    sizes = _llama(hidden, inner, layers, heads, groups, vocabulary, 32768)
    return sizes | {"model_type": "qwen2", "tie_word_embeddings": tied}


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    sizes = _llama(hidden, inner, layers, heads, 8, 151936, 40960)
    return sizes | {"model_type": "qwen3", "tie_word_embeddings": tied, "head_dim": 128}


# the sizes that these models' own config.json publishes on the Hugging Face hub
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "huggyllama/llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, 131072) | {"tie_word_embeddings": True, "head_dim": 64},
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, 131072) | {"tie_word_embeddings": True, "head_dim": 128},
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral"},
    "Salesforce/SFR-Embedding-Mistral": _llama(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral"},
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "bert-base-uncased": {"model_type": "bert"},  # the class's defaults
    "google-bert/bert-base-uncased": {"model_type": "bert"},
    "BAAI/bge-large-en-v1.5": {
        "model_type": "bert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "sentence-transformers/all-mpnet-base-v2": {"model_type": "mpnet"},
}


class Missing(Exception):
    """Something that the plan of a stage needs is not known; the message says what."""


def architecture(path: str, revision: str | None = None) -> dict[str, Any]:
    """Settings of the Hugging Face configuration of a folder, or of a model of the hub, without asking the hub.

    A file that an older version wrote may hold settings that its architecture no longer knows: they are left out.

    Raises:
        Missing: it is neither in a folder or the cache nor known here.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        if path in PUBLISHED:
            return dict(PUBLISHED[path])
        raise Missing(
            f"the sizes of '{path}': its config.json is not on this machine. Fetch it with `hf download {path} config.json`"
        ) from None
    known = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if key in known or key in READ}


def on_paper(base: BaseConfig) -> BaseConfig:
    """The base as one that is built from its configuration: the same sizes, no weights to be read.

    Raises:
        Missing: see `architecture`.
    """
    if base.path is None:
        return base
    return replace(base, path=None, revision=None, config=architecture(base.path, base.revision))


def prompt_tokens(base: BaseConfig) -> int:
    """Tokens of the prompt around a history, about: three and a half letters each, and the beginning."""
    if not base.path or not base.prompt:
        return 0
    from lit_llmers.teachers.prompt import AFTER, BEFORE, INSTRUCTION

    instruction = base.prompt if isinstance(base.prompt, str) else INSTRUCTION
    return 1 + round(len(BEFORE.format(instruction=instruction) + AFTER) / 3.5)
