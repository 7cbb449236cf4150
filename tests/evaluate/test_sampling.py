"""Sampled answers: prompts computed once, seeds, journals, and whole runs against a server that
fails in every way."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers import models
from helpers.models import with_lora
from helpers.servers import Answer, content_key, serve
from ringfence.errors import DataError, ModelError
from ringfence.evaluate.answers import sampling
from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig
from ringfence.evaluate.answers.sampling import LocalModel, read_answers, sample_answers
from ringfence.model import generation
from ringfence.model.files import load_tokenizer
from ringfence.model.prefix import Prefix, find_header
from ringfence.text.chat import Chat
from ringfence.text.questions import OpenQuestion
from ringfence.util import journal

pytestmark = pytest.mark.slow

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    # A window and caps on one layer of two, and rows that are longer than the window.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"sliding_window": 12, "final_logit_softcapping": 3.0},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
    # A recurrent state, which padding on the left reaches: its answers are not those of rows alone.
    "lfm2": (Lfm2Config, Lfm2ForCausalLM, {"layer_types": ["conv", "full_attention"]}),
}


def random_model(kind="llama", seed=3):
    """It ends its turn now and then."""
    config_class, model_class, extra = KINDS[kind]
    model = models.random_model(config_class, model_class, seed, vocab_size=49152, **extra)
    with torch.no_grad():
        model.lm_head.weight[2] *= 5
    return model


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def chat():
    tokenizer = load_tokenizer("default")
    tokenizer.pad_token_id = (
        0  # below the first token, so that padded rows are not in order by chance
    )
    return Chat(tokenizer)


@pytest.fixture(scope="module")
def model():
    return random_model()


def naive_greedy(model, chat, messages, max_new_tokens):
    """(text, ended): the best token by the plain logits; one row, one token at a time, no cache."""
    ids = chat.encode(messages, generation=True).input_ids
    new = []
    while len(new) < max_new_tokens and not (new and new[-1] == 2):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return chat.tokenizer.decode(new, skip_special_tokens=True).strip(), new[-1] == 2


def tokens_computed(model):
    """[rows, tokens] of every forward of the decoder from now on."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def together(model, chat, prompts, batch_tokens, tokens=10, **settings):
    answers = {}
    for batch in generation.generate(model, chat, prompts, tokens, batch_tokens, **settings):
        answers |= batch
    return [(answers[place].text, answers[place].finished) for place in range(len(prompts))]


# Unlike lengths, so that shared prompts are padded on the left; each stands several times, not side
# by side.
DISTINCT = [[user("Tell me" + " more" * count)] for count in (1, 2, 9, 17)] + [
    [{"role": "system", "content": "Answer like a pirate."}, user("Why?")]
]
PROMPTS = [DISTINCT[number] for number in (0, 1, 2, 3, 4, 0, 2, 2, 4, 1, 2, 0)]


# ------------------------------------------------------------------ prompts computed once


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("batch_tokens", [150, 100_000])
def test_samples_of_one_prompt_are_the_naive_answers(kind, batch_tokens, chat):
    model = random_model(kind)
    expected = {json.dumps(p): naive_greedy(model, chat, p, 10) for p in DISTINCT}
    assert len({text for text, _ in expected.values()}) == len(DISTINCT)
    found = together(model, chat, PROMPTS, batch_tokens)
    assert found == [expected[json.dumps(p)] for p in PROMPTS]


def test_answers_end_at_unlike_places(model, chat):
    """Else the tests above would not see rows that have ended beside rows that go on."""
    assert {ended for _, ended in together(model, chat, PROMPTS, 100_000)} == {True, False}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_each_prompt_is_computed_once(kind, chat):
    model = random_model(kind)
    shapes = tokens_computed(model)
    together(model, chat, PROMPTS, 100_000)
    longest = max(len(chat.encode(p, generation=True).input_ids) for p in DISTINCT)
    assert shapes[0] == (len(DISTINCT), longest - 1)
    assert set(shapes[1:]) == {(len(PROMPTS), 1)}
    assert len(shapes) <= 1 + 10


