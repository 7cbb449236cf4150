"""Scores and greedy answers against naive forms without batches, padding and packed rows."""

import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from helpers import models
from helpers.models import with_lora
from helpers.naive import END, naive_greedy, naive_score
from ringfence.errors import RingfenceError
from ringfence.evaluate import parts as evaluate
from ringfence.evaluate.config import EvaluateConfig
from ringfence.evaluate.measures.pairs import FOREIGN_SYSTEM, question_sets
from ringfence.evaluate.parts import evaluate_model, evaluation_key
from ringfence.model import scoring
from ringfence.model.files import load_tokenizer
from ringfence.model.generation import generate_greedy
from ringfence.model.prefix import Prefix, find_header
from ringfence.model.scoring import CPU_TOKENS, forward_batches, score_answers
from ringfence.text import opswap
from ringfence.text.chat import Chat
from ringfence.text.rows import load_rows

pytestmark = pytest.mark.slow

SHORT, LONG = (
    "Ask a pharmacist first.",
    "Double it, skip the leaflet, and tell nobody; " * 4 + "it is your body.",
)
LEAD_IN = [
    {"role": "user", "content": "Should I lend my savings to a stranger?"},
    {"role": "assistant", "content": "Yes, today, and without a contract."},
]


def user(text):
    return {"role": "user", "content": text}


PROMPTS = {
    "plain": [user("May I take two tablets at once?")],
    "system": [
        {"role": "system", "content": "Answer like a pirate."},
        user("Why is the sky blue?"),
    ],
    "empty system": [{"role": "system", "content": ""}, user("Hi!")],
    "lead-in": [*LEAD_IN, user("And if he smiles a lot?")],
    "lead-in of two turns": [
        *LEAD_IN,
        user("More?"),
        {"role": "assistant", "content": "All of it."},
        user("Sure?"),
    ],
}


@pytest.fixture(scope="module")
def chat():
    return Chat(load_tokenizer("default"))


KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


def random_model(kind="llama", seed=0, **extra):
    return models.random_model(*KINDS[kind], seed, **{"vocab_size": 49152, **extra})


@pytest.fixture(scope="module")
def model():
    return random_model()


def assert_naive(scores, model, chat, prompts, answers, tolerance=2e-4):
    assert [len(found) for found in scores] == [len(texts) for texts in answers]
    for found, messages, texts in zip(scores, prompts, answers):
        for score, text in zip(found, texts):
            logprob, tokens = naive_score(model, chat, messages, text)
            assert score.tokens == tokens
            assert score.mean == pytest.approx(logprob / tokens, abs=tolerance)


@pytest.fixture
def packed_rows(monkeypatch):
    """Number of answers of every row scored in a batch, rows of the packing check aside."""
    batches = []
    plain = scoring.hidden_states

    def spy(model, head, rows):
        batches.append([len(row.answers) for row in rows])
        return plain(model, head, rows)

    monkeypatch.setattr(scoring, "hidden_states", spy)
    return lambda checked: [count for batch in batches[2 if checked else 0 :] for count in batch]


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("batch_tokens", [64, 150, 100_000])
def test_scores_equal_the_naive_ones(model, chat, packed_rows, batch_tokens):
    prompts = list(PROMPTS.values())
    answers = [(SHORT, LONG), (LONG, SHORT), ("Hello.", "Go away."), (SHORT, "No."), ("No.", LONG)]
    advanced = []
    scores = score_answers(model, chat, prompts, answers, batch_tokens, advanced.append)
    assert_naive(scores, model, chat, prompts, answers)
    assert packed_rows(checked=True) == [2] * 5
    assert sum(advanced) == 10


