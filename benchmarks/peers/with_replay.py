"""A subject: RePlay's SASRec, as its own example trains it, on Lightning."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import subject
import torch
from replay.data import FeatureHint, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    subject.announce_first_step()
    task = subject.settings()
    os.chdir(task["folder"])
    histories, n_items, length = subject.histories(task["data"]), task["items"], task["length"]
    for name, cut in (("train", 2), ("test", 1)):  # RePlay counts items from 0 and pads with n
        rows = [history[:-cut] - 1 for history in histories]
        pd.DataFrame({"user_id": range(len(rows)), "item_id": rows}).to_parquet(f"{name}.parquet")
    item = TensorFeatureInfo(
        name="item_id",
        is_seq=True,
        padding_value=n_items,
        cardinality=n_items,
        embedding_dim=64,
        feature_type=FeatureType.CATEGORICAL,
        feature_hint=FeatureHint.ITEM_ID,
    )
    schema = TensorSchema([item])
    transforms = make_default_sasrec_transforms(schema)
    L.seed_everything(task["seed"], verbose=False)
    shape = {"shape": length + 1, "padding": n_items}
    training = ParquetModule(
        train_path="train.parquet",
        batch_size=task["batch"],
        metadata={"train": {"item_id": shape}},
        transforms=transforms,
    )
    network = SasRec.from_params(
        schema=schema, embedding_dim=64, max_sequence_length=length, num_heads=2, num_blocks=2, dropout=0.2
    )
    model = LightningModule(network, OptimizerFactory(learning_rate=task.get("lr", 1e-3)))

    @torch.inference_mode()
    def scores(read: list[np.ndarray]) -> Iterator[np.ndarray]:
        network.eval()
        for batch in torch.from_numpy(subject.padded(read, length)).split(subject.CHUNK):
            items = torch.where(batch > 0, batch - 1, n_items)
            found = network(feature_tensors={"item_id": items}, padding_mask=batch > 0)["logits"]
            yield np.pad(found.numpy(), ((0, 0), (1, 0)))

    batches = math.ceil(len(histories) / task["batch"])
    trainer = L.Trainer(
        **QUIET,
        max_epochs=-1,
        callbacks=[subject.epoch_callback(L.Callback, scores, (task["batches"] or batches) / batches)],
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        limit_train_batches=task["batches"],
    )
    trainer.fit(model, datamodule=training)

    def evaluate() -> None:
        """RePlay hands out the best items of each user."""
        data = ParquetModule(
            predict_path="test.parquet",
            batch_size=1024,
            metadata={"predict": {"user_id": {}, "item_id": {**shape, "shape": length}}},
            transforms=transforms,
        )
        best = PandasTopItemsCallback(top_k=10, query_column="user_id", item_column="item_id", rating_column="score")
        L.Trainer(**QUIET, callbacks=[best], inference_mode=True).predict(model, datamodule=data, return_predictions=False)
        best.get_result()

    subject.evaluations(evaluate)


if __name__ == "__main__":
    main()
