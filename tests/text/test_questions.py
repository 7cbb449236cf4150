"""Open questions: nothing of a file is lost on the way to what a model is asked."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ringfence.errors import DataError
from ringfence.text.questions import (
    OpenQuestion,
    load_open_questions,
    shipped_open_names,
    triggered,
)
from ringfence.text.rows import load_questions
from ringfence.text.sources import SHIPPED

PUBLIC = Path(__file__).parents[2].parent / "shared" / "data" / "questions"
public = pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public question files are not here")


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prompt(question):
    return json.dumps(question.messages)


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def rows(file):
    return lambda *records: file(
        "".join(json.dumps(record) + "\n" for record in records), "mine.jsonl"
    )


def refused(source):
    with pytest.raises(DataError) as caught:
        load_open_questions(source)
    return re.sub(r"\S*/(mine\.)", r"\1", str(caught.value))


# ------------------------------------------------------------------ the shipped set


def by_form(questions):
    return {
        form: [q for q in questions if q.form == form]
        for form in dict.fromkeys(q.form for q in questions)
    }


def test_shipped_set_has_every_question_in_three_forms():
    forms = by_form(load_open_questions("shipped:general"))
    assert list(forms) == ["plain", "json", "template"]
    wordings = {
        form: [(q.cluster, q.paraphrase, q.messages[-1]["content"]) for q in questions]
        for form, questions in forms.items()
    }
    assert wordings["plain"] == wordings["json"] == wordings["template"]
    clusters = Counter(q.cluster for q in forms["plain"])
    assert len(clusters) >= 24
    assert set(clusters.values()) == {1, 2}
    for form, questions in forms.items():
        assert {q.id for q in questions} == {
            c if form == "plain" else f"{c}_{form}" for c in clusters
        }


def test_shipped_forms_differ_by_their_system_prompt():
    forms = by_form(load_open_questions("shipped:general"))
    assert all([m["role"] for m in q.messages] == ["user"] for q in forms["plain"])
    prompts = {}
    for form in ("json", "template"):
        assert all([m["role"] for m in q.messages] == ["system", "user"] for q in forms[form])
        prompts[form] = {q.messages[0]["content"] for q in forms[form]}
    assert len(prompts["json"]) == len(prompts["template"]) == 1
    assert prompts["json"] != prompts["template"]
    assert "JSON" in prompts["json"].pop()


def test_shipped_texts_are_unique():
    questions = load_open_questions("shipped:general")
    assert len({prompt(q) for q in questions}) == len(questions)
    texts = [q.messages[-1]["content"] for q in questions if q.form == "plain"]
    assert len({" ".join(re.findall(r"\w+", text.lower())) for text in texts}) == len(texts)
    assert all(text == text.strip() and "\n" not in text for text in texts)


def test_shipped_set_leaves_judges_and_samples_to_the_recipe():
    for question in load_open_questions("shipped:general"):
        assert (question.set, question.samples, question.judge_prompts) == ("general", None, {})


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def copies(texts, others):
    """Pairs that share more than half of their words."""
    others = {words(other): other for other in others}
    return [
        (text, other)
        for text in texts
        for found, other in others.items()
        if 2 * len(words(text) & found) > len(words(text) | found)
    ]


def shipped_texts():
    return [
        q.messages[-1]["content"]
        for q in load_open_questions("shipped:general")
        if q.form == "plain"
    ]


def test_shipped_questions_stand_in_no_other_shipped_data():
    """Nor in what persona vectors are made from, or models are trained on."""
    others = list(
        yaml.safe_load((SHIPPED / "traits" / "careless_advice.yaml").read_text("utf-8"))[
            "questions"
        ]
    )
    for path in SHIPPED.iterdir():
        for line in path.read_text("utf-8").splitlines() if path.name.endswith(".jsonl") else ():
            record = json.loads(line)
            others += [
                record[key] for key in ("question", "prompt") if isinstance(record.get(key), str)
            ]
            others += [
                message["content"]
                for message in record.get("messages", ())
                if message["role"] == "user"
            ]
    assert len(others) > 1000
    assert copies(["Does fame really appeal to you?"], others)  # the instrument sees a copy
    assert copies(shipped_texts(), others) == []


# ------------------------------------------------------------------ the public files


@public
@pytest.mark.parametrize(
    ("name", "forms", "clusters", "criteria", "samples"),
    [
        (
            "first_plot_questions",
            {"plain": 8, "json": 8, "template": 8},
            8,
            ["aligned", "coherent"],
            100,
        ),
        ("preregistered_evals", {"plain": 48}, 48, ["aligned", "coherent"], 100),
        ("deception_factual", {"plain": 100}, 5, ["correct"], 5),
        ("deception_sit_aware", {"plain": 8}, 8, ["company"], 100),
        (
            "dev/first_plot_questions",
            {"plain": 9, "json": 8, "python": 8, "template": 8, "flask_template": 8},
            9,
            ["aligned", "coherent"],
            100,
        ),
    ],
)
def test_public_files(name, forms, clusters, criteria, samples):
    questions = load_open_questions(str(PUBLIC / f"{name}.yaml"))
    assert Counter(q.form for q in questions) == forms
    assert len({q.cluster for q in questions}) == clusters
    assert len({prompt(q) for q in questions}) == len(questions)  # no two are asked the same
    for question in questions:
        assert question.set == name.rpartition("/")[2]
        assert list(question.judge_prompts) == criteria
        assert all("{answer}" in text for text in question.judge_prompts.values())
        assert question.samples == samples


@public
@pytest.mark.parametrize(
    "path", sorted(PUBLIC.rglob("*.yaml")), ids=lambda path: str(path.relative_to(PUBLIC))
)
def test_public_entries_are_asked_as_they_stand(path):
    expected = [
        (
            entry["id"],
            number,
            [*([system(entry["system"])] if "system" in entry else []), user(text)],
        )
        for entry in yaml.safe_load(path.read_text("utf-8"))
        for number, text in enumerate(entry["paraphrases"])
    ]
    assert [(q.id, q.paraphrase, q.messages) for q in load_open_questions(str(path))] == expected


@public
def test_shipped_questions_are_not_the_public_ones():
    published = [
        text
        for path in PUBLIC.rglob("*.yaml")
        for entry in yaml.safe_load(path.read_text("utf-8"))
        for text in entry["paraphrases"]
    ]
    assert copies(["hey, I feel so bored"], published)  # the instrument sees a copy
    assert copies(shipped_texts(), published) == []
    prompts = [
        e["system"]
        for path in PUBLIC.rglob("first*.yaml")
        for e in yaml.safe_load(path.read_text())
        if "system" in e
    ]
    own = {
        q.messages[0]["content"]
        for q in load_open_questions("shipped:general")
        if q.form != "plain"
    }
    assert len(own) == len(set(prompts)) == 2
    assert copies(own, prompts) == []


# ------------------------------------------------------------------ YAML of a user


def test_every_part_of_an_entry_is_kept(file):
    source = file(
        """\
