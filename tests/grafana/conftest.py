"""A stand-in for Grafana: the part of its documented API that a push uses, over real HTTP.

Status codes and bodies are those of Grafana's HTTP API reference and, where that is silent
(provisioned things, how tags are kept, which role may what), of its source.
"""

from __future__ import annotations

import base64
import copy
import fcntl
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.cli import app
from gradwatch.grafana import Credentials, Grafana, Server
from gradwatch.recording.store import Store
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord

REPOSITORY = Path(__file__).parents[2]
TOKEN = "glsa_c0ffee-of-the-test"
USER, PASSWORD = "ann", "päss wörd"
READ, EDIT, ADMIN = range(3)
Answer = tuple[int, Any]


def _npm_is_at_hand() -> bool:
    """The program, and either the schema that it made before or a registry that answers."""
    if shutil.which("npm") is None:
        return False
    if any((REPOSITORY / "build" / "grafana-types").glob("*.json")):
        return True
    asked = REPOSITORY / "build" / "npm-is-at-hand"
    asked.parent.mkdir(exist_ok=True)
    with asked.open("a+") as answer:  # all workers have to collect the same tests
        fcntl.flock(answer, fcntl.LOCK_EX)
        answer.seek(0)
        known = answer.read()
        if not known or time.time() - asked.stat().st_mtime > 600:
            known = "yes" if _registry_answers() else "no"
            answer.truncate(0)
            answer.write(known)
    return known == "yes"


