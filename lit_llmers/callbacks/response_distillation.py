"""Response distillation: the student's scores of the items that the teacher ranks best learn to be the teacher's."""

from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from lit_llmers.backbones import Backbone, CollaborativeBackbone
from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.callbacks.distillation import Distillation, Readers, Reduce, Term, check_share
from lit_llmers.callbacks.teacher_lists import RankingSource, lists_of, of_all, read_lists
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses.ranking_weights import scaled_distance
from lit_llmers.losses.response import kl, soft_bce, soft_labels
from lit_llmers.losses.scores import list_scores
from lit_llmers.students.output import StudentOutput

KEYS = ("response_items", "response_scores", "response_targets")  # not ranking_distillation's: another teacher's
LOSSES, SAMPLERS = ("soft_bce", "kl"), ("top", "rank")


class ResponseTerm(Term):
    """The loss of the student's scores of listed items, see `ResponseDistillation` for the settings.

    Args:
        settings: the callback.
        reduce: mean over the targets of a batch.
    """

    requires = frozenset(KEYS[:2])

    def __init__(self, settings: "ResponseDistillation", reduce: Reduce) -> None:
        super().__init__()
        self.settings, self.reduce = settings, reduce

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        settings, targets = self.settings, len(output.user)
        drawn, user, items, scores = lists_of(output, batch, KEYS)
        valid = items > 0
        if settings.scaled:
            scores = 1 - scaled_distance(scores, valid)
        if settings.sampler == "rank":
            log_weight = samples.rank_log_weight(items.shape[1], settings.rank_temperature, items.device)
            place, valid = samples.draw_places(log_weight, valid, settings.k or items.shape[1])
            items, scores = items.gather(1, place), scores.gather(1, place)
        elif settings.k is not None:
            items, scores, valid = (each[:, : settings.k] for each in (items, scores, valid))
        student = list_scores(user, output.items, items)
        if settings.loss == "kl":
            loss = kl(student, scores, settings.temperature, valid)
        else:
            loss = soft_bce(student, soft_labels(scores, settings.temperature, settings.offset), valid)
        return self.reduce(of_all(loss, drawn, targets), batch)


class ResponseDistillation(Distillation):
    """The student says of each listed item what the teacher does: as a probability of its own, or among the list.

    CD (ICDM 2019) is `loss: soft_bce, sampler: rank, temperature: 2`, for a teacher whose scores are logits. Its code draws
    50 items once before training, each the better of two; here they are drawn at each step, without that choice. Items off
    the list have no teacher's score, so nothing is said of them.

    A teacher whose scores are distances with their sign changed, as BIGRec's, has none above 0: as logits they would call all
    of its list unlikely, the best item too. `scaled: true, temperature: 0.25, offset: -0.5` gives labels of .12 to .88.

    Args:
        ranking: the teacher's lists.
        loss: `soft_bce`, or `kl` between softmaxes over the list.
        k: items that a step takes of each list; null is all of it.
        sampler: which k: the `top`, or by `rank`, p ~ e^(-r / rank_temperature).
        scaled: each list's scores are scaled to 0 (the worst item of the recorded list) .. 1 (its best) first; not as CD, see
            above.
        temperature: divides the teacher's scores; with `kl` the student's too.
        offset: of `soft_bce`: added to the teacher's scores (CD's t2).
        rank_temperature: of the rank sampler. CD's code has 20 times the length of the list, which is nearly flat.
        share: of a batch's targets that each step computes the loss on, drawn at random; the loss stays unbiased.
        weight, decay_epochs: see `Distillation`.

    Raises:
        UserError: a name or a value that is none of these, or a setting that the loss or the sampler does not read.
    """

    name = "response"
    fits = (Backbone, CollaborativeBackbone)
    sources: ClassVar[dict[str, tuple[str, str]]] = {"ranking": ("from", "ranking")}
    readers: ClassVar[Readers] = (
        ("loss: soft_bce", lambda own: own.loss == "soft_bce", ("offset",)),
        ("sampler: rank", lambda own: own.sampler == "rank", ("rank_temperature",)),
    )

    def __init__(
        self,
        ranking: RankingSource,
        loss: str = "soft_bce",
        k: int | None = None,
        sampler: str = "top",
        scaled: bool = False,
        temperature: float = 1.0,
        offset: float = 0.0,
        rank_temperature: float = 10.0,
        share: float = 1.0,
        weight: float = 1.0,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        if loss not in LOSSES:
            raise unknown("loss (response_distillation.loss)", loss, LOSSES)
        if sampler not in SAMPLERS:
            raise unknown("sampler (response_distillation.sampler)", sampler, SAMPLERS)
        if k is not None and k < 1:
            raise UserError(f"response_distillation: k is {k}. It must be at least 1, or null for the whole list.")
        for key, value in {"temperature": temperature, "rank_temperature": rank_temperature}.items():
            if not value > 0:
                raise UserError(f"response_distillation: {key} is {value}. It must be positive.")
        check_share("response_distillation", share)
        self.ranking, self.loss, self.k, self.sampler, self.share = ranking, loss, k, sampler, share
        self.scaled, self.temperature, self.offset, self.rank_temperature = scaled, temperature, offset, rank_temperature
        self.check_read()

    def build(self, student: Any) -> ResponseTerm:
        if self.k is not None and self.k > self.ranking.k:
            raise UserError(
                f"response_distillation: k is {self.k}, but the teacher's lists have {self.ranking.k} items. Lower k, or "
                "record longer lists (k of the record stage)."
            )
        return ResponseTerm(self, student.reduce)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        whole = self.k is None or self.sampler != "top" or self.scaled
        read_lists(self.ranking, batch, KEYS, self.share, None if whole else self.k, pl_module.device)