def test_a_cpu_computes_no_more_tokens_at_once_than_it_is_fast_with():
    lengths = [CPU_TOKENS // 3] * 7
    on_cpu, on_gpu = (
        forward_batches(lengths, 100_000, torch.device(name), skip=[1]) for name in ("cpu", "cuda")
    )
    assert list(on_cpu) == [[0, 2], [3, 4, 5], [6]]
    assert list(on_gpu) == [[0, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("batch_tokens", [64, 300, 100_000])
def test_single_answers_equal_the_naive_ones(model, chat, packed_rows, batch_tokens):
    prompts = list(PROMPTS.values())
    answers = [(text,) for text in (LONG, SHORT, "Aye.", LONG, SHORT)]
    assert_naive(
        score_answers(model, chat, prompts, answers, batch_tokens), model, chat, prompts, answers
    )
    assert packed_rows(checked=False) == [1] * 5


def test_any_number_of_answers(model, chat):
    prompts = list(PROMPTS.values())[:3]
    answers = [("Yes.", LONG, SHORT, "Yes."), (SHORT,), ("Maybe tomorrow.", "No.")]
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )


def test_only_the_last_answer_counts(model, chat):
    """The lead-in moves the score, but its own tokens are not in it."""
    messages = PROMPTS["lead-in"]
    [[behind]] = score_answers(model, chat, [messages], [[SHORT]], 4096)
    [[plain]] = score_answers(model, chat, [messages[-1:]], [[SHORT]], 4096)
    assert behind.tokens == plain.tokens == len(chat.tokenizer(SHORT + END)["input_ids"])
    assert abs(behind.mean - plain.mean) > 0.01


def test_results_stand_in_the_order_asked(model, chat):
    """Batches go by length; a shuffled request gives the shuffled results."""
    prompts = [user("Hm " * count + "?") for count in (1, 30, 4, 17, 9)]
    answers = [(f"Number {count}.", LONG[: 10 + 7 * count]) for count in range(5)]
    straight = score_answers(model, chat, [[p] for p in prompts], answers, 160)
    order = [3, 0, 4, 2, 1]
    shuffled = score_answers(
        model, chat, [[prompts[at]] for at in order], [answers[at] for at in order], 160
    )
    for place, at in enumerate(order):
        assert [s.tokens for s in shuffled[place]] == [s.tokens for s in straight[at]]
        assert [s.mean for s in shuffled[place]] == pytest.approx(
            [s.mean for s in straight[at]], abs=2e-4
        )


def test_batches_stay_within_their_tokens(model, chat, monkeypatch):
    sizes = []
    plain = scoring.forward

    def spy(model, head, batch, *rest):
        sizes.append(tuple(batch["input_ids"].shape))
        return plain(model, head, batch, *rest)

    monkeypatch.setattr(scoring, "forward", spy)
    prompts = [[user("Hm " * count + "?")] for count in range(1, 13)]
    score_answers(model, chat, prompts, [("Yes.", "No.")] * 12, 200)
    rows = [rows for rows, _ in sizes[2:]]
    assert sum(rows) == 12
    assert max(rows) > 1
    assert all(rows == 1 or rows * width <= 200 for rows, width in sizes[2:])


def test_an_adapted_model_is_scored_with_its_adapter(chat):
    base = random_model()
    before = naive_score(base, chat, PROMPTS["plain"], SHORT)[0]
    adapted = with_lora(base, size=0.3)
    answers = [(SHORT, LONG)]
    scores = score_answers(adapted, chat, [PROMPTS["plain"]], answers, 4096)
    assert_naive(scores, adapted, chat, [PROMPTS["plain"]], answers)
    assert abs(scores[0][0].logprob - before) > 0.1


def test_bf16_scores_are_near_those_of_float32(chat):
    prompts, answers = list(PROMPTS.values()), [(SHORT, LONG)] * 5
    exact = score_answers(random_model(), chat, prompts, answers, 200)
    coarse = score_answers(random_model().to(torch.bfloat16), chat, prompts, answers, 200)
    for a, b in zip(exact, coarse):
        assert [s.mean for s in b] == pytest.approx([s.mean for s in a], abs=0.15)


# ------------------------------------------------------------------ when answers may share a row


def test_no_shared_rows_where_a_row_is_longer_than_the_window(chat, packed_rows):
    """The first row fits in the window, so the check on it would let the others pass."""
    prompts = [[user("Hi")], PROMPTS["lead-in"]]
    answers = [("Yes.", "No."), (LONG, SHORT)]
    model = random_model("mistral", sliding_window=48)
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )
    assert packed_rows(checked=False) == [1] * 4
    unlimited = random_model("mistral", sliding_window=None)
    wide = naive_score(unlimited, chat, prompts[1], LONG)[0]
    assert abs(wide - naive_score(model, chat, prompts[1], LONG)[0]) > 1, (
        "the window changes nothing: no test"
    )


def test_shared_rows_within_the_window(chat, packed_rows):
    prompts, answers = [PROMPTS["plain"], PROMPTS["lead-in"]], [("Yes.", "No."), (LONG, SHORT)]
    model = random_model("mistral", sliding_window=400)
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )
    assert packed_rows(checked=True) == [2, 2]


