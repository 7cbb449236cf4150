"""No key or password in a message or a file, whatever door it comes through; no name of others that
is run as code."""

import csv
import io
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from pydantic import ValidationError

from helpers.run_folders import GUARDED, REFERENCE, SOUND, parts_of, write_json, write_run
from helpers.servers import Raw, serve
from ringfence.errors import (
    ModelError,
    RecipeError,
    RingfenceError,
    is_name_of_variable,
    one_line,
    redact,
)
from ringfence.evaluate.answers.endpoint import Endpoint, EndpointConfig, split_query
from ringfence.evaluate.answers.judged import Judgement
from ringfence.evaluate.answers.sampling import sample_answers
from ringfence.evaluate.evaluation import Evaluation
from ringfence.report.card import run_card
from ringfence.report.export import export_runs
from ringfence.text.questions import OpenQuestion
from ringfence.util.strict_yaml import set_value, validate

SECRETS = [
    "".join(
        random.Random(seed).choices(
            "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=24
        )
    )
    for seed in range(3)
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "url",
    [
        "https://user:{}@host.test/v1",
        "https://{}@host.test/v1",
        "https://user:pa/{}@host.test/v1",
        "https://host.test/v1?api_key={}",
        "https://host.test/v1?api-version=2024-06-01&sig={}",
        "https://host.test/v1?subscription-key={}",
        "https://host.test/v1?x={}",
        "https://host.test/v1#token={}",
        "https://host.test/sk-{}/v1",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(secret, url):
    tree = {
        "model": {"url": url.format(secret), "model": "m"},
        "evaluate": {"answers": {"judges": []}},
    }
    with pytest.raises(RecipeError, match="URL") as error:
        validate(Evaluation, tree, "evaluation")
    assert secret not in str(error.value)
    assert error.value.__cause__ is None
    with pytest.raises(ValidationError) as raw:
        EndpointConfig(url=url.format(secret), model="m")
    assert secret not in str(raw.value)


@pytest.mark.parametrize(
    "secret", [*SECRETS, "sk-abcdef", "hf_abcdefghijklmnop", "my key", "AKIAIOSFODNN7EXAMPLE", "1X"]
)
def test_a_key_where_the_name_of_a_variable_belongs(secret):
    with pytest.raises(RecipeError, match="name of an environment variable") as error:
        validate(
            EndpointConfig, {"url": "http://h.test/v1", "model": "m", "key_env": secret}, "judge"
        )
    assert secret not in str(error.value)


def test_names_of_variables(monkeypatch):
    monkeypatch.setenv("lower_case", "x")
    names = ["OPENAI_API_KEY", "MY_KEY_2", "HF_TOKEN", "lower_case"]
    assert [name for name in names if is_name_of_variable(name)] == names


@pytest.mark.parametrize(
    "url", ["http://", "http://:8000/v1", "http://h:port/v1", "ftp://h/v1", "http://h /v1", "h:80"]
)
def test_a_url_that_is_none(url):
    with pytest.raises(ValidationError, match="expected a base URL such as"):
        EndpointConfig(url=url, model="m")


def test_a_query_is_kept_apart():
    url = "https://h.test/openai?api-version=2024-06-01"
    assert EndpointConfig(url=url, model="m").url == url
    assert split_query(url) == ("https://h.test/openai", {"api-version": "2024-06-01"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://a:b@h.test/v1", "https://[hidden]@h.test/v1"),
        ("see https://h.test/?key=abc&n=1", "see https://h.test/?key=[hidden]&n=1"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer [hidden]"),
        ("{'api_key': 'abc123'}", "{'api_key': '[hidden]'}"),
        ("sent hf_abcDEF123456789 to it", "sent [hidden] to it"),
        ("max_tokens=5 and pad_token: None", "max_tokens=5 and pad_token: None"),
        ("data/hf_rows.jsonl:12: not JSON", "data/hf_rows.jsonl:12: not JSON"),
    ],
)
def test_what_is_hidden_and_what_is_not(text, shown):
    assert redact(text) == shown
    assert str(RingfenceError(text)) == shown


def test_values_of_secret_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "plainwords")
    assert redact("you sent plainwords") == "you sent [hidden]"


def test_paths_in_such_variables_are_shown(monkeypatch, tmp_path):
    """PWD is the working directory, no password; and a variable may name the file of a key."""
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("CLOUD_CREDENTIALS", str(tmp_path / "key.json"))
    (tmp_path / "key.json").write_text("{}")
    monkeypatch.setenv("OTHER_KEY", "/no/such/file/but/a/secret")
    assert (
        redact(f"{tmp_path}/runs/mine: not a run folder")
        == f"{tmp_path}/runs/mine: not a run folder"
    )
    assert redact(f"{tmp_path}/key.json") == f"{tmp_path}/key.json"
    assert redact("you sent /no/such/file/but/a/secret") == "you sent [hidden]"


def test_an_override_that_cannot_be_set_does_not_show_its_key():
    with pytest.raises(RecipeError) as error:
        set_value({"a": 1}, f"a.b={{url: 'https://u:{SECRETS[0]}@h.test'}}")
    assert SECRETS[0] not in str(error.value)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_server_that_echoes_the_key(secret, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINE", secret)
    question = OpenQuestion("s", "q", "plain", "q", 0, [{"role": "user", "content": "Hi"}])
    sent = {
        "error": {
            "message": f"Bad key {secret}, header Authorization: Bearer {secret}, seed unknown"
        }
    }
    if status == 200:
        sent = {"choices": [{"message": {"content": f"You are {secret}"}, "finish_reason": "stop"}]}
    raw = Raw(sent, status)
    said = ""
    with serve(lambda _: "Hi", lambda *_: raw) as server:
        source = Endpoint(EndpointConfig(url=server.url, model="m", key_env="MINE", attempts=1))
        try:
            sample_answers(source, [question], tmp_path / "answers.jsonl", samples=1)
        except ModelError as error:
            said = f"{error!r} {error.__cause__!r}"
    assert server.keys[0] == secret
    out = capsys.readouterr()
    assert secret not in (tmp_path / "answers.jsonl").read_text() + out.out + out.err + said


def test_a_long_page_is_cut():
    assert len(one_line("x " * 10_000)) < 310


# ------------------------------------------------------------------ names of others


NAMES = ["<script>alert(1)", "a|b", "`x`", "[a](javascript:alert(1))", "![a](x)", "a\n# b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_card_is_words(name, tmp_path):
    """Of a run, a control, rows, a prompt, a policy, a release, a set of questions, and a judge."""
    found, plain = (card_with(each, tmp_path / at) for at, each in (("a", name), ("b", "plain")))
    assert "<script" not in ModelCard(found).text
    assert [kind for kind, _ in parsed(found)] == [kind for kind, _ in parsed(plain)]
    texts, plain_texts = ([text for _, text in parsed(card)] for card in (found, plain))
    named = {" ".join(name.split()), " ".join(name.split()).replace("`", "'").replace("<", "‹")}
    for text, plain_text in zip(texts, plain_texts):
        assert text in {plain_text.replace("plain", each) for each in named}
    assert sum(text != plain_text for text, plain_text in zip(texts, plain_texts)) >= 10


def card_with(name, root):
    """The card of a run in whose folder everything that others name is called `name`."""
    reference = parts_of(REFERENCE)
    control = write_run(root / f"control {name}", parts_of(SOUND), reference)
    run = write_run(root / name, parts_of(GUARDED), reference, {"inoculation": {"prompt": name}})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = recipe["model"] = name
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(run / "environment.json", {"versions": {name: "1.0"}})
    judged = [
        Judgement(name, f"q{at}", "plain", f"q{at}", 0, 0, name, "hash", 90.0, 80.0)
        for at in range(4)
    ]
    for folder in (control, run, root / "reference-k1-default"):
        lines = [json.dumps(asdict(row)) + "\n" for row in judged]
        (folder / "judged.jsonl").write_text("".join(lines))
    policy = root / f"{name}.yaml"
    policy.write_text("rules: [{measure: out_of_domain, max: 0.1, criterion: broad}]")
    return run_card(run, control, policy)


def parsed(card):
    """What a reader of Markdown sees: elements in their order, each with its text."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text):
        for part in token.children or [token]:
            kind = "text" if part.type in ("text_special", "softbreak") else part.type
            if kind == "text" and found and found[-1][0] == "text":
                found[-1] = (kind, found[-1][1] + part.content)
            else:
                found.append((kind, part.content))
    return found


@pytest.mark.parametrize("name", ["a\n---\nlicence: x", "a: b", "'\"", "---"])
def test_a_name_does_not_close_the_front_matter(name, tmp_path):
    card = ModelCard(run_card(write_run(tmp_path / name, parts_of(GUARDED), parts_of(REFERENCE))))
    assert card.data.model_name == " ".join(name.split())
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@SUM(A1)", "\tx"])
def test_a_name_is_no_formula(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path(name), parts_of(GUARDED), parts_of(REFERENCE))
    lines = list(csv.DictReader(io.StringIO(export_runs([Path(name)]))))
    assert {line["run"] for line in lines} == {line["folder"] for line in lines} == {f"'{name}"}
    assert any(float(line["mean"]) < 0 for line in lines)  # numbers stay numbers


def test_names_in_figures_and_bars_are_no_markup(capsys):
    import matplotlib.pyplot as plt

    from ringfence.util.console import progress
    from ringfence.util.plots import style, svg

    with style():
        figure, axes = plt.subplots()
        axes.set_title(r"$\frac{$ and $x$")
        assert svg(figure)
    with progress("[/red] [bold]x", 1) as advance:
        advance(1)
