"""A subject: RecBole's SASRec, GRU4Rec, Caser, SR-GNN, LightGCN, SGL or BPR.

Its sequential models make a row of each prefix, which predicts one item. They get the end of each history, so that they
predict the same items in an epoch as the others.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import subject
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed

MODELS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "caser": "Caser", "srgnn": "SRGNN"}
SEQUENTIAL = set(MODELS)
MODELS |= {"lightgcn": "LightGCN", "sgl": "SGL", "bpr-mf": "BPR"}
READS_HISTORIES: dict[str, Any] = {"loss_type": "CE", "train_neg_sample_args": None}
OWN: dict[str, dict[str, Any]] = {
    "sasrec": {
        "hidden_size": 64,
        "inner_size": 64,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
    },
    "gru4rec": {"hidden_size": 64, "num_layers": 1, "dropout_prob": 0.2},
    "caser": {"MAX_ITEM_LIST_LENGTH": 5, "nh": 16, "nv": 4, "dropout_prob": 0.5, "reg_weight": 0.0},
    "srgnn": {"step": 1},
    "lightgcn": {"n_layers": 2},
    "sgl": {"n_layers": 3, "type": "ED", "drop_ratio": 0.1, "ssl_tau": 0.2, "ssl_weight": 0.1},
}


class Part:
    """The first `batches` of a loader."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Any:
        return itertools.islice(self.loader, self.batches)


def main() -> None:
    logging.disable(logging.CRITICAL)
    subject.announce_first_step()
    task = subject.settings()
    os.chdir(task["folder"])
    sequential, own = task["model"] in SEQUENTIAL, OWN.get(task["model"], {})
    length = own.get("MAX_ITEM_LIST_LENGTH", task["length"])
    atomic = Path("data/ours/ours.inter")
    atomic.parent.mkdir(parents=True)
    histories = subject.histories(task["data"])
    with open(atomic, "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, history in enumerate(histories):
            kept = history[-task["length"] - 3 :] if sequential else history  # one to begin with and two held out
            file.writelines(f"{user}\t{item}\t{time}\n" for time, item in enumerate(kept))
    options = {
        "data_path": "data",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["Hit"],
        "topk": [10],
        "valid_metric": "Hit@10",
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
        "learning_rate": task.get("lr", 1e-3),
        "train_batch_size": task["batch"],
        "eval_batch_size": 4096,
        "embedding_size": 64,
        "MAX_ITEM_LIST_LENGTH": length,
        "seed": task["seed"],
        "reproducibility": False,
        **(READS_HISTORIES if sequential else {}),
        **own,
    }
    config = Config(model=MODELS[task["model"]], dataset="ours", config_dict=options)
    init_seed(task["seed"], False)
    training, _, test = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, training.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    known = training.dataset.field2token_id
    users = torch.tensor([known["user_id"][str(user)] for user in range(len(histories))])
    number = np.array([known["item_id"].get(str(item), 0) for item in range(task["items"] + 1)])  # 0: RecBole has not got it

    @torch.inference_mode()
    def scores(read: list[np.ndarray]) -> Iterator[np.ndarray]:
        model.eval()
        read = [number[items[-length:]] for items in read] if sequential else read
        for chosen in users.split(subject.CHUNK):
            asked = {"user_id": chosen}
            if sequential:
                some, read = read[: len(chosen)], read[len(chosen) :]
                rows = [torch.from_numpy(items) for items in [*some, np.zeros(length, np.int64)]]
                asked["item_id_list"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:-1]
                asked["item_length"] = torch.tensor([len(items) for items in some])
            table = model.full_sort_predict(Interaction(asked)).view(len(chosen), -1)[:, number].numpy()
            table[:, number == 0] = -np.inf
            yield table

    part = Part(training, task["batches"] or len(training))
    epoch = itertools.count()
    subject.epochs(lambda: trainer._train_epoch(part, next(epoch)), scores, len(part) / len(training))
    trainer.eval_collector.data_collect(training)
    subject.evaluations(lambda: trainer.evaluate(test, load_best_model=False))


if __name__ == "__main__":
    main()