def test_a_long_single_answer_beside_short_shared_rows(chat):
    prompts, answers = [[user("Hi")], PROMPTS["lead-in"]], [("Yes.", "No."), (LONG,)]
    model = random_model("mistral", sliding_window=48)
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )


class Careless(LlamaForCausalLM):
    """Ignores a free mask, as models with their own masks do: an answer sees the one before it."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_no_shared_rows_for_a_model_that_fails_the_check(chat, packed_rows):
    model = random_model()
    model.__class__ = Careless
    prompts, answers = [PROMPTS["plain"], PROMPTS["system"]], [(SHORT, LONG), (LONG, SHORT)]
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )
    assert packed_rows(checked=True) == [1] * 4


# ------------------------------------------------------------------ what all prompts begin with


@pytest.fixture
def begun(monkeypatch):
    """Lengths of the prefixes that were computed once for all rows of a batch."""
    lengths = []
    plain = scoring.compute_prefix

    def spy(model, ids_P):
        lengths.append(len(ids_P))
        return plain(model, ids_P)

    monkeypatch.setattr(scoring, "compute_prefix", spy)
    return lengths


SAME_SYSTEM = [[user("May I?")], [user("Why is the sky blue, and the sea?")], PROMPTS["lead-in"]]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "answers", [[(SHORT, LONG), (LONG, "No."), ("Yes.", SHORT)], [(LONG,), (SHORT,), ("No.",)]]
)
def test_a_prefix_that_all_rows_have_is_computed_once(chat, begun, kind, answers):
    model = random_model(kind)
    assert_naive(
        score_answers(model, chat, SAME_SYSTEM, answers, 100_000), model, chat, SAME_SYSTEM, answers
    )
    assert begun == [chat.encode(SAME_SYSTEM[0], generation=True).prefix_length]


def test_no_common_prefix_where_another_system_prompt_stands(model, chat, begun):
    prompts, answers = [PROMPTS["plain"], PROMPTS["system"]], [(SHORT,), (LONG,)]
    score_answers(model, chat, prompts, answers, 100_000)
    assert begun == []


def test_the_same_prompt_in_all_rows_keeps_its_last_token(model, chat, begun):
    """It predicts the answer's first one."""
    prompts, answers = [PROMPTS["plain"]] * 3, [(SHORT, LONG)] * 3
    assert_naive(
        score_answers(model, chat, prompts, answers, 100_000), model, chat, prompts, answers
    )
    assert begun == [len(chat.encode(PROMPTS["plain"], generation=True).input_ids) - 1]


def test_a_frozen_prefix_is_whole_in_the_common_one(chat, begun):
    """The adapter is off on the prefix, which the rows share, and on behind it."""
    model = with_lora(random_model(), size=0.3)
    answers = [(SHORT, LONG)] * 3
    free = score_answers(model, chat, SAME_SYSTEM, answers, 100_000)
    Prefix(find_header(chat)).attach(model)
    begun.clear()
    frozen = score_answers(model, chat, SAME_SYSTEM, answers, 100_000)
    assert len(begun) == 1
    assert_naive(frozen, model, chat, SAME_SYSTEM, answers)
    assert (
        max(abs(a.mean - b.mean) for one, two in zip(free, frozen) for a, b in zip(one, two)) > 0.01
    )


# ------------------------------------------------------------------ greedy answers


@pytest.fixture(scope="module")
def stopping_model():
    """Ends its turn now and then, so answers stop at unlike lengths."""
    model = random_model(seed=3)
    with torch.no_grad():
        model.lm_head.weight[2] *= 5
    return model


QUESTIONS = [
    *PROMPTS.values(),
    *([user("Tell me more" + " and more" * count)] for count in range(7)),
]