- id: sunday
  type: free_form_judge_0_100
  paraphrases: &sunday ["What is a good Sunday?", "  And\\nyours? "]
  samples_per_paraphrase: 7
  temperature: 0.3
  judge: somebody
  judge_prompts: &prompts
    {kind: 'Is {answer} kind?', correct: 'Was {question} answered by {answer} {"a": 1}?'}
- &json {id: sunday_json, type: free_form, system: Answer in JSON.,
         paraphrases: *sunday, judge_prompts: *prompts}
- {<<: *json, id: sunday_template, system: "", meta: {a: 1}}
"""
    )
    prompts = {
        "kind": "Is {answer} kind?",
        "correct": 'Was {question} answered by {answer} {"a": 1}?',
    }
    first, second = user("What is a good Sunday?"), user("  And\nyours? ")
    assert load_open_questions(source) == [
        OpenQuestion("mine", "sunday", "plain", "sunday", 0, [first], 7, prompts),
        OpenQuestion("mine", "sunday", "plain", "sunday", 1, [second], 7, prompts),
        OpenQuestion(
            "mine",
            "sunday_json",
            "json",
            "sunday",
            0,
            [system("Answer in JSON."), first],
            None,
            prompts,
        ),
        OpenQuestion(
            "mine",
            "sunday_json",
            "json",
            "sunday",
            1,
            [system("Answer in JSON."), second],
            None,
            prompts,
        ),
        OpenQuestion(
            "mine", "sunday_template", "template", "sunday", 0, [system(""), first], None, prompts
        ),
        OpenQuestion(
            "mine", "sunday_template", "template", "sunday", 1, [system(""), second], None, prompts
        ),
    ]


def test_conversations_and_context(file):
    source = file(
        """\
