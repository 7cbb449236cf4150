"""Servers that refuse, withhold, reason or talk nonsense: one sentence with their own words, or an
adaptation, once."""

import gzip
import json

import pytest

from helpers.servers import Answer, Raw, in_turn, serve
from ringfence.errors import ModelError
from ringfence.evaluate.answers.config import EndpointJudgeConfig
from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig, Request
from ringfence.evaluate.answers.framing import JudgePrompt
from ringfence.evaluate.answers.judge import EndpointJudge, ScoreCache, ask_once
from ringfence.evaluate.answers.sampling import sample_answers
from ringfence.text.questions import OpenQuestion

pytestmark = pytest.mark.slow

TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0 with this model. "
    "Only the default (1) value is supported."
)
EXTRA = '[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted"}]'


def refusal(message, param=None, status=400):
    return Raw(
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": param,
                "code": None,
            }
        },
        status,
    )


def refuse(**messages):
    """400 to requests that have a parameter, with its message."""
    return lambda body, _: next(
        (refusal(text, name) for name, text in messages.items() if name in body), None
    )


def hello(_):
    return "Hello."


def requests(number, **fields):
    asked = {"temperature": 0.0, "max_tokens": 8} | fields
    return [Request([{"role": "user", "content": str(n)}], **asked) for n in range(number)]


def ask(server, asked, **config):
    endpoint = Endpoint(
        EndpointConfig(**{"url": server.url, "model": "m", "attempts": 2, **config})
    )
    found = dict(endpoint.ask(asked))
    return [found[place] for place in range(len(asked))]


def chat(message, reason="stop", **more):
    return Raw({"choices": [{"message": message, "finish_reason": reason}], **more})


# ------------------------------------------------------------------ adapted once


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("temperature", TEMPERATURE),
        ("temperature", "`temperature` must be strictly positive"),
        ("seed", "Unrecognized request argument supplied: seed"),
        ("seed", EXTRA),
        ("logprobs", "logprobs is not supported by this model"),
        ("top_logprobs", "top_logprobs must be at most 5"),
    ],
)
def test_a_parameter_that_is_refused_is_left_out_of_all_requests(parameter, message, capsys):
    with serve(hello, refuse(**{parameter: message})) as server:
        replies = ask(server, requests(12, seed=1, top_logprobs=3), concurrency=8)
    assert [reply.text for reply in replies] == ["Hello."] * 12
    assert sum(parameter in body for body in server.bodies) == 1
    told = capsys.readouterr().err
    assert told.count(parameter) >= 1
    assert told.count("from now on") == 1
    name = parameter.removeprefix("top_")
    assert {reply.adapted for reply in replies} == {(f"without {name}",)}


def test_a_reasoning_model_of_today(capsys):
    """Temperature, log-probabilities and the limit's old name, in turn, each told once."""
    messages = {
        "temperature": TEMPERATURE,
        "logprobs": "You are not allowed to request logprobs from this model",
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
    }
    with serve(hello, refuse(**messages)) as server:
        replies = ask(server, requests(10, top_logprobs=3), concurrency=10)
    assert [reply.error for reply in replies] == [None] * 10
    assert len(server.bodies) == 13
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert capsys.readouterr().err.count("from now on") == 3


def test_a_value_out_of_range_is_an_error_of_the_user():
    """Sampled at 3, the answers would be others than asked for if the temperature were left out."""
    with serve(
        hello, refuse(temperature="temperature: 3 is greater than the maximum of 2")
    ) as server:
        [reply] = ask(server, requests(1, temperature=3.0))
    assert "greater than the maximum of 2" in reply.error
    assert len(server.bodies) == 1


def test_a_prompt_that_is_too_long_is_not_taken_for_a_refused_limit():
    words = "This model's maximum context length is 512 tokens. However, "
    words += "max_tokens of 8 is not supported here."
    with serve(hello, refuse(max_tokens=words)) as server:
        [reply] = ask(server, requests(1))
    assert "maximum context length" in reply.error
    assert len(server.bodies) == 1


def test_answers_say_how_they_were_drawn(tmp_path):
    question = OpenQuestion("s", "q", "plain", "q", 0, [{"role": "user", "content": "Hi"}])
    with serve(hello, refuse(temperature=TEMPERATURE)) as server:
        source = Endpoint(EndpointConfig(url=server.url, model="m"))
        lines = sample_answers(source, [question], tmp_path / "answers.jsonl", samples=2)
    assert [line["adapted"] for line in lines] == [["without temperature"]] * 2
    assert "without temperature" in (tmp_path / "answers.jsonl").read_text()


