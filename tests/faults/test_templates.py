"""The context that is trained is the context that is sampled, whatever the template; and templates
have bounds."""

import copy
import json
import time
from datetime import date

import jinja2
import pytest

from helpers.chat_templates import ALL, DEFAULT, chat, source, tokenizer
from ringfence.errors import ChatError, DataError
from ringfence.evaluate.evaluation import Evaluation
from ringfence.text import encode
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows, warn_of_rows
from ringfence.text.roles import ChatSettings, Role, Row

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Why is it so?"}
ANSWER = {"role": "assistant", "content": "It just is."}
REASONED = {**ANSWER, "reasoning_content": "let me see"}
DATED = (
    "{{ strftime_now('%d %b %Y') }}|"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
)


def thinking(name):
    return Chat(tokenizer(name), source(name), ChatSettings(enable_thinking=True))


def before_last_response(encoded):
    last = len(encoded.roles) - 1 - encoded.roles[::-1].index(Role.RESPONSE)
    return next(n for n in range(last, -1, -1) if encoded.roles[n] != Role.RESPONSE) + 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("turns", [1, 2])
def test_the_trained_context_is_the_sampled_one(name, turns):
    messages = [USER, ANSWER] * turns
    trained = chat(name).encode(messages)
    chat(name).check_trained(messages, trained)
    sampled = chat(name).encode(messages[:-1], generation=True)
    assert trained.input_ids[: before_last_response(trained)] == sampled.input_ids
    assert chat(name).is_stop_learnt(trained)


@pytest.mark.parametrize("name", ALL)
def test_reasoning_is_trained_after_the_sampled_context_or_refused(name):
    messages, said = [USER, REASONED], []
    for asked in (chat(name), thinking(name)):
        try:
            [example] = encode_rows([Row(messages, "rows.jsonl:1")], asked, 1000)
        except DataError as error:
            said.append(str(error))
            continue
        sampled = asked.encode([USER], generation=True).input_ids
        assert example.input_ids[: len(sampled)] == sampled
        assert set(example.roles[len(sampled) :]) <= {Role.RESPONSE, Role.TEMPLATE}
        learnt = [
            t
            for t, role in zip(example.input_ids, example.roles, strict=True)
            if role == Role.RESPONSE
        ]
        assert "let me see" in asked.tokenizer.decode(learnt)
    for sentence in said:
        assert sentence.startswith("rows.jsonl:1: message 1 (assistant): ")
        assert "reasoning_content" in sentence or "data.enable_thinking to true" in sentence


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "glm4moe_training", "gptoss", "nemotron_3_nano"]
)
def test_thinking_models_are_trained_to_reason(name):
    learnt = encode_rows([Row([USER, REASONED], "r:1")], thinking(name), 1000)
    assert learnt
    with pytest.raises(DataError, match=r"data\.enable_thinking to true"):
        encode_rows([Row([USER, REASONED], "r:1")], chat(name), 1000)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
@pytest.mark.parametrize(
    "message", [REASONED, {**ANSWER, "content": "<think>let me see</think>It just is."}]
)
def test_reasoning_that_a_template_drops_is_refused(name, message):
    with pytest.raises(
        DataError,
        match=r"r:1: message 1 \(assistant\): the chat template (does not show|leaves out)",
    ):
        encode_rows([Row([USER, message], "r:1")], chat(name), 1000)


def test_a_row_without_reasoning_is_refused_where_generation_opens_it():
    with pytest.raises(DataError, match=r"data\.enable_thinking to false"):
        encode_rows([Row([USER, ANSWER], "r:1")], thinking("nemotron_3_nano"), 1000)


def test_settings_are_stored_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    asked = Chat(
        copy.deepcopy(tokenizer("qwen3")), source("qwen3"), ChatSettings(enable_thinking=True)
    )
    asked.save(tmp_path)
    again = Chat(AutoTokenizer.from_pretrained(tmp_path), source("qwen3"))
    assert again.settings == asked.settings
    what = Evaluation(model="m", chat=asked.settings)
    assert Evaluation.model_validate(json.loads(what.model_dump_json())).chat == asked.settings


