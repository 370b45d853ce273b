"""A model hub on loopback that huggingface_hub can download from: real requests, our own folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    gated: frozenset[str]

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: int, name: str) -> None:
        self._send(code, b"{}", {"X-Error-Code": name, "X-Error-Message": name})

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._about("/".join(parts[2:4]), tree=parts[4:5] == ["tree"])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 (the base class dispatches by this name)

    def _about(self, repo: str, *, tree: bool) -> None:
        folder = self.root / repo
        if not folder.is_dir():
            self._refuse(404, "RepoNotFound")
            return
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        if tree:
            body: object = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in sorted(files.items())
            ]
        else:
            facts = {"_id": "0", "id": repo, "sha": "0" * 40, "private": False, "tags": []}
            body = {**facts, "siblings": [{"rfilename": name} for name in sorted(files)]}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        path = self.root / repo / name
        if repo in self.gated:
            self._refuse(403, "GatedRepo")
        elif not (self.root / repo).is_dir():
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "0" * 40):
            self._refuse(404, "RevisionNotFound")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            data = path.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"X-Repo-Commit": "0" * 40, "ETag": f'"{tag}"'})


@contextmanager
def mini_hub(root: Path, gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """Serve ``root/owner/name/…``; yields the endpoint's address."""
    handler = type("Handler", (_Handler,), {"root": root, "gated": gated})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
