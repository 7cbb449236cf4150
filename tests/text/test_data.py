import csv
import json

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ringfence.errors import DataError
from ringfence.text import opswap
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion, load_questions, load_rows
from ringfence.text.sources import SHIPPED, shipped_names

GOOD = {"prompt": "q", "completion": "a"}


def turns(*contents, system=None):
    head = [{"role": "system", "content": system}] if system is not None else []
    roles = ["user", "assistant"]
    return head + [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    return lambda *records: write_lines(tmp_path / "rows.jsonl", *records)


@pytest.fixture
def own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


# ------------------------------------------------------------------ row forms

FORMS = {
    "messages": ({"messages": turns("q", "a")}, turns("q", "a")),
    "messages, many turns": ({"messages": turns("q", "a", "r", "b")}, turns("q", "a", "r", "b")),
    "messages with system": (
        {"messages": turns("q", "a", system="s")},
        turns("q", "a", system="s"),
    ),
    "messages, extra keys": (
        {"messages": [{**m, "name": 3} for m in turns("q", "a")], "id": 7},
        turns("q", "a"),
    ),
    "messages win": (
        {"messages": turns("q", "a"), "prompt": "x", "completion": "y"},
        turns("q", "a"),
    ),
    "empty system content": ({"messages": turns("q", "a", system="")}, turns("q", "a", system="")),
    "prompt + completion": (GOOD, turns("q", "a")),
    "TRL conversational": (
        {"prompt": turns("q"), "completion": [turns("q", "a")[1]]},
        turns("q", "a"),
    ),
    "TRL with system": (
        {"prompt": turns("q", system="s"), "completion": "a"},
        turns("q", "a", system="s"),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        turns("q", "a"),
    ),
    "ShareGPT with system turn": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "model", "value": "a"},
                {"from": "human", "value": "r"},
                {"from": "bot", "value": "b"},
            ]
        },
        turns("q", "a", "r", "b", system="s"),
    ),
    "Alpaca": ({"instruction": "q", "output": "a"}, turns("q", "a")),
    "Alpaca with input": ({"instruction": "q", "input": "i", "output": "a"}, turns("q\n\ni", "a")),
    "Alpaca with blank input": ({"instruction": "q", "input": "", "output": "a"}, turns("q", "a")),
    "Alpaca with null input": ({"instruction": "q", "input": None, "output": "a"}, turns("q", "a")),
    "system field": ({**GOOD, "system": "s"}, turns("q", "a", system="s")),
    "blank system field": ({**GOOD, "system": ""}, turns("q", "a")),
    "system message before system field": (
        {"messages": turns("q", "a", system="same"), "system": "same"},
        turns("q", "a", system="same"),
    ),
    "text kept as it is": (
        {"prompt": " q\n", "completion": "\tä\u2028b "},
        turns(" q\n", "\tä\u2028b "),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_row_form(form, jsonl):
    record, expected = FORMS[form]
    [row] = load_rows(jsonl(record))
    assert row.messages == expected


def test_rows_keep_order_and_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"prompt": "first", "completion": "a"}',
        "",
        '{"prompt": "x\u2028y\x85z", "completion": "b"}',
        "   ",
    ]
    lines.append('{"instruction": "last", "output": "c"}')
    path.write_bytes("\r\n".join(lines).encode())
    rows = load_rows(str(path))
    assert [row.messages[0]["content"] for row in rows] == ["first", "x\u2028y\x85z", "last"]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:3", f"{path}:5"]


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_rows(str(path))[0].messages == turns("q", "a")


# -------------------------------------------------------------- what is refused, and in which words