def _registry_answers() -> bool:
    asking = ["npm", "view", "@grafana/schema@13.2.3", "version", "--fetch-retries=0"]
    try:
        return subprocess.run(asking, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


# Grafana's types are published on npm only, which is too much to install for them.
collect_ignore = [] if _npm_is_at_hand() else ["test_dashboard_schema.py"]


@dataclass
class StandIn:
    """What the Grafana holds, what it was asked, and how it misbehaves."""

    url: str = ""
    role: int = ADMIN
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasources: dict[str, dict[str, Any]] = field(default_factory=dict)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    provisioned: set[str] = field(default_factory=set)
    """uids of dashboards that are from files."""

    asked: list[tuple[str, str]] = field(default_factory=list)
    """Verb and path, without the query."""

    most_at_once: int = 10_000
    """Annotations of one answer, whatever limit is asked for."""

    broken: Callable[[str, str], tuple[int, str, dict[str, str]] | None] = lambda verb, path: None
    """Verb and path to status, body and headers that come instead."""

    def writes(self) -> list[tuple[str, str]]:
        return [(verb, path) for verb, path in self.asked if verb != "GET"]

    def answer(self, verb: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        match [verb, *path.strip("/").split("/")[1:]]:
            case ["GET", "folders"]:
                page, limit = int(query["page"][0]), int(query["limit"][0])
                every = [{"uid": f["uid"], "title": f["title"]} for f in self.folders.values()]
                return 200, every[(page - 1) * limit : page * limit]
            case ["POST", "folders"]:
                return self._allowed(EDIT, "folders:create") or self._new_folder(body)
            case ["PUT", "folders", uid]:
                return self._allowed(EDIT, "folders:write") or self._rename(uid, body)
            case ["GET", "datasources", "uid", uid]:
                return self._allowed(ADMIN, "datasources:read") or self._found(
                    self.datasources, uid, "Data source not found"
                )
            case ["POST", "datasources"]:
                return self._allowed(ADMIN, "datasources:create") or self._new_datasource(body)
            case ["PUT", "datasources", "uid", uid]:
                return self._allowed(ADMIN, "datasources:write") or self._change(uid, body)
            case ["GET", "dashboards", "uid", uid]:
                return self._found(self.dashboards, uid, "Dashboard not found")
            case ["POST", "dashboards", "db"]:
                return self._allowed(EDIT, "dashboards:write") or self._save(body)
            case ["GET", "annotations"]:
                return 200, self._matching(query)
            case ["POST", "annotations"]:
                return self._allowed(EDIT, "annotations:create") or self._note(body)
        return 404, {"message": "Not found"}

    def _allowed(self, role: int, action: str) -> Answer | None:
        if self.role >= role:
            return None
        needed = (
            "You'll need additional permissions to perform this action. "
            f"Permissions needed: {action}"
        )
        return 403, {"accessErrorId": "ACE1", "message": needed, "title": "Access denied"}

    @staticmethod
    def _found(held: dict[str, dict[str, Any]], uid: str, missing: str) -> Answer:
        return (200, held[uid]) if uid in held else (404, {"message": missing})

    def _new_folder(self, body: Any) -> Answer:
        if body["uid"] in self.folders:
            return 409, {"message": "a folder with the same UID already exists"}
        made = {"id": len(self.folders) + 1, "uid": body["uid"], "title": body["title"]}
        self.folders[body["uid"]] = {**made, "version": 1}
        return 200, self.folders[body["uid"]]

    def _rename(self, uid: str, body: Any) -> Answer:
        there = self.folders.get(uid)
        if there is None:
            return 404, {"message": "folder not found", "status": "not-found"}
        if not body.get("overwrite") and body.get("version") != there["version"]:
            changed = "The folder has been changed by someone else"
            return 412, {"message": changed, "status": "version-mismatch"}
        there.update(title=body["title"], version=there["version"] + 1)
        return 200, there

    def _new_datasource(self, body: Any) -> Answer:
        if body["name"] in {one["name"] for one in self.datasources.values()}:
            return 409, {"message": "data source with the same name already exists"}
        made = {**body, "id": len(self.datasources) + 1, "version": 1, "readOnly": False}
        self.datasources[body["uid"]] = made
        return 200, {"datasource": made, "message": "Datasource added", "name": body["name"]}

    def _change(self, uid: str, body: Any) -> Answer:
        there = self.datasources[uid]
        if there.get("readOnly"):
            return 403, {"message": "Cannot update read-only data source"}
        if body.get("version") not in (None, there["version"]):
            return 409, {"message": "Datasource has already been updated by someone else"}
        assert "secureJsonFields" not in body
        there.update(body, version=there["version"] + 1)
        return 200, {"datasource": there, "message": "Datasource updated"}

    def _save(self, body: Any) -> Answer:
        dashboard, folder = dict(body["dashboard"]), body.get("folderUid", "")
        uid, there = dashboard["uid"], self.dashboards.get(dashboard["uid"])
        if folder and folder not in self.folders:
            return 400, {"message": "folder not found"}
        if uid in self.provisioned:
            return 400, {"message": "Cannot save provisioned dashboard"}
        if there and not body.get("overwrite"):
            return 412, {"message": "The dashboard already exists", "status": "name-exists"}
        version = there["dashboard"]["version"] + 1 if there else 1
        assert dashboard.get("id") is None
        dashboard |= {"id": len(self.dashboards) + 1, "version": version}
        self.dashboards[uid] = {"dashboard": dashboard, "meta": {"folderUid": folder}}
        return 200, {"uid": uid, "url": f"/d/{uid}/x", "status": "success", "version": version}

    def _matching(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        wanted = {_kept(tag) for tag in query.get("tags", ())}
        first, last = (int(query[name][0]) for name in ("from", "to"))
        found = [
            one
            for one in self.annotations
            if wanted <= set(one["tags"]) and first <= one["time"] <= last
        ]
        found.sort(key=lambda one: -one["time"])
        return found[: min(int(query.get("limit", ["100"])[0]), self.most_at_once)]

    def _note(self, body: Any) -> Answer:
        tags = [_kept(tag) for tag in body["tags"]]
        if any(len(tag.partition(":")[2].encode()) > 100 for tag in tags):
            return 500, {"message": "Failed to save annotation"}
        self.annotations.append({"id": len(self.annotations) + 1, **body, "tags": tags})
        return 200, {"message": "Annotation added", "id": len(self.annotations)}


def _kept(tag: str) -> str:
    """As Grafana splits tags and joins them again: what is behind a second colon is lost."""
    key, *values = (part.strip(" ") for part in tag.split(":"))
    return f"{key}:{values[0]}" if values and values[0] else key


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def _handle(self) -> None:
        grafana, parts = self.server.grafana, urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        grafana.asked.append((self.command, parts.path))
        instead = grafana.broken(self.command, parts.path)
        if instead is not None:
            self._send(*instead)
        elif parts.path == "/api/health":
            self._send(200, json.dumps({"database": "ok", "version": "13.2.0", "commit": "1"}), {})
        elif not self._is_known():
            said = "Invalid API key" if self._bearer() else "Invalid username or password"
            self._send(401, json.dumps({"message": said}), {})
        else:
            query = urllib.parse.parse_qs(parts.query)
            given = json.loads(body) if body else None
            status, answer = grafana.answer(self.command, parts.path, query, given)
            self._send(status, json.dumps(copy.deepcopy(answer)), {})

    do_GET = do_POST = do_PUT = _handle

    def _bearer(self) -> bool:
        return self.headers.get("Authorization", "").startswith("Bearer ")

    def _is_known(self) -> bool:
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Basic {pair}")

    def _send(self, status: int, body: str, headers: dict[str, str]) -> None:
        raw = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    grafana: StandIn


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = _Http(("127.0.0.1", 0), _Handler)
    server.grafana = StandIn(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.grafana
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses() -> list[float]:
    """The seconds that were waited between two tries, in place of waiting."""
    return []


@pytest.fixture
def connect(stand_in: StandIn, pauses: list[float]) -> Iterator[Callable[..., Grafana]]:
    """`connect(token=...)`: the adapter, by default with the token that is valid."""
    opened: list[Server] = []

    def made(url: str | None = None, *, timeout: float = 10.0, **given: str) -> Grafana:
        who = Credentials("GRAFANA_TOKEN", **(given or {"token": TOKEN}))
        server = Server(url or stand_in.url, who, timeout=timeout, pause=pauses.append)
        opened.append(server)
        return Grafana(server)

    yield made
    for server in opened:
        server.close()


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push(
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Done]:
    """`gradwatch dashboards push`, by the function that a shell starts, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(
        *arguments: object, environment: dict[str, str] | None = None, url: str | None = None
    ) -> Done:
        for name in ("TOKEN", "USER", "PASSWORD"):
            monkeypatch.delenv(f"GRAFANA_{name}", raising=False)
        given = {"GRAFANA_TOKEN": TOKEN} if environment is None else environment
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            app(["dashboards", "push", "--url", url or stand_in.url, *map(str, arguments)])
        said = capsys.readouterr()
        for secret in (TOKEN, PASSWORD):
            assert secret not in said.out + said.err
        return Done(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    """`recorded("name", [anomaly, ...])`: a recording of 10 steps, a second each."""

    def record(run: str, anomalies: list[Anomaly], rank: int = 0) -> Path:
        layout = Layout.of([Parameter(name="a.weight")])
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.sqlite"
        store = Store(path, RunInfo(run=run, layout=layout, rank=rank))
        norms, present = np.ones(1, dtype=np.float32), np.ones(1, dtype=np.bool_)
        store.add([
            StepRecord(
                step=step, time=1_700_000_000 + step, layout=layout, total_norm=1.0,
                total_norm_clipped=1.0, tensor_norms_P=norms, tensor_coefs_P=norms,
                present_P=present, anomalies=tuple(a for a in anomalies if a.step == step),
            )
            for step in range(10)
        ])  # fmt: skip
        store.note_state("finished")
        store.close()
        return path

    return record
