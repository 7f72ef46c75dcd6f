"""A local stand-in for W&B's HTTP interface, as far as wandb 0.31 and wandb-workspaces 0.4 use it here."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ENDED
from PIL import Image

from lpc_runner.store.log import MetricLog
from lpc_runner.store.runs import RunDirectory
from lpc_runner.tracking import wandb_service

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


@dataclass
class StoredSweep:
    """A sweep that hands out what waits, one run a heartbeat, then stops `stop` and ends its agents when all is done.

    config: of the sweep's file. waiting: parameters of each run, by the run's name. stop: runs to be stopped early once
    they have logged a row.
    """

    config: dict[str, Any]
    waiting: dict[str, dict[str, Any]]
    stop: tuple[str, ...] = ()

    def commands(self, running: dict[str, bool], logged: set[str]) -> list[dict[str, Any]]:
        if early := [name for name in self.stop if name in running and name in logged]:
            return [{"type": "stop", "run_id": name} for name in early]
        if not running and not self.waiting:
            return [{"type": "exit"}]
        if running or not self.waiting:
            return []
        name = next(iter(self.waiting))
        values = self.waiting.pop(name)
        arguments = {key: {"value": value} for key, value in values.items()}
        return [{"type": "run", "run_id": name, "program": None, "args": arguments}]


class WandbServer:
    """Listens on a free port of this machine; `down()` closes it, `hang()` takes requests and never answers."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, StoredSweep] = {}
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
            self._http.close_all()
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
        return {
            "viewer": {
                "id": "VXNlcjox",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "t@example.org",
                "flags": "{}",
                "teams": teams,
                "admin": False,
                "apiKeys": {"edges": []},
            }
        }

    def _on_getdefaultentity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "VXNlcjox", "entity": ENTITY}}

    def _on_serverfeaturesquery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_organizationcoreweaveorganizationid(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _on_runresumestatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = variables["project"]
        run = self.runs.get(f"{project}/{variables['name']}")
        return {
            "model": {
                "id": project,
                "name": project,
                "entity": {"id": ENTITY, "name": ENTITY},
                "bucket": run and self._bucket(run),
            }
        }

    def _on_upsertbucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        path = (
            variables.get("id") if variables.get("id") in self.runs else f"{variables['project']}/{variables['name']}"
        )
        inserted = path not in self.runs
        run = self.runs.setdefault(path, StoredRun(path.partition("/")[2]))
        self.projects.add(path.partition("/")[0])
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        project = run.fields.get("project")
        numbers = sorted(run.lines)
        return {
            "id": f"{project}/{run.name}",
            "name": run.name,
            "displayName": run.fields.get("displayName"),
            "description": "",
            "config": run.fields.get("config") or "{}",
            "sweepName": run.fields.get("sweep"),
            "project": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}},
            "historyLineCount": len(numbers),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([run.lines[number] for number in numbers[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary),
            "tags": run.fields.get("tags") or [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _on_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{variables['project']}/{variables['name']}")
        if run is None:
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
        run = self.runs[f"{variables['project']}/{variables['name']}"]
        wanted = variables.get("fileNames") or list(run.files)
        nodes = [self._file(run, name) for name in wanted if name in run.files]
        files = {"edges": [{"node": node, "cursor": node["name"]} for node in nodes]}
        files["pageInfo"] = {"endCursor": None, "hasNextPage": False}
        return {"project": {"internalId": "1", "run": {"fileCount": len(run.files), "files": files}}}

    def _file(self, run: StoredRun, name: str) -> dict[str, Any]:
        url = f"{self.url}/upload/{run.fields['project']}/{run.name}/{name}"
        return {
            "id": name,
            "name": name,
            "url": url,
            "directUrl": url,
            "sizeBytes": len(run.files[name]),
            "mimetype": "",
            "updatedAt": "2020-01-01T00:00:00",
            "md5": "1",
        }

    def _on_getprojects(self, variables: dict[str, Any]) -> dict[str, Any]:
        user = {
            "id": "1",
            "name": ENTITY,
            "username": ENTITY,
            "__typename": "User",
            "email": "",
            "admin": False,
            "flags": "{}",
            "entity": ENTITY,
            "deletedAt": None,
            "apiKeys": None,
            "teams": None,
        }
        node = {
            "__typename": "Project",
            "id": "1",
            "entityName": ENTITY,
            "createdAt": "2020-01-01T00:00:00",
            "isBenchmark": False,
            "user": user,
        }
        edges = [{"node": node | {"name": name}, "cursor": name} for name in sorted(self.projects)]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"edges": edges, "pageInfo": page}}

    def _on_createproject(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["input"]["name"]
        self.projects.add(name)
        project = {"id": "1", "name": name, "entityName": ENTITY, "description": "", "access": "PRIVATE", "views": "{}"}
        return {"result": {"project": project, "model": project, "inserted": True}}

    def _on_projectinternalid(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = variables["projectName"] in self.projects
        return {"project": {"id": "1", "internalId": "UHJvamVjdDox"} if known else None}

    def _on_upsertview(self, variables: dict[str, Any]) -> dict[str, Any]:
        number = variables.get("id") or f"view{len(self.views)}"
        inserted = number not in self.views
        self.views[number] = view = self.views.get(number, {}) | variables
        project = {"id": "1", "name": view["projectName"], "entityName": view["entityName"]}
        shown = {"id": number, "type": view["type"], "name": view["name"], "displayName": view["displayName"]}
        shown |= {"description": "", "project": project, "spec": view["spec"], "updatedAt": "2020-01-01T00:00:00"}
        return {"upsertView": {"view": shown, "inserted": inserted}}

    def _on_upsertview2(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._on_upsertview(variables)

    def _on_sweepwithruns(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["sweep"]
        found = {"id": name, "name": name, "method": "bayes", "state": "RUNNING", "runs": {"edges": []}}
        return {"project": {"sweep": found | {"config": yaml.safe_dump(self.sweeps[name].config)}}}

    def _on_createagent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": variables["sweep"]}}}

    def _on_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        running = json.loads(variables["runState"])
        logged = {run.name for run in self.runs.values() if run.lines}
        commands = self.sweeps[variables["id"]].commands(running, logged)
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _on_createrunfiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        path = f"{variables['project']}/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{path}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": path, "uploadHeaders": [], "files": files}}

    def _on_markrunfilesuploaded(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def stream(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines of a run's history and its summary, at the offsets the client gives."""
        with self._lock:
            self.requests.append("file_stream")
            run = self.runs[path]
            for name, part in (body.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    run.lines_sent += len(part["content"])
                    run.lines |= dict(enumerate(part["content"], part["offset"]))
                elif name == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
            if body.get("complete"):
                run.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def upload(self, path: str, name: str, content: bytes) -> None:
        with self._lock:
            self.requests.append("upload")
            self.runs[path].files[name] = content


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.__dict__.setdefault("open_connections", set()).add(connection)
        return connection, address

    def close_all(self) -> None:
        """Stop listening and break what is open: clients keep connections for their next requests."""
        self.server_close()
        for connection in self.__dict__.get("open_connections", ()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

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
        _, _, project, run, name = self.path.split("?")[0].split("/", 4)
        self.server_state.upload(f"{project}/{run}", name, content)
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            self._answer(self.server_state.graphql(asked["query"], asked.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            self._answer(self.server_state.stream("/".join(self.path.split("/")[-3:-1]), json.loads(body)))
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


def forget_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No key, no settings of whoever runs the tests."""
    home.mkdir(exist_ok=True)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # means: not set; and what a fallback leaves here is undone
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


@contextmanager
def running_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """W&B on this machine, with a key; its service process is down before and after."""
    forget_wandb(monkeypatch, tmp_path / "home")
    _tear_down()
    here = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", here.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield here
    _tear_down()
    here.down()
    assert here.unknown == []


def _tear_down() -> None:
    if "wandb" in sys.modules:
        wandb_service.tear_down()


def make_run(outputs: Path, name: str, studies: tuple[str, ...] = ("fig4",), status: str = "finished", **keys: Any):
    """A run directory as the runner leaves it: four rows, a picture during training and two at the end."""
    run = RunDirectory(outputs / "runs" / name)
    tracker = {"_target_": "lpc_runner.tracking.wandb_run.WandbTracker", "mode": "offline", "project": "lpc_test"}
    run.samples.mkdir(parents=True)
    config = {"seed": keys.get("seed", 0), "tracker": tracker | {"entity": None, "tags": ["mine"]}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    described = {"name": name, "hash": "0" * 64, "choices": {}, "keys": {"dataset": "digits", **keys}}
    run.write("run.json", described | {"studies": list(studies), "data_shape": [1, 8, 8], "data": {}})
    log = MetricLog(run.path / "metrics.jsonl")
    for update in (1, 10, 20):
        log.append(update, update / 10, {"train/elbo": -float(update), "chain/drift_norm_last": 2.0})
        if update == 10:
            log.append(update, 1.0, {"eval/fd_random_conv": 9.5, "eval/num_samples": 20.0})
    log.close()
    for number, picture in enumerate(("update-000000010.png", "final.png", "reconstructions.png")):
        pixels = np.full((4, 4, 3), number + sum(name.encode()) % 200, np.uint8)
        Image.fromarray(pixels).save(run.samples / picture)
    run.write(
        "result.json",
        ENDED | {"status": status, "metrics": {"fd_random_conv": 7.25, "elbo": -20.0}},
    )
    for study in studies:
        run.link_into(outputs, study)
    return run