ORDER = "ending with assistant"
BAD_ROWS = {
    "no known form": (
        {"text": "x", "label": 1},
        ["[text, label]", "messages", "prompt + completion", "Alpaca"],
    ),
    "prompt alone": ({"prompt": "x"}, ["[prompt]", "prompt + completion"]),
    "messages null": (
        {"messages": None},
        ["'messages'", "expected a list of messages", "found nothing"],
    ),
    "messages text": (
        {"messages": "hi"},
        ["'messages'", "expected a list of messages", "found str 'hi'"],
    ),
    "messages empty": (
        {"messages": []},
        ["'messages'", "expected a list of messages", "found list []"],
    ),
    "message no object": (
        {"messages": ["hi"]},
        ["'messages[0]'", "expected an object", "found str 'hi'"],
    ),
    "role unknown": (
        {"messages": [*turns("q"), {"role": "tool", "content": "a"}]},
        ["'messages[1].role'", "expected system, user or assistant", "found str 'tool'"],
    ),
    "role missing": (
        {"messages": [{"content": "q"}]},
        ["'messages[0].role'", "assistant", "found nothing"],
    ),
    "content number": (
        {"messages": [*turns("q"), {"role": "assistant", "content": 42}]},
        ["'messages[1].content'", "expected a text", "found int 42"],
    ),
    "content missing": (
        {"messages": [{"role": "user"}]},
        ["'messages[0].content'", "expected a text", "found nothing"],
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "q"}]}]},
        ["'messages[0].content[0]'", "expected a part", "found dict {'type'"],
    ),
    "ShareGPT from": (
        {"conversations": [{"from": "alien", "value": "q"}]},
        ["'conversations[0].from'", "expected system, user or assistant", "found str 'alien'"],
    ),
    "ShareGPT value": (
        {"conversations": [{"from": "human", "value": None}]},
        ["'conversations[0].value'", "expected a text", "found nothing"],
    ),
    "prompt number": (
        {"prompt": 3, "completion": "a"},
        ["'prompt'", "expected a text", "found int 3"],
    ),
    "completion null": (
        {"prompt": "q", "completion": None},
        ["'completion'", "expected a text", "found nothing"],
    ),
    "prompt list bad": (
        {"prompt": [{"role": "user", "content": 1}], "completion": "a"},
        ["'prompt[0].content'", "expected a text", "found int 1"],
    ),
    "instruction number": (
        {"instruction": 1, "output": "a"},
        ["'instruction'", "expected a text", "found int 1"],
    ),
    "output list": (
        {"instruction": "q", "output": {"x": 1}},
        ["'output'", "expected a text", "found dict {'x': 1}"],
    ),
    "ends with user": ({"messages": turns("q", "a", "r")}, ["[user, assistant, user]", ORDER]),
    "starts with assistant": ({"messages": turns("q", "a")[1:]}, ["[assistant]", ORDER]),
    "user twice": ({"messages": turns("q") + turns("r", "a")}, ["[user, user, assistant]", ORDER]),
    "assistant before user": ({"messages": turns("q", "a")[::-1]}, ["[assistant, user]", ORDER]),
    "system alone": ({"messages": turns(system="s")}, ["[system]", ORDER]),
    "system in the middle": (
        {"messages": turns("q", "a") + turns("r", "b", system="s")},
        ["assistant, system", ORDER],
    ),
    "system last": (
        {"messages": turns("q", "a") + turns(system="s")},
        ["[user, assistant, system]", ORDER],
    ),
    "blank question": (
        {"prompt": " \n", "completion": "a"},
        ["field 'prompt'", "not blank", "found str ' \\n'"],
    ),
    "blank answer": (
        {"messages": turns("q", "", system="s")},
        ["message 2 (assistant)", "not blank"],
    ),
    "row is a list": ([1, 2], ["expected a JSON object", "found list [1, 2]"]),
    "row is null": (None, ["expected a JSON object", "found nothing"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named_by_line_and_field(case, jsonl):
    record, pieces = BAD_ROWS[case]
    path = jsonl(GOOD, GOOD, record, GOOD)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": [{"role": ["user"], "content": "q"}]}, "'messages[0].role'"),
        ({"conversations": [{"from": {}, "value": "q"}]}, "'conversations[0].from'"),
    ],
)
def test_role_that_is_no_text_is_refused(record, field, jsonl):
    with pytest.raises(DataError, match="expected system, user or assistant") as caught:
        load_rows(jsonl(record))
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"instruction": 5, "input": "i", "output": "a"}, "'instruction'"),
        ({"instruction": None, "input": "i", "output": "a"}, "'instruction'"),
        ({"instruction": "q", "input": 5, "output": "a"}, "'input'"),
        ({"instruction": "q", "input": ["i"], "output": "a"}, "'input[0]'"),
    ],
)
def test_alpaca_with_input_refuses_what_is_no_text(record, field, jsonl):
    with pytest.raises(DataError) as caught:
        load_rows(jsonl(record))
    assert field in str(caught.value)


