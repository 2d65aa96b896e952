"""A stand-in for the server of Weights & Biases: as much of it as ``wandb sync`` and an online run talk to.

It keeps the rows of one run's history as they arrive, and tells a client that resumes the run how far they go.
"""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: list[str] = []
        self.run_ids: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(row) for row in self.rows]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL operation."""
        entity = {"id": "1", "name": "entity"}
        project = {"id": "2", "name": "project", "entity": entity}
        bucket: dict[str, Any] = {
            "id": "3", "name": variables.get("name"), "displayName": "run", "description": None, "config": "{}",
            "sweepName": None, "historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0,
            "summaryMetrics": "{}", "historyTail": json.dumps(self.rows[-1:]), "eventsTail": "[]", "tags": [],
            "wandbConfig": '{"t": 1}',  # of a run that was really started: others are not resumed
            "project": project,
        }  # fmt: skip
        if operation == "UpsertBucket":
            is_new = not self.run_ids
            self.run_ids.add(variables["name"])
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": bucket if self.run_ids else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            return {
                "viewer": {"id": "4", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}}
            }
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None: ...

    def _body(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            query = json.loads(body)
            self._reply({"data": self.server.answer(query.get("operationName") or "", query.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            part = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if part is not None:
                rows, offset = self.server.rows, part["offset"]
                rows[offset : offset + len(part["content"])] = part["content"]
        self._reply({})


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