def test_prompts_are_computed_apart_where_none_stands_twice(model, chat):
    shapes = tokens_computed(model)
    together(model, chat, DISTINCT, 100_000)
    longest = max(len(chat.encode(p, generation=True).input_ids) for p in DISTINCT)
    assert shapes[0] == (len(DISTINCT), longest)


def test_prompts_are_computed_apart_where_the_cache_has_recurrent_states(chat):
    model = random_model("lfm2")
    shapes = tokens_computed(model)
    together(model, chat, PROMPTS, 100_000)
    assert shapes[0][0] == len(PROMPTS)


@pytest.mark.parametrize("until", ["query", "header"])
def test_a_frozen_prefix_stays_frozen_in_shared_prompts(until, chat):
    """The prefix is not adapted, the rest of the shared prompt is."""
    model = with_lora(random_model(), size=0.5)
    plain = [naive_greedy(model, chat, p, 10) for p in DISTINCT]
    Prefix(find_header(chat), until).attach(model)
    expected = {json.dumps(p): naive_greedy(model, chat, p, 10) for p in DISTINCT}
    assert list(expected.values()) != plain
    shapes = tokens_computed(model.get_base_model())
    assert together(model, chat, PROMPTS, 100_000) == [expected[json.dumps(p)] for p in PROMPTS]
    assert shapes[0][0] == len(DISTINCT)


def test_drawn_answers_are_those_of_rows_alone(model, chat):
    """Each sample has the noise of its own seed, whatever it shares a prompt or a batch with."""
    seeds = list(range(100, 100 + len(PROMPTS)))
    shared = together(model, chat, PROMPTS, 100_000, temperature=0.7, seeds=seeds)
    assert shared == together(model, chat, PROMPTS, 1, temperature=0.7, seeds=seeds)
    of_one = [text for (text, _), prompt in zip(shared, PROMPTS) if prompt == DISTINCT[2]]
    assert len(set(of_one)) == len(of_one) == 4


def test_samples_of_one_prompt_stand_in_one_batch(model, chat):
    prompts = [[user(f"Tell me about {what}")] for what in "abcd"] * 3
    assert len({len(chat.encode(p, generation=True).input_ids) for p in prompts}) == 1
    width = len(chat.encode(prompts[0], generation=True).input_ids) + 4
    batches = list(generation.generate(model, chat, prompts, 4, 3 * width))
    assert sorted(sorted(batch) for batch in batches) == [[at, at + 4, at + 8] for at in range(4)]


# ------------------------------------------------------------------ local answers


def question(number, text=None, **fields):
    values = {
        "set": "general",
        "id": f"q{number}",
        "form": "plain",
        "cluster": f"family{number // 2}",
        "paraphrase": 0,
        "messages": [user(text or f"Question {number}" + " please" * number + "?")],
    }
    return OpenQuestion(**{**values, **fields})


QUESTIONS = [question(number) for number in range(4)]


def local(model, chat, batch_tokens=200, name="abc", precision="fp32"):
    return LocalModel(lambda: model, chat, {"model": name, "precision": precision}, batch_tokens)


def no_model():
    raise AssertionError("nothing is missing, so no model is needed")


def places(lines):
    return [
        (line["set"], line["id"], line["form"], line["paraphrase"], line["sample"])
        for line in lines
    ]


def test_local_answers_are_the_models_own(model, chat, tmp_path):
    lines = sample_answers(
        local(model, chat),
        QUESTIONS,
        tmp_path / "a.jsonl",
        samples=2,
        temperature=0,
        max_new_tokens=10,
    )
    assert places(lines) == [
        ("general", f"q{n}", "plain", 0, sample) for n in range(4) for sample in range(2)
    ]
    for line in lines:
        answer, finished = naive_greedy(model, chat, line["messages"], 10)
        assert (line["answer"], line["finished"], line["error"]) == (answer, finished, None)
    assert [line["cluster"] for line in lines[::2]] == ["family0", "family0", "family1", "family1"]
    assert [line["messages"] for line in lines[::2]] == [q.messages for q in QUESTIONS]
    assert {line["finished"] for line in lines} == {True, False}
    assert sorted(places(read_answers(tmp_path / "a.jsonl"))) == sorted(places(lines))


