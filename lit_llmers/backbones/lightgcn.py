"""LightGCN: He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", SIGIR 2020,
2002.02126."""

import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.backbones import Batch, CollaborativeBackbone
from lit_llmers.backbones.graph import Edges, check_layers, propagate
from lit_llmers.backbones.items import copy_table
from lit_llmers.backbones.rows import half_squares, occurrences


class LightGCN(CollaborativeBackbone):
    """One embedding per user and item, averaged with those of its neighbours up to `layers` steps away (eq. 7 and 8).

    All layers weigh the same, as in the paper's experiments (section 3.1.2, alpha_k = 1 / (K+1)). The graph is that of the
    training pairs; a pair that repeats is one edge.

    Args:
        n_users, n_items: nodes; items are numbered from 1.
        training_pairs: `[E, 2]` int64, user 0..U-1 and item 1..n.
        dim: width of everything (D = d).
        layers: propagations; none is matrix factorisation.
        reg: lambda of eq. 15. As in the official code it weighs half the squares of the initial embeddings of a row's user,
            target and negatives (their mean), averaged over the batch.
        with_input: whether the initial embeddings are in the average; SimGCL leaves them out.
        init_std: standard deviation of the initial embeddings; that of the official code (the paper says Xavier).

    Attributes:
        states: `x_0 ... x_L` of the last forward pass, each `[N, d]`, with `keep_states` and in training; empty otherwise.

    Raises:
        UserError: there are fewer layers than none, or none without the input.
    """

    keep_states: bool = False

    def __init__(
        self,
        n_users: int,
        n_items: int,
        training_pairs: np.ndarray,
        dim: int = 64,
        layers: int = 3,
        reg: float = 1e-4,
        with_input: bool = True,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        check_layers(layers, with_input)
        self.layers, self.width, self.dim = layers, dim, dim
        self.n_users, self.n_items = n_users, n_items
        self.reg, self.with_input = reg, with_input
        self.edges = Edges.of(training_pairs, n_users, n_items)
        self.graph = self.edges.graph()
        self.nodes = nn.Parameter(torch.empty(n_users + n_items + 1, dim).normal_(std=init_std))
        self.nodes.data[n_users] = 0  # item 0: without neighbours and never in a batch, it stays so
        self.states: tuple[Tensor, ...] = ()

    def forward(self) -> tuple[Tensor, Tensor]:
        nodes = self.nodes  # which `callbacks.masked_reconstruction` puts others in place of, for this pass alone
        mean, hops = propagate(nodes, [self.graph] * self.layers, self.with_input)
        self.states = (nodes, *hops) if self.keep_states and self.training else ()
        return self.split(mean)

    def initialise(self, items: Tensor, users: Tensor | None = None) -> None:
        of_users, of_items = self.split(self.nodes.data)
        copy_table(of_items, items)
        if users is not None:
            copy_table(of_users, users, "users")

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Users `[U, d]` and items `[n+1, d]` of all nodes. (In one call: the gradient of two slices costs four copies.)"""
        users, items = nodes.split([self.n_users, self.n_items + 1])
        return users, items

    def penalty(self, batch: Batch) -> Tensor | float:
        if not self.reg:
            return 0.0
        count = torch.cat(occurrences(batch, self.n_users, self.n_items))
        return half_squares(self.nodes, count) * (self.reg / len(batch["user"]))
