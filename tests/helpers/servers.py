"""A small server that plays an endpoint of OpenAI's chat completions, faults included.

Standard library only.

    def answer(body):                 # the request's JSON: messages, temperature, seed, ...
        return "Ask a pharmacist."    # or Answer("95", top=[{"95": -0.1, "90": -2.4}]), or None

    with serve(answer) as server:
        endpoint = Endpoint(EndpointConfig(url=server.url, model="any"))
        ...
    assert server.answered == {content_key(messages, seed): 1, ...}

Faults are scripted by a function of the request and of the number of tries of the same content so
far (from 0):

    def faults(body, tries):
        return 429 if tries < 2 else None           # twice too many requests, then the answer

    a number        that HTTP status; 429 and 503 carry `Retry-After: {retry_after}`
    "slow"          the answer, after `slow` seconds
    "cut"           half of the answer, then the connection is closed
    "malformed"     an answer that is no JSON
    "choices"       an answer without choices
    "empty"         an answer whose content is null
    "nan"           the answer; its log-probabilities are NaN
    "null"          the answer; it has no log-probabilities, though they were asked for
    Raw(...)        these very bytes, with any status and headers

`faults=in_turn([429, "cut", None])` scripts them by arrival: the n-th request of all gets the n-th
fault. `refuses=("logprobs",)` answers 400 to requests that have that parameter, `key="..."` 401 to
those without that key, `models=("a",)` 404 to those of another model. What was seen is in `bodies`,
`keys`, `queries`, `asked`, `answered`, `peak`.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """Bytes sent as they are; `content` that is no text becomes JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        return (
            self.content if isinstance(self.content, str) else json.dumps(self.content)
        ).encode()


Fault = int | str | Raw | None


@dataclass(frozen=True)
class Answer:
    """`top`: for each generated token, which is the most likely, log-probability by token text."""

    text: str | None
    finished: bool = True
    top: Sequence[dict[str, float]] = ()


def content_key(messages: Any, seed: int | None = None) -> str:
    """What tells one request from another in `asked` and `answered`."""
    return json.dumps([messages, seed], sort_keys=True)


@dataclass
class Server:
    """What was seen. `answered` counts the answers that were sent whole, `peak` the most requests
    under way at once."""

    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    peak: int = 0
    under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)


def in_turn(script: Sequence[Fault]) -> Callable[[Body, int], Fault]:
    """Faults by order of arrival; when the script is over all is well."""
    left = iter(script)
    return lambda _body, _tries: next(left, None)


@contextmanager
def serve(
    answer: Callable[[Body], Answer | str | None],
    faults: Callable[[Body, int], Fault] = lambda _body, _tries: None,
    *,
    retry_after: float = 0.05,
    slow: float = 0.3,
    delay: float = 0.0,
    refuses: Sequence[str] = (),
    key: str | None = None,
    models: Sequence[str] = (),
    port: int = 0,
) -> Iterator[Server]:
    """A server on this machine, until the context closes.

    Args:
        answer: what is answered to a request.
        delay: seconds that every answer takes.
        port: 0 = any that is free.
    """
    seen = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = content_key(body["messages"], body.get("seed"))
            with seen.lock:
                tries = seen.asked[name]
                seen.asked[name] += 1
                seen.bodies.append(body)
                seen.queries.append(self.path.partition("?")[2])
                seen.keys.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
                seen.times.append(time.monotonic())
                seen.under_way += 1
                seen.peak = max(seen.peak, seen.under_way)
                fault = self.refused(body) or faults(body, tries)
            try:
                self.reply(body, name, fault)
            except OSError:  # the client is gone
                self.close_connection = True
            finally:
                with seen.lock:
                    seen.under_way -= 1

        def refused(self, body: Body) -> Fault:
            if self.path.partition("?")[0] != "/v1/chat/completions":
                return 404
            if key is not None and seen.keys[-1] != key:
                return 401
            if models and body["model"] not in models:
                return 404
            return next((f"refuse {name}" for name in refuses if name in body), None)

        def reply(self, body: Body, name: str, fault: Fault) -> None:
            if isinstance(fault, str) and fault.startswith("refuse "):
                parameter = fault.removeprefix("refuse ")
                instead = (
                    " Use 'max_completion_tokens' instead." if parameter == "max_tokens" else ""
                )
                return self.fail(
                    400,
                    f"Unsupported parameter: '{parameter}' is not supported.{instead}",
                    parameter,
                )
            if isinstance(fault, Raw):
                return self.send(fault)
            if isinstance(fault, int):
                return self.fail(fault, f"scripted status {fault} for model {body['model']}")
            time.sleep(delay + (slow if fault == "slow" else 0.0))
            said = answer(body)
            said = said if isinstance(said, Answer) else Answer(said)
            content = json.dumps(completion(body, said, fault)).encode()
            if fault == "malformed":
                content = content[:-20]
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                return None
            if fault not in ("malformed", "choices", "empty"):
                with seen.lock:
                    seen.answered[name] += 1
            self.wfile.write(content)
            return None

        def send(self, raw: Raw) -> None:
            self.send_response(raw.status)
            for name, value in {"Content-Type": "application/json", **raw.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw.bytes)))
            self.end_headers()
            self.wfile.write(raw.bytes)

        def fail(self, status: int, message: str, parameter: str | None = None) -> None:
            error = {"message": message, "type": "scripted", "param": parameter, "code": None}
            content = json.dumps({"error": error}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 503):
                self.send_header("Retry-After", str(retry_after))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: Any) -> None:  # connections that a client dropped
            pass

    with Quiet(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield seen
        finally:
            server.shutdown()


def completion(body: Body, said: Answer, fault: Fault = None) -> dict[str, Any]:
    """The JSON of an answer; log-probabilities where they were asked for and `said` has them."""
    logprobs = None
    if body.get("logprobs") and said.top and fault != "null":
        logprobs = {
            "content": [token_entry(top, fault == "nan") for top in said.top],
            "refusal": None,
        }
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": None if fault == "empty" else said.text},
        "finish_reason": "stop" if said.finished else "length",
        "logprobs": logprobs,
    }
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [] if fault == "choices" else [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def token_entry(top: dict[str, float], nan: bool) -> dict[str, Any]:
    entries = [
        {"token": token, "logprob": float("nan") if nan else logprob, "bytes": list(token.encode())}
        for token, logprob in top.items()
    ]
    return {**max(entries, key=lambda entry: top[entry["token"]]), "top_logprobs": entries}
