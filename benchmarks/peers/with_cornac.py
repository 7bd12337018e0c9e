"""A subject: Cornac's BPR-MF, whose loop is compiled; one gradient step for each training interaction in turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import subject
from cornac.data import Dataset
from cornac.models.bpr import recom_bpr


class Epochs:
    """Stands for the progress bar that Cornac's loop runs over."""

    def __init__(self, scores: subject.Scores) -> None:
        self.scores = scores

    def __iter__(self) -> Iterator[int]:
        subject.say(first_step=True)  # its steps cannot be seen
        asked = True
        while asked:
            clock = subject.Clock()
            yield 0
            subject.say(share=1.0, **clock.stop())
            asked = subject.another_epoch(self.scores)

    def set_postfix(self, _: dict[str, str]) -> None:
        pass


def main() -> None:
    task = subject.settings()
    histories = subject.histories(task["data"])
    pairs = [(user, item, 1.0) for user, history in enumerate(histories) for item in history[:-2].tolist()]
    training = Dataset.from_uir(pairs, seed=0)
    items = np.array(list(training.iid_map))  # ours in the order of Cornac's
    numbers = np.array([training.uid_map[user] for user in range(len(histories))])
    model = recom_bpr.BPR(
        k=64,
        max_iter=1,
        learning_rate=task.get("lr", 0.05),
        lambda_reg=task.get("reg", 0.001),
        num_threads=1,
        seed=task["seed"],
    )

    def scores(_: list[np.ndarray]) -> Iterator[np.ndarray]:
        vectors, biases = np.zeros((task["items"] + 1, 64), np.float32), np.full(task["items"] + 1, -np.inf, np.float32)
        vectors[items], biases[items] = model.i_factors, model.i_biases
        for users in np.array_split(numbers, len(numbers) // subject.CHUNK + 1):
            yield model.u_factors[users] @ vectors.T + biases

    @contextmanager
    def bar(*_: Any, **__: Any) -> Iterator[Epochs]:
        yield Epochs(scores)

    recom_bpr.trange = bar
    model.fit(training)
    subject.evaluations(lambda: subject.ranks(scores, "test", ("kept",)))


if __name__ == "__main__":
    main()
