"""RLMRec-Gen: Ren et al., "Representation Learning with Large Language Models for Recommendation", WWW 2024, 2310.15950."""

import math
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.callbacks.distillation import Distillation, Term, check_share
from lit_llmers.callbacks.embedding_distillation import two_layers
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.alignment import info_nce_among
from lit_llmers.students.collaborative import TableOutput
from lit_llmers.text.tables import has_vector

KEY = "masked_nodes"


class MaskedReconstructionTerm(Term):
    """InfoNCE: which of the hidden nodes' texts is that of this node, judged by what its neighbours say about it?

    Args:
        items: `[n+1, D]` signals, row 0 zero.
        users: `[U, D]` signals.
        dim: d, width of the student.
        temperature: divides the cosines.
        share: of the hidden nodes that are asked; the texts of all are what they choose from.

    Attributes:
        token: `[d]`, stands for the initial embedding of every hidden node.
        decoder: d to D.
    """

    requires = frozenset({KEY})
    per_target = False
    signals: Tensor

    def __init__(self, items: Tensor, users: Tensor, dim: int, temperature: float, share: float) -> None:
        super().__init__()
        self.register_buffer("signals", torch.cat([users, items]), persistent=False)
        self.token = nn.Parameter(torch.zeros(dim))
        self.decoder = two_layers(dim, items.shape[1], nn.LeakyReLU)
        self.temperature, self.share = temperature, share

    def forward(self, output: TableOutput, batch: Batch) -> Tensor:  # type: ignore[override]
        nodes, n_users = batch[KEY], len(output.users)
        asked = nodes[: math.ceil(self.share * len(nodes))]  # they were drawn in random order
        own, user = torch.arange(len(asked), device=nodes.device), asked < n_users
        read = torch.cat([output.users.index_select(0, asked[user]), output.items.index_select(0, asked[~user] - n_users)])
        text, own = self.signals.index_select(0, nodes), torch.cat([own[user], own[~user]])
        losses = info_nce_among(self.decoder(read), text, own, temperature=self.temperature)
        return losses.sum() / len(losses)  # not their mean: see `cross_entropy`


class MaskedReconstruction(Distillation):
    """Some nodes of the graph are hidden behind a learned token; what propagates to them is to tell their text.

    As in the official code the student has one pass over the graph in a training step, the one with hidden nodes: its own loss
    scores pairs with that pass too. What is penalised are the true embeddings. Validation and export see all nodes. We differ
    in that LightGCN's layers are averaged and not summed, that no edges are dropped, and that a node without text, which has
    none to tell, is never hidden.

    Cost: hidden nodes compete with each other, so it grows with the square of the graph's nodes and of `ratio`. On one core and
    at .15 an epoch of LightGCN takes twice as long with the term on 6,040 users and 3,706 items, and 30 times as long on 22,363
    and 12,101. `share` cuts it: each step asks some of the hidden nodes, which choose from the texts of all.

    Args:
        items: `[n+1, D]` the items' signals; a row of zeros, such as row 0, is none.
        users: `[U, D]` the users' signals, zero for one without.
        ratio: of all users and items with a signal, hidden, drawn anew at each step; one node at least.
        temperature: divides the cosines (tau).
        share: of the hidden nodes that are asked at a step; the loss stays unbiased.
        weight: factor of the term in the student's loss.
        decay_epochs: see `Distillation`; nodes are hidden also where the weight is zero.

    Raises:
        UserError: a ratio or share outside 0..1, a temperature that is not positive, or no signals of users.
    """

    name = "masked_reconstruction"
    fits = LightGCN
    sources: ClassVar[dict[str, tuple[str, str]]] = {"items": ("from", "items"), "users": ("from", "users")}

    def __init__(
        self,
        items: Tensor,
        users: Tensor,
        ratio: float = 0.15,
        temperature: float = 0.5,
        share: float = 1.0,
        weight: float = 0.1,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        if not 0 < ratio < 1:
            raise UserError(f"masked_reconstruction: ratio is {ratio}. It is the share of hidden nodes, between 0 and 1.")
        if not temperature > 0:
            raise UserError(f"masked_reconstruction: temperature is {temperature}. It must be positive.")
        if items.shape[1] != users.shape[1]:
            raise UserError(
                f"masked_reconstruction: the items' signals have {items.shape[1]} numbers and the users' {users.shape[1]}. "
                "Encode both with the same encoder."
            )
        check_share("masked_reconstruction", share)
        self.items, self.users, self.ratio, self.temperature, self.share = items, users, ratio, temperature, share
        self.known = has_vector(torch.cat([users, items])).nonzero().squeeze(1)  # nodes, [U + n] at most

    def build(self, student: Any) -> MaskedReconstructionTerm:
        return MaskedReconstructionTerm(self.items, self.users, student.backbone.dim, self.temperature, self.share)

    def draw(self, backbone: LightGCN) -> Tensor:
        """`[M]` nodes to hide, of those with a signal: never the padding."""
        device, number = backbone.nodes.device, len(self.known)
        drawn = torch.randperm(number, device=device)[: max(1, int(self.ratio * number))]
        return self.known.to(device)[drawn]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        student: Any = pl_module
        batch[KEY] = self.draw(student.backbone)
        hide(student.backbone, batch[KEY], student.terms[self.name].token)


def hide(backbone: LightGCN, nodes: Tensor, token: Tensor) -> None:
    """Let the backbone's next forward pass read the token `[d]` in place of the initial embeddings of the nodes `[M]`."""

    def before(module: nn.Module, arguments: Any) -> None:
        table = backbone.nodes.index_copy(0, nodes, token.to(backbone.nodes).expand(len(nodes), -1))
        vars(backbone)["nodes"] = table  # found before the parameter, which stays what it is

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        vars(backbone).pop("nodes", None)
        for hook in hooks:
            hook.remove()

    hooks = [backbone.register_forward_pre_hook(before), backbone.register_forward_hook(after, always_call=True)]
