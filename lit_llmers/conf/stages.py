"""The settings of each kind of stage: what a recipe's `fit`, `encode`, `tune`, `record`, `evaluate` and `export` take."""

from dataclasses import dataclass, field
from typing import Any

from lit_llmers.conf.schema import (
    BASE_DTYPES,
    SHARDED,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    SequenceConfig,
    SignalsConfig,
    TrainerConfig,
)
from lit_llmers.conf.typed import ADDED
from lit_llmers.errors import UserError, unknown

ENCODERS = ("tfidf", "transformer", "said")
POOLINGS = ("mean", "last", "eos", "cls")
USER_VECTORS = ("mean", "history", "profile")
MISSING = ("refuse", "zero")
RECORDABLE = ("block_states", "ranking")
REDUCTIONS = ("pca", "random", "uniform", "variance")
ALL = "all"  # of the principal components
EXPORTS = ("safetensors", "onnx")
TUNINGS = ("bigrec",)
VALIDATIONS = ("loss", "ranking")
EMBEDDERS = ("base", "tuned")


@dataclass(frozen=True)
class InitialConfig:
    """What the item table (and the users') of a backbone starts from, in place of random numbers.

    An item without a vector keeps its random start, and so does a user none of whose items has one: from a zero vector all of
    them would start as one and the same. They count neither in the reduction nor in the deviation.

    Attributes:
        items: the stage whose item table is copied.
        reduce: how it is cut to the model's width: `pca`, or columns that are drawn at `random`, `uniform`ly spaced, or of
            the largest `variance` among the items that interact most; null where it has that width.
        std: the copied table is scaled to this standard deviation; null keeps its scale.
        users: whether a collaborative model's users start as the means of their training items.
    """

    items: str
    reduce: str | None = "pca"
    std: float | None = 0.1
    users: bool = True

    def __post_init__(self) -> None:
        if self.reduce is not None and self.reduce not in REDUCTIONS:
            raise unknown("way to cut a table (initial.reduce)", self.reduce, REDUCTIONS)
        if self.std is not None and not self.std > 0:
            raise UserError(f"initial.std is {self.std}. It must be positive, or null to keep the table's scale.")


def _check_plateau(optimizer: OptimizerConfig, trainer: TrainerConfig) -> None:
    if optimizer.schedule == "plateau" and not trainer.patience:
        raise UserError(
            "optimizer.schedule=plateau lowers the learning rate when trainer.patience ends, and trainer.patience is 0. Set it "
            "to 1 or more."
        )


