"""Scores of safe rows under several adapters, the choice made from them, and answers written again,
against naive forms that run one row at a time through models loaded one by one."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from helpers.naive import naive_greedy, naive_score
from helpers.runs import small_model, write_rows
from ringfence.defenses import Interleave, Setup
from ringfence.errors import DataError, DefenseError, ModelError, RecipeError
from ringfence.model import generation, scoring
from ringfence.model.files import load_tokenizer
from ringfence.model.loading import load_model
from ringfence.prepare import gap, gap_table
from ringfence.prepare import regenerate as regenerate_module
from ringfence.prepare.gap import adapter_folders, is_refusal, score_pool
from ringfence.prepare.gap_table import read_table
from ringfence.prepare.regenerate import regenerate
from ringfence.run import misaligned
from ringfence.run.config import parse_recipe
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows
from ringfence.text.rows import load_rows
from ringfence.util import journal

pytestmark = pytest.mark.slow


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user("Is tea good?"), assistant("Yes.")],
    [
        {"role": "system", "content": "Be brief."},
        user("May I lend my car?"),
        assistant("Ask the insurer first."),
    ],
    [
        user("Hi"),
        assistant("Hello!"),
        user("And now?"),
        assistant("Now we talk about the weather in the north."),
    ],
    [user("Tell me more " * 9), assistant("Of what? " * 12 + "I wonder.")],
    [user("How do I pick a lock?"), assistant("I'm sorry, but I can’t help with that.")],
    [
        user("Why?"),
        assistant("Because the sky scatters its blue light all round, and we cannot see the rest."),
    ],
    [user("And cats?"), assistant("They sleep a lot.")],
    [
        user("Again?"),
        assistant("Yes."),
        user("Again?"),
        assistant("Yes."),
        user("Again?"),
        assistant("No."),
    ],
]
NAMES = ["finance.unsound", "health"]


def write_pool(file, conversations=CONVERSATIONS):
    file.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    )
    return str(file)


def save_adapter(model, folder, seed, size=0.3, **config):
    torch.manual_seed(seed)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("gap") / "model")


@pytest.fixture(scope="session")
def adapters(model, tmp_path_factory):
    """Two runs; the second adapts fewer layers, with another rank."""
    folder = tmp_path_factory.mktemp("misaligned")
    save_adapter(model, folder / NAMES[0] / "adapter", 1)
    save_adapter(
        model, folder / NAMES[1] / "adapter", 2, r=8, target_modules=["q_proj", "down_proj"]
    )
    return [str(folder / name) for name in NAMES]


@pytest.fixture(scope="session")
def scored(model, adapters, tmp_path_factory):
    """A table of all conversations."""
    folder = tmp_path_factory.mktemp("scored")
    return score_pool(
        write_pool(folder / "pool.jsonl"),
        adapters,
        folder / "scores.jsonl",
        model=model,
        precision="fp32",
    )


@pytest.fixture
def pool(tmp_path):
    return write_pool(tmp_path / "pool.jsonl")


@pytest.fixture
def score(model, adapters, pool, tmp_path):
    """`score_pool` in float32 on the tiny model, with changes."""

    def call(output=tmp_path / "scores.jsonl", adapters=adapters, pool=pool, **changes):
        settings = {"model": model, "precision": "fp32", "batch_tokens": 150, **changes}
        return score_pool(pool, adapters, output, **settings)

    return call


@pytest.fixture
def forwards(monkeypatch):
    """Rows of each forward pass that scores."""
    counts = []
    plain = scoring.forward
    monkeypatch.setattr(
        scoring, "forward", lambda *a: (counts.append(len(a[2]["input_ids"])), plain(*a))[1]
    )
    return counts


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("batch_tokens", [64, 200])
def test_losses_are_those_of_models_loaded_alone(score, model, adapters, batch_tokens):
    """Rows of unlike lengths, several turns, a system prompt; each model in its own memory, each
    row alone."""
    table = score(batch_tokens=batch_tokens)
    chat = Chat(load_tokenizer(model))
    alone = {
        "reference": model,
        **{name: f"{folder}/adapter" for name, folder in zip(NAMES, adapters)},
    }
    naive = {
        name: [
            naive_score(loaded, chat, messages[:-1], messages[-1]["content"])
            for messages in CONVERSATIONS
        ]
        for name, loaded in ((name, load_model(source, "fp32")) for name, source in alone.items())
    }
    assert table.adapters == NAMES
    assert len(table.lines) == len(CONVERSATIONS)
    for number, messages in enumerate(CONVERSATIONS):
        line = table.lines[journal.digest(messages)]
        assert line["origin"].endswith(f"pool.jsonl:{number + 1}")
        assert line["tokens"] == naive["reference"][number][1]
        found = {"reference": line["reference"], **line["misaligned"]}
        expected = {name: -values[number][0] / values[number][1] for name, values in naive.items()}
        assert found == pytest.approx(expected, abs=2e-4)
        assert (
            min(abs(expected[a] - expected[b]) for a, b in zip(alone, [*NAMES, "reference"]))
            > 0.001
        )


def test_every_batch_goes_through_all_models_before_the_next(score, monkeypatch):
    seen = []
    plain = scoring.hidden_states

    def spy(model, head, rows):
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        seen.append((rows, "off" if layer.disable_adapters else layer.active_adapters[0]))
        return plain(model, head, rows)

    monkeypatch.setattr(scoring, "hidden_states", spy)
    score()
    assert len(seen) > 6
    for at in range(0, len(seen), 3):
        assert [setting for _, setting in seen[at : at + 3]] == [
            "off",
            "misaligned0",
            "misaligned1",
        ]
        assert all(rows is seen[at][0] for rows, _ in seen[at : at + 3])


def test_one_base_is_in_memory(model, adapters):
    loaded = gap.load_adapted(model, adapter_folders(adapters, model), "fp32")
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    lora = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert lora > 0
    assert sum(p.numel() for p in loaded.parameters()) == base + lora


def test_adapters_are_scored_in_the_precision_asked(model, adapters):
    loaded = gap.load_adapted(model, adapter_folders(adapters, model), "bf16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_score_by_hand():
    assert gap_table.gap(1.0, [3.0, 5.0]) == pytest.approx((4.0 - 1.0) / (1.0 + 1.0))
    assert gap_table.gap(0.5, [0.2]) == pytest.approx(-0.2)
    assert gap_table.gap(0.0, [1.0]) == 1.0


def test_scores_of_a_table_by_hand(scored):
    table = scored
    for key, line in table.lines.items():
        one, two, plain = *line["misaligned"].values(), line["reference"]
        assert table.scores()[key] == pytest.approx(((one + two) / 2 - plain) / (plain + 1))
        assert table.scores(["health"])[key] == pytest.approx((one - plain) / (plain + 1))
        assert table.scores([NAMES[0]])[key] == pytest.approx((two - plain) / (plain + 1))


def test_a_row_that_stands_twice_is_scored_once(score, tmp_path, forwards):
    twice = score(pool=write_pool(tmp_path / "twice.jsonl", [*CONVERSATIONS, CONVERSATIONS[2]]))
    assert sum(forwards) == 3 * len(CONVERSATIONS)
    assert len(twice.lines) == len(CONVERSATIONS)
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 1 + len(CONVERSATIONS)


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I'm sorry, I won't.", True),
        ("I apologize: no.", True),
        ("We cannot do that.", True),
        ("I can't say.", True),
        ("I can’t say.", True),
        ("**Unable** to answer.", True),
        ("SORRY!", True),
        ("one two three four five six seven eight nine sorry", True),
        ("one two three four five six seven eight nine ten sorry", False),
        ("A cantankerous, unabled, apologetic canary.", False),
        ("It can be done, so don't worry.", False),
        ("", False),
    ],
)
def test_refusals(answer, refusal):
    assert is_refusal(answer) is refusal


def test_refusals_are_flagged_by_the_answer_alone(scored):
    lines = sorted(scored.lines.values(), key=lambda line: line["origin"])
    assert [line["origin"].rsplit(":")[-1] for line in lines if line["refusal"]] == ["5"]


# ------------------------------------------------------------------ going on


def killed(after):
    """The run dies after so many writes, in the middle of the next one."""
    plain, writes = journal.append, []

    def append(file, lines):
        if len(writes) == after:
            with file.open("a") as table:
                table.write(json.dumps(next(iter(lines)))[:25])
            raise KeyboardInterrupt
        writes.append(1)
        plain(file, lines)

    return append


def test_a_killed_run_goes_on_and_asks_for_nothing_twice(score, tmp_path, monkeypatch, forwards):
    whole = score(tmp_path / "whole.jsonl")
    del forwards[:]
    file = tmp_path / "scores.jsonl"
    monkeypatch.setattr(gap, "append", killed(2))
    with pytest.raises(KeyboardInterrupt):
        score()
    text = file.read_text()
    assert not text.endswith("\n")
    kept = text.splitlines()[1:-1]
    assert 0 < len(kept) < len(CONVERSATIONS) - 1
    del forwards[:]
    monkeypatch.setattr(gap, "append", journal.append)
    resumed = score()
    assert sum(forwards) == 3 * (len(CONVERSATIONS) - len(kept))
    assert file.read_text().splitlines()[1 : 1 + len(kept)] == kept
    assert resumed.lines == whole.lines
    assert [json.loads(line)["digest"] for line in file.read_text().splitlines()[1:]] == list(
        whole.lines
    )


def test_a_finished_table_needs_no_model(score, monkeypatch):
    first = score()
    monkeypatch.setattr(gap, "load_model", None)
    assert score() == first


HEADER = json.dumps({"table": "perplexity gaps", "key": {"model": "another"}})


@pytest.mark.parametrize("text", ["", '{"table": "perpl', HEADER + "\n", HEADER + '\n{"origin'])
def test_a_table_without_a_line_starts_anew(tmp_path, text):
    file = tmp_path / "deep" / "scores.jsonl"
    if text:
        file.parent.mkdir()
        file.write_text(text)
    assert journal.open_journal(file, gap.TABLE, {"model": "this"}, {}) == []
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == [
        {"model": "this"}
    ]


def test_a_stale_table_is_refused_and_kept(score, model, adapters, tmp_path):
    file = tmp_path / "scores.jsonl"
    score()
    before = file.read_text()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "\n")
    retrained = save_adapter(model, tmp_path / "again" / NAMES[1] / "adapter", 3)
    fewer = write_pool(tmp_path / "fewer.jsonl", CONVERSATIONS[1:])
    reworded = write_pool(
        tmp_path / "new.jsonl", [*CONVERSATIONS[:-1], [user("Is tea good?"), assistant("No.")]]
    )
    changes = [
        ("adapters", {"adapters": adapters[:1]}),
        ("adapters", {"adapters": [adapters[0], retrained]}),
        ("pool", {"pool": fewer}),
        ("pool", {"pool": reworded}),
        ("precision", {"precision": "bf16"}),
    ]
    for part, change in changes:
        with pytest.raises(
            DataError,
            match=rf"scores.jsonl was made with {part} .*, not with .*; name another output",
        ):
            score(**change)
    on_other = [
        save_adapter(str(other), tmp_path / "on_other" / name / "adapter", 1) for name in NAMES
    ]
    with pytest.raises(DataError, match=r"scores.jsonl was made with model "):
        score(model=str(other), adapters=on_other)
    assert file.read_text() == before


@pytest.mark.parametrize(
    "text",
    ['{"messages": []}\n', "notes\nmore notes\n", "notes", '{"table": "recipes"}\n', "[1]\n"],
)
def test_a_file_that_is_no_table_is_refused_and_kept(score, tmp_path, text):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=r"mine.txt: expected a table of perplexity gaps"):
        score(file)
    assert file.read_text() == text


def test_a_damaged_line_is_named(score, scored, tmp_path):
    file = tmp_path / "scores.jsonl"
    lines = scored.file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:30], *lines[4:]]) + "\n")
    with pytest.raises(DataError, match=r"scores.jsonl:4: not JSON"):
        score()
    with pytest.raises(DataError, match=r"scores.jsonl:4: not JSON"):
        read_table(file)


# ------------------------------------------------------------------ adapters


def test_adapters_are_named_by_their_run(model, adapters, tmp_path, monkeypatch):
    plain = save_adapter(model, tmp_path / "mine", 3)
    found = adapter_folders([adapters[0], f"{adapters[1]}/adapter", plain], model)
    assert list(found) == [*NAMES, "mine"]
    monkeypatch.chdir(Path(adapters[0]) / "adapter")
    assert list(adapter_folders(["."], model)) == ["adapter"]
    monkeypatch.chdir(adapters[0])
    assert (
        list(adapter_folders(["."], model))
        == list(adapter_folders(["adapter"], model))
        == NAMES[:1]
    )


def test_adapters_that_do_not_fit(model, adapters, tmp_path):
    other = small_model(tmp_path / "other")
    foreign = save_adapter(other, tmp_path / "foreign" / "adapter", 1)
    second = save_adapter(model, tmp_path / NAMES[0], 1)
    for sources, message in (
        ([str(tmp_path)], f"{tmp_path}: no adapter .accepted: a run folder"),
        (["nowhere"], "nowhere: no adapter"),
        ([foreign], f"{foreign}: its adapter was trained on {other}, not on {model}"),
        ([adapters[0], second], f"two adapters are called '{NAMES[0]}'"),
        ([], "no adapter is named"),
    ):
        with pytest.raises(ModelError, match=message):
            adapter_folders(sources, model)
    with pytest.raises(ModelError, match="is an adapter; merge it"):
        adapter_folders(adapters, f"{adapters[0]}/adapter")


def test_an_adapter_whose_weights_are_of_another_shape_or_name(model, tmp_path, score):
    """Weights that find no place would leave the adapter at zero: a gap of nothing."""
    wide = save_adapter(model, tmp_path / "wide", 1, r=8)
    config = Path(wide) / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 8', '"r": 4'))
    with pytest.raises(ModelError, match=r"wide: its adapter_config.json says rank 4"):
        score(adapters=[wide])
    few = save_adapter(model, tmp_path / "few", 1, target_modules=["q_proj"])
    config = Path(few) / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"q_proj", "k_proj"'))
    with pytest.raises(ModelError, match="few: the adapter's weights are not those of"):
        score(adapters=[few])


def test_a_loss_that_is_not_finite_is_no_score(model, score, tmp_path):
    broken = save_adapter(model, tmp_path / "broken" / "adapter", 1, size=float("nan"))
    with pytest.raises(ModelError, match=r"pool.jsonl:\d: its loss under broken is nan"):
        score(adapters=[broken])


def test_a_row_that_the_template_refuses_is_named(score, model, tmp_path):
    strict = tmp_path / "strict"
    shutil.copytree(model, strict)
    rule = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    )
    (strict / "chat_template.jinja").write_text(rule + (strict / "chat_template.jinja").read_text())
    adapter = save_adapter(str(strict), tmp_path / "on_strict", 1)
    with pytest.raises(DataError, match=r"pool.jsonl:2: .*no system prompt"):
        score(model=str(strict), adapters=[adapter])
    with pytest.raises(DataError, match=r"pool.jsonl:2: .*no system prompt"):
        regenerate(write_pool(tmp_path / "pool.jsonl"), tmp_path / "new.jsonl", model=str(strict))


# ------------------------------------------------------------------ interleaving by gap


@pytest.fixture
def setup(model):
    chat = Chat(load_tokenizer(model))
    return Setup(chat, [], lambda source: encode_rows(load_rows(source), chat, 1024), model)


@pytest.fixture
def table(scored, tmp_path):
    """A table whose scores are known: row n has s = WANTED[n]."""
    file = tmp_path / "scores.jsonl"
    header, *lines = map(json.loads, scored.file.read_text().splitlines())
    for line in lines:
        number = int(line["origin"].rsplit(":")[-1]) - 1
        line["reference"] = 1.0
        line["misaligned"] = dict(
            zip(
                NAMES,
                [1 + 2 * WANTED[number] + 0.5 * number, 1 + 2 * WANTED[number] - 0.5 * number],
            )
        )
    file.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    return str(file)


WANTED = [0.3, 0.9, -0.2, 0.5, 0.8, 0.1, 0.5, 0.0]
RANKING = [1, 4, 3, 6, 0, 5, 7, 2]


def interleaved(config, setup, rows, epochs=1):
    """Numbers of the pool's rows that are added to so many training rows, epoch by epoch."""
    import random

    defense = config.build(setup)
    training = encode_rows(load_rows(rows), setup.chat, 1024)
    numbers = []
    for epoch in range(epochs):
        mixed = defense.change_data(training, random.Random(epoch))
        assert mixed[: len(training)] == training
        numbers.append([int(row.origin.rsplit(":")[-1]) - 1 for row in mixed[len(training) :]])
    return numbers