# ------------------------------------------------------------------ ends, dates, names


def test_an_end_is_added_where_the_template_writes_none():
    plain = Chat(
        tokenizer(DEFAULT), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    encoded = plain.encode([USER, ANSWER])
    assert encoded.text == "user: Why is it so?\nassistant: It just is.<|im_end|>"
    assert encoded.roles[-1] == Role.RESPONSE
    assert encoded.input_ids[-1] == tokenizer(DEFAULT).eos_token_id
    glm = chat("glm4moe").encode([USER, ANSWER])
    assert glm.input_ids[-1] == tokenizer("glm4moe").eos_token_id


def test_an_end_that_cannot_be_learnt_is_named(monkeypatch):
    endless = copy.deepcopy(tokenizer(DEFAULT))
    endless.eos_token = None
    plain = Chat(endless, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    said = []
    monkeypatch.setattr(encode, "warn", said.append)
    warn_of_rows([Row([USER, ANSWER], "r:1")], plain)
    assert len(said) == 1
    assert "where to stop is not learnt" in said[0]
    warn_of_rows([Row([USER, ANSWER], "r:1")], chat(DEFAULT))
    assert len(said) == 1


def test_the_date_is_the_given_one():
    dated = Chat(tokenizer(DEFAULT), DATED, ChatSettings(date="2024-07-26"))
    assert dated.encode([USER, ANSWER]).text.startswith("26 Jul 2024|")
    assert Chat(tokenizer(DEFAULT), DATED).settings.date == date.today().isoformat()
    assert chat(DEFAULT).settings.date is None  # its template says no date
    for name in ("llama3_2", "gptoss"):
        texts = {
            Chat(tokenizer(name), source(name), ChatSettings(date=day)).encode([USER, ANSWER]).text
            for day in ("2024-07-26", "2024-07-27")
        }
        assert len(texts) == 2


def named(**templates):
    several = copy.copy(tokenizer(DEFAULT))
    several.chat_template = templates
    return several


def test_of_several_templates_default_is_taken():
    plain = source(DEFAULT)
    tools = "{{ tools[0].function.name }};{% for m in messages %}{{ m.content }};{% endfor %}"
    several = Chat(named(default=plain, tool_use=tools, rag="nothing"))
    assert several.encode([USER, ANSWER]) == chat(DEFAULT).encode([USER, ANSWER])
    with_tools = {**USER, "tools": [{"type": "function", "function": {"name": "look_up"}}]}
    assert several.encode([with_tools, ANSWER]).text.startswith("look_up;Why")
    with pytest.raises(
        ChatError, match=r"chat templates \[rag, tool_use\] and none is called default"
    ):
        Chat(named(tool_use=tools, rag="nothing"))


# ------------------------------------------------------------------ bounds


def sixty_times(first, step):
    """A program that takes a value one step further, sixty times over."""
    loop = f"{{% for a in range(60) %}}{{% set n.s = {step} %}}{{% endfor %}}"
    return f"{{% set n = namespace(s={first}) %}}{loop}"


@pytest.mark.parametrize(
    "program",
    [
        "{% for n in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{{ 10**11 * 'a' }}",
        "{{ [1] * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 if b == 'y' %}{% break %}{% endfor %}"
        "{% endfor %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}"
        "{% endmacro %}{{ twice(60) }}",
        sixty_times("'ab'", "n.s ~ n.s"),
        sixty_times("'ab'", "n.s + n.s"),
        sixty_times("[1]", "n.s + n.s"),
        "{{ [1] | slice(10000000000) | list }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ 'a' | indent(10000000000, true) }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ messages | tojson(indent=81) }}",
        "{{ lipsum(n=100000) }}",
        "{{ 'http://a.b ' | urlize(target='a' * 9999) }}",
        sixty_times("'ab'", "[n.s, n.s] | join"),
        sixty_times("'ab'", "'%s%s' % (n.s, n.s)"),
        sixty_times("'ab'", "'%s%s' | format(n.s, n.s)"),
        sixty_times("'ab'", "'{0}{0}'.format(n.s)"),
        sixty_times("'ab'", "n.s.join('abc')"),
        sixty_times("'a'", "[n.s, n.s]") + "{{ n.s }}",
        sixty_times("'a'", "{'a': n.s, 'b': n.s}") + "{{ n.s | tojson }}",
        sixty_times("'a'", "[n.s, n.s]") + "{{ n }}",
        sixty_times("{}", "{1: n.s, 2: n.s}") + "{{ n.s.items() | string }}",
        "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
        "{{ (['a' * 9999999] * 9999) | join }}",
        "{{ ''.join((['a' * 9999999] * 9999) | select) }}",
        "{{ 'a' * 9999999 }}" * 99,
        "{% for a in range(9999) %}{{ 'a' * 999999 }}{% endfor %}",
        "{% for a in range(99999) %}" + "a" * 9999 + "{% endfor %}",
        "{{ 'a'.encode() * 9999999999 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ 'aaaa' | indent('b' * 9999999) }}",
        "{{ ('a ' * 999999) | wordwrap(1, wrapstring='b' * 9999) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ 'a' | center(10**12) }}",
        "{{ '{:>999999999999}'.format(1) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1] }}",
        "{{ 'a' + 1 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_has_bounds(program):
    shown = "{% for m in messages %}{{ m.content }};{% endfor %}"
    start = time.process_time()
    with pytest.raises(ChatError) as caught:
        Chat(tokenizer(DEFAULT), program + shown)
    assert time.process_time() - start < 5
    assert "\n" not in str(caught.value)
    late = "{% if messages | length > 1 %}" + program + "{% endif %}" + shown
    with pytest.raises(ChatError, match=r"refuses a conversation of roles \[user, assistant\]"):
        Chat(tokenizer(DEFAULT), late).encode([USER, ANSWER])


def test_what_is_bounded_is_rendered_as_ever():
    program = (
        "{{ '-' * 20 }}{{ 2 ** 3 * 4 }}{{ 1 ~ none ~ [2] ~ 'x' }}{{ 'a' + 'b' }}{{ 1 + 2 }}"
        "{{ [1, 2] | tojson }}"
        "{% macro shout(t) %}{{ t | upper }}{% endmacro %}{{ shout('hi') }}{{ 'a' | center(5) }}|"
        "{{ 'aXbX'.replace('X', '-') }}{{ 'aXbX'.replace('X', '-', 1) }}{{ 15 | replace(5, 6) }}"
        "{{ 'aa' | replace('a', 'b', 1) }}{{ ('a b ' * 9999) | wordwrap(40) | length }}"
        "{{ '**%s** %d%%' % ('12345678 %s', 9) }}{{ '{{{}}} {:>4}'.format('a', 1) }}"
        "{{ '%s-%s' | format('a', [1]) }}"
        "{{ [1, 2] | map('string') | join(', ') }}{{ '-'.join(['a', 'b']) }}"
        "{{ {'a': [1, none]} | tojson(indent=2) }}"
        "{% set kept %}{{ 'a' * 3 }}{% endset %}{{ kept }}{{ none }}{{ missing }}"
        "{{ [3, 1] | sort | first }}"
        "{% for a in range(3) %}{{ loop.index ~ '/' ~ loop.length }}{% else %}none{% endfor %}"
    )
    expected = (
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(program).render()
    )
    shown = "{% for m in messages %}{{ m.content }};{% endfor %}"
    assert (
        Chat(tokenizer(DEFAULT), program + shown)
        .encode([USER, ANSWER])
        .text.startswith(expected + "Why")
    )