@dataclass(frozen=True)
class FitStage:
    """Train a backbone as a recommender.

    Attributes:
        fit: the backbone, a file in `lit_llmers/backbones`.
        model: arguments of the backbone.
        loss: the task's own loss.
        objective: loss terms that belong to the model itself, such as the contrast of CL4SRec; written as `callbacks` are.
        items: stages whose item tables the backbone reads, side by side (backbones with an `item_table` argument).
        initial: what the backbone's tables start from.
        fusion: what stands between the backbone's embedding and its reading; a file in `lit_llmers/fusion`, written as
            `callbacks` are, applied in order.
        callbacks: list of one-key mappings, a file in `lit_llmers/callbacks` to its arguments; `from` names the stage that
            recorded the teacher. What a method adds to a model stands here, so `callbacks: []` makes its control.
        sequences, optimizer, trainer: override the run's own for this stage.
        mask_history, validation_users, official_select_on_test: `evaluation.mask_history`, `evaluation.users` and
            `evaluation.official_select_on_test` of the run.
    """

    fit: str
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    objective: list[dict[str, Any]] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    initial: InitialConfig | None = None
    fusion: list[dict[str, Any]] = field(default_factory=list)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mask_history: bool = True
    validation_users: int | None = None
    official_select_on_test: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        _check_plateau(self.optimizer, self.trainer)

    @property
    def terms(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and arguments of all loss terms, the model's own first."""
        return [(name, own or {}) for entry in (*self.objective, *self.callbacks) for name, own in entry.items()]

    @property
    def fusions(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and arguments of what wraps the backbone, the innermost first."""
        return [(name, own or {}) for entry in self.fusion for name, own in entry.items()]

    @property
    def parts(self) -> list[str]:
        """The files that it is made of, by room and name."""
        named = (("fusion", self.fusions), ("callbacks", self.terms))
        return [f"backbones.{self.fit}", *(f"{room}.{name}" for room, entries in named for name, _ in entries)]


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

    @property
    def read(self) -> list[str]:
        """The columns and texts that are encoded."""
        return [*self.fields, *([self.profile] if self.profile else [])]

    @property
    def trains(self) -> bool:
        """Whether there is something to train; `trainer` otherwise says only how many processes encode."""
        return self.encode == "said" or self.contrast is not None


@dataclass(frozen=True)
class GenerationConfig:
    """How a tuned language model names an item, and which items are meant by what it says.

    Attributes:
        num_beams: of the beam search, whose best beam alone counts; 1 is greedy.
        max_new_tokens: of what is said; null takes as many as the longest title of the catalogue needs, as far as the base's
            positions go.
        constrained: nothing but titles of the catalogue can be said.
        embedder: whose last hidden state stands for a title: the `base` as it was before tuning, or the `tuned` model.
        batch_size: histories at a time.
    """

    num_beams: int = 4
    max_new_tokens: int | None = None
    constrained: bool = False
    embedder: str = "base"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.embedder not in EMBEDDERS:
            raise unknown("model that embeds titles (generation.embedder)", self.embedder, EMBEDDERS)
        for name in ("num_beams", "max_new_tokens", "batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"generation.{name} is {number}. It must be at least 1.")


VALIDATING = GenerationConfig(num_beams=1, embedder="tuned")  # how a tune stage asks its model between two epochs


@dataclass(frozen=True)
class TuneStage:
    """Teach a causal language model to say the title of the next item: `bigrec`.

    Attributes:
        tune: the method.
        base: which language model, a mapping as a teacher option has it; with `lora` adapters are trained, else all of it. Its
            `prompt` and `examples` are not read here.
        history: titles in a prompt, of the latest items; no more than `sequences.max_length`, which is what others ask with.
        fields: columns of the catalogue that tell of an item in a prompt, joined by full stops. The response is its title.
        instruction: what the prompt asks for; null takes the default.
        samples: so many training targets, drawn at random among those of `sequences`; null takes all.
        on_prompt: the prompt's tokens count in the loss too, as in the official code.
        max_tokens: of prompt and response together; of a longer one the oldest items are left out.
        vocabulary: size of the tokenizer that is trained on the titles, for a base from scratch, which has none.
        validate: what selects the epoch: `loss` of the validation items' titles, or `ranking`: NDCG@10 of the validation items
            by greedy, free generation, embedded by the model at hand.
        validation_users: validate on so many users, drawn at random; null takes all.
        generation: how it is asked, by those that need this stage; it changes nothing in the training.
        sequences: which training targets there are.
        optimizer, trainer: override the run's own for this stage, as `sequences` does.
        mask_history: `evaluation.mask_history` of the run.
        allow_leaking: names of texts among `fields`, as of an encode stage.
    """

    tune: str
    base: dict[str, Any]
    history: int = 10
    fields: list[str] = field(default_factory=lambda: ["title"])
    instruction: str | None = None
    samples: int | None = 1024
    on_prompt: bool = False
    max_tokens: int = 512
    vocabulary: int = 2048
    validate: str = "loss"
    validation_users: int | None = 256
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mask_history: bool = True
    allow_leaking: list[str] = field(default_factory=list, metadata=ADDED)

    def __post_init__(self) -> None:
        _check_plateau(self.optimizer, self.trainer)
        if self.tune not in TUNINGS:
            raise unknown("method of the tune stage (tune)", self.tune, TUNINGS)
        if self.validate not in VALIDATIONS:
            raise unknown("validation of the tune stage (validate)", self.validate, VALIDATIONS)
        if self.validate == "ranking" and self.trainer.strategy in SHARDED:
            raise UserError(
                f"validate: ranking asks each process for other titles, for which trainer.strategy={self.trainer.strategy} "
                "would have to run its parts together. Use validate: loss, or trainer.strategy=ddp."
            )
        for name in ("history", "samples", "max_tokens", "vocabulary", "validation_users"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} of the tune stage is {number}. It must be at least 1.")


@dataclass(frozen=True)
class RecordStage:
    """Ask a trained model about every training target and keep the answers.

    Attributes:
        record: what to record; `block_states`: hidden states at the end of each block. `ranking`: the best items and their
            scores, without those met before.
        of: the stage of the teacher.
        blocks: of `block_states`: equal blocks that its layers are cut into.
        k: of `ranking`: items in a list.
        per: of `ranking`: one list for each training `target`, after the history before it, or for each `user`, after all of
            his training history. A collaborative teacher or student knows users alone.
        batch_size: rows at a time.
    """

    record: str
    of: str
    blocks: int = 4
    k: int = 100
    per: str = "target"
    batch_size: int = 512
    signals: SignalsConfig = field(default_factory=SignalsConfig)

    def __post_init__(self) -> None:
        if self.record not in RECORDABLE:
            raise unknown("signal (record)", self.record, RECORDABLE)
        if self.batch_size < 1:
            raise UserError(f"batch_size of the record stage is {self.batch_size}. It must be at least 1.")
        if self.k < 1:
            raise UserError(f"k of the record stage is {self.k}. It must be at least 1.")
        if self.per not in ("target", "user"):
            raise unknown("row of the record (per)", self.per, ["target", "user"])

    @property
    def of_targets(self) -> bool:
        """Whether the teacher answers for each training target, and not for each user."""
        return self.record == "block_states" or self.per == "target"

    @property
    def online(self) -> bool:
        """Whether nothing is recorded, for the teacher answers the student's own batches."""
        return self.record == "block_states" and self.signals.online


@dataclass(frozen=True)
class EvaluateStage:
    """Rank the test items with trained models.

    Attributes:
        evaluate: `test`, the held-out part.
        of: stages to compare.
    """

    evaluate: str
    of: list[str]
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.evaluate != "test":
            raise unknown("part to evaluate", self.evaluate, ["test"])
        if not self.of:
            raise UserError("'of' of the evaluate stage is empty. Name the stages to compare, as of: [student].")


@dataclass(frozen=True)
class ExportStage:
    """Write a trained model for serving.

    Attributes:
        export: list of formats, `safetensors` and `onnx`.
        of: the stage to export (its first seed).
    """

    export: list[str]
    of: str = "student"

    def __post_init__(self) -> None:
        if not self.export:
            raise UserError(f"'export' of the export stage is empty. Name formats: {', '.join(EXPORTS)}.")
        for name in self.export:
            if name not in EXPORTS:
                raise unknown("export format", name, EXPORTS)
