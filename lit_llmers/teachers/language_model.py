"""A causal language model with its tokenizer, made for a stage that tunes it, and the tuned one read back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_llmers.conf.instruction import TuneStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.errors import UserError
from lit_llmers.files import readable, writable
from lit_llmers.processes import Processes
from lit_llmers.stages import Stage
from lit_llmers.teachers.base import BaseConfig, load_causal, load_tokenizer, without_load_report
from lit_llmers.teachers.lora import with_lora
from lit_llmers.teachers.wording import INSTRUCTION, Wording, title_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"  # folder of the stage


def read(model: Any, tokens: Tensor, mask: Tensor, **also: Any) -> Any:
    """Run the model on left-padded tokens; padding is masked and not counted in positions."""
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask.long(), position_ids=position, use_cache=False, **also)


def base_of(stage: Stage) -> BaseConfig:
    """The stage's base; one from scratch draws its weights from the stage's seed plus its own."""
    base = BaseConfig.of(stage.config.base)
    return replace(base, seed=base.seed + stage.seed)


def kept_tokenizer(stage: Stage, make: "Callable[[], PreTrainedTokenizerBase]") -> "PreTrainedTokenizerBase":
    """The tokenizer that is kept in the stage's folder; the first time it is made, by the first of several processes."""
    folder = stage.folder / TOKENIZER
    done, here = folder / "DONE", Processes.here().of(stage)
    if not done.is_file() and here.first:
        tokenizer = make()
        with writable(folder):
            tokenizer.save_pretrained(folder)
            done.touch()
        return tokenizer
    here.wait(stage.folder, done.is_file, f"the tokenizer of stage '{stage.label}'")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_wording(stage: Stage, dataset: Dataset) -> Wording:
    """The base's tokenizer, or the one that is kept with the stage, trained on the titles the first time.

    All titles of the catalogue shape that tokenizer; who chose them does not.
    """
    config: TuneStage = stage.config
    settings = config.fields, config.vocabulary, config.instruction or INSTRUCTION
    tokenizer = load_tokenizer(base_of(stage)) or kept_tokenizer(stage, lambda: title_tokenizer(dataset, *settings))
    return Wording(tokenizer, dataset, config)


def build_language_model(stage: Stage, wording: Wording) -> Any:
    """The language model before its training, with adapters where the base has `lora`.

    Raises:
        UserError: the base cannot be had, or has too few positions for the stage's prompts or what is said after them.
    """
    config, base = stage.config, base_of(stage)
    model = load_causal(base, wording.tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise UserError(
            f"The base '{base.name}' has {positions} positions, but max_tokens of stage '{stage.name}' is {config.max_tokens}. "
            f"Choose {positions} or less."
        )
    wording.new_tokens(config.generation, positions)  # now, and not when it is asked after its training
    return with_lora(model, base.lora) if base.lora else model


def save_language_model(stage: Stage, model: Any, wording: Wording, folder: Path) -> None:
    """Write what PEFT and transformers load by themselves: the weights, or with LoRA the adapter, and the tokenizer.

    An adapter is of no use without its base, so that of one from scratch is written beside it, as `base`. PEFT finds a base
    by its whole path in `adapter_config.json`: after a move, write the new one there, as `base_model_name_or_path`.
    """
    base = base_of(stage)
    place = Path(base.path) if base.path else folder / "base"
    with without_load_report(), writable(folder):
        if base.lora and not base.path:
            load_causal(base, wording.tokenizer).save_pretrained(place)
        if base.lora and place.is_dir():
            model.peft_config["default"].base_model_name_or_path = str(place.resolve())
        model.save_pretrained(folder)
        wording.tokenizer.save_pretrained(folder)


def load_tuned(model: Any, path: Path) -> None:
    """Put the weights of a checkpoint into a language model as `build_language_model` makes it."""
    with readable(path, path.parent):
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    saved = {name.removeprefix("model."): value for name, value in saved.items()}
    model.load_state_dict(model.state_dict() | saved)
