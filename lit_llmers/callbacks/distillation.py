"""What all distillation callbacks share: a loss term that is registered before training and fed by a source of signals."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import lightning as L
from torch import Tensor, nn

from lit_llmers.backbones import Backbone
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.fusion import Sources
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.recommender import Recommender

Reduce = Callable[[Tensor, Batch], Tensor]
Readers = tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...]  # a choice, whether it is made, what it alone reads


class SignalSource(Protocol):
    """Where a teacher's word comes from: a record on disk, or the frozen teacher itself."""

    shape: tuple[int, ...]

    def read(self, batch: Batch) -> Tensor:
        """The teacher's signal for every target of the batch, `[T, *shape]`, without gradient."""
        ...


class Term(nn.Module):
    """A loss term. `requires` names the outputs (`hidden`) and the batch keys that `forward` reads.

    `per_target` says that its loss is a sum over targets, reduced by the student; otherwise it is a mean over rows.
    `parts` holds the detached scalars that the last forward was made of, reduced as it was, for the log; `learned` what else it
    says of itself.
    `counts_more` `[T]`, without gradient, is how often more the last forward wants each target's own cross-entropy counted;
    the student adds it to the term, for next to nothing, where the output's `softmax` says so.
    """

    requires: frozenset[str] = frozenset()
    per_target: ClassVar[bool] = True
    counts_more: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Tensor] = {}
        self.learned: dict[str, Tensor] = {}

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        """The weighted loss of the batch, a scalar."""
        raise NotImplementedError


class Distillation(L.Callback):
    """Puts a term into the student's `distillation` in `setup`, where its parameters still reach the optimiser.

    Subclasses name the term and build it in `build`. Without this callback the student is what it always was: its
    checkpoint loads for testing and export without any term.

    Args:
        weight: factor of the whole term in the student's loss.
        decay_epochs: epochs in which the weight falls linearly to zero; 0 keeps it. A student that cannot become its teacher
            then stops trying, and its own task has the last word.
    """

    name: str
    fits: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...]] = Backbone  # the kind of backbone that the term reads
    whole_rows: ClassVar[bool] = False  # whether it needs a backbone that hides no items of the rows that it trains on
    of_user_table: ClassVar[tuple[str, ...]] = ()  # keys that a collaborative student alone, which has one, can be given
    sources: ClassVar[Sources] = {}  # constructor arguments that other stages make, see `lit_llmers.fusion.Fusion`
    readers: ClassVar[Readers] = ()  # of the settings that are not always read, for `check_read`

    def __init__(self, weight: float = 1.0, decay_epochs: int = 0) -> None:
        if not weight >= 0:
            raise UserError(f"{self.name}: weight is {weight}. It must be 0 (no effect) or more.")
        if decay_epochs < 0:
            raise UserError(f"{self.name}: decay_epochs is {decay_epochs}. It must be 0 (constant weight) or more.")
        self.weight, self.decay_epochs = weight, decay_epochs

    def check_read(self) -> None:
        """Refuse a setting other than its default that nothing reads: who gives it expects an effect.

        Raises:
            UserError: it names the setting, and what it belongs to.
        """
        parameters, file = inspect.signature(type(self)).parameters, type(self).__module__.rpartition(".")[2]
        for choice, made, settings in self.readers:
            for key in () if made(self) else settings:
                value, default = getattr(self, key), parameters[key].default
                if value not in (default, {}):  # a mapping without entries gives nothing
                    raise UserError(
                        f"{file}: {key}={value} has no effect: it belongs to {choice}. Leave it out, or set it to "
                        f"{'null' if default is None else default}."
                    )

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        """Whether the term, with these arguments, puts rows of a batch beside each other, so that one process must have all."""
        return False

    @classmethod
    def compares_as_they_are(cls, arguments: dict[str, Any]) -> bool:
        """Whether the term, with these arguments, needs vectors of one width at the student and where they come from."""
        return False

    def build(self, student: Any) -> Term:
        """Check that the student and the signals fit together and return the term.

        Raises:
            UserError: they do not; the message says what to change.
        """
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Recommender) and self.name not in pl_module.distillation:
            pl_module.distillation[self.name] = self.build(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set_weight(trainer, pl_module)  # a run that goes on inside an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set_weight(trainer, pl_module)

    def _set_weight(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        left = max(0.0, 1 - trainer.current_epoch / self.decay_epochs) if self.decay_epochs else 1.0
        pl_module.weights[self.name] = self.weight * left  # type: ignore[operator, index]


def check_share(name: str, share: float | None, null: bool = False) -> None:
    """Refuse a share that is 0 or outside 0..1.

    Args:
        name: of the callback, for the message.
        null: None is a choice too.
    """
    if share is not None and not 0 < share <= 1:
        raise UserError(f"{name}: share is {share}. It must be above 0 and at most 1{', or null' if null else ''}.")