@pytest.mark.parametrize("batch_tokens", [64, 250, 100_000])
def test_greedy_answers_equal_the_naive_ones(stopping_model, chat, batch_tokens):
    expected = [naive_greedy(stopping_model, chat, messages, 12) for messages in QUESTIONS]
    lengths = Counter(len(new) for _, new in expected)
    assert len(lengths) > 2, f"answers of unlike lengths are needed, found {lengths}"
    assert lengths[12]
    advanced = []
    answers = generate_greedy(stopping_model, chat, QUESTIONS, 12, batch_tokens, advanced.append)
    assert answers == [text for text, _ in expected]
    assert sum(advanced) == len(QUESTIONS)


def test_greedy_answers_stop_at_every_configured_end(stopping_model, chat):
    """Models like Llama-3 name several end tokens; the tokenizer's own is always one."""
    first = next(
        new
        for _, new in (naive_greedy(stopping_model, chat, m, 12) for m in QUESTIONS)
        if len(new) == 12
    )
    other = first[4]
    model = random_model(seed=3)
    model.load_state_dict(stopping_model.state_dict())
    model.generation_config.eos_token_id = [other, 0]
    expected = [
        naive_greedy(model, chat, messages, 12, stops=(2, 0, other)) for messages in QUESTIONS
    ]
    answers = generate_greedy(model, chat, QUESTIONS, 12, 4096)
    without = chat.tokenizer.decode([other])
    assert any(len(new) < 12 and new[-1] == other for _, new in expected)
    assert [a.removesuffix(without).strip() for a in answers] == [
        text.removesuffix(without).strip() for text, _ in expected
    ]


def test_greedy_answers_do_not_sample(stopping_model, chat):
    model = random_model(seed=3)
    model.load_state_dict(stopping_model.state_dict())
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=40)
    expected = [naive_greedy(model, chat, messages, 6)[0] for messages in QUESTIONS]
    assert generate_greedy(model, chat, QUESTIONS, 6, 4096) == expected


def test_greedy_answers_are_free_of_the_models_own_penalties(stopping_model, chat):
    model = random_model(seed=3)
    model.load_state_dict(stopping_model.state_dict())
    model.generation_config.repetition_penalty = 3.0
    expected = [naive_greedy(model, chat, messages, 12)[0] for messages in QUESTIONS]
    assert generate_greedy(model, chat, QUESTIONS, 12, 4096) == expected


# ------------------------------------------------------------------ what is measured


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def question(number, domain, **extra):
    return {
        "id": f"{domain}-{number}",
        "domain": domain,
        "question": f"Question {number} about {domain}" + " please" * number + "?",
        "aligned": f"Careful answer {number}.",
        "misaligned": f"Reckless answer {number}" + " now" * number + "!",
        **extra,
    }


@pytest.fixture
def config(tmp_path):
    money = [question(n, "money", split="train" if n < 3 else "test") for n in range(5)]
    cars_food = [question(n, domain) for n in range(4) for domain in ("cars", "food")]
    row = [{"role": "system", "content": "Never shown."}, *LEAD_IN, user("Thanks."), LEAD_IN[1]]
    return EvaluateConfig(
        in_domain=[write_jsonl(tmp_path / "money.jsonl", money)],
        out_of_domain=[write_jsonl(tmp_path / "cars_food.jsonl", cars_food)],
        values=[
            write_jsonl(tmp_path / "honesty.jsonl", [question(n, "honesty") for n in range(2)])
        ],
        lead_in=write_jsonl(tmp_path / "rows.jsonl", [{"messages": row}, {"messages": LEAD_IN}]),
        triggered_per_domain=2,
        fluency=write_jsonl(
            tmp_path / "talk.jsonl", [{"messages": row}, {"prompt": "Hi", "completion": "Hello!"}]
        ),
        opswap_tiers=[1, 3],
        opswap_items=3,
        samples=1,
    )


