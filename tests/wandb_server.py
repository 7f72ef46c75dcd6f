"""A local stand-in for W&B's HTTP interface, as far as wandb 0.31 and wandb-workspaces 0.4 use it here."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY = "tester"
_OPERATION = re.compile(r"^(?:\s|#[^\n]*\n)*(?:query|mutation)\s+(\w+)")


@dataclass
class StoredRun:
    """What the server holds of one run; history by line number, as the file stream sends it."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    lines_sent: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.fields.get("config") or "{}").items()}


class WandbServer:
    """Listens on a free port of this machine; `down()` closes it, `hang()` takes requests and never answers."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.projects: set[str] = set()
        self.requests: list[str] = []
        self.keys: set[str] = set()
        self.unknown: list[str] = []
        self.others: list[str] = []
        self._lock = threading.Lock()
        self._answering = threading.Event()
        self._answering.set()
        self._http: ThreadingHTTPServer | None = None
        self._port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Listen, on the port of before if there was one."""
        self._answering.set()
        if self._http is None:
            server = self
            handler = type("Handler", (_Handler,), {"server_state": server})
            self._http = _Listener(("127.0.0.1", self._port), handler)
            self._port = self._http.server_address[1]
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections from now on."""
        self._answering.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def hang(self) -> None:
        """Take requests and answer none, until `up` or `down`."""
        self._answering.clear()

    def wait(self) -> None:
        self._answering.wait()

    # What each request does -----------------------------------------------------------------------------------

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = match[1] if (match := _OPERATION.match(query)) else "?"
        with self._lock:
            self.requests.append(operation)
            method = getattr(self, f"_on_{operation.lower()}", None)
            if method is None:
                self.unknown.append(query)
                return {"errors": [{"message": f"unknown operation {operation}"}]}
            return {"data": method(variables)}

    def _on_viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "email": "t@example.org",
                           "flags": "{}", "teams": teams, "admin": False, "apiKeys": {"edges": []}}}

    def _on_getdefaultentity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "VXNlcjox", "entity": ENTITY}}

    def _on_serverfeaturesquery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_organizationcoreweaveorganizationid(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _on_runresumestatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = variables["project"]
        run = self.runs.get(variables["name"])
        return {"model": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY},
                          "bucket": run and self._bucket(run)}}

    def _on_upsertbucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(name))
        self.projects.add(variables.get("project") or run.fields.get("project"))
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        project = run.fields.get("project")
        numbers = sorted(run.lines)
        return {
            "id": run.name, "name": run.name, "displayName": run.fields.get("displayName"), "description": "",
            "config": run.fields.get("config") or "{}", "sweepName": run.fields.get("sweep"),
            "project": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}},
            "historyLineCount": len(numbers), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([run.lines[number] for number in numbers[-1:]]), "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary), "tags": run.fields.get("tags") or [], "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _on_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None or variables["project"] != run.fields.get("project"):
            return {"project": {"run": None}}
        more = {
            "projectId": "1",
            "state": {None: "running", 0: "finished"}.get(run.exit_code, "failed"),
            "group": run.fields.get("groupName"),
            "historyKeys": {"lastStep": max((row["_step"] for row in run.history), default=-1)},
            "user": {"name": ENTITY, "username": ENTITY},
            "systemMetrics": "{}",
        }
        return {"project": {"run": self._bucket(run) | more}}

    def _on_runhistorykeys(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._on_run(variables)

    def _on_runfiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["name"]]
        wanted = variables.get("fileNames") or list(run.files)
        nodes = [self._file(run, name) for name in wanted if name in run.files]
        files = {"edges": [{"node": node, "cursor": node["name"]} for node in nodes]}
        files["pageInfo"] = {"endCursor": None, "hasNextPage": False}
        return {"project": {"internalId": "1", "run": {"fileCount": len(run.files), "files": files}}}

    def _file(self, run: StoredRun, name: str) -> dict[str, Any]:
        url = f"{self.url}/upload/{run.name}/{name}"
        return {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": len(run.files[name]),
                "mimetype": "", "updatedAt": "2020-01-01T00:00:00", "md5": "1"}

    def _on_createrunfiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _on_markrunfilesuploaded(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def stream(self, run_name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines of a run's history and its summary, at the offsets the client gives."""
        with self._lock:
            self.requests.append("file_stream")
            run = self.runs[run_name]
            for name, part in (body.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    run.lines_sent += len(part["content"])
                    run.lines |= dict(enumerate(part["content"], part["offset"]))
                elif name == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
            if body.get("complete"):
                run.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def upload(self, run_name: str, name: str, content: bytes) -> None:
        with self._lock:
            self.requests.append("upload")
            self.runs[run_name].files[name] = content


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer({"path": self.path})

    def do_PUT(self) -> None:
        content = self._body()
        _, _, run, name = self.path.split("?")[0].split("/", 3)
        self.server_state.upload(run, name, content)
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            self._answer(self.server_state.graphql(asked["query"], asked.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            self._answer(self.server_state.stream(self.path.split("/")[-2], json.loads(body)))
        else:  # W&B's own telemetry
            self.server_state.others.append(self.path)
            self._answer({})

    def _body(self) -> bytes:
        import gzip

        self.server_state.keys.add(self.headers.get("Authorization", ""))
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_state.wait()
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