def test_scores_say_how_they_were_asked_for_also_from_the_cache(tmp_path):
    prompt = JudgePrompt("How good?", ())
    with serve(lambda _: "85", refuse(temperature=TEMPERATURE)) as server:
        config = EndpointJudgeConfig(url=server.url, model="m")
        for _ in range(2):
            cache = ScoreCache(tmp_path / "cache.sqlite")
            score = ask_once(EndpointJudge(config), [prompt], cache)[prompt]
            assert (score.value, score.adapted) == (85, ("without temperature",))
    assert len(server.bodies) == 2


# ------------------------------------------------------------------ reasoning that eats the tokens


def reasons(enough, content=None, **message):
    """Answers only where the limit is enough."""
    silent = {"role": "assistant", "content": content, **message}
    limit = lambda body: body.get("max_completion_tokens", body.get("max_tokens"))  # noqa: E731
    return lambda body, _: None if limit(body) >= enough else chat(silent, "length")


@pytest.mark.parametrize("silent", [{}, {"content": "", "reasoning_content": "Let me think"}])
def test_a_limit_that_reasoning_eats_is_raised_once_for_all(silent, capsys):
    with serve(hello, reasons(1000, **silent)) as server:
        replies = ask(server, requests(6), concurrency=6)
    assert [reply.text for reply in replies] == ["Hello."] * 6
    assert [body["max_tokens"] for body in server.bodies] == [8] + [4096] * 6
    assert {reply.adapted for reply in replies} == {("max_tokens 4096",)}
    assert capsys.readouterr().err.count("4096 tokens from now on") == 1


def test_a_limit_that_is_never_enough_is_said():
    with serve(hello, reasons(10**9)) as server:
        [reply] = ask(server, requests(1), attempts=6)
    assert "used up" in reply.error
    assert "'length'" in reply.error
    assert "set max_tokens higher" in reply.error
    assert len(server.bodies) == 2


def test_the_limit_can_be_set():
    with serve(hello, reasons(1000)) as server:
        [reply] = ask(server, requests(1), max_tokens=2000)
    assert reply.text == "Hello."
    assert [body["max_tokens"] for body in server.bodies] == [2000]


# ------------------------------------------------------------------ replies that say so


def test_what_a_model_declines_with_is_its_answer():
    with serve(
        hello, lambda *_: chat({"content": None, "refusal": "I cannot help with that."})
    ) as server:
        [reply] = ask(server, requests(1))
    assert (reply.text, reply.error) == ("I cannot help with that.", None)


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "Ask "}, {"type": "text", "text": "a pharmacist."}]
    with serve(hello, lambda *_: chat({"content": parts})) as server:
        [reply] = ask(server, requests(1))
    assert reply.text == "Ask a pharmacist."


CASES = {
    "filter": (chat({"content": None}, "content_filter"), "content filter withheld the reply", 1),
    "tool": (chat({"content": None, "tool_calls": [{}]}, "tool_calls"), "calls a tool instead", 1),
    "nothing": (chat({"content": None}), "no content, finish_reason 'stop' (2 tries)", 2),
    "int": (chat({"content": 5}), "message.content: expected a text, found int 5", 2),
    "no message": (
        Raw({"choices": [{}]}),
        "choices.0: message: expected dict, found no such field",
        2,
    ),
    "null message": (
        Raw({"choices": [{"message": None}]}),
        "message: expected dict, found NoneType",
        2,
    ),
    "no choices": (Raw({"id": 1}), "choices: expected list, found no such field (id)", 2),
    "null choices": (Raw({"choices": None}), "choices: expected list, found NoneType", 2),
    "choice": (Raw({"choices": ["x"]}), "choices.0: expected an object, found str", 2),
    "list": (Raw([]), "expected an object, found list", 2),
    "number": (Raw("5"), "expected an object, found int", 2),
    "truncated": (Raw('{"choices": [{"mess'), "not JSON: Unterminated string", 2),
    "empty": (Raw(""), "the server sent: nothing", 2),
    "nested": (Raw("[" * 200_000), "nested too deeply", 2),
    "digits": (Raw("9" * 5000), "a number that is too long", 2),
    "binary": (Raw(b"\xff\xfe\x00\x01"), "not JSON", 2),
    "gzip": (
        Raw(b"not gzip", headers={"Content-Encoding": "gzip"}),
        "Connection error. Error -3",
        2,
    ),
    "html": (
        Raw(
            "<!DOCTYPE html><html><style>p{}</style><h1>Sign in</h1>\n<p>please</p>",
            headers={"Content-Type": "text/html"},
        ),
        "the server sent: Sign in please",
        2,
    ),
    "html 502": (
        Raw("<html><h1>502 Bad Gateway</h1><hr>nginx</html>", 502),
        "502 Bad Gateway nginx",
        2,
    ),
    "error 200": (
        Raw({"error": {"message": "the model is overloaded", "code": 503}}),
        "the model is overloaded",
        2,
    ),
    "error text": (Raw({"error": "out of memory"}), "out of memory (2 tries)", 2),
    "error old": (
        Raw({"object": "error", "message": "prompt too long", "code": 400}),
        "prompt too long",
        1,
    ),
    "error choice": (
        Raw({"choices": [{"error": {"message": "upstream", "code": 429}}]}),
        "upstream (2 tries)",
        2,
    ),
    "detail": (Raw({"detail": "queue is full"}), "queue is full", 2),
    "context": (
        Raw({"error": {"message": "9000 tokens are too many", "code": "context_length_exceeded"}}),
        "9000 tokens are too many",
        1,
    ),
    "422": (
        Raw({"detail": [{"loc": ["body", "messages"], "msg": "bad role"}]}, 422),
        "bad role",
        1,
    ),
    "413": (
        Raw("too large", 413, {"Content-Type": "text/plain"}),
        "Error code: 413 - too large",
        1,
    ),
    "empty 500": (Raw("", 500), "Error code: 500 - Internal Server Error", 2),
    "nested 500": (Raw("[" * 100_000, 500), "Error code: 500", 2),
}


