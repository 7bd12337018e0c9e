"""Embedding distillation: Hint (FitNets), DE (distillation experts) and HTD (hierarchical topology).

Hint: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550), on item vectors. DE: Kang et al.,
"DE-RRD: A Knowledge Distillation Framework for Recommender System", CIKM 2020 (arXiv 2012.04357). HTD: Kang et al., "Topology
Distillation for Recommender System", KDD 2021 (arXiv 2106.08700).
"""

import math
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone, CollaborativeBackbone
from lit_llmers.callbacks.distillation import Distillation, Readers, Reduce, Term, check_share
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses.embedding import entity_topology, expert_weights, group_topology, gumbel_like, squared_distance
from lit_llmers.students.output import StudentOutput
from lit_llmers.text.tables import has_vector

KINDS = ("hint", "experts", "topology")
MAPS = ("none", "linear", "mlp")
DRAWN = 256  # targets that a step looks at where no share is given


def two_layers(inputs: int, outputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """The map that DE, HTD and RLMRec share: its inner width is the mean of both ends."""
    inner = (inputs + outputs) // 2
    return nn.Sequential(nn.Linear(inputs, inner), activation(), nn.Linear(inner, outputs))


def drawn(index: Tensor, share: float | None, most: int) -> Tensor:
    """A share of the numbers `[K]`, drawn at random; `most` of them at most where no share is given."""
    number = most if share is None else math.ceil(share * len(index))
    return index[torch.randperm(len(index), device=index.device)[:number]] if number < len(index) else index


def with_signal(index: Tensor, known: Tensor) -> tuple[Tensor, float]:
    """Those of the entities `[K]` that are `known`, `[N]` bool, and their share: the others add nothing to a mean over all."""
    found = index[known[index]]
    return found, len(found) / max(1, len(index))


def item_sets(batch: Batch, known: Tensor, uniform: bool = False) -> list[tuple[Tensor, float]]:
    """The items that a batch is about: its targets `[T]` and, where it brings them, its negatives `[B N]`, as `with_signal`.

    Args:
        known: `[n+1]` bool.
        uniform: where it brings none, as many items drawn uniformly from the catalogue stand with the targets, `[2 T]`.
    """
    target = batch["target"]
    sets = [target if target.dim() == 1 else target[target > 0]]
    if "negatives" in batch:
        sets.append(batch["negatives"].flatten())
    elif uniform:
        sets[0] = torch.cat([sets[0], torch.randint(1, len(known), sets[0].shape, device=target.device)])
    return [with_signal(each, known) for each in sets]


def number_of_targets(output: StudentOutput, batch: Batch) -> int:
    """T, which an accelerator is not asked for: the step would wait for it."""
    target = batch["target"]
    return len(target) if target.dim() == 1 else len(output.user)


def distinct(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The different numbers in `[K]`, each once and in order: `[M]`, and the share of the K that each has.

    Args:
        rows: one past the largest number there may be.
    """
    count = torch.bincount(index, minlength=rows)
    ids = count.nonzero().squeeze(1)
    return ids, count[ids] / len(index)


class Hint(nn.Module):
    """`||map(s) - t||^2` of each entity.

    Args:
        map: to the teacher's width; None where it is the student's own.
    """

    def __init__(self, map: nn.Module | None) -> None:
        super().__init__()
        self.map = map

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[M]` for `[M, d]` and `[M, D]`."""
        return squared_distance(student if self.map is None else self.map(student), teacher)


class Experts(nn.Module):
    """DE: `||sum_k z_k f_k(s) - t||^2`, with a hard choice z of experts that a gate makes from t.

    The experts f_k are `two_layers` with a ReLU. They are computed side by side as one layer, whose inner part is scaled by z.

    Args:
        dim: d, width of the student.
        width: D, width of the teacher.
        number: E, how many experts.

    Attributes:
        temperature: of the choice.
    """

    def __init__(self, dim: int, width: int, number: int) -> None:
        super().__init__()
        inner = (dim + width) // 2
        self.gate = nn.Linear(width, number)
        self.inner = nn.Linear(dim, number * inner)
        self.outer = nn.Parameter(torch.empty(number * inner, width).uniform_(-(inner**-0.5), inner**-0.5))
        self.bias = nn.Parameter(torch.empty(number, width).uniform_(-(inner**-0.5), inner**-0.5))
        self.temperature = 1.0

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[M]` for `[M, d]` and `[M, D]`."""
        return self.chosen_distance(student, teacher, self.gate(teacher))

    def chosen_distance(self, student: Tensor, teacher: Tensor, logits: Tensor) -> Tensor:
        """`[M]`, for a choice that is drawn by the gate's logits `[M, E]`."""
        return self.distance(student, teacher, expert_weights(logits, gumbel_like(logits), self.temperature))

    def distance(self, student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
        """`[M]`, for a choice `[M, E]`."""
        inner = self.inner(student).relu().unflatten(1, (len(self.bias), -1)) * chosen[:, :, None]  # [M, E, inner]
        return squared_distance(torch.addmm(chosen @ self.bias, inner.flatten(1), self.outer), teacher)


class Topology(nn.Module):
    """HTD: `a (entity + group topology) + (1 - a) assignment` of each entity; the groups are where the experts' gate points.

    Args:
        experts: one for each group; their distance is the assignment.
        balance: a.
    """

    def __init__(self, experts: Experts, balance: float) -> None:
        super().__init__()
        self.experts, self.balance = experts, balance

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[M]` for `[M, d]` and `[M, D]`."""
        logits = self.experts.gate(teacher)  # once: a call without gradient before it would leave autocast a weight without
        group = logits.detach().argmax(1)
        topology = entity_topology(student, teacher, group) + group_topology(student, teacher, group)
        return self.balance * topology + (1 - self.balance) * self.experts.chosen_distance(student, teacher, logits)


class EmbeddingTerm(Term):
    """The mean of a distance over the items of a batch; it is 0 for an item that the teacher has no vector of.

    Args:
        items: `[n+1, D]` the teacher's vectors; a row of zeros, such as row 0, is none.
        distance: `[M]` of the student's vectors `[M, d]` and the teacher's `[M, D]` of M different items.
        once: an item counts once in a batch, however often it is in it; otherwise once for each target, and half where the
            batch brings negatives, whose mean is the other half.
        share: of the targets that it is estimated from; None takes `DRAWN` of them.
        reduce: the student's.
    """

    items: Tensor
    known: Tensor

    def __init__(self, items: Tensor, distance: nn.Module, once: bool, share: float | None, reduce: Reduce) -> None:
        super().__init__()
        self.register_buffer("items", items, persistent=False)
        self.register_buffer("known", has_vector(items), persistent=False)
        self.distance, self.once, self.share, self.reduce = distance, once, share, reduce

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        sets = [(drawn(each, self.share, DRAWN), found) for each, found in item_sets(batch, self.known)]
        if self.once:
            ids, _ = distinct(torch.cat([each for each, _ in sets]), len(self.items))
            value = self._distance(output, ids).sum() / max(1, len(ids)) * sum(found for _, found in sets) / len(sets)
        else:
            counted = [(*distinct(each, len(self.items)), found) for each, found in sets]
            values = [(self._distance(output, ids), weight, found) for ids, weight, found in counted]
            value = torch.stack([distance.dot(weight.to(distance)) * found for distance, weight, found in values]).mean()
        return self.reduce(value.expand(number_of_targets(output, batch)), batch)

    def _distance(self, output: StudentOutput, ids: Tensor) -> Tensor:
        values = self.distance(output.items.index_select(0, ids), self.items.index_select(0, ids))
        return values.to(torch.promote_types(values.dtype, torch.float32))


class EmbeddingDistillation(Distillation):
    """The student's item vectors learn to be, or to lie to each other as, the teacher's of the same items.

    `hint` maps a student's vector to its teacher's; `experts` (DE) lets the teacher's vector choose which of several maps does;
    `topology` (HTD) asks that items which the teacher puts into one group are as alike to each other, and to the means of the
    groups, as at the teacher. What the maps learn is dropped with the callback.

    We differ from the official codes of DE and HTD in that values are means over the batch's items and not sums, and in that
    users have no part, since a teacher that knows text alone has none. HTD's pairs are those among the items that are drawn.

    Distances are sums over the teacher's width, as in the papers, whose teachers are recommenders. An encode stage's vectors
    have squares of mean 1, so that those of an LLM are 4,096 away from a student that begins: they want a small weight, and
    with `topology`, whose cosines know no width, a balance near 1.

    Cost: of 6,400 targets, 64 numbers wide, the 256 drawn by default and a teacher of 384 add up to 3 % to a SASRec's step on
    one core for a hint and 5 to 8 % for 5 experts or groups; 30 add 30 %.

    Args:
        items: `[n+1, D]` the teacher's item vectors; an item whose row is zero has none, and teaches nothing.
        kind: `hint`, `experts` or `topology`.
        map: of `hint`: `none`, `linear`, or `mlp` with one inner layer of the mean width.
        experts: of `experts` and `topology`: how many maps, or groups; 30 in the papers.
        temperature: of the choice of experts in the first epoch; it falls exponentially.
        final_temperature: where it would be after the last epoch; 1e-10 in the official codes.
        balance: of `topology`: its weight against that of the assignment to groups (the official code's alpha).
        share: of a batch's targets, drawn at random at each step, that the loss is estimated from; None draws 256 at most.
        weight: factor of the term in the student's loss.
        decay_epochs: see `Distillation`.

    Raises:
        UserError: an unknown kind or map, no expert, a temperature that is not positive, a share outside 0..1, or a setting
            that the kind does not read.
    """

    name = "embedding"
    fits = (Backbone, CollaborativeBackbone)
    sources: ClassVar[dict[str, tuple[str, str]]] = {"items": ("from", "items")}
    readers: ClassVar[Readers] = (
        ("kind: hint", lambda own: own.kind == "hint", ("map",)),
        ("kind: experts or topology", lambda own: own.kind != "hint", ("experts", "temperature", "final_temperature")),
        ("kind: topology", lambda own: own.kind == "topology", ("balance",)),
    )

    def __init__(
        self,
        items: Tensor,
        kind: str = "hint",
        map: str = "linear",
        experts: int = 5,
        temperature: float = 1.0,
        final_temperature: float = 1e-10,
        balance: float = 0.5,
        share: float | None = None,
        weight: float = 1.0,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        if kind not in KINDS:
            raise unknown("kind (embedding_distillation.kind)", kind, KINDS)
        if map not in MAPS:
            raise unknown("map (embedding_distillation.map)", map, MAPS)
        if experts < 1:
            raise UserError(f"embedding_distillation: experts is {experts}. It must be at least 1.")
        for key, value in {"temperature": temperature, "final_temperature": final_temperature}.items():
            if not value > 0:
                raise UserError(f"embedding_distillation: {key} is {value}. It must be positive.")
        if not 0 <= balance <= 1:
            raise UserError(f"embedding_distillation: balance is {balance}. It is a share, from 0 to 1.")
        check_share("embedding_distillation", share, null=True)
        self.items, self.kind, self.map, self.experts = items, kind, map, experts
        self.temperature, self.final_temperature = temperature, final_temperature
        self.balance, self.share = balance, share
        self.check_read()

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return arguments.get("kind") == "topology"  # of the groups that are in a batch

    @classmethod
    def compares_as_they_are(cls, arguments: dict[str, Any]) -> bool:
        return arguments.get("kind", "hint") == "hint" and arguments.get("map") == "none"

    def build(self, student: Any) -> EmbeddingTerm:
        dim, width = student.backbone.dim, self.items.shape[1]
        distance: nn.Module
        if self.kind == "hint":
            if self.map == "none" and dim != width:
                raise UserError(
                    f"embedding_distillation: map=none compares vectors as they are, but the student's have {dim} numbers and "
                    f"the teacher's {width}. Use map=linear, or give both the same dim."
                )
            map = None
            if self.map != "none":
                map = nn.Linear(dim, width) if self.map == "linear" else two_layers(dim, width)
            distance = Hint(map)
        else:
            distance = Experts(dim, width, self.experts)
            if self.kind == "topology":
                distance = Topology(distance, self.balance)
        return EmbeddingTerm(self.items, distance, self.kind == "topology", self.share, student.reduce)

    def _set_weight(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._set_weight(trainer, pl_module)
        student: Any = pl_module
        past = trainer.current_epoch / (trainer.max_epochs or 1)
        for module in student.terms[self.name].modules():
            if isinstance(module, Experts):
                module.temperature = self.temperature * (self.final_temperature / self.temperature) ** past
