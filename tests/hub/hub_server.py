"""A hub on this machine that huggingface_hub talks to: repositories, commits of files, downloads."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


class Hub:
    """What the server has and was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, status: int, value: object) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json(401, {"error": "Invalid username or password."})
        elif parts[:3] == ["api", "repos", "create"]:
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}"
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self._json(status, {"url": f"{self.base}/{name}", "name": name, "error": "You already created this model"})
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self._json(200, {"files": files})
        elif parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            for line in map(json.loads, content.decode().splitlines()):
                if line["key"] == "file":
                    self.hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.base}/{name}/commit/{COMMIT}"
            self._json(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        elif parts == ["api", "validate-yaml"]:
            self._json(200, {"errors": [], "warnings": []})
        else:
            self._json(404, {"error": f"unknown {self.path}"})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._model_info("/".join(parts[2:4]), listing="tree" in parts)
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._json(404, {"error": f"unknown {self.path}"})

    do_HEAD = do_GET

    def _model_info(self, name: str, *, listing: bool) -> None:
        if name not in self.hub.repositories:
            self._answer(401, X_Error_Code="RepoNotFound")
            return
        files = self.hub.repositories[name]
        if listing:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _digest(data)} for path, data in files.items()
            ]
            self._json(200, entries)
        else:
            self._json(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def _file(self, name: str, path: str) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._answer(401, X_Error_Code="RepoNotFound")
        elif path not in files:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            data = files[path]
            etag = f'"{_digest(data)}"'
            self._answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Content_Length=str(len(data)))

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def use_endpoint(monkeypatch: Any, address: str) -> None:
    """Let huggingface_hub, and what uses it, ask the hub at this address."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    # Versions before 1.0 have copies of the constants.
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api):
        for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@contextmanager
def serve() -> Iterator[tuple[str, Hub]]:
    """The address of a running hub, and what it has."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
