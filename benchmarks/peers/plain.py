"""A subject: each model as a plain PyTorch loop, as a good programmer writes it: no framework and no tricks."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import subject
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DIM, LAYERS, HEADS, DROPOUT, STD = 64, 2, 2, 0.2, 0.02
HIDDEN = 0.15  # share of the items that BERT4Rec hides
PENALTY = 1e-5  # LightGCN's on the initial embeddings of a batch


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer on `[B, L, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.inner, self.outer = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, HEADS, DIM // HEADS))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, visible, DROPOUT * self.training, is_causal=visible is None)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.outer(F.gelu(self.inner(self.ffn_norm(x)))))


class Transformer(nn.Module):
    """SASRec if causal; else BERT4Rec, whose item n+1 stands for a hidden one."""

    def __init__(self, n_items: int, length: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.items = nn.Embedding(n_items + 2 - causal, DIM, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(length, DIM) * STD)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.dropout = nn.LayerNorm(DIM), nn.Dropout(DROPOUT)
        nn.init.normal_(self.items.weight, std=STD)

    def forward(self, items: Tensor) -> Tensor:
        real = items > 0
        visible = None if self.causal else real[:, None, None]
        x = self.dropout(self.items(items) + self.positions) * real[:, :, None]
        for block in self.blocks:
            x = block(x, visible) * real[:, :, None]
        return self.norm(x)


class GRU4Rec(nn.Module):
    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.items, self.dropout = nn.Embedding(n_items + 1, DIM, padding_idx=0), nn.Dropout(DROPOUT)
        self.gru, self.dense = nn.GRU(DIM, DIM, batch_first=True), nn.Linear(DIM, DIM)
        nn.init.normal_(self.items.weight, std=STD)

    def forward(self, items: Tensor) -> Tensor:
        return self.dense(self.gru(self.dropout(self.items(items)))[0])


class Propagation(torch.autograd.Function):
    """Mean of a table and of what `LAYERS` steps over the graph make of it; the graph is symmetric, and so is this."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, graph: Tensor) -> Tensor:
        ctx.graph = graph
        layers = [table]
        for _ in range(LAYERS):
            layers.append(graph @ layers[-1])
        return sum(layers) / len(layers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Propagation.forward(ctx, gradient, ctx.graph), None


def normalised_graph(pairs: Tensor, nodes: int) -> Tensor:
    """`D^-1/2 A D^-1/2` of the pairs `[E, 2]` of nodes, CSR."""
    both = torch.cat([pairs, pairs.flip(1)]).T
    degree = torch.bincount(both[0], minlength=nodes)
    weight = (degree[both[0]] * degree[both[1]]).rsqrt()
    return torch.sparse_coo_tensor(both, weight, (nodes, nodes)).coalesce().to_sparse_csr()


# ---- training and ranking ----------------------------------------------------------------------------------------------


def sequential(task: dict) -> tuple[Callable[[], None], subject.Scores]:
    """What trains an epoch and what scores all items for all users, for the sequential models."""
    histories, length, n_items = subject.histories(task["data"]), task["length"], task["items"]
    cloze = task["model"] == "bert4rec"
    training = [history[:-2] for history in histories]
    if cloze:
        rows = torch.from_numpy(subject.padded(training, length))
    else:
        rows = torch.from_numpy(subject.padded([row for row in training if len(row) > 1], length + 1))
    model = GRU4Rec(n_items) if task["model"] == "gru4rec" else Transformer(n_items, length, not cloze)
    compiled = task.get("compiled", False)
    device = "cuda" if compiled and torch.cuda.is_available() else "cpu"
    rows, model = rows.to(device), model.to(device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), task.get("lr", 1e-3), fused=True)

    def loss(batch: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if cloze:
            scored = (torch.rand(batch.shape, device=device) < HIDDEN) & (batch > 0)
            items, answer = batch.masked_fill(scored, n_items + 1), batch[scored]
        else:
            items, scored = batch[:, :-1], batch[:, :-1] > 0
            answer = batch[:, 1:][scored]
        with torch.autocast(device, torch.bfloat16, enabled=compiled):
            return F.cross_entropy(forward(items)[scored] @ model.items.weight[: n_items + 1].T, answer)

    if compiled:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss(rows[: task["batch"]], model).backward()
        optimizer.zero_grad()
        task["flop"] = counter.get_total_flops() * -(-len(rows) // task["batch"])

    def train() -> None:
        model.train()
        for index in torch.randperm(len(rows), device=device).split(task["batch"]):
            loss(rows[index], forward).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.inference_mode()
    def scores(read: list[np.ndarray]) -> Iterator[np.ndarray]:
        model.eval()
        if cloze:
            read = [np.append(items, n_items + 1) for items in read]  # hidden, to be filled in
        for batch in torch.from_numpy(subject.padded(read, length)).split(subject.CHUNK):
            yield (model(batch.to(device))[:, -1] @ model.items.weight[: n_items + 1].T).cpu().numpy()

    return train, scores


def collaborative(task: dict) -> tuple[Callable[[], None], subject.Scores]:
    """The same for BPR-MF and LightGCN. One table holds the users and after them the items, of which the 0th is unused."""
    histories, n_items = subject.histories(task["data"]), task["items"]
    n_users = len(histories)
    user = torch.repeat_interleave(torch.tensor([len(history) - 2 for history in histories]))
    item = torch.from_numpy(np.concatenate([history[:-2] for history in histories]))
    seen = torch.unique(user * (n_items + 1) + item)  # sorted
    table = nn.Parameter(torch.randn(n_users + n_items + 1, DIM) * 0.1)
    optimizer = torch.optim.Adam([table], task.get("lr", 1e-3), fused=True)
    reg = task.get("reg", PENALTY if task["model"] == "lightgcn" else 0.0)
    graph = None
    if task["model"] == "lightgcn":
        pairs = torch.stack([seen // (n_items + 1), n_users + seen % (n_items + 1)], 1)
        graph = normalised_graph(pairs, len(table))

    def propagated() -> Tensor:
        return table if graph is None else Propagation.apply(table, graph)

    def negatives(user: Tensor) -> Tensor:
        """An item for each user that the user has not met."""
        drawn, left = torch.empty_like(user), torch.arange(len(user))
        while len(left):
            drawn[left] = torch.randint(1, n_items + 1, left.shape)
            key = user[left] * (n_items + 1) + drawn[left]
            left = left[seen[torch.searchsorted(seen, key).clamp_(max=len(seen) - 1)] == key]
        return drawn

    def train() -> None:
        for index in torch.randperm(len(user)).split(task["batch"]):
            who, liked = user[index], item[index]
            nodes = torch.cat([who, n_users + liked, n_users + negatives(who)])
            u, positive, negative = propagated().index_select(0, nodes).chunk(3)
            loss = F.softplus((u * (negative - positive)).sum(1)).mean()
            if reg:
                loss = loss + reg / 2 * table.index_select(0, nodes).square().sum() / len(index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.inference_mode()
    def scores(_: list[np.ndarray]) -> Iterator[np.ndarray]:
        vectors = propagated()
        for users in vectors[:n_users].split(subject.CHUNK):
            yield (users @ vectors[n_users:].T).numpy()

    return train, scores


if __name__ == "__main__":
    subject.announce_first_step()
    task = subject.settings()
    torch.manual_seed(task["seed"])
    train, scores = (collaborative if task["model"] in ("lightgcn", "bpr-mf") else sequential)(task)
    subject.epochs(train, scores, **({"flop": task["flop"]} if "flop" in task else {}))
    subject.evaluations(lambda: subject.ranks(scores, "test", ("kept",)))
