"""The settings that more than one room shares, as dataclasses that refuse what they do not know.

A room's own settings (a data source's, an LLM base's, a backbone's arguments) live with the room.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lit_llmers.conf.typed import ADDED, unread
from lit_llmers.errors import UserError, unknown

EXAMPLES = ("sequence", "prefixes", "last")
SCHEDULES = ("constant", "linear", "cosine", "plateau")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SIGNAL_DTYPES = ("float16", "float32")
BASE_DTYPES = ("float32", "bfloat16", "float16")
LOGGERS = ("wandb", "tensorboard", "csv")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true")
STRATEGIES = ("auto", "ddp", "zero2", "zero3", "zero3-offload", "fsdp2")
SHARDED = ("zero2", "zero3", "zero3-offload", "fsdp2")  # cut a large model over processes; no gain for a small one
LOSSES = ("cross_entropy", "sampled_softmax", "bce", "gbce", "bpr")
LOSS_READERS = {"negatives": LOSSES[1:], "t": ("gbce",)}  # settings that not all kinds read


@dataclass(frozen=True)
class SequenceConfig:
    """How histories become training examples.

    Attributes:
        max_length: items of history that a model reads, the latest ones.
        examples: `last`: one example per user, its last training item (SLMRec). `prefixes`: one example per training item,
            each with the history before it (E4SRec). `sequence`: the targets of `prefixes`, all predicted in one causal
            pass over the user's history; needs a model that reads out at every position.
        targets_per_user: for `prefixes` and `sequence`, at most so many targets per user, the latest first. 0, which recipes
            have but where they say otherwise, takes all of them; null is `max_length` (as E4SRec).
        context: for `sequence`, so many of a row's items have no target, but are read before those that have one. 0 cuts a long
            history into rows of `max_length` targets, of which the first is predicted from one item, the second from two. With
            25 of 50 none but those at the history's beginning is predicted from fewer than 26, and there are twice the rows.

    Raises:
        UserError: a value out of range, or a context where each target has the latest `max_length` items before it.
    """

    max_length: int = 50
    examples: str = "sequence"
    targets_per_user: int | None = None
    context: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.examples not in EXAMPLES:
            raise unknown("kind of training examples (sequences.examples)", self.examples, EXAMPLES)
        if self.max_length < 1:
            raise UserError(f"sequences.max_length is {self.max_length}. It must be at least 1.")
        if self.targets_per_user is not None and self.targets_per_user < 0:
            raise UserError(f"sequences.targets_per_user is {self.targets_per_user}. It must be 0 (all), more, or null.")
        if not 0 <= self.context < self.max_length:
            raise UserError(
                f"sequences.context is {self.context}. It must be 0 or more, and below sequences.max_length, which is "
                f"{self.max_length}: what is left has targets."
            )
        if self.context and self.examples != "sequence":
            raise UserError(
                f"sequences.context={self.context} has no effect with sequences.examples={self.examples}, which has the latest "
                "max_length items before each target. Leave it out, or set it for the stage that it is meant for, as "
                "stages.teacher.sequences.context."
            )

    @property
    def most_targets(self) -> int:
        """Training targets of a user at most, the latest ones; 0 is all. What is equal for two stages numbers targets alike."""
        if self.examples == "last":
            return 1
        return self.max_length if self.targets_per_user is None else self.targets_per_user


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: after warm-up, `constant`, or `linear` or `cosine` to zero over the whole training. `plateau`: constant, and
            where patience would end the training, a tenth of that until patience ends it again.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("learning-rate schedule (optimizer.schedule)", self.schedule, SCHEDULES)
        if not self.lr > 0:
            raise UserError(f"optimizer.lr is {self.lr}. It must be positive.")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}. It must be 0 or more.")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}. It must be 0 or more.")


@dataclass(frozen=True)
class LossConfig:
    """The task's own loss.

    Attributes:
        kind: `cross_entropy`: softmax over the whole catalogue. `sampled_softmax`: over the target and items drawn by
            popularity once for the batch, with the log-q correction. `bce`, `bpr`: the target against items drawn uniformly for
            each target from those that its user has not met in training. `gbce`: from all but the target. A collaborative
            student takes `bpr`, `bce` or `sampled_softmax`, each against items drawn as for `bce`.
        negatives: items drawn; `cross_entropy` draws none.
        t: of `gbce` alone, calibration from 0 (plain BCE) to 1 (fully unbiased).

    Raises:
        UserError: an unknown kind, a value out of range, or one other than the default that the kind does not read.
    """

    kind: str = "cross_entropy"
    negatives: int = 256
    t: float = 0.75

    @property
    def unmet(self) -> bool:
        """Whether a sequential student's negatives are items that the user has not met in training."""
        return self.kind in ("bce", "bpr")

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise unknown("loss (loss.kind)", self.kind, LOSSES)
        if self.negatives < 1:
            raise UserError(f"loss.negatives is {self.negatives}. It must be at least 1.")
        if not 0 <= self.t <= 1:
            raise UserError(f"loss.t is {self.t}. It must lie between 0 and 1.")
        for name, value, default in unread(self, self.kind, LOSS_READERS):
            raise UserError(
                f"loss.{name}={value} has no effect with loss.kind={self.kind}. Leave it out, set it to {default}, or choose "
                f"loss.kind={' or '.join(LOSS_READERS[name])}."
            )


