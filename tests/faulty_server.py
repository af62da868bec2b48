"""A web server for one folder that answers ranges, and does wrong what a test asks for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# What can go wrong with one answer, and right with the next one.
PASSING = ("500", "503", "429", "drop", "short", "wrong", "slow", "shifted", "close")


@dataclass
class Asked:
    """One request: the file, its range header (None for the whole file), and who says to be asking."""

    file: str
    range: str | None
    authorization: str | None = None


@dataclass
class FaultyServer:
    """A running server.

    Attributes:
        root: the folder.
        url: its address.
        fault: says for each request what goes wrong ("" for nothing); see `_Handler`.
        asked: all requests so far.
    """

    root: Path
    url: str
    fault: Callable[[Asked], str] = lambda asked: ""
    slow_seconds: float = 2.0
    asked: list[Asked] = field(default_factory=list)

    def once(self, fault: str, suffix: str = ".tar") -> None:
        """The next request for such a file goes wrong, and no other one."""
        left = [fault]
        self.fault = lambda asked: left.pop() if left and asked.file.endswith(suffix) else ""

    def always(self, fault: str, suffix: str = ".tar") -> None:
        """Every request for such a file goes wrong."""
        self.fault = lambda asked: fault if asked.file.endswith(suffix) else ""


@contextmanager
def serve(root: Path) -> Iterator[FaultyServer]:
    """Serve a folder at a free port of this machine, below `/data/`."""
    httpd = _Server(("127.0.0.1", 0), _Handler)
    server = FaultyServer(root, f"http://127.0.0.1:{httpd.server_port}/data")
    httpd.RequestHandlerClass = type("Handler", (_Handler,), {"told": server})
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait for the client
    told: FaultyServer

    def do_GET(self) -> None:
        """Answer with the file, its range, or a fault."""
        place = unquote(self.path).removeprefix("/moved")
        asked = Asked(place.removeprefix("/data/"), self.headers.get("Range"), self.headers.get("Authorization"))
        self.told.asked.append(asked)
        fault = self.told.fault(asked)
        path = self.told.root / asked.file
        if fault.isdigit():
            return self._answer(int(fault), b"")
        if fault == "close":
            self.close_connection = True
            return None
        if fault == "redirect" and not self.path.startswith("/moved"):
            return self._answer(302, b"", Location=f"/moved{self.path}")
        if not path.is_file():
            return self._answer(404, b"no such file")
        content = path.read_bytes()
        if fault == "slow":
            time.sleep(self.told.slow_seconds)
        if asked.range is None or fault == "ignore-range":
            return self._answer(200, content, fault=fault)
        first, last = (int(number) for number in asked.range.removeprefix("bytes=").split("-"))
        if first >= len(content):
            return self._answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        said = first + 512 if fault == "shifted" else first
        return self._answer(
            206, part, fault=fault, **{"Content-Range": f"bytes {said}-{said + len(part) - 1}/{len(content)}"}
        )

    def _answer(self, status: int, content: bytes, *, fault: str = "", **headers: str) -> None:
        length = len(content)
        if fault == "wrong":
            changed = bytearray(content)
            changed[length // 2] ^= 4
            content = bytes(changed)
        elif fault == "short":
            content = content[: length // 2]
            length = len(content)
        elif fault == "drop":
            content = content[: length // 2]
            self.close_connection = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client waited long enough

    def log_message(self, *args: object) -> None:
        """Quiet."""
