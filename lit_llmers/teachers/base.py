"""An LLM base: its configuration, and loading its first layers."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_llmers.conf.schema import BASE_DTYPES, EXAMPLES
from lit_llmers.conf.typed import build
from lit_llmers.errors import UserError, nearest, unknown
from lit_llmers.files import sha256
from lit_llmers.teachers.lora import LoraConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
DTYPES = {name: getattr(torch, name) for name in BASE_DTYPES}
READ = ("head_dim", "partial_rotary_factor")  # by models whose configuration does not name them
_ELSEWHERE: ContextVar[bool] = ContextVar("elsewhere", default=False)
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, settings and words; not the words about them
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class BaseConfig:
    """Which LLM, in which precision, and how it learns.

    Attributes:
        name: what reports call it.
        path: a local folder or a hub id; None builds the model from `config` with random weights.
        revision: branch, tag or commit on the hub.
        config: settings of a Hugging Face configuration when built from scratch; `model_type` defaults to llama.
        seed: of the random weights when built from scratch.
        dtype: of the base's weights: float32, bfloat16 or float16. Those that train are float32 meanwhile, see
            `lit_llmers.callbacks.float32`; with trainer.precision=bf16-mixed their products are in half.
        attention: Hugging Face's `attn_implementation`, or a kernel of the hub as `OWNER/NAME`; None lets it choose.
        gradient_checkpointing: recompute layers in the backward pass, to save memory.
        lora: adapters on a frozen base; None trains the whole base.
        prompt: False for item vectors alone, True for the default instruction around them, or an instruction. A base
            without a tokenizer gets item vectors alone.
        examples: the training examples that suit it: sequence, prefixes or last.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    attention: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    prompt: bool | str = False
    examples: str = "sequence"

    @classmethod
    def of(cls, settings: "BaseConfig | Mapping[str, Any]", where: str = "teacher") -> "BaseConfig":
        """The configuration itself, or one made from a mapping such as a recipe's `teacher` section.

        Args:
            where: the key under which the mapping stands, for messages.

        Raises:
            UserError: a key or a choice is unknown, `name` is missing, or `path` is written as a folder's and there is none.
        """
        if isinstance(settings, BaseConfig):
            return settings
        base = build(cls, settings, where)
        for key, known in (("dtype", BASE_DTYPES), ("examples", EXAMPLES), ("attention", ATTENTIONS)):
            choice = getattr(base, key)
            if choice not in known and not (key == "attention" and (choice is None or "/" in choice)):
                raise unknown(f"{where}.{key}", choice, known)
        return replace(base, path=located(base.path, f"the base '{base.name}' ({where}.path)")) if base.path else base


def located(path: str, what: str) -> str:
    """Where a model is, as its loaders take it: a folder, `~` expanded, or a name on the hub.

    Args:
        what: the model, for the message.

    Raises:
        UserError: it begins as a folder does and there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path[:1] in "./~":
        raise UserError(f"There is no folder {folder}, {what}. Correct it, or name a model of the hub.")
    return path


def content_of(base: BaseConfig) -> dict[str, Any]:
    """What names a base besides its settings: checksums of its files, if they are in a folder.

    A checkpoint leaves frozen weights out, so what was trained on one base would else be loaded on another.
    """
    return {"base": checksums(Path(base.path))} if base.path and Path(base.path).is_dir() else {}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's files by name, each read once in a process."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _CONTENT]
    return {path.name: _checksum(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, changed: int) -> str:
    return sha256(path)


@contextmanager
def without_weights() -> Iterator[None]:
    """In this context bases are made without content or memory, on the meta device: another process will send their weights."""
    token = _ELSEWHERE.set(True)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def load_base(config: BaseConfig, layers: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """The first `layers` layers of a decoder, without language-model head, and its tokenizer if it has one.

    After its last layer the decoder still applies the base's final norm. All weights train, or with LoRA the adapters.

    Raises:
        UserError: the base does not exist or cannot be reached, is not such a decoder, has fewer layers, or another tokenizer.
    """
    model = _pretrained(config, config.path, layers) if config.path else _from_scratch(config, layers)
    tokenizer = _tokenizer(config, config.path) if config.path and config.prompt else None
    if tokenizer:
        check_vocabulary(f"the base '{config.path}'", tokenizer, model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model, tokenizer


def load_tokenizer(config: BaseConfig) -> "PreTrainedTokenizerBase | None":
    """The base's own tokenizer; None for a base from scratch, which has none.

    Raises:
        UserError: the base cannot be reached, or lacks its tokenizer's files.
    """
    tokenizer = _tokenizer(config, config.path) if config.path else None
    if config.path and not tokenizer:
        raise UserError(f"The base '{config.path}' has no tokenizer, so it cannot read text. Add its tokenizer's files.")
    return tokenizer


def load_causal(config: BaseConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The whole causal language model, with its head and without any habits of generation that came with it.

    Args:
        tokenizer: a base from scratch gets its vocabulary and its special tokens.

    Raises:
        UserError: the base does not exist or cannot be reached, is no causal language model, or another tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    model: Any
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.path and _ELSEWHERE.get():
        with _reachable(config):
            architecture = AutoConfig.from_pretrained(config.path, revision=config.revision)
        model = _hollow(AutoModelForCausalLM, config, architecture)
    elif config.path:
        with _reachable(config), without_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path,
                revision=config.revision,
                dtype=DTYPES[config.dtype],
                output_loading_info=True,
                **_attention(config),
            )
        model, found = loaded
        _check_complete(config.path, found)
        model.train()  # it comes as for inference, where no activation is recomputed
    else:
        model = _drawn(AutoModelForCausalLM, config, _architecture(config, vocab_size=len(tokenizer), **special))
    check_vocabulary(f"the base '{config.path or config.name}'", tokenizer, model)
    model.generation_config = GenerationConfig(**special)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def check_vocabulary(what: str, tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Check that a model has a vector for every token but that of padding, which is often the tokenizer's alone.

    Args:
        what: the model, for the message.

    Raises:
        UserError: a token has none.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if any(token >= known and token != tokenizer.pad_token_id for token in tokenizer.get_vocab().values()):
        raise UserError(
            f"The tokenizer of {what} knows {len(tokenizer)} tokens, but the model {known}: one of them is another model's. "
            "Put both of one model together."
        )


def _architecture(config: BaseConfig, **settings: Any) -> "PretrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = {**config.config, **settings}
    kind = settings.pop("model_type", "llama")
    try:
        known, made = AutoConfig.for_model(kind).to_dict(), AutoConfig.for_model(kind, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"teacher.config of '{config.name}' is no Hugging Face configuration: {reason}") from error
    for key in settings:
        if key in made.to_dict() and key not in (*known, *READ):  # what a configuration does not know it keeps
            raise UserError(f"Unknown configuration key 'teacher.config.{key}': {kind} has none.{nearest(key, known)}")
    return made


def _from_scratch(config: BaseConfig, layers: int) -> "PreTrainedModel":
    """All layers are made and the first ones kept: whatever their number, layer k of a base always starts the same."""
    from transformers import AutoModel

    architecture = _architecture(config)
    _check_depth(config, architecture, layers)
    model = _drawn(AutoModel, config, architecture)
    model.layers = model.layers[:layers]
    _truncate(model.config, layers)
    return model


def _drawn(kind: Any, config: BaseConfig, architecture: "PretrainedConfig") -> Any:
    """A model with random weights, which depend on the base's seed alone."""
    if _ELSEWHERE.get():
        return _hollow(kind, config, architecture)
    cure = "Correct its config or its attention."
    with torch.random.fork_rng(range(torch.cuda.device_count())), loading(f"The base '{config.name}'", cure):
        torch.manual_seed(config.seed)
        return kind.from_config(architecture, dtype=DTYPES[config.dtype], **_attention(config))