@dataclass(frozen=True)
class TrainerConfig:
    """Lightning's Trainer, as far as a recipe or a user chooses.

    Attributes:
        accelerator, precision: as Lightning names them; `auto` takes a GPU where there is one.
        strategy: how processes share the work: `ddp` copies the model, `zero*` and `fsdp2` shard it, `auto` is `ddp` where
            there are several. Said of the whole run, `ddp` holds for every stage that trains with gradients and the sharded
            ones for language models.
        devices: processes on each machine.
        num_nodes: machines.
        batch_size: training rows per micro-batch, over all processes together; their number changes random draws alone.
        accumulate_grad_batches: micro-batches per optimiser step.
        max_epochs: epochs at most.
        validate_every: epochs between two validations, from which the best epoch is chosen.
        patience: epochs without a better validation NDCG@10 before training stops (with `schedule: plateau` before the learning
            rate falls, and then again before it stops); 0 never stops early.
        gradient_clip_val: largest gradient norm; null does not clip.
        checkpoint_every: batches between two `last.ckpt`, the most that a killed run loses.
        log_every: optimiser steps between two log lines.
        limit_train_batches: batches per epoch at most, for a trial run; null takes all.
        compile: run the backbone through torch.compile; the first step then takes up to a minute.
    """

    accelerator: str = "auto"
    precision: str = "32-true"
    strategy: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    batch_size: int = 128
    accumulate_grad_batches: int = 1
    max_epochs: int = 40
    patience: int = 4
    gradient_clip_val: float | None = 1.0
    checkpoint_every: int = 200
    log_every: int = 10
    limit_train_batches: int | None = None
    validate_every: int = field(default=1, metadata=ADDED)
    compile: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "accumulate_grad_batches", "max_epochs", "validate_every", "checkpoint_every", "log_every")
        for name in ("devices", "num_nodes", *counts):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} is {getattr(self, name)}. It must be at least 1.")
        if self.limit_train_batches is not None and self.limit_train_batches < 1:
            raise UserError(
                f"trainer.limit_train_batches is {self.limit_train_batches}. It must be at least 1, or null for all."
            )
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise UserError(
                f"trainer.gradient_clip_val is {self.gradient_clip_val}. It must be positive, or null for no limit."
            )
        if self.precision == "16-true":
            raise UserError(
                "trainer.precision is 16-true, in which the squares of small gradients, which AdamW keeps, are zero: the model "
                "would be ruined without a word. Use trainer.precision=16-mixed or bf16-true."
            )
        if self.accelerator not in ACCELERATORS:
            raise unknown("accelerator (trainer.accelerator)", self.accelerator, ACCELERATORS)
        if self.precision not in PRECISIONS:
            raise unknown("precision (trainer.precision)", self.precision, PRECISIONS)
        if self.strategy not in STRATEGIES:
            raise unknown("strategy (trainer.strategy)", self.strategy, STRATEGIES)
        if self.strategy == "auto" and self.processes > 1:
            object.__setattr__(self, "strategy", "ddp")
        if self.batch_size % self.processes:
            raise UserError(
                f"trainer.batch_size={self.batch_size} counts the rows of all processes together and cannot be divided by "
                f"{self.processes} (trainer.devices={self.devices} x trainer.num_nodes={self.num_nodes}). Choose a multiple of "
                f"{self.processes}."
            )
        if self.validate_every > self.max_epochs:
            raise UserError(
                f"trainer.validate_every={self.validate_every} is more than trainer.max_epochs={self.max_epochs}: no epoch "
                "would ever be chosen. Lower it."
            )
        if self.patience < 0:
            raise UserError(f"trainer.patience is {self.patience}. It must be 0 (never stop early) or more.")

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def trains_in_float32(self) -> bool:
        """Whether weights in half precision become float32 to be trained.

        DeepSpeed keeps float32 copies of its own beside them, which others would double, and `bf16-true` asks for half
        precision throughout.
        """
        return not self.strategy.startswith("zero") and self.precision != "bf16-true"