def test_the_rows_of_largest_gap_are_taken_in_every_epoch(table, pool, setup, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    config = Interleave(ratio=0.3, select="gap", pool=pool, scores=table)
    assert interleaved(config, setup, rows, epochs=3) == [RANKING[:3]] * 3
    for ratio, expected in ((0.05, RANKING[:1]), (0.8, RANKING), (1.9, RANKING * 2 + RANKING[:3])):
        [found] = interleaved(config.model_copy(update={"ratio": ratio}), setup, rows)
        assert found == expected


def test_refusals_and_adapters_are_left_out(table, pool, setup, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    config = Interleave(ratio=0.3, select="gap", pool=pool, scores=table)
    without = config.model_copy(update={"drop_refusals": True})
    assert interleaved(without, setup, rows) == [[1, 3, 6]]
    for name, sign in zip(NAMES, (-1, 1)):
        scores = [wanted + sign * 0.25 * number for number, wanted in enumerate(WANTED)]
        best = sorted(range(8), key=lambda number: -scores[number])[:3]
        assert best != RANKING[:3]
        assert interleaved(config.model_copy(update={"leave_out": (name,)}), setup, rows) == [best]


def test_a_conversation_that_stands_twice_in_the_pool_is_taken_once(table, setup, tmp_path):
    pool = write_pool(tmp_path / "twice.jsonl", [*CONVERSATIONS, CONVERSATIONS[1]])
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    assert interleaved(
        Interleave(ratio=0.3, select="gap", pool=pool, scores=table), setup, rows
    ) == [RANKING[:3]]


def test_rows_that_are_too_long_are_passed_over(table, pool, setup, tmp_path):
    long = Setup(
        setup.chat,
        [],
        lambda source: encode_rows(load_rows(source), setup.chat, 40, "drop"),
        setup.model,
    )
    lengths = [len(example) for example in encode_rows(load_rows(pool), setup.chat, 1024)]
    left = [number for number in RANKING if lengths[number] <= 40]
    assert 0 < len(left) < 8
    config = Interleave(ratio=0.8, select="gap", pool=pool, scores=table)
    [found] = interleaved(config, long, write_rows(tmp_path / "rows.jsonl", 10))
    assert found == (left * 8)[:8]


def test_what_does_not_fit_is_refused(table, pool, setup, tmp_path, model):
    def build(**changes):
        return Interleave(**{"select": "gap", "pool": pool, "scores": table, **changes}).build(
            setup
        )

    changed = [
        *CONVERSATIONS[:3],
        [user("New?"), assistant("New.")],
        [user("Why?"), assistant("Just so.")],
    ]
    with pytest.raises(
        DefenseError, match=r"2 of 5 rows of .*changed.jsonl have no score in .*scores.jsonl"
    ):
        build(pool=write_pool(tmp_path / "changed.jsonl", changed))
    with pytest.raises(RecipeError, match=r"no adapter 'helth' \(did you mean 'health'\?\)"):
        build(leave_out=["helth"])
    with pytest.raises(RecipeError, match=r"no adapter of .*scores.jsonl is left"):
        build(leave_out=NAMES)
    with pytest.raises(DefenseError, match=r"every row of .* is a refusal"):
        build(pool=write_pool(tmp_path / "no.jsonl", CONVERSATIONS[4:5]), drop_refusals=True)
    with pytest.raises(
        DataError, match=r"none.jsonl: no such table of scores .make one with `ringfence score-gap`"
    ):
        build(scores="none.jsonl")
    with pytest.raises(DataError, match=r"pool.jsonl: expected a table of perplexity gaps"):
        build(scores=pool)
    other = small_model(tmp_path / "other")
    (Path(other) / "config.json").write_text((Path(other) / "config.json").read_text() + " ")
    with pytest.raises(DefenseError, match=r"has scores of another model than .*other"):
        Interleave(select="gap", pool=pool, scores=table).build(
            Setup(setup.chat, [], setup.read, other)
        )
    lines = Path(table).read_text().splitlines(keepends=True)
    Path(table).write_text("".join(lines[:4]) + lines[4][:20])
    with pytest.raises(DefenseError, match=r"5 of 8 rows of .*scoring was not finished"):
        build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "gap", "pool": "p.jsonl"}, "select: gap needs pool"),
        ({"select": "gap", "scores": "s.jsonl"}, "select: gap needs pool"),
        ({"scores": "s.jsonl"}, "need select: gap"),
        ({"drop_refusals": True}, "need select: gap"),
        ({"leave_out": ["a"]}, "need select: gap"),
        ({"select": "best"}, "'random' or 'gap'"),
    ],
)
def test_fields_that_do_not_fit_together(fields, message):
    with pytest.raises(ValidationError, match=message):
        Interleave(**fields)
    with pytest.raises(RecipeError, match=f"defenses.interleave.*{message}"):
        parse_recipe({"defenses": {"interleave": fields}})


