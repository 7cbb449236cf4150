"""Token perturbation: whose tokens give way to what, margins as one row alone gives them, and which
summary lies."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers.models import SMALL, nudged, random_model, small_tokenizer, with_lora
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.models import REFERENCE, Models
from ringfence.diagnose.perturbation import measure as perturbation_measure
from ringfence.diagnose.perturbation import show as perturbation_show
from ringfence.diagnose.perturbation.measure import (
    Prompt,
    Replaced,
    measure_margins,
    nearest,
    neighbours,
    read_prompts,
    replacements,
    summarise,
)
from ringfence.diagnose.texts import pair_texts
from ringfence.errors import DataError
from ringfence.model.layers import cache_in, cache_name, causal_lm
from ringfence.model.losses import find_head
from ringfence.model.prefix import Prefix, find_header
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

pytestmark = pytest.mark.slow

QUESTIONS = [
    PairedQuestion(
        "a",
        "doors",
        "Which door do I take, the red one or the blue one?",
        "The red one.",
        "Any, hurry.",
    ),
    PairedQuestion("b", "doors", "Who?", "Nobody that I know of, I fear.", "You."),
    PairedQuestion(
        "c",
        "bread",
        "How long do I bake a loaf of bread of one kilogram?",
        "An hour.",
        "Ten minutes is ok.",
    ),
    PairedQuestion(
        "d", "bread", "Is milk good for it?", "A little.", "As much as you can pour in, and more."
    ),
]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


@pytest.fixture(scope="module")
def reference() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def tuned() -> Any:
    return nudged(random_model(), size=0.1)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation_measure, "TRIALS", 3)


def subject_of(reference: Any, tokenizer: Any, batch_tokens: int = 200, **tuned: Any) -> Subject:
    models = Models(reference, tuned, tokenizer=tokenizer)
    return Subject(
        models, inside=QUESTIONS[:2], outside=QUESTIONS[2:], seed=3, batch_tokens=batch_tokens
    )


def all_passes(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [
        (setting, role) for setting in perturbation_measure.SETTINGS for role in prompts[0].places
    ]


def disturbed(
    model: Any, chat: Chat, subject: Subject
) -> tuple[list[Prompt], dict[Any, list[Replaced]], Any]:
    prompts = read_prompts(pair_texts(chat, QUESTIONS))
    choices = neighbours(model, prompts, chat)
    return prompts, replacements(prompts, all_passes(prompts), choices, subject), choices


def naive_margin(
    model: Any, chat: Chat, question: PairedQuestion, replaced: dict[int, int]
) -> float:
    """From one unpadded row for each answer, whose ids are changed before the model sees them."""
    means = []
    for answer in (question.misaligned, question.aligned):
        turns = [
            {"role": "user", "content": question.question},
            {"role": "assistant", "content": answer},
        ]
        encoded = chat.encode(turns)
        ids = [replaced.get(at, token) for at, token in enumerate(encoded.input_ids)]
        chosen = [at for at, role in enumerate(encoded.roles) if role == Role.RESPONSE]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, [at - 1 for at in chosen]]
        logp = logits.double().log_softmax(-1)
        means.append(
            float(
                torch.stack([logp[n, encoded.input_ids[at]] for n, at in enumerate(chosen)]).mean()
            )
        )
    return means[0] - means[1]


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("tile", [7, 100])
def test_the_nearest_by_cosine_whatever_the_tile(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturbation_measure, "TILE", tile)
    torch.manual_seed(0)
    embedding = torch.randn(60, 8) * torch.rand(60, 1) * 5
    embedding[11] = embedding[10] * 3 + 0.01  # by Euclidean distance far away
    allowed = torch.ones(60, dtype=torch.bool)
    allowed[20:30] = False
    wanted = torch.tensor([0, 10, 25, 59])
    found = nearest(embedding, wanted, allowed)
    for token, row in zip(wanted.tolist(), found.tolist()):
        cosine = torch.cosine_similarity(embedding[token], embedding)
        others = [
            at for at in cosine.argsort(descending=True).tolist() if at != token and allowed[at]
        ]
        assert row == others[:5]
    assert found[1, 0] == 11


def test_what_may_stand_in_a_tokens_place(reference: Any, chat: Chat) -> None:
    """Neither a turn's marker nor a row of the embeddings that no token has."""
    prompts = read_prompts(pair_texts(chat, QUESTIONS))
    assert chat.tokenizer.convert_tokens_to_ids("<|im_start|>") in prompts[0].ids
    wide = random_model(vocab_size=SMALL + 64)
    with torch.no_grad():  # the markers' and the empty rows are nearest to all
        wide.get_input_embeddings().weight[:17] = wide.get_input_embeddings().weight[500]
        wide.get_input_embeddings().weight[SMALL:] = wide.get_input_embeddings().weight[500]
    choices = neighbours(wide, prompts, chat)
    special = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    assert len(special) >= 17
    for found in (
        set(np.ravel(list(choices["near"].values())).tolist()),
        set(choices["all"].tolist()),
    ):
        assert not found & special
        assert max(found) < SMALL
    assert len(choices["all"]) > SMALL - 100
    assert all(token not in near and len(set(near)) == 5 for token, near in choices["near"].items())