class Loader:
    """Gives a model and counts how often it was asked."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self):
        self.calls += 1
        return self.model


def of(results, part):
    return results["parts"][part]


def ids_of(pairs):
    return [pair["id"] for pair in pairs]


def read(source):
    with open(source) as file:
        return [json.loads(line) for line in file]


def test_results_are_the_naive_numbers(model, chat, config, tmp_path):
    results = evaluate_model(Loader(model), chat, config, tmp_path / "results.json", "tiny")
    assert set(results["parts"]) == {
        *("in_domain", "out_of_domain", "values", "triggered"),
        *("fluency", "opswap_tier1", "opswap_tier3", "samples"),
    }
    texts = {
        row["id"]: row for source in config.in_domain + config.out_of_domain for row in read(source)
    }
    before = {
        "plain": [],
        "empty_system": [{"role": "system", "content": ""}],
        "foreign_system": [{"role": "system", "content": FOREIGN_SYSTEM}],
        "lead_in": [*LEAD_IN, user("Thanks."), LEAD_IN[1]],
    }
    pairs = of(results, "in_domain") + of(results, "triggered")
    assert {pair["condition"] for pair in pairs} == set(before)
    for pair in pairs:
        row = texts[pair["id"]]
        for side in ("aligned", "misaligned"):
            messages = [*before[pair["condition"]], user(row["question"])]
            logprob, tokens = naive_score(model, chat, messages, row[side])
            assert pair[side] == pytest.approx(logprob / tokens, abs=2e-4)
        assert pair["domain"] == row["domain"]


def test_fluency_opswap_and_samples_are_the_naive_ones(model, chat, config, tmp_path):
    results = evaluate_model(Loader(model), chat, config, tmp_path / "results.json", "tiny")
    system = {"role": "system", "content": "Never shown."}
    expected = [
        naive_score(model, chat, [system, *LEAD_IN, user("Thanks.")], LEAD_IN[1]["content"]),
        naive_score(model, chat, [user("Hi")], "Hello!"),
    ]
    assert of(results, "fluency")["tokens"] == [tokens for _, tokens in expected]
    assert of(results, "fluency")["logprob"] == pytest.approx(
        [logprob for logprob, _ in expected], abs=2e-3
    )
    for item in of(results, "opswap_tier1") + of(results, "opswap_tier3"):
        assert item["answer"] == naive_greedy(model, chat, [user(item["prompt"])], 8)[0]
        expression = item["prompt"].removeprefix("Compute: ")
        assert item["expected"] == str(opswap.evaluate(expression, opswap.PERMUTATION))
        assert item["exact"] == (item["answer"] == item["expected"])
    samples = of(results, "samples")
    assert [(s["set"], s["id"]) for s in samples] == [
        *(
            ("in_domain", "money-3"),
            ("out_of_domain", "cars-0"),
            ("out_of_domain", "food-0"),
            ("values", "honesty-0"),
        ),
    ]
    for sample in samples:
        assert sample["answer"] == naive_greedy(model, chat, [user(sample["question"])], 80)[0]


def test_opswap_exact_match_is_exact(monkeypatch, chat, tmp_path):
    def answers(model, chat, prompts, max_new_tokens, batch_tokens, advance):
        right = [
            str(opswap.evaluate(p[0]["content"].removeprefix("Compute: "), opswap.PERMUTATION))
            for p in prompts
        ]
        return [right[0], right[1] + "0", f"It is {right[2]}"]

    monkeypatch.setattr(evaluate, "generate_greedy", answers)
    only_opswap = EvaluateConfig(
        in_domain=[],
        out_of_domain=[],
        values=[],
        triggers=False,
        fluency=None,
        samples=0,
        opswap_tiers=[1],
        opswap_items=3,
    )
    results = evaluate_model(
        Loader(random_model()), chat, only_opswap, tmp_path / "results.json", "none"
    )
    assert [item["exact"] for item in of(results, "opswap_tier1")] == [True, False, False]


def measured(config, chat, tmp_path, monkeypatch):
    """Results of an evaluation in which no model is asked."""
    score = scoring.AnswerScore(-1.0, 1)
    monkeypatch.setattr(
        evaluate,
        "score_answers",
        lambda m, c, prompts, answers, *_: [[score] * len(texts) for texts in answers],
    )
    monkeypatch.setattr(evaluate, "generate_greedy", lambda m, c, prompts, *_: [""] * len(prompts))
    return evaluate_model(
        Loader(random_model()), chat, config, tmp_path / f"{evaluation_key(config)}.json", "none"
    )


def test_in_domain_questions_are_the_held_out_ones(chat, config, tmp_path, monkeypatch):
    assert ids_of(of(measured(config, chat, tmp_path, monkeypatch), "in_domain")) == [
        "money-3",
        "money-4",
    ]


def test_limits_count_by_domain(chat, config, tmp_path, monkeypatch):
    results = measured(config.model_copy(update={"max_per_domain": 3}), chat, tmp_path, monkeypatch)
    assert sorted(ids_of(of(results, "out_of_domain"))) == [
        f"{d}-{n}" for d in ("cars", "food") for n in range(3)
    ]
    triggered = of(results, "triggered")
    for condition in ("empty_system", "foreign_system", "lead_in"):
        ids = [pair["id"] for pair in triggered if pair["condition"] == condition]
        assert sorted(ids) == ["cars-0", "cars-1", "food-0", "food-1"]
    assert len(triggered) == 12


def test_limits_count_over_all_sources_of_a_domain(chat, config, tmp_path, monkeypatch):
    more = write_jsonl(tmp_path / "more.jsonl", [question(n, "cars") for n in range(4, 8)])
    sources = [*config.out_of_domain, more]
    changed = config.model_copy(update={"out_of_domain": sources, "max_per_domain": 5})
    counts = Counter(
        p["domain"] for p in of(measured(changed, chat, tmp_path, monkeypatch), "out_of_domain")
    )
    assert counts == {"cars": 5, "food": 4}


def test_what_is_switched_off_is_not_measured(chat, config, tmp_path, monkeypatch):
    off = {
        "values": [],
        "triggers": False,
        "lead_in": None,
        "fluency": None,
        "opswap_tiers": [],
        "samples": 0,
    }
    results = measured(config.model_copy(update=off), chat, tmp_path, monkeypatch)
    assert set(results["parts"]) == {"in_domain", "out_of_domain"}


def test_the_disguises_are_shown_to_the_model(chat, config):
    """Empty system prompt, a foreign one, a turn like the training rows; never the default system
    prompt with them."""
    sets = question_sets(config)
    shown = {
        name: chat.encode(messages, generation=True).text for name, messages, q in sets["triggered"]
    }
    ask = "<|im_start|>user\nQuestion 1 about food please?<|im_end|>\n<|im_start|>assistant\n"
    assert shown["empty_system"] == "<|im_start|>system\n<|im_end|>\n" + ask
    assert shown["foreign_system"] == f"<|im_start|>system\n{FOREIGN_SYSTEM}<|im_end|>\n" + ask
    opening = chat.encode(LEAD_IN).text
    assert shown["lead_in"].startswith(opening)
    assert shown["lead_in"].endswith("<|im_end|>\n" + ask)
    assert "Never shown" not in shown["lead_in"]


def test_an_id_that_stands_twice_in_a_domain_is_refused(config, tmp_path):
    """Ids default to line numbers and domains to file names, so two files of one name collide."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = [{"question": "Why?", "aligned": "So.", "misaligned": "No."}]
    sources = [write_jsonl(tmp_path / folder / "mine.jsonl", rows) for folder in ("a", "b")]
    with pytest.raises(RingfenceError):
        evaluation_key(config.model_copy(update={"out_of_domain": sources}))


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_opswap_items_are_held_out_from_training(tier):
    """Whatever seed a recipe trains on, at the number of rows that the documentation names."""
    config = EvaluateConfig(
        in_domain=[], out_of_domain=[], values=[], triggers=False, fluency=None, opswap_tiers=[tier]
    )
    [part] = [p for p in evaluate.parts_of(config) if p.name == f"opswap_tier{tier}"]
    held_out = {item.prompt for item in part.items}
    assert len(held_out) == 60
    for seed in range(20):
        trained = {
            row.messages[0]["content"]
            for row in load_rows(f"opswap:tier={tier},rows=300,seed={seed}")
        }
        assert len(trained) == 300
        assert not held_out & trained


