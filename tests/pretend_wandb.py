"""A W&B server on this machine's loopback that knows just enough to take one run, and to let it go on."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PretendServer:
    """Serves until `close`.

    Attributes:
        url: for `WANDB_BASE_URL`.
        history: the rows that it was sent, in order.
        summary: the latest.
        reachable: cleared, it answers nobody any more.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.reachable, self.closed = threading.Event(), threading.Event()
        self.reachable.set()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"pretend": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "lit_llmers", "entity": {"id": "e", "name": "me"}}
        nothing = {"config": "{}", "summaryMetrics": "{}", "sweepName": None}
        bucket = {"id": "r", "name": variables.get("name"), "displayName": "", "project": project, **nothing}
        bucket |= {"historyLineCount": len(self.history)}
        if operation == "RunResumeStatus":
            tails = {"historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]), "eventsTail": "[]"}
            known = bucket | tails | {"eventsLineCount": 0, "logLineCount": 0, "tags": [], "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": known} if self.history else None}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}} if operation == "UpsertBucket" else {}

    def take(self, files: dict[str, Any]) -> None:
        for name, sent in files.items():
            rows = [json.loads(row) for row in sent["content"]]
            if name == "wandb-history.jsonl":
                self.history += rows
            elif name == "wandb-summary.json":
                self.summary = rows[-1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    pretend: PretendServer

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.pretend.reachable.is_set():
            self.pretend.closed.wait(60)
            return
        reply: dict[str, Any] = {}
        if self.path.endswith(("/graphql", "/file_stream")):
            asked = json.loads(gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data)
            if "query" in asked:
                operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                reply = {"data": self.pretend.answer(operation[1] if operation else "", asked.get("variables") or {})}
            else:
                self.pretend.take(asked.get("files") or {})
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""
