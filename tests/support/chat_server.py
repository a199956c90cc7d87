"""An OpenAI-compatible server on loopback, with faults on demand.

It answers `chat/completions` with `reply(body)`, by default "answer to " and the last message. `server.faults[text]` is a list of
faults for requests whose last message contains `text`: each such request takes the first fault off the list, and gets it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from select import select
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any


@dataclass
class Fault:
    """An answer with `status` and `body` (bytes unchanged, other values as JSON, None for the right answer), after `delay` seconds."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0


@dataclass
class Request:
    """A request: its time, body, key and path."""

    at: float
    body: dict[str, Any]
    key: str | None
    path: str

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class ChatServer:
    url: str = ""
    reply: Callable[[dict[str, Any]], str] = lambda body: f"answer to {body['messages'][-1]['content']}"
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    closed: Event = field(default_factory=Event)
    _at_once: int = 0
    _lock: Lock = field(default_factory=Lock)

    def begin(self, request: Request) -> Fault:
        """Record a request that begins, and return its fault."""
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            due = [faults for text, faults in self.faults.items() if text in request.text and faults]
            return due[0].pop(0) if due else Fault()

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


def completion(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """Return the body of a right answer."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], str] | None = None) -> Iterator[ChatServer]:
    """Run a server on a free port; its `url` is the `base_url` for a client."""
    server = ChatServer(**({"reply": reply} if reply else {}))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # Nagle's algorithm delays every answer

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = server.begin(Request(monotonic(), body, self.headers["Authorization"], self.path))
            try:
                self.wait(fault.delay)
                answer = completion(server.reply(body)) if fault.body is None else fault.body
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            finally:
                server.end()  # before the answer is sent: the client may send the next request at once
            try:
                self.send_response(fault.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | fault.headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has closed the connection

        def wait(self, seconds: float) -> None:
            """Sleep, but stop once the client closes the connection, which makes it readable."""
            until = monotonic() + seconds
            while (left := until - monotonic()) > 0 and not server.closed.is_set():
                if select([self.connection], [], [], min(left, 0.05))[0]:
                    break

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        http.shutdown()
        thread.join()
        http.server_close()
