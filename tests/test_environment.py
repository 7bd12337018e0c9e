"""`environment.json` says what a run ran on."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

from lit_llmers import environment
from lit_llmers.environment import command_line


def test_it_is_json_and_names_machine_and_versions():
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "lightning" in found["packages"]
    assert found["python"] == sys.version.split()[0]
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0.1
    assert found["cpu"]
    assert datetime.fromisoformat(found["date"]).utcoffset().total_seconds() == 0


def test_what_was_worked_out_elsewhere_keeps_its_machine(tmp_path):
    assert environment.recorded(tmp_path, worked=False)["cpu"], "a folder that has none gets one"
    (tmp_path / "environment.json").write_text('{"cpu": "Another"}')
    assert environment.recorded(tmp_path, worked=False) == {"cpu": "Another"}
    assert environment.recorded(tmp_path, worked=True)["cpu"] != "Another"


def test_a_command_of_ours_is_written_as_it_is_typed(monkeypatch):
    fit = str(Path(environment.__file__).parent / "fit.py")
    monkeypatch.setattr(sys, "argv", [fit, "recipe=slmrec", "seeds=[0,1]", "data.path=my folder"])
    assert command_line() == "python -m lit_llmers.fit recipe=slmrec 'seeds=[0,1]' 'data.path=my folder'"


def test_commit_and_changes_of_the_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert environment._git(tmp_path) is None
    git("init")
    (tmp_path / "__init__.py").write_text("")
    assert environment._git(tmp_path) is None  # a checkout, but not of this file
    git("add", "__init__.py")
    git("commit", "-m", "first")
    state = environment._git(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "__init__.py").write_text("changed = True\n")
    assert environment._git(tmp_path)["dirty"] is True