def _hollow(kind: Any, config: BaseConfig, architecture: "PretrainedConfig") -> Any:
    with torch.device("meta"):
        return kind.from_config(architecture, dtype=DTYPES[config.dtype], **_attention(config))


def _pretrained(config: BaseConfig, path: str, layers: int) -> "PreTrainedModel":
    """Only the layers that are kept are made and read."""
    from transformers import AutoConfig, AutoModel

    with _reachable(config):
        architecture = AutoConfig.from_pretrained(path, revision=config.revision)
    _check_depth(config, architecture, layers)
    _truncate(architecture, layers)
    if _ELSEWHERE.get():
        return _hollow(AutoModel, config, architecture)
    with _reachable(config), without_load_report():
        model, found = AutoModel.from_pretrained(
            path,
            revision=config.revision,
            config=architecture,
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
            **_attention(config),
        )
    _check_complete(path, found)
    return model.train()  # it comes as for inference, where no activation is recomputed


def _check_complete(path: str, found: dict[str, Any]) -> None:
    if found["missing_keys"]:
        first = sorted(found["missing_keys"])[0]
        raise UserError(
            f"The base '{path}' lacks {len(found['missing_keys'])} tensors, the first of them '{first}'. "
            "Its files are incomplete or of another model: fetch it again."
        )


def _check_depth(config: BaseConfig, architecture: "PretrainedConfig", layers: int) -> None:
    depth = getattr(architecture, "num_hidden_layers", None)
    if depth is None:
        raise UserError(
            f"The base '{config.path or config.name}' ({architecture.model_type}) is not a plain decoder. Choose one "
            "built like Llama, Mistral or Qwen."
        )
    if not 1 <= layers <= depth:
        raise UserError(
            f"{layers} layers were asked of the base '{config.name}', which has {depth}. Choose layers between 1 and "
            f"{depth}, or a deeper base."
        )


def _truncate(architecture: "PretrainedConfig", layers: int) -> None:
    architecture.num_hidden_layers = layers
    if getattr(architecture, "layer_types", None):
        architecture.layer_types = architecture.layer_types[:layers]


def _attention(config: BaseConfig) -> dict[str, str]:
    return {"attn_implementation": config.attention} if config.attention else {}


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Recompute layers in the backward pass, to save memory."""
    # renamed in the course of transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _tokenizer(config: BaseConfig, path: str) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    with _reachable(config):
        return AutoTokenizer.from_pretrained(path, revision=config.revision)


def _reachable(config: BaseConfig) -> AbstractContextManager[None]:
    return loading(
        f"The base '{config.path}'",
        "Give a local folder that has its config.json and weights (teacher=local teacher.path=FOLDER), check the hub name and "
        "the network (gated models need a login with `hf auth login`), or use teacher=tiny-llama, which needs neither.",
    )


@contextmanager
def loading(what: str, cure: str) -> Iterator[None]:
    """Turn Hugging Face's many ways to say that a model cannot be had into one that names the cure.

    Args:
        what: the model, with which the message begins.
        cure: where it is not to be found, or is not what it should be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{what} needs a package that is not installed: {_first_line(error)} Install it; or, where it is for attention, "
            "set attention to sdpa."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"The weights of {what[:1].lower()}{what[1:]} are damaged: {_first_line(error)}. Fetch the files again."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{what} cannot be loaded: {_first_line(error)} {cure}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silence progress bars, and the report of what is left out on purpose; what is missing is checked by the caller."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