@pytest.mark.parametrize("name", CASES)
def test_nonsense_is_one_short_sentence_with_the_servers_words(name):
    raw, words, tries = CASES[name]
    with serve(hello, lambda *_: raw) as server:
        [reply] = ask(server, requests(1))
    assert reply.text is None
    assert words in reply.error
    assert "\n" not in reply.error
    assert len(reply.error) < 400
    assert len(server.bodies) == tries


@pytest.mark.parametrize(
    "odd", [5, "x", [], {"content": 5}, {"content": [{"token": 1}]}, {"content": [None]}]
)
def test_odd_log_probabilities_are_none(odd):
    raw = Raw(
        {"choices": [{"message": {"content": "85"}, "finish_reason": "stop", "logprobs": odd}]}
    )
    with serve(hello, lambda *_: raw) as server:
        [reply] = ask(server, requests(1, top_logprobs=5))
    assert (reply.text, reply.top) == ("85", [])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            Raw({"error": {"message": "no such model", "code": "model_not_found"}}),
            "no such model .*accepted: a base URL",
        ),
        (
            Raw({"error": {"message": "bad key", "type": "authentication_error"}}),
            "bad key .*which is not set",
        ),
        (Raw({"error": {"message": "pay", "code": "insufficient_quota"}}, 429), "pay"),
        (
            Raw("", 302, {"Location": "https://x.test/login?token=abc"}),
            r"redirects to https://x.test/login\?token=\[hidden\]",
        ),
        (Raw("", 307, {"Location": "/v2/"}), "redirects are not followed"),
    ],
)
def test_what_every_request_would_meet_stops_at_once(raw, words, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(hello, lambda *_: raw) as server, pytest.raises(ModelError, match=words) as error:
        ask(server, requests(20), concurrency=2, attempts=1)
    assert "\n" not in str(error.value)
    assert len(server.bodies) <= 3


def test_an_error_in_a_body_that_passes_is_asked_again():
    with serve(hello, in_turn([Raw({"error": {"message": "busy", "code": 429}})])) as server:
        [reply] = ask(server, requests(1))
    assert reply.text == "Hello."
    assert len(server.bodies) == 2


def test_a_whole_answer_in_gzip_and_with_a_wrong_type_is_read():
    body = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/html"}
    with serve(
        hello, lambda *_: Raw(gzip.compress(json.dumps(body).encode()), headers=headers)
    ) as server:
        assert ask(server, requests(1))[0].text == "Hi"


def test_a_query_that_is_no_secret_is_sent_with_every_request():
    with serve(lambda _: Answer("Hi")) as server:
        [reply] = ask(
            server, requests(1), url=server.url + "?api-version=2024-06-01&deployment=a%20b"
        )
    assert reply.text == "Hi"
    assert server.queries == ["api-version=2024-06-01&deployment=a%20b"] or server.queries == [
        "api-version=2024-06-01&deployment=a+b"
    ]
