"""A web server on this machine that answers as it is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Answer:
    """What is sent for one path.

    Args:
        body: The bytes.
        status: The status code.
        kind: Content-Type; None for none.
        length: Content-Length, the true one without it.
        begin: Seconds before the answer.
        drip: Seconds after each byte.
        failures: So often 503 comes first.
    """

    body: bytes
    status: int = 200
    kind: str | None = "image/png"
    length: int | None = None
    begin: float = 0
    drip: float = 0
    failures: int = 0


@dataclass
class Site:
    """Answers by path (with its query), and how often each was asked for."""

    address: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)

    def put(self, path: str, *args: object, **rest: object) -> str:
        """Answer `path`; its whole address."""
        self.answers[path] = Answer(*args, **rest)
        return self.address + path


@contextmanager
def served() -> Iterator[Site]:
    """A site that is there as long as the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked[self.path] += 1
            answer = site.answers.get(self.path, Answer(b"gone", 404, "text/html"))
            if site.asked[self.path] <= answer.failures:
                answer = Answer(b"busy", 503, "text/plain")
            time.sleep(answer.begin)
            self.send_response(answer.status)
            if answer.kind is not None:
                self.send_header("Content-Type", answer.kind)
            length = len(answer.body) if answer.length is None else answer.length
            self.send_header("Content-Length", str(length))
            self.end_headers()
            try:
                for at in range(len(answer.body)) if answer.drip else ():
                    self.wfile.write(answer.body[at : at + 1])
                    self.wfile.flush()
                    time.sleep(answer.drip)
                if not answer.drip:
                    self.wfile.write(answer.body)
            except ConnectionError:
                pass  # who asked has gone

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
