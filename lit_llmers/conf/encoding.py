"""What an `encode` stage takes: what becomes a vector, by what, and how that is tuned first."""

from dataclasses import dataclass, field
from typing import Any

from lit_llmers.conf.schema import BASE_DTYPES, SHARDED, OptimizerConfig, TrainerConfig
from lit_llmers.conf.typed import ADDED, unread
from lit_llmers.errors import UserError, unknown

ENCODERS = ("tfidf", "transformer", "said")
POOLINGS = ("mean", "last", "eos", "cls")
USER_VECTORS = ("mean", "history", "profile")
MISSING = ("refuse", "zero")
ALL = "all"  # of the principal components
READERS: dict[str, tuple[str, ...]] = {  # of the settings that not every encoder reads
    "dim": ("tfidf", "said"),
    "max_tokens": ("transformer", "said"),
    "dtype": ("transformer", "said"),
    **dict.fromkeys(("pooling", "batch_size", "normalise"), ("transformer",)),
    "vocabulary": ("said",),
}


@dataclass(frozen=True)
class ContrastConfig:
    """Tune a text encoder to tell an item's two views from those of the others: `lit_llmers.text.contrast`.

    Attributes:
        drop: share of an item's fields that a view leaves out, rounded down.
        temperature: of the contrast, at its start: it is trained.
        lora: adapters on a frozen encoder, as a base's `lora`; null trains all of it.
        gradient_checkpointing: recompute layers in the backward pass, to save memory.
    """

    drop: float = 0.4
    temperature: float = 3.0
    lora: dict[str, Any] | None = None
    gradient_checkpointing: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise UserError(f"contrast.drop is {self.drop}. It must be 0 or more and less than 1.")
        if not self.temperature > 0:
            raise UserError(f"contrast.temperature is {self.temperature}. It must be positive.")