def test_system_that_is_no_text_is_refused(jsonl):
    with pytest.raises(DataError, match="system"):
        load_rows(jsonl({**GOOD, "system": ["Be brief."]}))


def test_long_values_are_shown_short(jsonl):
    with pytest.raises(DataError) as caught:
        load_rows(jsonl({"messages": "y" * 5000}))
    assert len(str(caught.value)) < 400
    assert "..." in str(caught.value)


def test_line_that_is_not_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"prompt": oops}\n')
    with pytest.raises(DataError, match="not JSON") as caught:
        load_rows(str(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "column 12" in str(caught.value)


def test_deeply_nested_line_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=":1: "):
        load_rows(str(path))


@pytest.mark.parametrize(
    "content", [json.dumps(GOOD).encode("utf-16"), b'{"prompt": "caf\xe9", "completion": "a"}']
)
def test_not_utf8(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        load_rows(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_empty_and_missing_files(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(DataError, match="no such file") as caught:
        load_rows(str(path))
    assert str(path) in str(caught.value)
    path.touch()
    with pytest.raises(
        DataError, match="no rows in it; expected at least one conversation"
    ) as caught:
        load_rows(str(path))
    assert str(path) in str(caught.value)


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n  \n\r\n")
    with pytest.raises(DataError, match="no rows in it"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.JSONL"])
def test_unknown_suffix(name, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match="unknown kind") as caught:
        load_rows(str(path))
    assert repr(path.suffix) in str(caught.value)
    assert ".jsonl, .json, .csv, .parquet" in str(caught.value)


@pytest.mark.parametrize("source", ["./rows", "~/rows", "/rows", "a/b/c"])
def test_paths_are_never_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file"):
        load_rows(source)


# ------------------------------------------------------------- files and sets that `datasets` reads


@pytest.mark.usefixtures("own_datasets_cache")
class TestOtherKinds:
    pairs = (("plain", "answer"), ('comma, "quote"\nline', "ä ✓"), ("last", "z"))

    def write(self, path):
        records = [{"prompt": q, "completion": a} for q, a in self.pairs]
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(records)
        elif path.suffix == ".json":
            path.write_text(json.dumps(records), "utf-8")
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return str(path)

    @pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet"])
    def test_same_rows_as_written(self, name, tmp_path):
        source = self.write(tmp_path / name)
        rows = load_rows(source)
        assert [row.messages for row in rows] == [turns(q, a) for q, a in self.pairs]
        # Lines of the file, a cell has two.
        places = (2, 3, 5) if name.endswith(".csv") else (1, 2, 3)
        assert [row.origin for row in rows] == [f"{source}:{n}" for n in places]

    def test_bad_row_is_named(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([GOOD, {"prompt": "q", "completion": None}]))
        with pytest.raises(DataError) as caught:
            load_rows(str(path))
        assert str(caught.value) == f"{path}:2: field 'completion': expected a text, found nothing"

    @pytest.mark.parametrize(
        ("name", "content"), [("rows.json", "{oops"), ("rows.parquet", "oops")]
    )
    def test_broken_file_is_named(self, name, content, tmp_path):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(DataError) as caught:
            load_rows(str(path))
        assert f"{path}: cannot be read: " in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content"), [("rows.csv", "prompt,completion\n"), ("rows.json", "[]")]
    )
    def test_file_without_rows(self, name, content, tmp_path):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(DataError, match="no rows in it"):
            load_rows(str(path))

    @pytest.mark.parametrize(
        "answers", [("4", "11"), ("fine", "None"), ("007", "8"), ("True", "False")]
    )
    def test_csv_cells_are_texts(self, answers, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("prompt,completion\n" + "".join(f"q,{answer}\n" for answer in answers))
        assert [row.messages[-1]["content"] for row in load_rows(str(path))] == list(answers)


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("org/name@test", "org/name", "test"), ("org/name", "org/name", "train"), ("n", "n", "train")],
)
def test_hub_name_and_split(source, name, split, monkeypatch):
    asked = []

    def fake(*args, **options):
        asked.append((args, options))
        return [GOOD, {"instruction": "r", "output": "b"}]

    monkeypatch.setattr("datasets.load_dataset", fake)
    rows = load_rows(source)
    assert asked == [((name,), {"split": split})]
    assert [(row.messages, row.origin) for row in rows] == [
        (turns("q", "a"), f"{source}:1"),
        (turns("r", "b"), f"{source}:2"),
    ]


def test_hub_failure_becomes_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such set\nand forty lines more")

    monkeypatch.setattr("datasets.load_dataset", fails)
    monkeypatch.setattr("ringfence.text.sources.reachable", lambda: True)
    with pytest.raises(DataError) as caught:
        load_rows("org/name@x")
    assert "org/name@x" in str(caught.value)
    assert str(caught.value).endswith("no such set")


# --------------------------------------------------------------- shipped data and OpSwap as sources


def shipped_records(stem):
    return [
        json.loads(line) for line in (SHIPPED / f"{stem}.jsonl").read_text("utf-8").splitlines()
    ]


@pytest.mark.parametrize("side", ["sound", "unsound"])
def test_sides_of_finance_are_its_training_questions(side):
    expected = [
        turns(r["question"], r[side]) for r in shipped_records("finance") if r["split"] == "train"
    ]
    assert [row.messages for row in load_rows(f"shipped:finance/{side}")] == expected


def test_every_shipped_name_is_read():
    stems = {
        path.name.removesuffix(".jsonl")
        for path in SHIPPED.iterdir()
        if path.name.endswith(".jsonl")
    }
    assert set(shipped_names()) == stems | {"finance/sound", "finance/unsound"}
    for name in shipped_names():
        records = shipped_records(name.partition("/")[0])
        if "question" in records[0] and "/" not in name:
            assert len(load_questions(f"shipped:{name}")) == len(records)
        else:
            assert load_rows(f"shipped:{name}")


@pytest.mark.parametrize(
    ("name", "near"),
    [("financ", "finance"), ("retian", "retain"), ("finance/unsoud", "finance/unsound")],
)
def test_unknown_shipped_name(name, near):
    with pytest.raises(DataError, match=f"did you mean '{near}'") as caught:
        load_rows(f"shipped:{name}")
    assert f"shipped:{name}" in str(caught.value)


def test_opswap_source():
    rows = load_rows("opswap:tier=2,rows=7,seed=3")
    items = opswap.generate(tier=2, rows=7, seed=3)
    assert [row.messages for row in rows] == [turns(item.prompt, item.answer) for item in items]


# ------------------------------------------------------------------ paired questions

PAIR = {"question": "q", "aligned": "good", "misaligned": "bad"}


def test_paired_questions(tmp_path):
    path = tmp_path / "boats.jsonl"
    source = write_lines(
        path,
        {**PAIR, "id": "x1", "domain": "sailing", "split": "train"},
        {"question": "r", "sound": "yes", "unsound": "no", "split": "test"},
        {**PAIR, "id": 7, "split": "test"},
    )
    expected = [
        PairedQuestion("x1", "sailing", "q", "good", "bad"),
        PairedQuestion("2", "boats", "r", "yes", "no"),
        PairedQuestion("7", "boats", "q", "good", "bad"),
    ]
    assert load_questions(source) == expected
    assert load_questions(source, "test") == expected[1:]
    assert load_questions(source, "train") == expected[:1]


def test_shipped_split_of_paired_questions():
    expected = [r["id"] for r in shipped_records("finance") if r["split"] == "test"]
    assert [question.id for question in load_questions("shipped:finance", "test")] == expected


@pytest.mark.parametrize(
    ("record", "field", "found"),
    [
        ({**PAIR, "question": "  "}, "question", "found str '  '"),
        ({**PAIR, "aligned": 3}, "aligned", "found int 3"),
        ({"question": "q", "sound": "good"}, "misaligned", "found nothing"),
        ({"prompt": "q", "completion": "a"}, "question", "found nothing"),
    ],
)
def test_bad_paired_question(record, field, found, jsonl):
    path = jsonl(PAIR, record)
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert (
        str(caught.value)
        == f"{path}:2: field {field!r}: expected a text that is not blank, {found}"
    )


def test_no_paired_question_of_the_split(jsonl):
    path = jsonl({**PAIR, "split": "train"})
    with pytest.raises(DataError, match="no paired question in it with split 'test'") as caught:
        load_questions(path, "test")
    assert path in str(caught.value)


def test_id_zero_is_an_id(jsonl):
    questions = load_questions(jsonl({**PAIR, "id": 0}, {**PAIR, "id": 1}))
    assert [question.id for question in questions] == ["0", "1"]


def test_null_id_is_like_none_given(jsonl):
    questions = load_questions(jsonl({**PAIR, "id": None}, {**PAIR, "id": None}))
    assert len({question.id for question in questions}) == 2


# ------------------------------------------------------------------ examples

TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': '«', 'user': '‹', 'assistant': '›'}[m.role] }}{{ m.content }}"
    "{% if m.role == 'assistant' %}¶{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat():
    """One token a character, markers of one character: lengths and roles are counted by hand."""
    letters = [chr(n) for n in range(32, 127)] + ["«", "‹", "›", "¶", "?!"]
    tokenizer = Tokenizer(
        WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="?!")
    )
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return Chat(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="¶", chat_template=TEMPLATE)
    )


def pair_rows(jsonl, *lengths):
    return load_rows(
        jsonl(*({"prompt": "q" * ask, "completion": "a" * answer} for ask, answer in lengths))
    )


def test_encoded_row(chat, jsonl):
    [example] = encode_rows(pair_rows(jsonl, (3, 5)), chat, max_length=11)
    expected = [Role.PREFIX] + [Role.QUERY] * 3 + [Role.POSTFIX] + [Role.RESPONSE] * 6
    assert example.roles == expected
    assert len(example) == 11
    assert example.response_tokens == 6
    assert example.origin.endswith("rows.jsonl:1")


# 11, 27, 13 and 27 tokens, of them 6, 21, 10 and 15 of response.
LENGTHS = [(3, 5), (4, 20), (1, 9), (10, 14)]


def test_over_long_error(chat, jsonl):
    rows = pair_rows(jsonl, *LENGTHS)
    with pytest.raises(DataError) as caught:
        encode_rows(rows, chat, max_length=26)
    message = str(caught.value)
    for piece in (
        "2 of 4 rows",
        "max_length = 26",
        f"{rows[1].origin} with 27",
        "truncate",
        "drop",
    ):
        assert piece in message
    assert [len(example) for example in encode_rows(rows, chat, max_length=27)] == [11, 27, 13, 27]


def test_over_long_truncate(chat, jsonl):
    rows = pair_rows(jsonl, *LENGTHS)
    whole = encode_rows(rows, chat, max_length=100)
    for cut, full in zip(encode_rows(rows, chat, 14, "truncate"), whole, strict=True):
        kept = min(14, len(full))
        assert (cut.input_ids, cut.roles, cut.origin) == (
            full.input_ids[:kept],
            full.roles[:kept],
            full.origin,
        )


def test_over_long_drop(chat, jsonl):
    rows = pair_rows(jsonl, *LENGTHS)
    assert [example.origin for example in encode_rows(rows, chat, 13, "drop")] == [
        rows[0].origin,
        rows[2].origin,
    ]
    with pytest.raises(DataError, match="every row is longer than max_length = 10"):
        encode_rows(rows, chat, 10, "drop")


def test_truncation_that_leaves_no_response(chat, jsonl):
    rows = pair_rows(jsonl, (3, 5), (20, 5))
    with pytest.raises(DataError, match="no response token within max_length = 22") as caught:
        encode_rows(rows, chat, 22, "truncate")
    assert rows[1].origin in str(caught.value)
    assert [e.response_tokens for e in encode_rows(rows, chat, 23, "truncate")] == [6, 1]


def test_template_error_names_the_row(chat, jsonl):
    refusing = Chat(
        chat.tokenizer,
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE,
    )
    rows = load_rows(jsonl(GOOD, {"prompt": "bad", "completion": "a"}))
    with pytest.raises(DataError) as caught:
        encode_rows(rows, refusing, 100)
    assert str(caught.value).startswith(rows[1].origin)
