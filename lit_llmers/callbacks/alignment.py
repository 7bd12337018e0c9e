"""Alignment: what a student learned from interactions and what a text says about the same item or user are to agree.

RLMRec-Con: Ren et al., "Representation Learning with Large Language Models for Recommendation", WWW 2024 (arXiv 2310.15950).
LLMEmb: Liu et al., AAAI 2025 (arXiv 2409.19925), soft targets. PAD: Wang et al., SIGIR 2025 (arXiv 2412.04107), equal
distributions.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lit_llmers.backbones import Backbone, CollaborativeBackbone
from lit_llmers.callbacks.alignment_term import COLDEST, AlignmentTerm, Bank, Views, two_views
from lit_llmers.callbacks.distillation import Distillation, Readers, check_share
from lit_llmers.callbacks.embedding_distillation import two_layers
from lit_llmers.errors import UserError, unknown

KINDS = ("info_nce", "soft_clip", "mmd", "cosine")
NEGATIVES = ("batch", "all", "bank")
PROJECTORS = ("none", "linear", "mlp")


class Alignment(Distillation):
    """A student's vector of an item, and of a user where `users` are given, is to be near to the text's vector of the same one.

    An item that is in a batch twice competes with itself nowhere: we differ from the official codes, in which it is its own
    false negative, in that it is one candidate. RLMRec-Con is `kind: info_nce, projector: mlp` with a collaborative student:
    users compete with all users, targets with the targets of the batch, negatives with its negatives. From LLMEmb we differ in
    the learned temperature: we learn its logarithm, so that it stays positive.

    Cost: with the 512 targets drawn by default of 6,400, 64 numbers wide, and signals of 384, a SASRec pays 2 to 5 % of its
    step on one core; 6 % with a bank, 11 to 14 % against all of 3,706 items, and 24 % with `share: 1`. A LightGCN's step on
    2,048 pairs is so short that items cost 35 to 50 % of it, and all of 6,040 users through an MLP three times a step.

    Args:
        items: `[n+1, D]` the items' signals; an item whose row is zero has none: it is no pair and no negative. None aligns the
            two tables of a student whose fusion has them, its own items' and that of their text (`concat`, `dual_view`), both
            of which learn: PAD's second phase.
        users: `[U, D]` the users' signals, zero for one without; for a collaborative student alone.
        kind: `info_nce` (cosines), `soft_clip` (dot products, the signal as x), `mmd` (equal distributions) or `cosine` (equal
            directions). The distributions are of the items that a step looks at: as in PAD's code, targets and as many items
            drawn uniformly, so that rare items count too; with a collaborative student its negatives, by themselves.
        negatives: of `info_nce`: which items compete: those of the `batch`, `all`, or those of the batch and of a `bank` of the
            vectors that were last met.
        bank: how many vectors it holds.
        symmetric: of `info_nce`: also ask for the student's vector given the signal, and take the mean of both.
        temperature: of `info_nce` and `soft_clip`: divides the similarities (tau); the latter also multiplies those of its
            targets by it.
        learn_temperature: whether it is trained, from there on and not below 0.01.
        projector: `none`, `linear`, or `mlp` with one inner layer of the mean width and a leaky ReLU; users and items share it.
        project: what it maps: the `signal` to the student's width, or the `student` to the signal's.
        share: of a batch's targets, negatives and users, drawn at random at each step; the others are not aligned, nor do
            they compete where the batch does. None draws 512 of each at most (of targets and uniform items together).
        weight: factor of the term in the student's loss.
        decay_epochs: see `Distillation`.

    Raises:
        UserError: an unknown kind, projector or competition; a size, a temperature or a share that is not positive; or a
            setting that is not read.
    """

    name = "alignment"
    fits = (Backbone, CollaborativeBackbone)
    of_user_table = ("users",)
    sources: ClassVar[dict[str, tuple[str, str]]] = {"items": ("from", "items"), "users": ("users", "users")}
    readers: ClassVar[Readers] = (
        ("kind: info_nce", lambda own: own.kind == "info_nce", ("negatives", "symmetric")),
        (
            "kind: info_nce or soft_clip",
            lambda own: own.kind in ("info_nce", "soft_clip"),
            ("temperature", "learn_temperature"),
        ),
        ("negatives: bank", lambda own: own.negatives == "bank", ("bank",)),
        ("projector: linear or mlp", lambda own: own.projector != "none", ("project",)),
    )

    def __init__(
        self,
        items: Tensor | None = None,
        users: Tensor | None = None,
        kind: str = "info_nce",
        negatives: str = "batch",
        bank: int = 4096,
        symmetric: bool = False,
        temperature: float = 0.2,
        learn_temperature: bool = False,
        projector: str = "linear",
        project: str = "signal",
        share: float | None = None,
        weight: float = 0.1,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        for key, given, known in (
            ("kind", kind, KINDS),
            ("negatives", negatives, NEGATIVES),
            ("projector", projector, PROJECTORS),
            ("project", project, ("signal", "student")),
        ):
            if given not in known:
                raise unknown(f"value of alignment.{key}", given, known)
        if bank < 1:
            raise UserError(f"alignment: bank is {bank}. It must hold at least 1 vector.")
        if not temperature > 0:
            raise UserError(f"alignment: temperature is {temperature}. It must be positive.")
        if learn_temperature and temperature < COLDEST:
            raise UserError(f"alignment: temperature is {temperature}. To be learned it must start at {COLDEST} or above.")
        check_share("alignment", share, null=True)
        self.items, self.users, self.kind, self.negatives, self.bank = items, users, kind, negatives, bank
        self.symmetric, self.temperature, self.learn_temperature = symmetric, temperature, learn_temperature
        self.projector, self.project, self.share = projector, project, share
        self.check_read()

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return arguments.get("kind") != "cosine" and arguments.get("negatives") != "all"

    @classmethod
    def compares_as_they_are(cls, arguments: dict[str, Any]) -> bool:
        return arguments.get("projector") == "none"

    def build(self, student: Any) -> AlignmentTerm:
        items: Tensor | Views | None = self.items
        if items is None:
            items = two_views(student.backbone)
        dim = student.backbone.dim if isinstance(items, Tensor) else items()[0].shape[1]
        width = items.shape[1] if isinstance(items, Tensor) else items()[1].shape[1]
        if self.projector == "none" and dim != width:
            raise UserError(
                f"alignment: projector=none compares vectors as they are, but the student's have {dim} numbers and the "
                f"signals {width}. Use projector=linear or mlp, or give both the same dim."
            )
        users = self.users
        if users is not None and users.shape[1] != width:
            raise UserError(
                f"alignment: the items' signals have {width} numbers and the users' {users.shape[1]}. Encode both with the "
                "same encoder."
            )
        inputs, outputs = (width, dim) if self.project == "signal" else (dim, width)
        projector: nn.Module = nn.Identity()
        if self.projector != "none":
            linear = self.projector == "linear"
            projector = nn.Linear(inputs, outputs) if linear else two_layers(inputs, outputs, nn.LeakyReLU)
        mapped = {self.project: projector}
        number = (1 + self.symmetric) * (self.negatives == "bank")
        return AlignmentTerm(
            items,
            users,
            student.backbone.text.source.vectors if self.items is None else self.items,
            self.kind,
            self.negatives,
            self.symmetric,
            self.temperature,
            self.learn_temperature,
            mapped.get("signal", nn.Identity()),
            mapped.get("student", nn.Identity()),
            [Bank(self.bank, outputs) for _ in range(number)],
            self.share,
            student.reduce,
        )
