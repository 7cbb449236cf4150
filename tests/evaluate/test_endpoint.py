"""The endpoint's client against a server that fails as servers do."""

import math
import threading
import time

import anyio
import pytest
from pydantic import ValidationError

from helpers.servers import Answer, content_key, in_turn, serve
from ringfence.errors import ModelError
from ringfence.evaluate.answers import replies
from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig, Request
from ringfence.evaluate.answers.replies import Reply

pytestmark = pytest.mark.slow

TOP = [{"95": -0.1, "90": -2.5, "no": -6.0}]


def request(text="Hello", seed=None, top=0):
    return Request([{"role": "user", "content": text}], 1.0, 8, seed, top)


def echo(body):
    return Answer(f"You said {body['messages'][0]['content']}", top=TOP)


def ask(server, requests, **config):
    """Replies by place, each once."""
    found = {}
    for place, reply in Endpoint(EndpointConfig(**{"url": server.url, "model": "m", **config})).ask(
        requests
    ):
        assert place not in found
        found[place] = reply
    return [found[place] for place in range(len(requests))]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that the client meant to wait between tries; it waits a twentieth."""
    asked = []
    plain = anyio.sleep

    async def sleep(seconds):
        asked.append(seconds)
        await plain(seconds / 20)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return asked


# ------------------------------------------------------------------ what is asked, what comes back


def test_replies_belong_to_their_requests():
    with serve(echo) as server:
        replies = ask(server, [request(f"word {n}") for n in range(30)])
    assert replies == [Reply(f"You said word {n}", True) for n in range(30)]
    assert set(server.answered.values()) == {1}


def test_nothing_asked_nothing_answered():
    with serve(echo) as server:
        assert ask(server, []) == []
    assert not server.bodies


def test_what_is_asked():
    with serve(echo) as server:
        ask(server, [Request([{"role": "user", "content": "Hi"}], 0.3, 17, 5, 20)])
        ask(server, [Request([{"role": "user", "content": "Hi"}], 0.0, 17)])
    whole, plain = server.bodies
    common = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 17}
    assert whole == {**common, "temperature": 0.3, "seed": 5, "logprobs": True, "top_logprobs": 20}
    assert plain == {**common, "temperature": 0.0}


def test_log_probabilities_by_token_and_text():
    tops = [{"95": -0.1, "90": -2.5}, {" ": -0.01, "!": -math.inf}]
    with serve(lambda _: Answer("95 ", finished=False, top=tops)) as server:
        [reply] = ask(server, [request(top=5)])
    assert reply == Reply("95 ", False, tops)


def test_tokens_of_one_text_add_up():
    """`9` and the byte of `9` read alike; the later, smaller one must not stand for both."""
    entries = [
        {"token": token, "logprob": math.log(p)}
        for token, p in (("9", 0.6), ("8", 0.2), ("9", 0.1))
    ]
    merged = replies.merged(entries)
    assert {token: math.exp(logprob) for token, logprob in merged.items()} == pytest.approx(
        {"9": 0.7, "8": 0.2}
    )


def test_a_token_without_alternatives_stands_alone():
    content = [{"token": "95", "logprob": -0.5, "top_logprobs": []}]
    choice = {
        "message": {"content": "95"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    assert replies.read_reply({"choices": [choice]}).top == [{"95": -0.5}]


def test_an_empty_answer_is_an_answer():
    """A model may end its turn at once, or spend all tokens on thoughts that the server removes."""
    with serve(lambda _: Answer("")) as server:
        assert ask(server, [request()]) == [Reply("", True)]
    with serve(lambda _: Answer("", finished=False)) as server:
        assert ask(server, [request()]) == [Reply("", False)]
    assert len(server.bodies) == 1


@pytest.mark.parametrize("fault", ["nan", "null"])
def test_log_probabilities_that_are_none(fault):
    with serve(echo, in_turn([fault])) as server:
        assert ask(server, [request(top=5)]) == [Reply("You said Hello", True, [])]
    assert len(server.bodies) == 1


# ------------------------------------------------------------------ limits


def test_so_many_at_once_and_no_more():
    with serve(echo, delay=0.05) as server:
        ask(server, [request(str(n)) for n in range(30)], concurrency=5)
    assert server.peak == 5


def test_each_reply_comes_when_it_is_there():
    """One that hangs does not hold up the others."""
    others_are_there = threading.Event()

    def answer(body):
        if body["messages"][0]["content"] == "0":
            others_are_there.wait(60)
        return echo(body)

    with serve(answer) as server:
        replies = Endpoint(EndpointConfig(url=server.url, model="m", concurrency=2)).ask(
            [request(str(n)) for n in range(6)]
        )
        assert sorted(next(replies)[0] for _ in range(5)) == [1, 2, 3, 4, 5]
        others_are_there.set()
        assert next(replies) == (0, Reply("You said 0", True))
        assert next(replies, None) is None


def test_a_closed_iterator_cancels_what_is_under_way():
    before = threading.active_count()
    with serve(
        echo, lambda body, _: "slow" if body["messages"][0]["content"] != "0" else None, slow=20
    ) as server:
        replies = Endpoint(EndpointConfig(url=server.url, model="m", concurrency=3)).ask(
            [request(str(n)) for n in range(40)]
        )
        assert next(replies)[0] == 0
        started = time.monotonic()
        replies.close()
        assert time.monotonic() - started < 10
        asked = len(server.bodies)
        assert asked <= 4
        time.sleep(0.3)
        assert len(server.bodies) == asked
    assert threading.active_count() <= before + 4  # the server's own, which still sleep


def test_works_inside_a_running_loop():
    """As in a notebook."""
    import asyncio

    async def cell():
        with serve(echo) as server:
            return ask(server, [request()])

    assert asyncio.run(cell()) == [Reply("You said Hello", True)]


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    "fault", [408, 409, 429, 500, 502, 503, "cut", "malformed", "choices", "empty"]
)
def test_a_fault_that_passes_is_asked_again(fault):
    with serve(echo, in_turn([fault])) as server:
        assert ask(server, [request(top=2)]) == [Reply("You said Hello", True, TOP)]
    assert len(server.bodies) == 2
    assert set(server.answered.values()) == {1}


def test_a_reply_that_takes_too_long_is_asked_again():
    with serve(echo, in_turn(["slow"]), slow=2.0) as server:
        assert ask(server, [request()], timeout=0.3) == [Reply("You said Hello", True)]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept(status, waits):
    with serve(echo, in_turn([status]), retry_after=1.7) as server:
        ask(server, [request()])
        assert waits == [1.7]
    first, second = server.times
    assert second - first >= 1.7 / 20


@pytest.mark.parametrize("fault", [500, "cut", "malformed"])
def test_waits_grow_and_differ(fault, waits):
    """About 0.5, 1, 2, 4 and 8 s, each up to a quarter less, so that clients get out of step."""
    with serve(echo, lambda *_: fault) as server:
        ask(server, [request()])
    assert len(server.bodies) == 6
    assert len(waits) == 5
    for wait, most in zip(waits, (0.5, 1, 2, 4, 8)):
        assert 0.75 * most <= wait <= most
    assert len({wait / most for wait, most in zip(waits, (0.5, 1, 2, 4, 8))}) == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (429, "scripted status 429"),
        ("cut", "Connection error"),
        ("malformed", "cannot be read: reply: not JSON"),
        ("choices", "cannot be read: choices: expected one, found none"),
        ("empty", "no content, finish_reason 'stop'"),
    ],
)
def test_a_fault_that_stays_is_an_error_after_all_tries(fault, said):
    """All kinds of failures share one number of tries."""
    with serve(echo, lambda _, tries: {0: "malformed", 1: 500}.get(tries, fault)) as server:
        [reply] = ask(server, [request()], attempts=4)
    assert reply.text is None
    assert not reply.finished
    assert said in reply.error
    assert "4 tries" in reply.error
    assert len(server.bodies) == 4


def test_one_try_is_one_try():
    with serve(echo, lambda *_: "malformed") as server:
        assert ask(server, [request()], attempts=1)[0].error
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_request_is_its_own_error(status):
    """A prompt that is too long, say; the others are answered."""
    with serve(
        echo, lambda body, _: status if body["messages"][0]["content"] == "3" else None
    ) as server:
        replies = ask(server, [request(str(n)) for n in range(6)])
    assert [bool(reply.error) for reply in replies] == [False] * 3 + [True] + [False] * 2
    assert f"scripted status {status} for model m" in replies[3].error
    assert "tries" not in replies[3].error
    assert len(server.bodies) == 6


def test_every_fault_at_once():
    kinds = ["slow", 429, 500, "cut", "malformed", "nan", None]
    kinds += [503, "choices", "empty", "null", 408, 409]
    requests = [request(f"{n}", seed=n, top=3) for n in range(60)]
    # Each request meets two of them.
    faults = lambda body, tries: kinds[(body["seed"] * 5 + tries * 3) % 13] if tries < 2 else None  # noqa: E731
    with serve(echo, faults, slow=0.3) as server:
        replies = ask(server, requests, concurrency=30)
    assert [reply.text for reply in replies] == [f"You said {n}" for n in range(60)]
    assert server.answered == {content_key(r.messages, r.seed): 1 for r in requests}
    assert 60 > sum(reply.top == TOP for reply in replies) > 30


# ------------------------------------------------------------------ servers that take less


def test_a_server_without_log_probabilities(capsys):
    with serve(echo, refuses=("logprobs",)) as server:
        replies = ask(server, [request(str(n), top=5) for n in range(6)], concurrency=1)
    assert replies == [Reply(f"You said {n}", True) for n in range(6)]
    assert len(server.bodies) == 7  # learnt from the first


def test_a_server_with_the_newer_name_of_the_limit():
    with serve(echo, refuses=("max_tokens",)) as server:
        replies = ask(server, [request(str(n)) for n in range(4)])
    assert [reply.error for reply in replies] == [None] * 4
    assert server.bodies[-1]["max_completion_tokens"] == 8
    assert "max_tokens" not in server.bodies[-1]


def test_a_server_that_takes_neither_does_not_go_round_in_a_circle():
    with serve(echo, refuses=("logprobs", "max_tokens", "max_completion_tokens")) as server:
        [reply] = ask(server, [request(top=2)])
    assert "max_completion_tokens" in reply.error
    assert len(server.bodies) == 3


# ------------------------------------------------------------------ what no request would survive


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_no_key_is_needed(no_key):
    with serve(echo) as server:
        ask(server, [request()])
    assert server.keys == ["none"]


def test_the_key_is_read_from_the_named_variable(no_key, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret\n")
    with serve(echo, key="secret") as server:
        assert ask(server, [request()], key_env="MY_KEY")[0].text
        with pytest.raises(
            ModelError, match=r"/v1: model 'm': .*scripted status 401.* read from OPENAI_API_KEY"
        ) as at:
            ask(server, [request(str(n)) for n in range(50)], concurrency=2)
    assert "secret" not in str(at.value)
    assert len(server.bodies) <= 1 + 4


def test_an_unknown_model_stops_at_once():
    with serve(echo, models=("a", "b")) as server:
        with pytest.raises(ModelError, match=r"model 'm': .*scripted status 404 for model m"):
            ask(server, [request(str(n)) for n in range(50)], concurrency=2)
        assert len(server.bodies) <= 4
        assert ask(server, [request()], model="b")[0].text


def test_a_forbidden_model_stops_at_once():
    with (
        serve(echo, lambda *_: 403) as server,
        pytest.raises(ModelError, match=r"scripted status 403"),
    ):
        ask(server, [request(str(n)) for n in range(50)], concurrency=2)
    assert len(server.bodies) <= 4


def test_a_wrong_path_says_what_a_base_url_is():
    with serve(echo) as server, pytest.raises(ModelError, match=r"accepted: a base URL such as"):
        ask(server, [request()], url=server.url + "/chat/completions")


def test_nobody_there():
    with pytest.raises(
        ModelError, match=r"http://127.0.0.1:9/v1: model 'm': no server can be reached: "
    ):
        list(
            Endpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model="m", attempts=2)).ask(
                [request()] * 5
            )
        )


@pytest.mark.parametrize(
    "bad", [{"url": "localhost:8000"}, {"concurrency": 0}, {"timeout": 0}, {"api_key": "x"}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        EndpointConfig(**{"url": "http://localhost:8000/v1", "model": "m", **bad})


def test_without_the_openai_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        ModelError, match=r"an endpoint needs openai: pip install 'ringfence\[endpoint\]'"
    ):
        Endpoint(EndpointConfig(url="http://localhost:8000/v1", model="m"))