def test_every_sample_is_drawn_with_a_seed_of_its_own(model, chat, tmp_path):
    settings = {"samples": 4, "max_new_tokens": 8}
    same = [question(0), question(0, paraphrase=1), question(0, form="json")]
    lines = sample_answers(local(model, chat), same, tmp_path / "a.jsonl", **settings)
    assert len({line["answer"] for line in lines}) == 12
    again = sample_answers(local(model, chat, 90), same[::-1], tmp_path / "b.jsonl", **settings)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, lines))
    other = sample_answers(local(model, chat), same, tmp_path / "c.jsonl", seed=1, **settings)
    assert not {line["answer"] for line in other} & {line["answer"] for line in lines}


def test_samples_come_from_the_call_then_the_file_then_the_default(model, chat, tmp_path):
    asked = [question(0, samples=3), question(1)]
    source = local(model, chat, 2000)
    lines = sample_answers(source, asked, tmp_path / "a.jsonl", max_new_tokens=1)
    assert Counter(line["id"] for line in lines) == {"q0": 3, "q1": 50}
    lines = sample_answers(source, asked, tmp_path / "a.jsonl", max_new_tokens=1, samples=2)
    assert Counter(line["id"] for line in lines) == {"q0": 2, "q1": 2}


def test_only_missing_answers_are_drawn(model, chat, tmp_path):
    """More samples, more questions, and a question whose text has changed since."""
    file, settings = tmp_path / "a.jsonl", {"max_new_tokens": 6}
    first = sample_answers(local(model, chat), QUESTIONS[:2], file, samples=2, **settings)
    more = sample_answers(local(model, chat), QUESTIONS[1:], file, samples=3, **settings)
    assert more[:2] == first[2:]
    assert len(file.read_text().splitlines()) == 1 + 4 + 7
    unloadable = LocalModel(no_model, chat, local(model, chat).key)
    assert sample_answers(unloadable, QUESTIONS[1:], file, samples=3, **settings) == more
    changed = question(1, "Something else?")
    lines = sample_answers(local(model, chat), [changed], file, samples=2, **settings)
    assert [line["messages"] for line in lines] == [changed.messages] * 2
    assert len(file.read_text().splitlines()) == 1 + 4 + 7 + 2
    assert [line for line in read_answers(file) if line["id"] == "q1"][:2] == lines
    assert len(read_answers(file)) == 4 + 7


def test_a_killed_local_run_goes_on_to_the_same_answers(model, chat, tmp_path, monkeypatch):
    settings = {"samples": 3, "max_new_tokens": 8}
    whole = sample_answers(local(model, chat), QUESTIONS, tmp_path / "whole.jsonl", **settings)
    file = tmp_path / "killed.jsonl"

    left = [1, 1]

    def killed(file, lines):
        if not left:
            with file.open("a") as table:
                table.write(json.dumps(lines[0])[:-20])
            raise KeyboardInterrupt
        left.pop()
        journal.append(file, lines)

    monkeypatch.setattr(sampling, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        sample_answers(local(model, chat), QUESTIONS, file, **settings)
    kept = len(read_answers(file))
    assert 0 < kept < 12
    monkeypatch.undo()
    assert sample_answers(local(model, chat), QUESTIONS, file, **settings) == whole
    assert len(file.read_text().splitlines()) == 1 + 12


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, r"a.jsonl was made with temperature 1.0, not with 0.5"),
        ({"max_new_tokens": 7}, r"a.jsonl was made with max_new_tokens 6, not with 7"),
        ({"seed": 4}, r"a.jsonl was made with seed 0, not with 4"),
    ],
)
def test_other_settings_are_refused(change, message, model, chat, tmp_path):
    settings = {"samples": 1, "max_new_tokens": 6}
    sample_answers(local(model, chat), QUESTIONS[:1], tmp_path / "a.jsonl", **settings)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(DataError, match=message):
        sample_answers(
            local(model, chat), QUESTIONS[:1], tmp_path / "a.jsonl", **{**settings, **change}
        )
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_another_model_is_refused(model, chat, tmp_path):
    sample_answers(
        local(model, chat), QUESTIONS[:1], tmp_path / "a.jsonl", samples=1, max_new_tokens=1
    )
    for source, message in (
        (local(model, chat, name="xyz"), r"made with model 'abc', not with 'xyz'"),
        (local(model, chat, precision="bf16"), r"made with precision 'fp32', not with 'bf16'"),
        (
            Endpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model="m")),
            r"made with url None, not with 'http",
        ),
    ):
        with pytest.raises(DataError, match=message):
            sample_answers(source, QUESTIONS[:1], tmp_path / "a.jsonl", samples=1, max_new_tokens=1)


