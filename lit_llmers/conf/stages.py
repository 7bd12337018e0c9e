"""What a recipe's `fit`, `record`, `evaluate` and `export` stages take; `encode` and `tune` have files of their own."""

from dataclasses import dataclass, field
from typing import Any

from lit_llmers.conf.schema import (
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    SequenceConfig,
    SignalsConfig,
    TrainerConfig,
    check_plateau,
)
from lit_llmers.conf.typed import ADDED
from lit_llmers.errors import UserError, unknown

RECORDABLE = ("block_states", "ranking")
REDUCTIONS = ("pca", "random", "uniform", "variance")
EXPORTS = ("safetensors", "onnx")


@dataclass(frozen=True)
class InitialConfig:
    """What the item table (and the users') of a backbone starts from, in place of random numbers.

    An item without a vector keeps its random start, and so does a user none of whose items has one: from a zero vector all of
    them would start as one and the same. They count neither in the reduction nor in the deviation.

    Attributes:
        items: the stage whose item table is copied.
        reduce: how a wider one is cut to the model's width: `pca`, or columns that are drawn at `random`, `uniform`ly spaced,
            or of the largest `variance` among the items that interact most. One of that width is copied as it is, neither
            turned nor centred, whatever stands here; with null it must have it.
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
        check_plateau(self.optimizer, self.trainer)

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
        """The files that it is made of, by room and name, and again with each choice given: `callbacks.NAME.KEY=VALUE`."""
        parts = [f"backbones.{self.fit}"]
        for room, entries in (("fusion", self.fusions), ("callbacks", self.terms)):
            for name, own in entries:
                given = [f".{key}={value}" for key, value in own.items() if isinstance(value, str | bool)]
                parts += [f"{room}.{name}{choice}" for choice in ("", *given)]
        return parts


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
