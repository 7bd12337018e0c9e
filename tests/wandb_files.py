"""Reads offline W&B runs back from their files."""

import json
import struct
import time
from pathlib import Path


def read_wandb(folder: Path) -> dict:
    """Read the one offline run in a folder, once it is whole: W&B's service writes on for a moment after the end."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not (out := parse_wandb(path.read_bytes()))["exited"]:
        assert time.monotonic() < deadline, f"{path} is not whole"
        time.sleep(0.05)
    return out


def parse_wandb(content: bytes) -> dict:
    """The content of a .wandb file: a LevelDB log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    position, buffer = 7, b""
    out: dict = {"history": [], "summary": {}, "config": {}, "exited": False}
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + 7 : position + 7 + length]
        position += 7 + length
        if len(data) < length:
            break
        buffer = data if kind in (1, 2) else buffer + data
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record.FromString(buffer)
        key = lambda item: item.key or "/".join(item.nested_key)  # noqa: E731
        if record.HasField("history"):
            out["history"].append({key(item): json.loads(item.value_json) for item in record.history.item})
        elif record.HasField("summary"):
            out["summary"] |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        elif record.HasField("run"):
            run = record.run
            out |= {"id": run.run_id, "project": run.project, "group": run.run_group, "job_type": run.job_type}
            out["name"] = run.display_name
            out["config"] |= {key(item): json.loads(item.value_json) for item in run.config.update}
        elif record.HasField("exit"):
            out["exited"] = True
    return out