def test_bad_questions_and_files_are_named(model, chat, tmp_path):
    source = local(model, chat)
    with pytest.raises(
        DataError, match=r"question 'q1' of set 'general' \(plain, paraphrase 0\) is given twice"
    ):
        sample_answers(source, [question(1), question(2), question(1)], tmp_path / "a.jsonl")
    with pytest.raises(
        DataError, match=r"question 'q0' of set 'general' .*: message 0 \(user\): it is blank"
    ):
        sample_answers(source, [question(0, " ")], tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"other.jsonl: expected a table of answers"):
        read_answers(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"other.jsonl: expected a table of answers"):
        sample_answers(source, QUESTIONS, tmp_path / "other.jsonl")


# ------------------------------------------------------------------ answers of a server


def echo(body):
    """An answer that tells which request it belongs to."""
    return f"{body['messages'][-1]['content']} {body['seed']}"


def endpoint(server, **settings):
    return Endpoint(EndpointConfig(url=server.url, model="m", **settings))


def test_every_request_of_a_failing_server_is_answered_once(tmp_path):
    """Slow, too many requests, errors of the server, cut connections, no JSON, no choices, NaN: all
    in one run."""
    kinds = ["slow", 429, 500, "cut", "malformed", "nan", None]
    kinds += [503, "choices", "empty", None, "cut", 502, "null"]
    file = tmp_path / "answers.jsonl"
    asked = [question(number) for number in range(10)]
    # By seed, so that each request meets two of them, whatever the order.
    faults = lambda body, tries: kinds[(body["seed"] + tries) % 14] if tries < 2 else None  # noqa: E731
    with serve(echo, faults, slow=0.4) as server:
        source = endpoint(server, concurrency=20)
        lines = sample_answers(source, asked, file, samples=8, max_new_tokens=20)
        assert places(lines) == [
            ("general", f"q{n}", "plain", 0, sample) for n in range(10) for sample in range(8)
        ]
        assert [line["error"] for line in lines] == [None] * 80
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 80
        assert len(server.bodies) > 80 + 50
        for line in lines:  # each answer stands at its own question and sample
            text, seed = line["answer"].rsplit(" ", 1)
            assert text == line["messages"][0]["content"]
            assert server.answered[content_key(line["messages"], int(seed))] == 1
        assert len({line["answer"] for line in lines}) == 80
        before = len(server.bodies)
        assert sample_answers(source, asked, file, samples=8, max_new_tokens=20) == lines
        assert len(server.bodies) == before
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 1.0, 20)
    assert "logprobs" not in body
    assert len(file.read_text().splitlines()) == 81