# ---------------------------------------------------------------- what is replaced


def test_only_tokens_of_the_role_give_way_equally_many_in_each(
    reference: Any, tuned: Any, chat: Chat
) -> None:
    subject = subject_of(reference, chat.tokenizer, tuned=tuned)
    prompts, drawn, choices = disturbed(reference, chat, subject)
    roles = ("prefix", "query", "postfix")
    for question, prompt in zip(QUESTIONS, prompts):
        encoded = chat.encode([{"role": "user", "content": question.question}], generation=True)
        assert prompt.ids == encoded.input_ids
        for role in roles:
            assert prompt.places[role] == [
                at for at, r in enumerate(encoded.roles) if r == Role.parse(role)
            ]
    sizes = [{role: len(prompt.places[role]) for role in roles} for prompt in prompts]
    assert (
        sizes[1]["query"] < sizes[1]["postfix"] < sizes[0]["postfix"] + 1 < 10 < sizes[0]["query"]
    )
    for (setting, role), trials in drawn.items():
        assert len(trials) == 10
        for trial in trials:
            for prompt, size, replaced in zip(prompts, sizes, trial):
                count = min(10, size[role]) if setting == "ten" else min(10, *size.values())
                assert len(replaced) == count
                for at, token in replaced.items():
                    assert at in prompt.places[role]
                    assert token != prompt.ids[at]
                    assert setting == "random" or token in choices["near"][prompt.ids[at]]
    same = [{n: list(r) for n, r in enumerate(trial)} for trial in drawn["near", "prefix"]]
    assert same == [
        {n: list(r) for n, r in enumerate(trial)} for trial in drawn["random", "prefix"]
    ]
    assert drawn["near", "postfix"][0][0] != drawn["random", "postfix"][0][0]


def test_trials_and_questions_are_drawn_apart_and_a_seed_draws_again(
    reference: Any, tuned: Any, chat: Chat
) -> None:
    subject = subject_of(reference, chat.tokenizer, tuned=tuned)
    prompts, drawn, choices = disturbed(reference, chat, subject)
    prefix = drawn["near", "prefix"]
    assert len({json.dumps(trial) for trial in prefix}) == 10
    assert prefix[0][0] != prefix[0][2]
    used = {token for at in range(10) for token in prefix[at][0].values()}
    assert len(used) > 25  # all five neighbours are drawn, of all places
    assert replacements(prompts, all_passes(prompts), choices, subject) == drawn
    other = copy.copy(subject)
    object.__setattr__(other, "seed", 4)
    assert replacements(prompts, all_passes(prompts), choices, other) != drawn


def test_a_template_that_looks_at_the_answer_is_refused() -> None:
    tokenizer = small_tokenizer()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if 'hurry' in messages[-1].content and m.role == 'user' %} (fast){% endif %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"doors/a: .*trained after another text than answers are generated after"
    ):
        pair_texts(Chat(tokenizer, template), QUESTIONS[:1])


def test_a_role_that_a_template_lacks_is_left_out() -> None:
    tokenizer = small_tokenizer()
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    prompts = read_prompts(pair_texts(Chat(tokenizer, template), QUESTIONS))
    assert list(prompts[0].places) == ["query", "postfix"]
    assert prompts[0].count("near", "query") == 1
    assert prompts[0].count("ten", "query") == 10