@dataclass(frozen=True)
class EncodeStage:
    """Turn item text into vectors, a table that a fit stage can read, and on request users into vectors of the same space.

    Attributes:
        encode: `tfidf`: TF-IDF and truncated SVD, no model needed. `transformer`: a language model, as it is or tuned here.
            `said`: vectors are trained, so that a causal language model that is fed one says the item's text.
        fields: columns of the catalogue, `data.texts` among them, that are joined to an item's text.
        dim: width of `tfidf`'s and `said`'s vectors.
        prompt: the item's text with `{field}` in place of each field's text; null joins the fields by full stops.
        model: of `transformer`: `minilm` (the package of the extra `minilm`), a local folder, a hub name, or a base as
            `teacher=NAME` has it, of which name, path, revision, dtype and attention count. Of `said`: a folder, a hub name
            or a base, all of which counts but `examples`; its `prompt` stands around the vector.
        adapter: folder of a PEFT adapter that is put onto the model.
        pooling: `mean` of all tokens, `last` token, `cls` (first token), or `eos`: an end-of-text token is appended and read.
        max_tokens: a text is cut there.
        batch_size: texts at a time.
        normalise: vectors of length one, before `reduce`.
        dtype: of the model's weights; null is the base's own, or float32.
        reduce: keep so many principal components of the items' vectors, which are centred then; `all`: those there are, of
            the vectors of any encoder; null leaves the vectors as they are.
        whiten: give those components one variance; of `all`, those without any are left out. Text vectors point mostly one
            way, and what is trained on them learns the other ways late.
        shuffle: give every vector to another item, drawn at random: what remains is the spectrum without the meaning.
        users: vectors of users too: `mean` of their training items' vectors; `history`: the encoded titles of their training
            items, the latest that fit; `profile`: an encoded text about the user.
        user_prompt: of `history`, with `{history}` where the titles go; null takes the default.
        profile: of `profile`, the user text among `data.texts`.
        allow_leaking: names of texts that are read although they may have been written with held-out items in view.
        missing: what is done where an item or a user has no text: `refuse`, or `zero`: it has no vector, a row of zeros.
        contrast: of `transformer`: tune the model by contrast before it encodes.
        train_base: of `said`: the language model is trained too, its `lora` adapters or all of it. A base with random weights
            says nothing otherwise.
        vocabulary: of `said`: size of the tokenizer that is trained on the texts, for a base from scratch, which has none.
        optimizer, trainer: of `said` and `contrast`; override the run's own for this stage. There is no validation: the last
            epoch counts. A `transformer` that is not tuned takes `trainer.devices`, `num_nodes` and `accelerator`: so many
            processes encode, each its own texts.
    """

    encode: str
    fields: list[str] = field(default_factory=lambda: ["title", "categories", "text"])
    dim: int = 64
    prompt: str | None = field(default=None, metadata=ADDED)
    model: str | dict[str, Any] | None = field(default=None, metadata=ADDED)
    adapter: str | None = field(default=None, metadata=ADDED)
    pooling: str = field(default="mean", metadata=ADDED)
    max_tokens: int = field(default=128, metadata=ADDED)
    batch_size: int = field(default=64, metadata=ADDED)
    normalise: bool = field(default=True, metadata=ADDED)
    dtype: str | None = field(default=None, metadata=ADDED)
    reduce: int | str | None = field(default=None, metadata=ADDED)
    whiten: bool = field(default=False, metadata=ADDED)
    shuffle: bool = field(default=False, metadata=ADDED)
    users: str | None = field(default=None, metadata=ADDED)
    user_prompt: str | None = field(default=None, metadata=ADDED)
    profile: str | None = field(default=None, metadata=ADDED)
    allow_leaking: list[str] = field(default_factory=list, metadata=ADDED)
    missing: str = field(default="refuse", metadata=ADDED)
    contrast: ContrastConfig | None = field(default=None, metadata=ADDED)
    train_base: bool = field(default=False, metadata=ADDED)
    vocabulary: int = field(default=2048, metadata=ADDED)
    optimizer: OptimizerConfig | None = field(default=None, metadata=ADDED)
    trainer: TrainerConfig | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("encode", self.encode, ENCODERS),
            ("pooling", self.pooling, POOLINGS),
            ("users", self.users, (None, *USER_VECTORS)),
            ("missing", self.missing, MISSING),
            ("dtype", self.dtype, (None, *BASE_DTYPES)),
        ):
            if value not in known:
                raise unknown(f"choice of the encode stage ({name})", str(value), [each for each in known if each])
        if isinstance(self.reduce, str) and self.reduce != ALL:
            raise UserError(f"reduce of the encode stage is '{self.reduce}'. It must be a number of components, or {ALL}.")
        for name in ("dim", "max_tokens", "batch_size", "reduce", "vocabulary"):
            if isinstance(number := getattr(self, name), int) and number < 1:
                raise UserError(f"{name} of the encode stage is {number}. It must be at least 1.")
        if (self.encode != "tfidf") != (self.model is not None):
            raise UserError(
                f"encode: {self.encode} needs a model. Name one, as model: minilm (transformer) or a causal one (said), or use "
                "encode: tfidf."
                if self.model is None
                else f"encode: {self.encode} has no model. Use encode: transformer, or leave model out."
            )
        foreign = {
            "reduce (use dim)": self.reduce not in (None, ALL),
            "adapter": self.adapter,
            f"users: {self.users} (use mean)": self.users in ("history", "profile"),
            "contrast": self.contrast,
        }
        if self.encode != "transformer" and any(foreign.values()):
            what = next(name for name, value in foreign.items() if value)
            raise UserError(f"encode: {self.encode} does not take {what}. Use encode: transformer for it.")
        if self.whiten and self.reduce is None:
            raise UserError(
                "whiten of the encode stage is of principal components. Say how many, as reduce: 128 or all, or drop whiten."
            )
        if self.contrast and (self.prompt or self.adapter or len(self.fields) < 2):
            raise UserError(
                "contrast of the encode stage leaves fields of an item out and puts them in any order: it takes two fields or "
                "more, no prompt, and no adapter that was tuned before."
            )
        if self.train_base and self.encode != "said":
            raise UserError(f"encode: {self.encode} does not take train_base. Use encode: said for it.")
        if self.trainer is not None and self.trainer.strategy in SHARDED:
            raise UserError(f"trainer.strategy={self.trainer.strategy} does not train an encode stage. Use ddp or auto.")
        if self.trains and self.optimizer is not None and self.optimizer.schedule == "plateau":
            raise UserError(
                "optimizer.schedule=plateau waits for validation, and an encode stage has none. Give it a schedule of its own, "
                "as stages.NAME.optimizer.schedule=constant."
            )
        if self.encode == "tfidf" and self.trainer is not None and self.trainer.processes > 1:
            raise UserError(
                f"encode: tfidf is counted by one process, not by {self.trainer.processes}. Leave trainer out of this stage."
            )
        if self.contrast and self.trainer is not None and self.trainer.processes > 1:
            raise UserError(
                "contrast of the encode stage puts all rows of a batch beside each other, but each of "
                f"{self.trainer.processes} processes has its own. Train this stage in one, with trainer: {{strategy: auto, "
                "devices: 1, num_nodes: 1}."
            )
        if (self.users == "profile") != (self.profile is not None):
            raise UserError(
                "users: profile of the encode stage goes with profile: NAME, a text of users among data.texts such as "
                "llm_user_profile. Give both or none."
            )
        if not self.fields:
            raise UserError("fields of the encode stage is empty. Name columns of the catalogue, as fields: [title].")
        if self.user_prompt is not None and self.users != "history":
            raise UserError("user_prompt of the encode stage has no effect: it belongs to users: history. Leave it out.")
        for name, value, default in unread(self, self.encode, READERS):
            encoders = " or ".join(READERS[name]) + " (text=minilm has one)" * ("transformer" in READERS[name])
            raise UserError(
                f"{name}={value} of the encode stage has no effect with encode: {self.encode}. Leave it out, set it to "
                f"{default}, or choose encode: {encoders}."
            )

    @property
    def read(self) -> list[str]:
        """The columns and texts that are encoded."""
        return [*self.fields, *([self.profile] if self.profile else [])]

    @property
    def trains(self) -> bool:
        """Whether there is something to train; `trainer` otherwise says only how many processes encode."""
        return self.encode == "said" or self.contrast is not None
