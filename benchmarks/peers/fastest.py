"""A subject: the fastest hand-written loop known to us, whose file (setting `library`) is not part of this project.

Its variants are tried for a few steps each, and the fastest on these data starts anew. It has no evaluation of its own.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import subject
import torch

VARIANTS = {
    "whole rows": {},
    "packed": {"pack": 1, "groups": 9},
    "flash attention": {"attn": "flash"},
}
SHARED = {"loss": "un2", "attn": "bmm", "drop": "bits", "adam": "fused", "C": 256}
TRIALS, BATCHES = 7, 8


def main() -> None:
    subject.announce_first_step()
    task = subject.settings()
    sys.path.insert(0, str(Path(task["library"]).parent))
    import fast_lib
    import peerlib

    fast_lib.mallopt()
    peerlib.seqs = lambda _: {user: items.tolist() for user, items in enumerate(subject.histories(task["data"]))}
    data = fast_lib.Data("ours", task["length"])
    data.V = task["items"] + 1
    variants = {name: fast_lib.Var(data, **{**SHARED, **flags}) for name, flags in VARIANTS.items()}

    def train(name: str, rows: torch.Tensor) -> float:
        clock = subject.Clock()
        for index in rows.split(task["batch"]):
            variants[name].step(index)
        return clock.stop()["cpu"]

    samples = [torch.randperm(data.n)[: BATCHES * task["batch"]] for _ in range(TRIALS)]
    trials = [{name: train(name, rows) for name in variants} for rows in samples][1:]
    fastest = min(variants, key=lambda name: statistics.median(trial[name] for trial in trials))
    chosen = variants[fastest] = fast_lib.Var(data, seed=task["seed"], **{**SHARED, **VARIANTS[fastest]})
    chosen.opt.param_groups[0]["lr"] = task.get("lr", 1e-3)

    @torch.inference_mode()
    def scores(read: list[np.ndarray]) -> Iterator[np.ndarray]:
        chosen.dr.p, dropout = 0.0, chosen.dr.p
        for batch in torch.from_numpy(subject.padded(read, task["length"])).split(subject.CHUNK):
            yield (chosen.encode_pad(batch)[:, -1] @ chosen.m.e.weight.T).numpy()
        chosen.dr.p = dropout

    subject.epochs(lambda: train(fastest, torch.randperm(data.n)), scores, variant=fastest)


if __name__ == "__main__":
    main()
