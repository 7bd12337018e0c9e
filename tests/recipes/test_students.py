"""Students by the settings of their own files, at their smallest: each trains, is evaluated, and comes back from its export."""

import numpy as np
import pytest
import torch
from planned import assert_planned
from tiny import by_name, losses, small

from lit_llmers.building import find
from lit_llmers.journal import read_metrics
from lit_llmers.models import load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.serving import TorchScorer, inputs_of, score_catalogue

HISTORIES = ["bert4rec", "caser", "cl4srec", "srgnn"]  # sasrec and gru4rec: tests/recipes/test_slmrec.py
USERS = ["bpr-mf", "mixgcf", "sgl", "simgcl"]  # lightgcn: the methods that have it, in tests/recipes/test_families.py


@pytest.mark.parametrize("student", [*HISTORIES, *USERS])
def test_a_student_of_its_own_file_runs_from_data_to_export(student, tmp_path):
    given = [f"student={student}", "student.optimizer.lr=0.01", "trainer.max_epochs=1", "stages.export.export=[safetensors]"]
    planned = small(tmp_path, *given, recipe="student")
    run(planned, None)
    assert_planned(planned)
    stages = by_name(planned)
    trained, exported = stages["student"], stages["export"]

    course = losses(trained, "loss/task")
    third = len(course) // 3
    assert np.mean(course[-third:]) < 0.998 * np.mean(course[:third])
    logged = {key.split("/")[1] for entry in read_metrics(trained.folder / "metrics.jsonl") for key in entry if "loss/" in key}
    assert logged == {"task", *(find("callbacks", part).name for part, _ in trained.config.terms)}

    data = load_dataset(trained)
    asked = np.arange(0, data.n_users, 7)
    if student in HISTORIES:
        asked = np.random.default_rng(0).integers(1, data.n_items + 1, (5, 8))
        asked[1, :3] = asked[2, :7] = 0
    with torch.inference_mode():
        model = load_model(trained, data)
        expected = score_catalogue(model, 8, *map(torch.from_numpy, inputs_of(asked).values())).numpy()
    np.testing.assert_allclose(TorchScorer(exported.folder)(asked), expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected[:, 1:].round(6))) > 50, "items and rows are told apart"