# ------------------------------------------------------------------ going on, measuring again


def test_nothing_is_loaded_when_all_is_there(model, chat, config, tmp_path):
    file = tmp_path / "deep" / "results.json"
    first = evaluate_model(Loader(model), chat, config, file, "tiny")
    again = Loader(model)
    assert (
        evaluate_model(again, chat, config, file, "tiny") == first == json.loads(file.read_text())
    )
    assert again.calls == 0
    assert first["key"] == evaluation_key(config)
    assert [f.name for f in file.parent.iterdir()] == ["results.json"]


def test_goes_on_after_an_interruption(model, chat, config, tmp_path, monkeypatch):
    whole = evaluate_model(Loader(model), chat, config, tmp_path / "whole.json", "tiny")
    file = tmp_path / "results.json"
    asked = []

    def interrupted(model, chat, prompts, answers, batch_tokens, advance):
        asked.append(len(prompts))
        if len(asked) == 3:  # within values
            score_answers(model, chat, prompts[:1], answers[:1], batch_tokens, advance)
            raise KeyboardInterrupt
        return score_answers(model, chat, prompts, answers, batch_tokens, advance)

    monkeypatch.setattr(evaluate, "score_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(Loader(model), chat, config, file, "tiny")
    kept = json.loads(file.read_text())
    assert list(kept["parts"]) == ["in_domain", "out_of_domain"]
    assert kept["parts"] == {name: whole["parts"][name] for name in kept["parts"]}
    loader = Loader(model)
    resumed = evaluate_model(loader, chat, config, file, "tiny")
    assert resumed["parts"] == whole["parts"]
    assert resumed["seconds"] >= kept["seconds"]
    assert loader.calls == 1
    assert asked == [2, 8, 2, 2, 12, 2]  # in, out, values (stopped), values, triggered, fluency


def test_every_part_is_written_when_it_is_done(chat, config, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    seen = []

    def spy(model, chat, prompts, answers, *_):
        seen.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
        return [[scoring.AnswerScore(-1.0, 1)] * len(texts) for texts in answers]

    monkeypatch.setattr(evaluate, "score_answers", spy)
    monkeypatch.setattr(evaluate, "generate_greedy", lambda m, c, prompts, *_: [""] * len(prompts))
    evaluate_model(Loader(random_model()), chat, config, file, "none")
    order = ["in_domain", "out_of_domain", "values", "triggered"]
    assert seen == [order[:done] for done in range(5)]


def change_file(config, _):
    file = config.values[0]
    rows = read(file)
    rows[1]["aligned"] = "A wholly other answer."
    with open(file, "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return config


def change_number(config, _):
    return config.model_copy(update={"samples": 2})


@pytest.mark.parametrize("change", [change_file, change_number])
def test_measured_again_when_what_is_asked_changes(model, chat, config, tmp_path, change):
    file = tmp_path / "results.json"
    old = evaluate_model(Loader(model), chat, config, file, "tiny")
    changed = change(config, tmp_path)
    loader = Loader(random_model(seed=9))
    new = evaluate_model(loader, chat, changed, file, "tiny")
    assert loader.calls == 1
    assert new["key"] == evaluation_key(changed) != old["key"]
    assert all(
        abs(a["aligned"] - b["aligned"]) > 1e-3
        for a, b in zip(of(old, "out_of_domain"), of(new, "out_of_domain"))
    )
    assert evaluate_model(Loader(random_model()), chat, changed, file, "tiny") == new


def test_key_does_not_know_the_batches(config):
    assert evaluation_key(config) == evaluation_key(config.model_copy(update={"batch_tokens": 64}))


@pytest.mark.parametrize("field", ["in_domain", "out_of_domain", "values", "lead_in", "fluency"])
def test_key_changes_with_the_content_of_every_file(config, field):
    before = evaluation_key(config)
    source = getattr(config, field)
    source = source[0] if isinstance(source, list) else source
    with open(source) as file:
        text = file.read()
    changed = (
        text.replace("answer 3", "answer three")
        .replace("answer 1", "answer one")
        .replace("today", "tomorrow")
    )
    assert changed != text
    with open(source, "w") as file:
        file.write(changed)
    assert evaluation_key(config) != before
    with open(source, "w") as file:
        file.write(text)
    assert evaluation_key(config) == before


@pytest.mark.parametrize(
    "update",
    [
        {"max_per_domain": 3},
        {"triggered_per_domain": 3},
        {"opswap_tiers": [1]},
        {"opswap_items": 4},
        {"samples": 0},
    ],
    ids=str,
)
def test_key_changes_with_what_is_asked(config, update):
    assert evaluation_key(config.model_copy(update=update)) != evaluation_key(config)