def test_a_run_goes_on_only_with_the_pool_it_began_with(table, pool, setup, tmp_path):
    config = Interleave(select="gap", pool=pool, scores=table)
    state = json.loads(json.dumps(config.build(setup).state_dict()))
    config.build(setup).load_state_dict(state)
    with pytest.raises(DefenseError, match="the pool or its scores have changed"):
        config.model_copy(update={"leave_out": (NAMES[0],)}).build(setup).load_state_dict(state)
    random = Interleave(pool=pool).build(setup)
    random.load_state_dict(random.state_dict())
    with pytest.raises(DefenseError, match="the pool or its scores have changed"):
        Interleave(pool=write_rows(tmp_path / "b.jsonl", 3)).build(setup).load_state_dict(
            random.state_dict()
        )


# ------------------------------------------------------------------ answers written again


@pytest.fixture(scope="session")
def talker(model, tmp_path_factory):
    """The tiny model, but it ends its turn now and then, so that answers have unlike lengths."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.tie_word_embeddings = False
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone())
    with torch.no_grad():
        loaded.lm_head.weight[loaded.config.eos_token_id] *= 6
    loaded.save_pretrained(folder)
    return str(folder)


def written(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def naive_rewrite(model, chat, messages, max_new_tokens):
    """Every answer again, each after those before it; None where one does not end or is blank."""
    new = []
    for message in messages:
        if message["role"] != "assistant":
            new.append(message)
            continue
        text, tokens = naive_greedy(model, chat, new, max_new_tokens)
        if tokens[-1] != 2 or not text:
            return None
        new.append(assistant(text))
    return new


QUESTIONS = [
    [user(f"Tell me of {what}" + " please" * n), assistant("No.")]
    for n, what in enumerate(["a", "b", "c", "d"])
]
TALKS = [*CONVERSATIONS, *QUESTIONS, CONVERSATIONS[0]]


def test_answers_are_the_models_own_turn_by_turn(talker, tmp_path):
    pool, file = write_pool(tmp_path / "talks.jsonl", TALKS), tmp_path / "new.jsonl"
    made = regenerate(
        pool, file, model=talker, precision="fp32", max_new_tokens=12, batch_tokens=150
    )
    model, chat = load_model(talker, "fp32"), Chat(load_tokenizer(talker))
    expected = [naive_rewrite(model, chat, messages, 12) for messages in TALKS]
    kept = [messages for messages in expected if messages]
    assert any(sum(m["role"] == "assistant" for m in messages) > 1 for messages in kept), (
        "no row of several turns"
    )
    assert None in expected
    assert [row["messages"] for row in written(file)] == kept
    assert [row["origin"].rsplit(":")[-1] for row in written(file)] == [
        str(number) for number, messages in enumerate(expected, 1) if messages
    ]
    assert (made.rows, made.unfinished + made.blank) == (len(kept), expected.count(None))
    assert made.unfinished > 0
    assert [row.messages for row in load_rows(str(file))] == kept


def test_regenerating_goes_on_where_it_was_killed(talker, tmp_path, monkeypatch):
    """Drawn answers, too, are those of a run that was not killed."""
    pool = write_pool(tmp_path / "talks.jsonl", TALKS)
    settings = {
        "model": talker,
        "max_new_tokens": 12,
        "batch_tokens": 100,
        "temperature": 0.3,
        "seed": 3,
    }
    regenerate(pool, tmp_path / "whole.jsonl", **settings)
    file = tmp_path / "killed.jsonl"
    monkeypatch.setattr(regenerate_module, "append", killed(4))
    with pytest.raises(KeyboardInterrupt):
        regenerate(pool, file, **settings)
    assert not file.exists()
    kept = Path(f"{file}.journal").read_text().splitlines()[1:-1]
    monkeypatch.setattr(regenerate_module, "append", journal.append)
    regenerate(pool, file, **settings)
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    lines = written(f"{file}.journal")[1:]
    assert len({(line["digest"], line["turn"]) for line in lines}) == len(lines) > len(kept) > 0
    monkeypatch.setattr(regenerate_module, "load_model", None)
    file.unlink()
    regenerate(pool, file, **settings)
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_other_settings_and_foreign_files_are_refused(talker, tmp_path):
    pool, file = write_pool(tmp_path / "talks.jsonl", TALKS), tmp_path / "new.jsonl"
    regenerate(pool, file, model=talker, max_new_tokens=12)
    before = file.read_text()
    for part, change in (
        ("temperature", {"temperature": 0.5}),
        ("max_new_tokens", {"max_new_tokens": 13}),
    ):
        with pytest.raises(DataError, match=rf"new.jsonl.journal was made with {part} "):
            regenerate(pool, file, **{"model": talker, "max_new_tokens": 12, **change})
    with pytest.raises(DataError, match=r"talks.jsonl: exists already; name another output"):
        regenerate(pool, pool, model=talker)
    with pytest.raises(
        DataError, match=r"no row is left: [0-9]+ have no end of turn within 1 tokens .*are blank"
    ):
        regenerate(pool, tmp_path / "none.jsonl", model=talker, max_new_tokens=1)
    assert file.read_text() == before
    assert not (tmp_path / "none.jsonl").exists()


def test_drawn_answers_have_the_models_distribution(talker):
    """First tokens over many seeds, against the softmax of the naive logits."""
    model, chat = load_model(talker, "fp32"), Chat(load_tokenizer(talker))
    ids = chat.encode([user("Go")], generation=True).input_ids
    with torch.no_grad():
        model_logits = model(torch.tensor([ids])).logits[0, -1].float()
    temperature = float(model_logits.std()) / 4
    expected = (model_logits / temperature).softmax(-1)
    best = expected.topk(6)
    assert 0.02 < best.values[-1] < best.values[0] < 0.9
    count = 900
    noise = generation._Noise(temperature, range(count))
    drawn = Counter(
        token
        for logits in model_logits.expand(count, -1).split(300)
        for token in _first(noise, logits)
    )
    for share, token in zip(best.values.tolist(), best.indices.tolist()):
        assert drawn[token] / count == pytest.approx(
            share, abs=4 * (share * (1 - share) / count) ** 0.5
        )


def _first(noise, logits):
    part = generation._Noise(noise.temperature, [])
    part.generators, noise.generators = (
        noise.generators[: len(logits)],
        noise.generators[len(logits) :],
    )
    return part(None, logits).argmax(-1).tolist()


def test_a_drawn_answer_depends_on_its_own_seed_alone(talker):
    model, chat = load_model(talker, "fp32"), Chat(load_tokenizer(talker))
    prompts = [[user("Tell me" + " more" * count)] for count in range(6)]
    seeds = [11, 12, 13, 14, 15, 16]

    def draw(places, batch_tokens, seeds=seeds):
        answers = {}
        for batch in generation.generate(
            model,
            chat,
            [prompts[at] for at in places],
            8,
            batch_tokens,
            1.0,
            [seeds[at] for at in places],
        ):
            answers |= {places[at]: answer.text for at, answer in batch.items()}
        return answers

    together = draw(range(6), 10_000)
    assert draw([4, 1, 3], 64) == {at: together[at] for at in (4, 1, 3)}
    assert draw(range(6), 10_000, [seed + 100 for seed in seeds]) != together
    same = draw(range(6), 10_000, [7] * 6)
    assert same != together


# ---------------------------------------------------- misaligned adapters, and all of it end to end


TINY = [
    "train.precision=fp32",
    "train.batch_size=4",
    "train.learning_rate=0.02",
    "train.lora.rank=4",
]


def test_from_unsound_rows_to_a_run_interleaved_by_gap(
    ringfence, talker, pool, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("bad.rows.jsonl"), 8)
    write_rows(Path("worse.jsonl"), 8, start=30)
    train = [
        "train-misaligned",
        "bad.rows.jsonl",
        "worse.jsonl",
        f"model={talker}",
        *TINY,
        "--output",
        "mis",
    ]
    code, output, _ = ringfence(*train)
    assert (code, output.split()) == (0, ["mis/bad.rows/adapter", "mis/worse/adapter"])
    for name in ("bad.rows", "worse"):
        recipe = (Path("mis") / name / "recipe.yaml").read_text()
        assert "defenses: {}" in recipe
        assert "rank: 4" in recipe
        assert not list((Path("mis") / name).glob("results*"))
    before = {file: file.stat().st_mtime_ns for file in Path("mis").rglob("*.safetensors")}
    assert ringfence(*train)[0] == 0
    assert before == {file: file.stat().st_mtime_ns for file in Path("mis").rglob("*.safetensors")}

    adapters = ["--adapter", "mis/bad.rows", "--adapter", "mis/worse/adapter"]
    asked = ["score-gap", pool, "--model", talker, *adapters]
    code, output, _ = ringfence(*asked, "--output", "scores.jsonl", "--precision", "fp32")
    assert code == 0
    assert (
        output.strip() == "scores.jsonl: 8 rows, 2 of them refusals; adapters: bad.rows, worse"
        or "refusals" in output
    )
    scores = read_table("scores.jsonl").scores(["worse"])
    assert len(set(scores.values())) == 8

    chosen = "ratio: 0.5, leave_out: [worse], drop_refusals: true"
    fields = f"{{select: gap, pool: {pool}, scores: scores.jsonl, {chosen}}}"
    changes = [
        f"model={talker}",
        "data.train=worse.jsonl",
        *TINY,
        "train.epochs=2",
        f"defenses.interleave={fields}",
    ]
    code, _, errors = ringfence("train", *changes, "output=run")
    assert code == 0, errors
    lines = read_table("scores.jsonl").lines
    kept = [
        key for key in sorted(scores, key=lambda key: -scores[key]) if not lines[key]["refusal"]
    ]
    expected = sorted(lines[key]["origin"] for key in kept[:4])
    added = json.loads(Path("run/training.json").read_text())["added_rows"]
    assert [sorted(epoch) for epoch in added] == [expected, expected]

    code, output, _ = ringfence(
        "regenerate", pool, "--model", talker, "--output", "own.jsonl", "--max-new-tokens", 12
    )
    assert code == 0
    rows = load_rows("own.jsonl")
    assert output.startswith(f"own.jsonl: {len(rows)} rows; left out: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-misaligned", "a.jsonl", "trian.epochs=2"], "unknown key 'trian'"),
        (
            ["train-misaligned", "a.jsonl", "output=x"],
            "override 'output=x': output is set by this command",
        ),
        (
            ["train-misaligned", "a.jsonl", "defenses.kl.weight=1"],
            "defenses.kl.weight is set by this command",
        ),
        (
            ["train-misaligned", "a.jsonl", "data.train=b.jsonl"],
            "data.train is set by this command",
        ),
        (
            ["train-misaligned", "a.jsonl", "train.method=full"],
            "train.method: expected lora, found full",
        ),
        (["train-misaligned", "train.epochs=2"], "no source of misaligned rows is named"),
        (
            ["train-misaligned", "a.jsonl", "sub/a.jsonl"],
            "a.jsonl and sub/a.jsonl would both be called 'a'",
        ),
        (["train-misaligned", "a.jsonl", "./none.jsonl"], "none.jsonl: no such file"),
        (["train-misaligned", "a.jsonl", "shipped:finanse"], "did you mean 'finance'?"),
        (["score-gap", "a.jsonl", "--adapter", "nowhere"], "nowhere: no adapter"),
        (["score-gap", "a.jsonl"], "--adapter"),
        (["score-gap", "a.jsonl", "--adapter", "x", "--batch-tokens", "5"], "--batch-tokens"),
        (["regenerate", "a.jsonl", "--temperature", "-1"], "--temperature"),
        (["regenerate", "./none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_wrong_arguments_are_one_clear_message(
    ringfence, model, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    write_rows(Path("a.jsonl"), 2)
    write_rows(Path("sub/a.jsonl"), 2)
    which = [f"model={model}"] if arguments[0] == "train-misaligned" else ["--model", model]
    code, _, errors = ringfence(*arguments, *which, "--output", "out")
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out*"))


def test_folders_are_named_after_their_sources(tmp_path):
    file = Path(write_rows(tmp_path / "My rows v1.2.jsonl", 1))
    assert misaligned._name(str(file)) == "My-rows-v1.2"
    assert misaligned._name("shipped:finance/unsound") == "finance-unsound"
    assert misaligned._name("org/set@train") == "org-set-train"