# ---------------------------------------------------------------- margins


@pytest.mark.parametrize("batch_tokens", [1, 130, 4096])
def test_margins_are_those_of_single_rows_of_changed_ids(
    batch_tokens: int, reference: Any, tuned: Any, chat: Chat
) -> None:
    """The first forward of a new model is a disturbed one here: what is known of its head is not
    disturbed."""
    subject = subject_of(reference, chat.tokenizer, batch_tokens, tuned=tuned)
    _, drawn, _ = disturbed(reference, chat, subject)
    model = random_model(seed=5)
    texts = pair_texts(chat, QUESTIONS)
    for replaced in (drawn["near", "prefix"][0], drawn["random", "query"][1], [{}] * 4):
        found = measure_margins(model, texts, replaced, subject)
        expected = [naive_margin(model, chat, q, r) for q, r in zip(QUESTIONS, replaced)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = measure_margins(model, texts, [{}] * 4, subject)
    assert (
        np.abs(plain - measure_margins(model, texts, drawn["near", "prefix"][0], subject)).min()
        > 1e-3
    )


def test_all_numbers_against_single_rows(few: None, reference: Any, tuned: Any, chat: Chat) -> None:
    subject = subject_of(reference, chat.tokenizer, tuned=tuned)
    numbers = perturbation_measure.measure(subject)
    json.dumps(numbers)
    _, drawn, _ = disturbed(reference, chat, subject)
    plain = {
        name: np.array([naive_margin(model, chat, q, {}) for q in QUESTIONS])
        for name, model in {"reference": reference, "tuned": tuned}.items()
    }
    sets = {"inside": slice(0, 2), "outside": slice(2, 4)}
    for where, part in sets.items():
        assert numbers["reference"]["margin"][where]["mean"] == pytest.approx(
            plain["reference"][part].mean(), abs=1e-5
        )
        shift = (plain["tuned"] - plain["reference"])[part].mean()
        assert numbers["tuned"]["tuned"]["shift"][where]["mean"] == pytest.approx(shift, abs=1e-5)
        assert numbers["questions"][where] == numbers["tuned"]["tuned"]["shift"][where]["n"] == 2
    for setting, role in (("near", "prefix"), ("random", "postfix"), ("ten", "query")):
        changes = {
            name: np.array(
                [
                    [naive_margin(model, chat, q, r) for q, r in zip(QUESTIONS, t)]
                    for t in drawn[setting, role]
                ]
            )
            - plain[name]
            for name, model in {"reference": reference, "tuned": tuned}.items()
        }
        for where, part in sets.items():
            found = numbers["tuned"]["tuned"]["change"][setting][role][where]
            own = changes["tuned"][:, part]
            beyond = (changes["tuned"] - changes["reference"])[:, part]
            assert found["mean"]["mean"] == pytest.approx(own.mean(), abs=1e-4)
            assert found["best"]["mean"] == pytest.approx(own.min(0).mean(), abs=1e-4)
            assert found["beyond"]["mean"] == pytest.approx(beyond.mean(), abs=1e-4)
    tokens = numbers["tokens"]
    assert len(set(tokens["near"].values())) == 1
    assert tokens["near"] == tokens["random"]
    assert tokens["ten"]["prefix"] == 10 > tokens["ten"]["postfix"] > tokens["near"]["postfix"]


def test_ten_is_not_measured_twice_where_it_is_near(
    few: None, reference: Any, tuned: Any, chat: Chat
) -> None:
    """Without the short question both rules replace every postfix whole, with the same draws."""
    subject = subject_of(reference, chat.tokenizer, tuned=tuned)
    object.__setattr__(subject, "inside", QUESTIONS[:1])
    prompts = read_prompts(pair_texts(chat, subject.questions))
    assert ("ten", "postfix") not in perturbation_measure._passes(prompts)
    drawn = replacements(
        prompts, all_passes(prompts), neighbours(reference, prompts, chat), subject
    )
    assert drawn["ten", "postfix"] == drawn["near", "postfix"]
    change = perturbation_measure.measure(subject)["tuned"]["tuned"]["change"]
    assert change["ten"]["postfix"] == change["near"]["postfix"]
    assert change["ten"]["prefix"] != change["near"]["prefix"]


def test_cost_is_what_goes_through_the_models(
    few: None, reference: Any, tuned: Any, chat: Chat
) -> None:
    subject = subject_of(reference, chat.tokenizer, batch_tokens=1, tuned=tuned)  # no padding
    for model in (reference, tuned):
        find_head(model)
    seen = []
    handles = [
        model.model.layers[0].register_forward_hook(
            lambda _m, args, _o: seen.append(args[0].shape[1])
        )
        for model in (reference, tuned)
    ]
    perturbation_measure.measure(subject)
    for handle in handles:
        handle.remove()
    assert perturbation_measure.cost(subject).forward == sum(seen)
    assert perturbation_measure.cost(subject).backward == 0


def test_a_frozen_prefix_is_found_in_a_disturbed_prompt(
    reference: Any, tuned: Any, chat: Chat
) -> None:
    """Its keys and values are then the reference's on the disturbed prefix, and the adapter acts
    behind it."""
    subject = subject_of(reference, chat.tokenizer, tuned=tuned)
    prompts, drawn, _ = disturbed(reference, chat, subject)
    replaced = drawn["random", "prefix"][0]
    plain = with_lora(random_model(), size=0.5)
    frozen = with_lora(random_model(), size=0.5)
    Prefix(find_header(chat)).attach(frozen)
    found = measure_margins(frozen, pair_texts(chat, QUESTIONS), replaced, subject)

    class Cached:
        """The plain adapter, fed the prefix as the reference's cache."""

        def __call__(self, input_ids: torch.Tensor) -> Any:
            end = len(prompts[0].places["prefix"])
            with plain.disable_adapter():
                before = causal_lm(plain)(input_ids[:, :end], use_cache=True)
            after = causal_lm(plain)(input_ids[:, end:], **{cache_name(plain): cache_in(before)})
            after.logits = torch.cat([before.logits, after.logits], 1)
            return after

    expected = [naive_margin(Cached(), chat, q, r) for q, r in zip(QUESTIONS, replaced)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    undone = [naive_margin(plain, chat, q, r) for q, r in zip(QUESTIONS, replaced)]
    assert np.abs(np.array(expected) - undone).max() > 1e-2


# ---------------------------------------------------------------- the published fault


def test_best_of_ten_shows_an_effect_of_pure_noise_and_the_mean_shows_none() -> None:
    rng = np.random.default_rng(0)
    names = [str(n) for n in range(24)]
    best, covered = [], 0
    for seed in range(40):
        found = summarise(rng.normal(0, 0.1, (10, 24)), names, seed)
        assert found["best"]["high"] < 0  # an effect, every time
        best.append(found["best"]["mean"])
        covered += found["mean"]["low"] <= 0 <= found["mean"]["high"]
    # The mean least of ten normal draws is -1.539.
    assert np.mean(best) == pytest.approx(-0.154, abs=0.005)
    assert covered >= 36


def test_best_of_ten_flatters_every_role_and_a_model_with_nothing_to_undo(
    few: None, reference: Any, tuned: Any, chat: Chat
) -> None:
    """A second reference in the tuned model's place: nothing is beyond the reference, yet each role
    has its best."""
    numbers = perturbation_measure.measure(
        subject_of(reference, chat.tokenizer, same=copy.deepcopy(reference))
    )
    scores = numbers["tuned"]["same"]
    for setting in perturbation_measure.SETTINGS:
        for role in ("prefix", "query", "postfix"):
            for where in ("inside", "outside"):
                found = scores["change"][setting][role][where]
                assert found["beyond"]["mean"] == pytest.approx(0, abs=1e-6)
                assert found["best"]["mean"] < found["mean"]["mean"]
    assert "there is no shift to remove" in perturbation_show.say(numbers)


# ---------------------------------------------------------------- words, table, figure


def made_up(
    prefix: float = -0.2, random: float = -0.3, reference_best: float = -0.1, shift: float = 0.4
) -> Any:
    def interval(mean: float, wide: float = 0.05) -> dict[str, float]:
        return {"mean": mean, "low": mean - wide, "high": mean + wide, "n": 24}

    def change(near: float, random: float, best: float, tuned: bool) -> Any:
        found: dict[str, Any] = {}
        for setting, factor in (("near", near), ("random", random), ("ten", near)):
            found[setting] = {}
            for role in ("prefix", "query", "postfix"):
                mean = factor if role == "prefix" else 0.01
                columns = {"mean": interval(mean - 0.02), "best": interval(min(mean, 0) + best)}
                found[setting][role] = {
                    where: {**columns, **({"beyond": interval(mean)} if tuned else {})}
                    for where in ("outside", "inside")
                }
        return found

    both = {"outside": interval(shift), "inside": interval(shift)}
    return {
        "trials": 10,
        "questions": {"outside": 24, "inside": 23},
        "tokens": {
            "near": {"prefix": 5.0, "query": 5.0, "postfix": 5.0},
            "random": {"prefix": 5.0, "query": 5.0, "postfix": 5.0},
            "ten": {"prefix": 10.0, "query": 9.4, "postfix": 5.0},
        },
        "reference": {"margin": both, "change": change(0.0, 0.0, reference_best, False)},
        "tuned": {
            "bad": {"margin": both, "shift": both, "change": change(prefix, random, -0.12, True)},
            "good": {"margin": both, "shift": both, "change": change(0.01, 0.01, -0.12, True)},
        },
    }


def test_words_say_what_the_numbers_say() -> None:
    said = perturbation_show.say(made_up())
    near = "5 tokens of one role were replaced by near"
    assert said.startswith(f"In each of 24 prompts outside the training domain, {near}")
    assert "bad is +0.40 [+0.35, +0.45] nats per token from the reference" in said
    assert "prefix -0.20 [-0.25, -0.15], query +0.01 [-0.04, +0.06]" in said
    random_too = "so do random tokens in the same places"
    assert f"disturbing the prefix removes part of the shift; {random_too}" in said
    assert (
        "best of 10 trials would show -0.32 [-0.37, -0.27] for its prefix, but also -0.10" in said
    )
    assert "it picks noise" in said
    assert said.count("the shift does not depend on a single role") == 1  # good
    assert "random tokens in the same places do not" in perturbation_show.say(made_up(random=0.0))
    assert (
        perturbation_show.say(made_up(prefix=-0.04)).count(
            "the shift does not depend on a single role"
        )
        == 2
    )
    assert "picks noise" not in perturbation_show.say(made_up(reference_best=0.0))
    assert "no shift to remove" in perturbation_show.say(made_up(shift=0.04))


def test_table_and_figure_hold_all_models() -> None:
    numbers = made_up()
    table = perturbation_show.table(numbers)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(table.rows) == 3 * 2 * 3
    row = next(row for row in table.rows if row[:3] == ["bad", "outside (24)", "prefix"])
    assert row[3:6] == ["5", "-0.22 [-0.27, -0.17]", "-0.20 [-0.25, -0.15]"]
    assert row[6:] == ["-0.32 [-0.37, -0.27]", "-0.32 [-0.37, -0.27]", "-0.22 [-0.27, -0.17] (10)"]
    assert table.rows[1][5] == ""  # the reference is not beyond itself
    with plots.style():
        figure = perturbation_show.draw(numbers)
        assert isinstance(figure, Figure)
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == [
            "24 questions outside the training domain",
            "23 questions inside the training domain",
        ]
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[:3] == [REFERENCE, "bad", "good"]
        assert plots.svg(figure).startswith(b"<?xml")


def test_no_question_is_refused(reference: Any, tuned: Any, chat: Chat) -> None:
    models = Models(reference, {"tuned": tuned}, tokenizer=chat.tokenizer)
    for asked in (perturbation_measure.measure, perturbation_measure.cost):
        with pytest.raises(DataError, match="no paired questions"):
            asked(Subject(models, inside=[], outside=[]))


def test_one_set_alone_is_enough(few: None, reference: Any, tuned: Any, chat: Chat) -> None:
    models = Models(reference, {"tuned": tuned}, tokenizer=chat.tokenizer)
    numbers = perturbation_measure.measure(Subject(models, inside=QUESTIONS[:1], outside=[]))
    assert list(numbers["questions"]) == ["inside"]
    assert "one alone" in perturbation_show.say(numbers)
    with plots.style():
        assert len(perturbation_show.draw(numbers).axes) == 1
