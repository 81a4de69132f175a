"""A small hub: the endpoints that huggingface_hub calls to make a repository and to upload a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Repo:
    private: bool | None
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})

    @property
    def commit(self) -> str:
        """Another one for other contents."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the server keeps, and how it is to fail.

    Attributes:
        token: that it accepts, with its `role`.
        repos: by `OWNER/NAME`.
        failures: by a pattern of `METHOD PATH`, the status and the message of the answer.
        requests: what was asked for, `METHOD PATH`.
    """

    token: str = "hf_secret"
    role: str = "write"
    repos: dict[str, Repo] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    address: str = ""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def card_errors(content: str) -> list[str]:
    """What the hub's check of a model card finds wrong.

    Source: huggingface/hub-docs, modelcard.md.
    """
    parts = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(parts[1]) if parts else None
    if not isinstance(data, dict):
        return ["there is no YAML"]
    wrong = [
        key for key in ("license", "base_model", "library_name") if not isinstance(data.get(key, ""), str)
    ]
    for model in data.get("model-index", []):
        wrong += [] if isinstance(model.get("name"), str) else ["model-index name"]
        for result in model["results"]:
            wrong += [] if isinstance(result["task"].get("type"), str) else ["task type"]
            wrong += [
                f"dataset {k}" for k in ("type", "name") if not isinstance(result["dataset"].get(k), str)
            ]
            for metric in result["metrics"]:
                wrong += [] if isinstance(metric.get("type"), str) else ["metric type"]
                wrong += [] if isinstance(metric.get("value"), int | float) else ["metric value"]
    return wrong


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        for pattern, (status, message) in self.hub.failures.items():
            if re.search(pattern, asked):
                return self._send(status, {"error": message})
        is_open = path.startswith("/blobs/") or path == "/api/validate-yaml"
        if not is_open and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                return answer(self, body, *found.groups())
        return self._send(404, {"error": f"no such endpoint: {asked}"})

    def _send(self, status: int, value: Any = None, *, data: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self) -> None:
        self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def whoami(self, _: bytes) -> None:
        token = {"displayName": "mine", "role": self.hub.role}
        self._send(200, {"type": "user", "name": "ada", "auth": {"accessToken": token}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'ada'}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(asked.get("visibility") == "private"))
        self._send(
            status, {"url": f"{self.hub.address}/{name}", "error": "You already created this model repo"}
        )

    def info(self, _: bytes, name: str) -> None:
        if name not in self.hub.repos:
            return self._missing()
        repo = self.hub.repos[name]
        return self._send(200, {"id": name, "private": repo.private, "sha": repo.commit, "tags": []})

    def tree(self, _: bytes, name: str) -> None:
        files = self.hub.repos[name].files
        entries = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in files.items()]
        self._send(200, entries)

    def validate(self, body: bytes) -> None:
        wrong = card_errors(json.loads(body)["content"])
        self._send(400 if wrong else 200, {"errors": [{"message": text} for text in wrong], "warnings": []})

    def preupload(self, body: bytes, _: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def batch(self, body: bytes, _: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/blobs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, name: str) -> None:
        files = self.hub.repos[name].files
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.repos[name].commit
        self._send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, _: bytes, name: str, path: str) -> None:
        repo = self.hub.repos[name]
        data = repo.files[path]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data=data, ETag=etag, X_Repo_Commit=repo.commit)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"GET /api/models/{_NAME}": _Handler.info,
    f"GET /api/models/{_NAME}/tree/main": _Handler.tree,
    f"POST /api/models/{_NAME}/preupload/main": _Handler.preupload,
    f"POST /{_NAME}.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /blobs/(\w+)": _Handler.blob,
    f"POST /api/models/{_NAME}/commit/main": _Handler.commit,
    f"(?:GET|HEAD) /{_NAME}/resolve/main/(.+)": _Handler.resolve,
}
