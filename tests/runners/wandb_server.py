"""A small W&B server on the loopback interface: as much of the protocol as the client speaks to upload runs and views.

GraphQL operations arrive at `/graphql`, history and summary in pieces at `/files/<entity>/<project>/<run>/file_stream`,
files by PUT. What has arrived is kept per run, pieces by their offset, so that a repeated upload shows as such.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

ENTITY = "tester"
KEY = "local" + 35 * "0"


@dataclass
class Run:
    """What has arrived of one run."""

    fields: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    lines: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    complete: bool = False

    @property
    def history(self) -> list[dict]:
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]


class Server(ThreadingHTTPServer):
    """Serves until `close`; after `requests` answered file-stream requests it drops every connection.

    Attributes:
        runs: by id.
        views: workspaces by id, as their variables.
        requests: file-stream requests still answered; None: all.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, requests: int | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.runs: dict[str, Run] = {}
        self.views: dict[str, dict] = {}
        self.requests = requests
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that log a client in here."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A dropped connection is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"]).group(1)
            answer = getattr(self, operation, lambda **_: {})(**(request.get("variables") or {}))
            self._answer({"data": answer})
        elif self.path.endswith("/file_stream"):
            self._file_stream(json.loads(body))
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer({})

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def _file_stream(self, pieces: dict) -> None:
        if self.server.requests == 0:
            self.close_connection = True
            self.connection.close()
            return
        if self.server.requests:
            self.server.requests -= 1
        run = self.server.runs[self.path.split("/")[-2]]
        for name, piece in (pieces.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.lines |= {piece["offset"] + i: line for i, line in enumerate(piece["content"])}
            elif name == "wandb-summary.json":
                run.summary = json.loads(piece["content"][-1])
        run.complete |= bool(pieces.get("complete"))
        self._answer({"exitcode": None, "limits": {}})

    # ---- GraphQL operations, named as the client names them ----

    def Viewer(self, **_) -> dict:
        return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    GetDefaultEntity = Viewer

    def UpsertBucket(self, *, name: str, project: str, config: str | None = None, **fields) -> dict:
        new = name not in self.server.runs
        run = self.server.runs.setdefault(name, Run())
        run.fields |= {key: value for key, value in fields.items() if value} | {"project": project}
        if config:
            run.config = {key: entry["value"] for key, entry in json.loads(config).items()}
        place = {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": fields.get("displayName"), "project": place}
        bucket |= {"historyLineCount": 0, "config": "{}", "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def CreateRunFiles(self, *, files: list[str], **_) -> dict:
        base = self.server.environment["WANDB_BASE_URL"]
        files = [{"name": name, "uploadUrl": f"{base}/upload/{name}"} for name in files]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def UpsertView2(self, **view) -> dict:
        found = view.get("id") or f"view{len(self.server.views)}"
        self.server.views[found] = view
        return {"upsertView": {"view": {"id": found, "name": view["name"]}, "inserted": "id" not in view}}

    def View(self, *, viewName: str, **_) -> dict:
        views = [
            {"id": found, "name": view["name"], "displayName": view["displayName"], "spec": view["spec"]}
            for found, view in self.server.views.items()
            if viewName in view["name"]
        ]
        return {"project": {"allViews": {"edges": [{"node": view} for view in views]}}}
