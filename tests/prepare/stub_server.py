"""An OpenAI-compatible server on loopback: its answers are a function of the request, its faults are scripted."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any] | str, dict[str, str]]  # status, body, headers


class Stub:
    """answer: (request, how often it has come) -> text, or (status, body, headers). requests: all that came."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Any], seconds: float = 0.0) -> None:
        self.answer, self.seconds = answer, seconds
        self.requests: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()

    def reply(self, request: dict[str, Any]) -> Answer:
        name = json.dumps(request, sort_keys=True)
        with self.lock:
            self.requests.append(request)
            seen = self.counts[name] = self.counts.get(name, 0) + 1
        time.sleep(self.seconds)
        found = self.answer(request, seen)
        return found if isinstance(found, tuple) else (200, completion(found), {})


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 1, "completion_tokens": len((text or "").split()), "total_tokens": 1}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice], "usage": usage}


def shown(request: dict[str, Any]) -> str:
    """All text of the user turn."""
    return "".join(part.get("text", "") for part in request["messages"][-1]["content"])


def asked(request: dict[str, Any]) -> str:
    """The side's own text."""
    return shown(request).partition("Input:\n")[2].partition("\n\n")[0]


def pictures(request: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in request["messages"][-1]["content"] if part["type"] == "image_url"]


def by_content(request: dict[str, Any], seen: int = 1) -> str:
    """An answer of good form that depends on everything in the request."""
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return f"<think>It is {asked(request)}.</think>\nAnswer: thing {name} about {asked(request)}"


@contextmanager
def serve(stub: Stub) -> Iterator[str]:
    """Its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body, headers = stub.reply(request)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client was killed

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
