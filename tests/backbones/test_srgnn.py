from itertools import pairwise

import numpy as np
import torch

from lit_llmers.backbones.srgnn import SRGNN


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_the_paper(model: SRGNN, clicks: list[int]) -> np.ndarray:
    """One session's vector from a list of nodes and the matrices of its edges (paper, figure 2 and eq. 1-7)."""
    w = {name: value.detach().numpy() for name, value in model.named_parameters()}
    nodes = sorted(set(clicks))
    edges = np.zeros((len(nodes), len(nodes)))
    for start, end in pairwise(clicks):
        edges[nodes.index(start), nodes.index(end)] += 1
    outgoing, incoming = edges / np.maximum(edges.sum(1, keepdims=True), 1), (edges / np.maximum(edges.sum(0), 1)).T
    v = w["items.weight"][nodes]
    for _ in range(model.layers):
        updated = []
        for node in range(len(nodes)):
            a = np.concatenate([incoming[node] @ v @ w["incoming.weight"].T, outgoing[node] @ v @ w["outgoing.weight"].T])
            reset_a, update_a, new_a = np.split(w["cell.weight_ih"] @ a + w["cell.bias_ih"], 3)
            reset_v, update_v, new_v = np.split(w["cell.weight_hh"] @ v[node] + w["cell.bias_hh"], 3)
            update = sigmoid(update_a + update_v)
            updated.append((1 - update) * np.tanh(new_a + sigmoid(reset_a + reset_v) * new_v) + update * v[node])
        v = np.stack(updated)
    at = [nodes.index(click) for click in clicks]
    last, total = v[at[-1]], np.zeros(model.dim)
    for node in at:
        query = w["query.weight"] @ last + w["query.bias"] + w["key.weight"] @ v[node]
        total += (w["attention.weight"] @ sigmoid(query)) * v[node]
    return w["combine.weight"] @ np.concatenate([last, total])


def test_sessions_equal_a_loop_over_nodes_and_edges():
    """Items that come back, at once and later; edges that occur twice; a single click; the figure of the paper."""
    sessions = [[3, 5, 3, 5, 7, 3], [4, 4, 4, 2], [9], [1, 2, 3, 2, 4], [6, 8, 6, 8, 6, 8, 1]]
    length = max(map(len, sessions))
    items = torch.tensor([[0] * (length - len(session)) + session for session in sessions])
    torch.manual_seed(0)
    model = SRGNN(10, length, dim=6, layers=3, init_std=0.7).double()
    states = model(items, items > 0)
    expected = np.stack([by_the_paper(model, session) for session in sessions])
    torch.testing.assert_close(states[-1][:, 0], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[0][:, 0], model.item_table()[items[:, -1]])