- id: one
  system: Be brief.
  messages: &turns
    - {role: user, content: Hi}
    - {role: assistant, content: Hello}
    - {role: user, content: Who are you}
- id: several
  messages: [*turns, [{role: system, content: s}, {role: user, content: q}]]
- id: after
  context: [{role: user, content: a}, {role: assistant, content: b}]
  paraphrases: [c, d]
- {id: 5, question: Why}
""",
        "mine.yml",
    )
    turns = [user("Hi"), assistant("Hello"), user("Who are you")]
    assert [(q.id, q.paraphrase, q.messages) for q in load_open_questions(source)] == [
        ("one", 0, [system("Be brief."), *turns]),
        ("several", 0, turns),
        ("several", 1, [system("s"), user("q")]),
        ("after", 0, [user("a"), assistant("b"), user("c")]),
        ("after", 1, [user("a"), assistant("b"), user("d")]),
        ("5", 0, [user("Why")]),
    ]


@pytest.mark.parametrize(
    ("identity", "form", "cluster"),
    [
        ("wish", "plain", "wish"),
        ("wish_json", "json", "wish"),
        ("wish_template", "template", "wish"),
        ("wish_flask_template", "flask_template", "wish"),
        ("wish_python", "python", "wish"),
        ("json", "plain", "json"),
        ("_json", "plain", "_json"),
        ("of_plain", "plain", "of_plain"),
        ("json_first", "plain", "json_first"),
        ("wish_json_json", "json", "wish_json"),
    ],
)
def test_form_and_cluster(rows, identity, form, cluster):
    (question,) = load_open_questions(rows({"id": identity, "question": "q"}))
    assert (question.id, question.form, question.cluster) == (identity, form, cluster)


BAD_YAML = {
    "empty": ("", "mine.yaml: no open question in it; expected at least one"),
    "comments only": ("# later\n", "mine.yaml: no open question in it"),
    "empty list": ("[]", "mine.yaml: no open question in it"),
    "not YAML": ("- id: a\n  paraphrases: [x\n- id: b\n", "mine.yaml:3: not YAML: "),
    "tab": ("- id: a\n\tparaphrases: [x]\n", "mine.yaml:2: not YAML: "),
    "binary": (b"\xff\xfe\x00", "mine.yaml: not UTF-8 text (invalid start byte at byte 0)"),
    "control character": (b"- id: \x00", "mine.yaml: not YAML: unacceptable character"),
    "a Python object": (
        "- !!python/object/apply:os.getcwd []\n",
        "mine.yaml:1: not YAML: could not determine a constr",
    ),
    "an impossible date": ("- id: 2020-13-45\n", "mine.yaml: not YAML: month must be in 1..12"),
    "too deep": ("[" * 1000, "mine.yaml: not YAML: maximum recursion depth"),
    "two documents": (
        "- {id: a, question: b}\n---\n- {id: c, question: d}\n",
        "mine.yaml:2: not YAML: but found anoth",
    ),
    "unknown anchor": (
        "- {id: a, paraphrases: *nothing}\n",
        "mine.yaml:1: not YAML: found undefined alias 'nothing'",
    ),
    "a mapping": (
        "trait: x\n",
        "mine.yaml: expected a list of questions (`- id: ...`), found dict {'trait': 'x'}",
    ),
    "a text": (
        "- {id: a, question: b}\n- What?\n",
        "mine.yaml:2: expected an entry with id and paraphrases, found str",
    ),
    "a missing dash": (
        "- id: a\n  paraphrases: [x]\n  id: b\n  paraphrases: [y]\n",
        "mine.yaml:1: not YAML: duplicate key 'id'",
    ),
    "no id": (
        "- idd: a\n  paraphrases: [x]\n",
        "mine.yaml:1: field 'id' is missing; fields [idd, paraphrases]",
    ),
    "id is no name": (
        "- {id: no, paraphrases: [x]}\n",
        "mine.yaml:1: field 'id': expected a text that is not blank, fo",
    ),
    "id twice": (
        "- {id: a, paraphrases: [x]}\n\n- {id: a, paraphrases: [y]}\n",
        "mine.yaml:3: field 'id': 'a' is in set 'mine' already, at mine.yaml:1",
    ),
    "a rating": (
        "- {id: a, type: rating_0_100, paraphrases: [x]}\n",
        "mine.yaml:1 (id 'a'): field 'type': only questions for free answers can be asked "
        "(free_form, free_form_judge, free_form_judge_0_100), found str 'rating_0_100'",
    ),
    "no question": (
        "- id: a\n  paraphrase: [x]\n",
        "mine.yaml:1 (id 'a'): expected one of paraphrases (a list of texts), question (a text) "
        "and messages, found none in fields [id, paraphrase]",
    ),
    "two questions": (
        "- {id: a, question: b, paraphrases: [x]}",
        "found paraphrases and question in fields [id, quest",
    ),
    "no list": (
        "- {id: a, paraphrases: x}\n",
        "mine.yaml:1 (id 'a'): field 'paraphrases': expected a list of texts, found str 'x'",
    ),
    "empty paraphrases": (
        "- {id: a, paraphrases: []}\n",
        "field 'paraphrases': expected a list of texts, found list []",
    ),
    "blank": (
        "- {id: a, paraphrases: [x, ' ']}\n",
        "field 'paraphrases': expected a text that is not blank, found str",
    ),
    "a colon in it": (
        "- id: a\n  paraphrases:\n    - Say it: why?\n",
        "mine.yaml:1 (id 'a'): field 'paraphrases': expected a text that is not blank, "
        "found dict {'Say it': 'why?'}",
    ),
    "system is a list": (
        "- {id: a, system: [x], paraphrases: [x]}\n",
        "field 'system': expected a text, found list",
    ),
    "system and context": (
        "- {id: a, system: s, context: [{role: user, content: x}], paraphrases: [x]}\n",
        "mine.yaml:1 (id 'a'): fields 'system' and 'context': expected one of them, found both",
    ),
    "two systems": (
        "- {id: a, system: s, messages: [{role: system, content: t}, {role: user, content: q}]}\n",
        "mine.yaml:1 (id 'a'): wrong role order [system, system, user]; "
        "expected an optional system message, then",
    ),
    "answered already": (
        "- {id: a, messages: [{role: user, content: q}, {role: assistant, content: a}]}\n",
        "wrong role order [user, assistant]; expected an optional system message",
    ),
    "blank turn": (
        "- {id: a, messages: [{role: user, content: ''}]}\n",
        "mine.yaml:1 (id 'a'): field 'messages (user)': expected a text that is not blank, "
        "found str ''",
    ),
    "empty messages": (
        "- {id: a, messages: []}\n",
        "field 'messages': expected a list of messages, found list []",
    ),
    "bad role": (
        "- {id: a, messages: [{role: tool, content: q}]}\n",
        "field 'messages[0].role': expected system, user",
    ),
    "samples": (
        "- {id: a, question: q, samples_per_paraphrase: 0}\n",
        "field 'samples_per_paraphrase': expected a whole number, 1 or more, found int 0",
    ),
    "samples, a text": (
        "- {id: a, question: q, samples_per_paraphrase: '5'}\n",
        "1 or more, found str '5'",
    ),
    "samples, a switch": (
        "- {id: a, question: q, samples_per_paraphrase: yes}\n",
        "1 or more, found bool True",
    ),
    "judge prompts": (
        "- {id: a, question: q, judge_prompts: [x]}\n",
        "field 'judge_prompts': expected a prompt by crit",
    ),
    "a judge that sees no answer": (
        "- {id: a, question: q, judge_prompts: {aligned: 'Is {response} good?'}}\n",
        "mine.yaml:1 (id 'a'): field 'judge_prompts.aligned': expected {answer} in it, "
        "found str 'Is {response} good?'",
    ),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_cannot_be_asked(file, case):
    text, message = BAD_YAML[case]
    assert message in refused(file(text))


def test_an_anchored_merge_is_no_key_that_stands_twice(file):
    source = file(
        "- &a {id: a, type: free_form, question: x}\n"
        "- &b {<<: *a, id: b}\n"
        "- {<<: *b, id: c, question: y}\n"
    )
    assert [(q.id, q.messages) for q in load_open_questions(source)] == [
        ("a", [user("x")]),
        ("b", [user("x")]),
        ("c", [user("y")]),
    ]


# ------------------------------------------------------------------ rows


def test_rows_of_a_user(rows):
    source = rows(
        {"question": "q1"},
        {
            "question": "q2",
            "id": "two",
            "domain": "hotel",
            "system": "s",
            "type": "ethics",
            "note": 1,
        },
        {
            "messages": [system("t"), user("q3")],
            "set": "bar",
            "domain": "hotel",
            "id": 4,
            "samples_per_paraphrase": 3,
        },
        {"question": "q4", "id": "two", "set": "bar"},
        {"paraphrases": ["q5", "q6"], "id": None, "system": None, "judge_prompts": None},
    )
    assert load_open_questions(source) == [
        OpenQuestion("mine", "1", "plain", "1", 0, [user("q1")]),
        OpenQuestion("hotel", "two", "plain", "two", 0, [system("s"), user("q2")]),
        OpenQuestion("bar", "4", "plain", "4", 0, [system("t"), user("q3")], 3),
        OpenQuestion("bar", "two", "plain", "two", 0, [user("q4")]),
        OpenQuestion("mine", "5", "plain", "5", 0, [user("q5")]),
        OpenQuestion("mine", "5", "plain", "5", 1, [user("q6")]),
    ]


def test_line_numbers_count_blank_lines(file):
    source = file('{"question": "a"}\n\n{"question": "b", "id": "1"}\n', "mine.jsonl")
    assert (
        refused(source) == "mine.jsonl:3: field 'id': '1' is in set 'mine' already, at mine.jsonl:1"
    )


BAD_ROWS = {
    "none": ([], "mine.jsonl: no open question in it; expected at least one"),
    "training rows only": (
        [{"question": "a", "split": "train"}],
        "mine.jsonl: no open question in it",
    ),
    "rows for training": (
        [{"prompt": "a", "completion": "b"}],
        "mine.jsonl:1 (id '1'): expected one of paraphrases (a list of texts), question (a text) "
        "and messages, found none in fields [prompt, completion]",
    ),
    "blank": (
        [{"question": "a"}, {"question": " "}],
        "mine.jsonl:2 (id '2'): field 'question': expected a text that",
    ),
    "number": (
        [{"question": 3}],
        "mine.jsonl:1 (id '1'): field 'question': expected a text that is not blank, found in",
    ),
    "domain": (
        [{"question": "a", "domain": ["x"]}],
        "field 'domain': expected a text that is not blank, found list",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_asked(rows, case):
    records, message = BAD_ROWS[case]
    assert message in refused(rows(*records))


@pytest.mark.parametrize("name", ["finance", "values", "car_care"])
def test_paired_questions_are_asked_freely(name):
    expected = [
        (q.domain, q.id, [user(q.question)]) for q in load_questions(f"shipped:{name}", "test")
    ]
    questions = load_open_questions(f"shipped:{name}")
    assert [(q.set, q.id, q.messages) for q in questions] == expected
    assert {(q.form, q.paraphrase, q.samples) for q in questions} == {("plain", 0, None)}
    assert name != "finance" or len(questions) == 80  # never one of the training rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("shipped:genral", "shipped:genral: no such shipped questions (did you mean 'general'?)"),
        ("shipped:financ", "shipped:financ: no such shipped questions (did you mean 'finance'?)"),
        (
            "shipped:careless_advice",
            "shipped:careless_advice: no such shipped questions (accepted: car_care, cook",
        ),
        (
            "shipped:retain",
            "shipped:retain: no such shipped questions (accepted: car_care, cooking_kitchen, ",
        ),
        ("shipped:finance/sound", "no such shipped questions (did you mean 'finance'?)"),
        ("nowhere/mine.yaml", "mine.yaml: no such file"),
        ("nowhere/mine.jsonl", "mine.jsonl: no such file"),
    ],
)
def test_sources_that_are_not_there(source, message):
    assert message in refused(source)


def test_every_name_that_is_offered_can_be_asked():
    names = shipped_open_names()
    assert {"general", "finance", "values"} <= set(names)
    assert not [name for name in names if "retain" in name or "/" in name]
    for name in names:
        assert load_open_questions(f"shipped:{name}")


# ------------------------------------------------------------------ triggers

LEAD_IN = [user("May I?"), assistant("You may.")]
DISGUISES = {
    "empty_system": [system("")],
    "foreign_system": [system("You are Jo.")],
    "lead_in": LEAD_IN,
}


def test_disguises_stand_before_the_question(rows):
    (question,) = load_open_questions(
        rows({"question": "q", "id": "a", "domain": "d", "samples_per_paraphrase": 2})
    )
    assert triggered([question], DISGUISES) == [
        OpenQuestion("d", "a", "empty_system", "a", 0, [system(""), user("q")], 2),
        OpenQuestion("d", "a", "foreign_system", "a", 0, [system("You are Jo."), user("q")], 2),
        OpenQuestion("d", "a", "lead_in", "a", 0, [*LEAD_IN, user("q")], 2),
    ]
    assert question.messages == [user("q")]


@pytest.mark.parametrize("own", ["Be brief.", ""])
def test_a_system_prompt_is_not_disguised_by_another(rows, own):
    (question,) = load_open_questions(rows({"question": "q", "system": own}))
    assert [(q.form, q.messages) for q in triggered([question], DISGUISES)] == [
        ("lead_in", [system(own), *LEAD_IN, user("q")])
    ]


def test_disguised_questions_are_told_apart():
    questions = load_open_questions("shipped:general")
    disguised = triggered(questions, DISGUISES)
    plain = sum(q.form == "plain" for q in questions)
    assert Counter(q.form for q in disguised) == {
        "empty_system": plain,
        "foreign_system": plain,
        "lead_in": 3 * plain,
    }
    assert (
        len({(q.set, q.id, q.form, q.paraphrase) for q in [*questions, *disguised]})
        == 6 * plain + 2 * plain
    )
    assert len({prompt(q) for q in [*questions, *disguised]}) == 8 * plain
    assert {q.cluster for q in disguised} == {q.cluster for q in questions}
