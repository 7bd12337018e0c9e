"""A subject: Cornac's BPR-MF, whose loop is compiled; one gradient step for each training interaction in turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import subject
from cornac.data import Dataset
from cornac.models.bpr import recom_bpr


class Epochs:
    """Stands for the progress bar that Cornac's loop runs over."""

    def __iter__(self) -> Iterator[int]:
        subject.say(first_step=True)  # its steps cannot be seen
        asked = True
        while asked:
            clock = subject.Clock()
            yield 0
            subject.say(share=1.0, **clock.stop())
            asked = subject.another_epoch()

    def set_postfix(self, _: dict[str, str]) -> None:
        pass


@contextmanager
def bar(*_: Any, **__: Any) -> Iterator[Epochs]:
    yield Epochs()


def main() -> None:
    task = subject.settings()
    histories = subject.histories(task["data"])
    recom_bpr.trange = bar
    pairs = [(user, item, 1.0) for user, history in enumerate(histories) for item in history[:-2].tolist()]
    training = Dataset.from_uir(pairs, seed=0)
    model = recom_bpr.BPR(k=64, max_iter=1, learning_rate=0.05, lambda_reg=0.001, num_threads=1, seed=0)
    model.fit(training)

    def evaluate() -> float:
        """Scores of all items for each user."""
        hits = 0
        for user, history in enumerate(histories):
            wanted = training.iid_map.get(int(history[-1]))
            if wanted is not None:
                scores = model.score(training.uid_map[user])
                hits += int((scores > scores[wanted]).sum()) < 10
        return hits / len(histories)

    subject.evaluations(evaluate)


if __name__ == "__main__":
    main()
