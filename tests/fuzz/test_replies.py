"""What servers send and judges say."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig, Request
from ringfence.evaluate.answers.framing import LABELS, JudgePrompt
from ringfence.evaluate.answers.judge import ScoreCache
from ringfence.evaluate.answers.replies import Reply
from ringfence.evaluate.answers.scores import Score, read_reply, sampled_score
from ringfence.util.strict_yaml import validate

from .harness import knock, tries
from .mutations import TEXTS, files, spoilt, values
from .places import Named, Place

LOGPROBS = {
    "content": [
        {"token": "85", "logprob": -0.1, "top_logprobs": [{"token": "85", "logprob": -0.1}]}
    ]
}
COMPLETION: dict[str, Any] = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "85"},
            "finish_reason": "stop",
            "logprobs": LOGPROBS,
        }
    ],
}
ERROR = {
    "error": {
        "message": "temperature is not supported",
        "type": "x",
        "param": "temperature",
        "code": None,
    }
}
STATUSES = [200, 200, 200, 200, 201, 204, 301, 400, 400, 401, 403, 404, 422, 429, 500, 503]


class Stub:
    """A server that says what it is told to."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, {"Content-Type": "application/json"}, b""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(stub.status)
                for name, value in stub.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(stub.body)))
                self.send_header("Retry-After", "0.001")
                self.end_headers()
                self.wfile.write(stub.body)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub()
    threading.Thread(
        target=stub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    yield stub
    stub.server.shutdown()


def check_score(score: Score) -> None:
    assert score.value is None or 0 <= score.value <= 100
    assert (score.value is not None) + (score.label is not None) + (score.unscored is not None) == 1
    json.dumps(score.unscored or "", ensure_ascii=False).encode()


BODIES = st.one_of(files(COMPLETION), files(COMPLETION), files(ERROR), files(LOGPROBS))
TYPES = [
    "application/json",
    "application/json",
    "application/json",
    "text/html",
    "text/event-stream",
    "x",
]


def test_replies_of_servers(stub: Stub, place: Place) -> None:
    @given(BODIES, st.sampled_from(STATUSES), st.sampled_from(TYPES))
    @tries(0.06)
    def test(body: bytes, status: int, kind: str) -> None:
        stub.body, stub.status, stub.headers = (
            (b"" if status == 204 else body),
            status,
            {"Content-Type": kind},
        )
        endpoint = Endpoint(EndpointConfig(url=stub.url, model="m", attempts=1, timeout=5))
        request = Request([{"role": "user", "content": "Hi"}], 0.0, 8, None, 5)

        def call() -> list[Reply]:
            return [reply for _, reply in endpoint.ask([request])]

        found = knock("replies of servers", (status, body), call, place.root, [stub.url])
        if isinstance(found, list):
            (reply,) = found
            assert (reply.text is None) != (reply.error is None)
            assert reply.error is None or (reply.error.strip() and len(reply.error) < 1_000), (
                reply.error
            )
            check_score(read_reply(reply, LABELS))

    test()


def test_what_judges_say(place: Place) -> None:
    said = st.one_of(
        st.sampled_from([*TEXTS, "85", "85.", "100", "REFUSAL", "007", "١٢", "8\u200b5"]), st.text()
    )
    logp = st.one_of(st.floats(max_value=0, allow_nan=False), st.just(-1e-9))
    top = st.lists(
        st.dictionaries(st.one_of(said, st.sampled_from(["8", "85", "RE"])), logp, max_size=4),
        max_size=2,
    )

    @given(said, top)
    @tries(0.04)
    def test(text: str, top: list[dict[str, float]]) -> None:
        def call() -> None:
            check_score(sampled_score(text, LABELS))
            check_score(read_reply(Reply(text, True, top), LABELS))

        knock("what judges say", (text, top), call, place.root)

    test()


def test_spoilt_caches_of_scores(place: Place) -> None:
    prompt = JudgePrompt("How good?", LABELS)
    cache = ScoreCache(place.fresh() / "scores.sqlite")
    cache.put(Named(), {prompt: Score(50.0)})  # type: ignore[arg-type]
    cache._table.execute("PRAGMA journal_mode = DELETE")
    good = cache.file.read_bytes()
    record = json.loads(cache._table.execute("SELECT score FROM scores").fetchone()[0])
    cache._table.close()

    def asked(file: Path, text: str | None = None) -> None:
        again = ScoreCache(file)
        try:
            if text is not None:
                again._table.execute("UPDATE scores SET score = ?", (text,))
            again.put(Named(), {JudgePrompt("Another?", LABELS): Score(1.0)})  # type: ignore[arg-type]
            found = again.get(Named(), prompt)  # type: ignore[arg-type]
            if found is not None:
                check_score(found)
        finally:
            again._table.close()

    @given(spoilt(good))
    @tries(0.01)
    def files_spoilt(content: bytes) -> None:
        file = place.file("scores.sqlite", content)
        knock("cache of scores", content, lambda: asked(file), file.parent, ["scores.sqlite"])

    @given(files(record).map(lambda content: content.decode("utf-8", "replace")))
    @tries(0.01)
    def lines_spoilt(text: str) -> None:
        file = place.file("scores.sqlite", good)
        knock("cache of scores", text, lambda: asked(file, text), file.parent, ["scores.sqlite"])

    files_spoilt()
    lines_spoilt()


@pytest.mark.parametrize("field", ["url", "model", "key_env"])
def test_settings_of_servers(field: str, place: Place) -> None:

    urls = st.sampled_from(
        [
            "http://",
            "http://[",
            "https://a:99999/v1",
            "http://\0",
            "http://x y",
            "https://[::1",
            "//",
        ]
    )
    good = {"url": "http://127.0.0.1:9/v1", "model": "m", "attempts": 1}

    @given(st.one_of(values(), urls, urls))
    @tries(0.005)
    def test(value: Any) -> None:
        def call() -> list[Any]:
            config = validate(EndpointConfig, {**good, field: value}, "judge")
            return list(
                Endpoint(config).ask([Request([{"role": "user", "content": "Hi"}], 0.0, 8)])
            )

        knock("settings of servers", (field, value), call, place.root)

    test()
