"""What a `tune` stage takes: a language model that is taught to say titles."""

from dataclasses import dataclass, field
from typing import Any

from lit_llmers.conf.schema import SHARDED, OptimizerConfig, SequenceConfig, TrainerConfig, check_plateau
from lit_llmers.conf.typed import ADDED
from lit_llmers.errors import UserError, unknown

TUNINGS = ("bigrec",)
VALIDATIONS = ("loss", "ranking")
EMBEDDERS = ("base", "tuned")


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
        check_plateau(self.optimizer, self.trainer)
        if self.tune not in TUNINGS:
            raise unknown("method of the tune stage (tune)", self.tune, TUNINGS)
        if self.validate not in VALIDATIONS:
            raise unknown("validation of the tune stage (validate)", self.validate, VALIDATIONS)
        if self.validate == "ranking" and self.trainer.strategy in SHARDED:
            raise UserError(
                f"validate: ranking asks each process for other titles, for which trainer.strategy={self.trainer.strategy} "
                "would have to run its parts together. Use validate: loss, or trainer.strategy=ddp."
            )
        if not self.fields:
            raise UserError("fields of the tune stage is empty. Name columns of the catalogue, as fields: [title].")
        for name in ("history", "samples", "max_tokens", "vocabulary", "validation_users"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} of the tune stage is {number}. It must be at least 1.")