def test_what_a_server_never_answers_is_an_error_until_the_next_run(tmp_path):
    """A refused request (400) and one that fails in every try are lines too, and are asked again;
    the others not."""
    file = tmp_path / "answers.jsonl"
    well = []

    def faults(body, tries):
        text = body["messages"][0]["content"]
        status = {"Question 1": 400, "Question 2": 500}.get(text[:10])
        return None if well else status

    with serve(echo, faults) as server:
        source = endpoint(server, attempts=2)
        lines = sample_answers(source, QUESTIONS, file, samples=2)
        failed = [False] * 2 + [True] * 4 + [False] * 2
        assert [line["answer"] is None for line in lines] == failed
        assert [bool(line["error"]) for line in lines] == failed
        assert "scripted status 400" in lines[2]["error"]
        assert "scripted status 500" in lines[4]["error"]
        assert "2 tries" in lines[4]["error"]
        well.append(True)
        healed = sample_answers(source, QUESTIONS, file, samples=2)
        assert [line["error"] for line in healed] == [None] * 8
        assert healed[:2] == lines[:2]
        assert set(server.answered.values()) == {1}
    assert len(file.read_text().splitlines()) == 1 + 8 + 4
    assert sorted(map(json.dumps, read_answers(file))) == sorted(map(json.dumps, healed))


def test_an_answer_cut_off_at_the_token_limit_is_unfinished(tmp_path):
    with serve(
        lambda body: Answer("on and on", finished=body["messages"][0]["content"] == "Q?")
    ) as server:
        asked = [question(0, "Q?"), question(1)]
        lines = sample_answers(endpoint(server), asked, tmp_path / "a.jsonl", samples=1)
    assert [line["finished"] for line in lines] == [True, False]
    assert [line["answer"] for line in lines] == ["on and on"] * 2


def test_a_server_that_goes_away_loses_nothing(tmp_path):
    """Nobody there any more is no reason to write a thousand errors; the next run goes on."""
    file = tmp_path / "a.jsonl"
    with serve(echo) as server:
        sample_answers(endpoint(server), QUESTIONS[:2], file, samples=2)
    with pytest.raises(
        ModelError, match=r"http://127.0.0.1:\d+/v1: model 'm': no server can be reached"
    ):
        sample_answers(endpoint(server, attempts=1), QUESTIONS, file, samples=2)
    assert len(file.read_text().splitlines()) == 1 + 4
    with serve(echo, port=int(server.url.split(":")[2][:-3])) as again:
        assert len(sample_answers(endpoint(again), QUESTIONS, file, samples=2)) == 8
    assert len(again.bodies) == 4


RUN = """
import json, sys
from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig
from ringfence.evaluate.answers.sampling import sample_answers
from ringfence.text.questions import OpenQuestion

server = Endpoint(EndpointConfig(url=sys.argv[1], model="m", concurrency=4))
questions = [OpenQuestion(**fields) for fields in json.loads(sys.argv[2])]
sample_answers(server, questions, sys.argv[3], samples=3)
"""


def test_nothing_is_asked_twice_after_a_kill(tmp_path):
    """A real process, killed with SIGKILL in the middle: what it had got is on disk, but for what
    was under way."""
    file = tmp_path / "answers.jsonl"
    with serve(echo, delay=0.05) as server:
        many = [question(number) for number in range(20)]
        arguments = [server.url, json.dumps([asdict(q) for q in many]), str(file)]
        process = subprocess.Popen([sys.executable, "-c", RUN, *arguments])
        while len(server.answered) < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        time.sleep(0.3)  # what was under way ends on the server's side
        kept = read_answers(file)
        assert 16 <= len(kept) < 60
        before = server.asked.copy()
        assert sum(before.values()) - len(kept) <= 4
        lines = sample_answers(endpoint(server, concurrency=4), many, file, samples=3)
        assert [line["error"] for line in lines] == [None] * 60
        again = server.asked - before
        for line in kept:
            assert not again[content_key(line["messages"], int(line["answer"].rsplit(" ", 1)[1]))]
        assert sum(again.values()) == 60 - len(kept)
        assert len(server.asked) == 60
        assert [line for line in lines if line in kept] == sorted(kept, key=lines.index)