def check_plateau(optimizer: OptimizerConfig, trainer: TrainerConfig) -> None:
    """Refuse to wait for a patience that never ends."""
    if optimizer.schedule == "plateau" and not trainer.patience:
        raise UserError(
            "optimizer.schedule=plateau lowers the learning rate when trainer.patience ends, and trainer.patience is 0. Set it "
            "to 1 or more, or optimizer.schedule=constant."
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What the target is ranked against.

    Attributes:
        protocol: `full`: the whole catalogue. `sampled-N`: N items that the user never meets, drawn once with
            `candidate_seed` and stored with their hash; `sampled-999` has the SLMRec paper's number of negatives.
        candidates: FILE with the items that compete, in place of a protocol; see `lit_llmers.candidates` for its form.
        users: rank for so many users only, a random sample that is the same for every model and seed; null takes all.
            Validation too.
        mask_history: items that the user has seen do not compete; a repeated target still does. Validation too.
        batch_size: rows at a time; it changes no figure.
        cutoffs: k of the test's HR@k, NDCG@k, Recall@k and coverage@k; 10 is among them, by which models are compared.
        official_select_on_test: choose the epochs of recommenders on the test rows, as DLLM2Rec's official code does: figures
            to hold against its own, and no others. The report begins with that.
    """

    protocol: str = "full"
    candidates: str | None = None
    users: int | None = None
    mask_history: bool = True
    batch_size: int = 512
    candidate_seed: int = 0
    cutoffs: list[int] = field(default_factory=lambda: [1, 5, 10, 20], metadata=ADDED)
    official_select_on_test: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.protocol != "full" and not re.fullmatch("sampled-[1-9][0-9]*", self.protocol):
            raise UserError(
                f"Unknown evaluation protocol (evaluation.protocol) '{self.protocol}'. There is: full, and sampled-N with a "
                "number of candidates, as sampled-999."
            )
        if self.candidates is not None:
            if self.protocol != "full":
                raise UserError(f"evaluation.candidates excludes evaluation.protocol={self.protocol}. Leave one of them out.")
            if self.users is not None:
                raise UserError(f"evaluation.candidates excludes evaluation.users={self.users}: the file names the users.")
            if not self.candidates.endswith((".npy", ".parquet")):
                raise UserError(f"evaluation.candidates is {self.candidates}. It must be an npy or a parquet file.")
            if self.candidates.startswith("~"):
                object.__setattr__(self, "candidates", str(Path(self.candidates).expanduser()))
        if self.users is not None and self.users < 2:
            raise UserError(f"evaluation.users is {self.users}. Models are compared on 2 or more; null takes all.")
        if self.batch_size < 1:
            raise UserError(f"evaluation.batch_size is {self.batch_size}. It must be at least 1.")
        if self.candidate_seed < 0:
            raise UserError(f"evaluation.candidate_seed is {self.candidate_seed}. It must be at least 0.")
        if any(type(k) is not int or k < 1 for k in self.cutoffs) or 10 not in self.cutoffs:
            raise UserError(
                f"evaluation.cutoffs is {self.cutoffs}. It must be a list of whole numbers from 1 with 10, by which models are "
                "compared, among them, as [10,50,100]."
            )
        object.__setattr__(self, "cutoffs", sorted(set(self.cutoffs)))


@dataclass(frozen=True)
class SignalsConfig:
    """How a teacher's word reaches its students.

    Attributes:
        online: of hidden states: the frozen teacher runs beside the student instead of being recorded. Lists always are.
        dtype: of the record on disk.
        shard_rows: rows in one file of the record; null makes files of 32 batches, and of 128 MB at most.
    """

    online: bool = False
    dtype: str = "float16"
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in SIGNAL_DTYPES:
            raise unknown("dtype (signals.dtype)", self.dtype, SIGNAL_DTYPES)
        if self.shard_rows is not None and self.shard_rows < 1:
            raise UserError(f"signals.shard_rows is {self.shard_rows}. It must be at least 1, or null.")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept: `<dir>/<recipe>/<name>`."""

    dir: str = "runs"
    name: str = "default"

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"run.name is '{self.name}'. It must name one folder; the folder that holds it is run.dir=FOLDER.")

    @property
    def root(self) -> Path:
        """`dir`, with `~` expanded."""
        return Path(self.dir).expanduser()


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides `metrics.jsonl`: `wandb`, `tensorboard` or `csv`; `project` is W&B's."""

    kind: str = "wandb"
    project: str = "lit_llmers"

    def __post_init__(self) -> None:
        if self.kind not in LOGGERS:
            raise unknown("logger (logger.kind)", self.kind, LOGGERS)


SECTIONS = {
    "run": RunConfig,
    "logger": LoggerConfig,
    "sequences": SequenceConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "signals": SignalsConfig,
}
