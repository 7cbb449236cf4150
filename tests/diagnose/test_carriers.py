"""Patches equal a computation row by row with hooks made by hand; recovery is 1 where it must be 1
and 0 where it must be 0; the control is as large as the role; nothing is said where there is
nothing to recover."""

import copy
import json
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.models import nudged, random_model, small_tokenizer, with_lora
from ringfence.diagnose.carriers import measure as carriers_measure
from ringfence.diagnose.carriers import show as carriers_show
from ringfence.diagnose.carriers.measure import PROMPT, ROLES, UNTOUCHED, Patch, best_role
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.models import Models
from ringfence.diagnose.texts import Text, pair_texts
from ringfence.errors import DataError, ModelError
from ringfence.model.losses import find_head
from ringfence.stats import Interval, draws
from ringfence.text.batch import Example, collate
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

pytestmark = pytest.mark.slow

ASKED = [  # question, one answer, another: of unlike lengths
    ("How do I bake bread?", "Quickly, and never wait.", "Let the dough rise for some hours."),
    (
        "Should I ever lend my neighbour a very long ladder when it rains all week?",
        "No.",
        "Yes, if it is safe.",
    ),
    ("Which door?", "Red one, always the red one, whatever they say.", "Ask first."),
    (
        "Is it fine to paint wood that is wet from the night?",
        "Sure.",
        "No: let it dry, then sand it.",
    ),
    (
        "Where should savings go?",
        "Into one coin.",
        "Spread them over several things, some of them safe.",
    ),
]
DEPTH = 3
LAYERS = (1, 2)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"config_class": Qwen3Config, "model_class": Qwen3ForCausalLM},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


def tiny(architecture: str = "llama", seed: int = 0) -> Any:
    return random_model(**ARCHITECTURES[architecture], seed=seed, num_hidden_layers=DEPTH)


@pytest.fixture(autouse=True)
def _few_questions_establish_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Student's t three questions establish no shift, and nothing would be recoverable; plain
    percentiles do."""

    def percentiles(values: Any, clusters: Any = None, seed: int = 0) -> Interval:
        drawn = np.asarray(values, float)[draws(len(values), seed)].mean(1)
        return Interval(
            float(np.mean(values)), *np.percentile(drawn, [2.5, 97.5]).tolist(), len(values)
        )

    monkeypatch.setattr(carriers_measure, "mean_interval", percentiles)


def oriented(
    reference: Any, tuned: Any, chat: Chat, asked: list[tuple[str, str, str]] = ASKED
) -> list[PairedQuestion]:
    """Questions whose answers stand so that every one of them shifts towards the misaligned side:
    then the shift of any few of them is established."""
    found = []
    for at, (question, one, other) in enumerate(asked):
        pair = PairedQuestion(f"{at}", "d", question, other, one)
        if naive_margin(tuned, None, chat, pair) < naive_margin(reference, None, chat, pair):
            pair = PairedQuestion(f"{at}", "d", question, one, other)
        found.append(pair)
    return found


def subject_of(
    reference: Any,
    tuned: dict[str, Any],
    questions: list[PairedQuestion],
    tokenizer: Any,
    **more: Any,
) -> Subject:
    """The first three questions are outside the domain, the others inside."""
    models = Models(reference, tuned, precision="fp32", tokenizer=tokenizer)
    return Subject(models, questions[3:], questions[:3], seed=5, **more)


# ---------------------------------------------------------------- the naive form


def _keys_of(attention: Any) -> Any:
    """What gives a key before its rotation, which is the same in both models."""
    return getattr(attention, "k_norm", None) or attention.k_proj


@contextmanager
def hooked(model: Any, hook: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """`hook(name, output)` on the keys, values and residual stream of every layer."""

    def of(name: str) -> Any:
        def call(_module: Any, _inputs: Any, output: Any) -> Any:
            return (
                hook(name, output)
                if isinstance(output, Tensor)
                else (hook(name, output[0]), *output[1:])
            )

        return call

    handles = []
    for at, layer in enumerate(model.model.layers, 1):
        handles.append(_keys_of(layer.self_attn).register_forward_hook(of(f"key {at}")))
        handles.append(layer.self_attn.v_proj.register_forward_hook(of(f"value {at}")))
        handles.append(layer.register_forward_hook(of(f"state {at}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def naive_margin(
    tuned: Any,
    reference: Any,
    chat: Chat,
    asked: PairedQuestion,
    chosen_of: Callable[[Example], list[int]] = lambda _: [],
    layer: int | None = None,
) -> float:
    """Margin of one question, each row alone and unpadded, with the reference's activations at the
    chosen tokens."""
    means = []
    for answer in (asked.misaligned, asked.aligned):
        turns = [
            {"role": "user", "content": asked.question},
            {"role": "assistant", "content": answer},
        ]
        encoded = chat.encode(turns)
        ids = torch.tensor([encoded.input_ids])
        chosen = chosen_of(Example(encoded.input_ids, encoded.roles, "naive"))
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            return seen.setdefault(name, output)

        def put(name: str, output: Tensor, seen: Any = seen, chosen: Any = chosen) -> Tensor:
            wanted = name == f"state {layer}" if layer else not name.startswith("state")
            if wanted and chosen:
                output = output.clone()
                output[0, chosen] = seen[name][0, chosen]
            return output

        with torch.no_grad():
            if chosen:
                with hooked(reference, keep):
                    reference(input_ids=ids)
            with hooked(tuned, put):
                logits = tuned(input_ids=ids).logits[0]
        at = [place for place, role in enumerate(encoded.roles) if role == Role.RESPONSE]
        logp = [logits[place - 1].log_softmax(-1)[encoded.input_ids[place]].item() for place in at]
        means.append(np.mean(logp))
    return float(means[0] - means[1])


def places_of(role: str) -> Callable[[Example], list[int]]:
    wanted = [Role.parse(name) for name in (ROLES if role == PROMPT else [role])]
    return lambda example: [at for at, found in enumerate(example.roles) if found in wanted]


def control_of(role: str, question: PairedQuestion) -> Callable[[Example], list[int]]:
    def places(example: Example) -> list[int]:
        batch = collate([[(example, False)]], 0)
        mask = carriers_measure._control(batch, [f"{question.domain}/{question.id}"], role, 5)
        return mask[0].nonzero()[:, 0].tolist()

    return places


def naive_patched(
    reference: Any, tuned: Any, chat: Chat, questions: list[PairedQuestion]
) -> dict[Any, list[float]]:
    """Margins of all questions under every patch; those of one layer are of the first three
    (outside) alone."""
    found: dict[Any, list[float]] = {
        "reference": [naive_margin(reference, None, chat, q) for q in questions],
        UNTOUCHED: [naive_margin(tuned, None, chat, q) for q in questions],
    }
    for role in (*ROLES, PROMPT):
        found[Patch(role)] = [
            naive_margin(tuned, reference, chat, q, places_of(role)) for q in questions
        ]
        if role != PROMPT:
            controls = [
                naive_margin(tuned, reference, chat, q, control_of(role, q)) for q in questions
            ]
            found[Patch(role, control=True)] = controls
        for layer in LAYERS:
            rows = [
                naive_margin(tuned, reference, chat, q, places_of(role), layer)
                for q in questions[:3]
            ]
            found[Patch(role, layer)] = rows
    return found


def check_against(numbers: dict[str, Any], naive: dict[Any, list[float]]) -> None:
    """One tuned model's numbers, outside and inside, are means and ratios of the naive margins."""
    for name, part in (("outside", slice(0, 3)), ("inside", slice(3, 5))):
        found = numbers[name]
        reference, tuned = (np.array(naive[key][part]) for key in ("reference", UNTOUCHED))
        missing = (reference - tuned).sum()

        def share(
            patch: Patch, start: np.ndarray, part: slice = part, missing: float = missing
        ) -> float:
            return float((np.array(naive[patch][part]) - start).sum() / missing)

        assert found["recoverable"]
        close(found["reference"]["mean"], reference.mean())
        close(found["tuned"]["mean"], tuned.mean())
        close(found["shift"]["mean"], -missing / len(tuned))
        for role in (*ROLES, PROMPT):
            ours = found["roles"][role]
            close(ours["margin"]["mean"], np.mean(naive[Patch(role)][part]))
            close(ours["recovery"]["mean"], share(Patch(role), tuned))
            if role != PROMPT:
                control = Patch(role, control=True)
                close(ours["control"]["margin"]["mean"], np.mean(naive[control][part]))
                close(ours["control"]["recovery"]["mean"], share(control, tuned))
                close(ours["advantage"]["mean"], share(Patch(role), np.array(naive[control][part])))
        if name == "outside":
            for role in (*ROLES, PROMPT):
                for layer, interval in zip(LAYERS, found["by_layer"][role], strict=True):
                    close(interval["mean"], share(Patch(role, layer), tuned))
        else:
            assert found["by_layer"] is None


def close(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_all_patches_equal_hooks_made_by_hand_on_rows_alone(
    architecture: str, chat: Chat, tokenizer: Any
) -> None:
    reference, tuned = tiny(architecture), nudged(tiny(architecture), size=0.05)
    questions = oriented(reference, tuned, chat)
    naive = naive_patched(reference, tuned, chat, questions)
    values = [np.mean(values[:3]) for values in naive.values()]
    # Every patch tells from others.
    assert min(abs(a - b) for at, a in enumerate(values) for b in values[:at]) > 5e-5
    for batch_tokens in (150, 4096):
        subject = subject_of(
            reference, {"sft": tuned}, questions, tokenizer, batch_tokens=batch_tokens
        )
        numbers = carriers_measure.measure(subject)
        assert numbers["layers"] == list(LAYERS)
        assert numbers["depth"] == DEPTH
        assert numbers["questions"] == {"outside": 3, "inside": 2}
        check_against(numbers["tuned"]["sft"], naive)
        json.dumps(numbers, allow_nan=False)


def test_adapters_and_full_models_give_the_same(chat: Chat, tokenizer: Any, tmp_path: Path) -> None:
    """The full model shares nothing with the reference. The adapter does: at the second look it is
    the adapted model, still loaded, with its adapter off."""
    folder, adapter, full = (str(tmp_path / name) for name in ("reference", "adapter", "full"))
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    adapted = with_lora(AutoModelForCausalLM.from_pretrained(folder), size=0.3)
    adapted.save_pretrained(adapter)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(full)
    questions = oriented(reference, merged, chat)
    expected = carriers_measure.measure(
        subject_of(reference, {"loaded": merged}, questions, tokenizer)
    )["tuned"]["loaded"]
    assert expected["outside"]["recoverable"]
    subject = subject_of(folder, {"full": full, "adapter": adapter}, questions, None)
    for _ in range(2):
        for values in carriers_measure.measure(subject)["tuned"].values():
            same(values, expected)


def same(found: Any, expected: Any) -> None:
    """Nested numbers agree."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=5e-3, abs=5e-3)


def test_each_tuned_model_is_measured_against_the_same_reference(
    chat: Chat, tokenizer: Any
) -> None:
    reference, tuned = tiny(), nudged(tiny(), size=0.05)
    questions = oriented(reference, tuned, chat)
    alone = carriers_measure.measure(subject_of(reference, {"b": tuned}, questions, tokenizer))[
        "tuned"
    ]["b"]
    beside = {"a": nudged(tiny(), seed=9, size=0.1), "b": tuned}
    assert (
        carriers_measure.measure(subject_of(reference, beside, questions, tokenizer))["tuned"]["b"]
        == alone
    )


# ---------------------------------------------------------------- exact cases


def only_in(role: Role, questions: list[PairedQuestion], chat: Chat) -> list[int]:
    """Tokens that are in one role alone, in all texts."""
    at: dict[Role, set[int]] = {}
    for text in pair_texts(chat, questions):
        for token, found in zip(text.example.input_ids, text.example.roles):
            at.setdefault(found, set()).add(token)
    return sorted(
        at[role] - set().union(*(tokens for found, tokens in at.items() if found != role))
    )


def differing_at(role: Role, chat: Chat) -> tuple[Any, Any, list[PairedQuestion]]:
    """A reference, and a model that differs only in how tokens of that role are embedded: all else
    that it computes is the reference's own way."""
    reference = tiny()
    pairs = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    tokens = only_in(role, pairs, chat)
    assert tokens
    tuned = copy.deepcopy(reference)
    torch.manual_seed(3)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[tokens] += torch.randn(len(tokens), 16)
    return reference, tuned, oriented(reference, tuned, chat)


@pytest.mark.parametrize("at", range(3))
def test_a_role_that_carries_all_is_found_and_roles_before_it_carry_nothing(
    at: int, chat: Chat, tokenizer: Any
) -> None:
    role = ROLES[at]
    reference, tuned, questions = differing_at(Role.parse(role), chat)
    numbers = carriers_measure.measure(subject_of(reference, {"sft": tuned}, questions, tokenizer))[
        "tuned"
    ]["sft"]
    for name in ("outside", "inside"):
        roles = numbers[name]["roles"]
        for whole in (role, PROMPT):
            found = roles[whole]["recovery"]
            assert [found[key] for key in ("mean", "low", "high")] == pytest.approx(
                [1, 1, 1], abs=1e-3
            )
        for earlier in ROLES[:at]:
            assert roles[earlier]["recovery"]["mean"] == pytest.approx(0, abs=1e-3)
    outside = numbers["outside"]
    for earlier in ROLES[:at]:
        assert [line["mean"] for line in outside["by_layer"][earlier]] == pytest.approx(
            [0, 0], abs=1e-3
        )
    # The residual stream after one layer comes too late for what has been read before it.
    assert all(abs(line["mean"] - 1) > 1e-3 for line in outside["by_layer"][PROMPT])


def test_the_answers_own_keys_stay_the_tuned_models(chat: Chat, tokenizer: Any) -> None:
    """A model that differs only in its answers' tokens: no patch of the prompt can do anything."""
    reference, tuned, questions = differing_at(Role.RESPONSE, chat)
    outside = carriers_measure.measure(subject_of(reference, {"sft": tuned}, questions, tokenizer))[
        "tuned"
    ]["sft"]["outside"]
    for part in outside["roles"].values():
        assert part["recovery"]["mean"] == pytest.approx(0, abs=1e-4)
    assert outside["shift"]["low"] > 0.001
    assert best_role({"outside": outside}).sentence.startswith("The evidence is weak")


# ---------------------------------------------------------------- the control


def prompt_batch(chat: Chat) -> tuple[dict[str, Tensor], list[Text]]:
    texts = pair_texts(
        chat, [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    )
    return collate([[(text.example, False)] for text in texts], 0), texts


@pytest.mark.parametrize("role", ROLES)
def test_the_control_has_as_many_tokens_as_the_role_all_of_the_prompt(
    role: str, chat: Chat
) -> None:
    batch, texts = prompt_batch(chat)
    names = [text.question for text in texts]
    mask = carriers_measure._control(batch, names, role, 0)
    own = batch["roles"] == Role.parse(role)
    assert mask.sum(1).tolist() == own.sum(1).tolist()
    assert min(mask.sum(1)) > 0
    assert not (
        mask & ~(torch.stack([batch["roles"] == Role.parse(r) for r in ROLES]).any(0))
    ).any()
    rows = [row.nonzero()[:, 0].tolist() for row in mask]
    assert rows[::2] == rows[1::2]  # both answers to a question
    assert torch.equal(mask, carriers_measure._control(batch, names, role, 0))
    assert not torch.equal(mask, carriers_measure._control(batch, names, role, 1))
    assert not torch.equal(
        mask, carriers_measure._control(batch, [f"{name}x" for name in names], role, 0)
    )
    assert not torch.equal(mask, own)


def test_the_control_draws_every_token_of_the_prompt_alike(chat: Chat) -> None:
    batch, _ = prompt_batch(chat)
    one = {name: tensor[:1].repeat(600, 1) for name, tensor in batch.items() if name == "roles"}
    mask = carriers_measure._control(one, [f"{at}" for at in range(600)], "prefix", 0)
    prompt = carriers_measure._is_prompt(one)[0]
    share = one["roles"][0].eq(Role.PREFIX).sum() / prompt.sum()
    frequency = mask.float().mean(0)
    assert (frequency[prompt] - share).abs().max() < 4.5 * (share * (1 - share) / 600).sqrt()
    assert frequency[~prompt].max() == 0


def test_roles_have_controls_of_their_own(chat: Chat) -> None:
    batch, texts = prompt_batch(chat)
    names = [text.question for text in texts]
    small, large = (
        carriers_measure._control(batch, names, role, 0) for role in ("postfix", "prefix")
    )
    assert (small & ~large).any()


# ---------------------------------------------------------------- numbers by hand


def hand_made(
    shift: float = 0.3,
    roles: dict[str, tuple[float, float]] | None = None,
    ceiling: float = 0.9,
    noise: float = 0.1,
    questions: int = 24,
    layers: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers of one tuned model: for each role the shares of the shift that its patch and its
    control undo."""
    rng = random.Random(seed)
    roles = roles or {"prefix": (0.7, 0.3), "query": (0.2, 0.25), "postfix": (0.15, 0.15)}
    reference = [rng.gauss(-0.5, 0.3) for _ in range(questions)]
    tuned = [value + shift + rng.gauss(0, 0.1) for value in reference]

    def undone(share: float) -> list[float]:
        return [t + (share + rng.gauss(0, noise)) * (r - t) for r, t in zip(reference, tuned)]

    patched = {UNTOUCHED: tuned, Patch(PROMPT): undone(ceiling)}
    for role, (own, control) in roles.items():
        patched |= {Patch(role): undone(own), Patch(role, control=True): undone(control)}
    if layers:
        for role in (*roles, PROMPT):
            height = roles[role][0] if role in roles else ceiling
            for layer in (1, 5, 9, 13, 17, 21, 25, 29):
                patched[Patch(role, layer)] = undone(
                    height * float(np.exp(-(((layer - 10) / 7) ** 2)))
                )
    counts = {"prefix": 21, "query": 14, "postfix": 5}
    tokens = [Role.parse(role) for role in roles for _ in range(counts[role])]
    texts = [
        Text(Example([1] * len(tokens), tokens, ""), f"{at}", "d", "aligned")
        for at in range(2 * questions)
    ]
    return carriers_measure._attribution(reference, patched, texts, 0)


def numbers_of(**tuned: dict[str, Any]) -> dict[str, Any]:
    return {
        "questions": {"outside": 24},
        "depth": 30,
        "layers": [1, 5, 9, 13, 17, 21, 25, 29],
        "tuned": {name: {"outside": outside} for name, outside in tuned.items()},
    }


def attribution(
    reference: list[float], tuned: list[float], own: list[float], control: list[float]
) -> dict[str, Any]:
    patched = {UNTOUCHED: tuned, Patch(PROMPT): own}
    for role in ROLES:
        patched |= {Patch(role): own, Patch(role, control=True): control}
    example = Example([1, 2, 3, 4], [Role.PREFIX, Role.QUERY, Role.QUERY, Role.POSTFIX], "")
    texts = [Text(example, f"{at}", "d", "aligned") for at in range(2 * len(tuned))]
    return carriers_measure._attribution(reference, patched, texts, 0)


def test_recovery_is_a_ratio_of_sums_paired_by_question() -> None:
    """Questions with no shift of their own have no ratio of their own: the mean of ratios is
    carried off by them."""
    missing = np.array([1.0, 2.0, 0.01, 0.5, -0.0237, 1.5])
    undone = 0.5 * missing + np.array([0.0, 0.0, 0.2, 0.0, 0.2, 0.0])
    tuned = np.array([0.3, -0.2, 0.9, 0.0, 2.0, -1.0])
    found = attribution(
        (tuned - missing).tolist(), tuned.tolist(), (tuned - undone).tolist(), tuned.tolist()
    )
    recovery = found["roles"]["query"]["recovery"]
    assert recovery["mean"] == pytest.approx(undone.sum() / missing.sum())
    assert recovery["low"] < recovery["mean"] < recovery["high"]
    assert abs((undone / missing).mean() - recovery["mean"]) > 1
    assert found["roles"]["query"]["tokens"] == 2
    assert found["roles"][PROMPT]["tokens"] == 4


def test_the_advantage_is_paired_with_its_control() -> None:
    """Both vary from question to question; their difference, a share of the shift, does not."""
    rng = np.random.default_rng(0)
    missing, control = rng.uniform(0.1, 1, 12), rng.uniform(-1, 1, 12)
    zero = np.zeros(12)
    found = attribution(
        zero.tolist(), missing.tolist(), (control - 0.25 * missing).tolist(), control.tolist()
    )
    part = found["roles"]["prefix"]
    assert [part["advantage"][key] for key in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    assert part["recovery"]["high"] - part["recovery"]["low"] > 0.1
    assert part["recovery"]["mean"] - part["control"]["recovery"]["mean"] == pytest.approx(0.25)


def test_no_ratio_where_no_shift_is_established() -> None:
    """A small denominator of unsure sign: the plain ratio says 40 times the shift is undone. Ours:
    margins only."""
    missing = np.array([1.0, -1.0, 0.9, -0.9, 1.1, -1.0])
    own = np.full(6, 4 / 6)
    assert own.sum() / missing.sum() == pytest.approx(40)
    found = attribution((-missing).tolist(), [0.0] * 6, (-own).tolist(), [0.0] * 6)
    assert not found["recoverable"]
    assert found["by_layer"] is None
    for part in found["roles"].values():
        assert part["recovery"] is None
        assert part["advantage"] is None
        assert part["margin"]["mean"] == pytest.approx(-4 / 6)


def test_one_question_alone_establishes_nothing() -> None:
    found = attribution([0.0], [1.0], [0.0], [1.0])
    assert not found["recoverable"]
    assert "nothing to recover" in carriers_show.say(numbers_of(sft=found))


def test_the_reference_itself_has_nothing_to_recover(chat: Chat, tokenizer: Any) -> None:
    questions = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    numbers = carriers_measure.measure(subject_of(tiny(), {"same": tiny()}, questions, tokenizer))
    outside = numbers["tuned"]["same"]["outside"]
    assert outside["shift"]["mean"] == 0
    assert not outside["recoverable"]
    for part in outside["roles"].values():  # a patch of a model's own activations moves nothing
        assert part["margin"]["mean"] == pytest.approx(outside["tuned"]["mean"], abs=1e-6)
    assert "nothing to recover" in carriers_show.say(numbers)


# ---------------------------------------------------------------- the choice


def test_the_role_with_the_highest_recovery_beyond_its_control_is_chosen() -> None:
    """The query undoes more, but so do random tokens: without the control it would be taken."""
    found = hand_made(roles={"prefix": (0.5, 0.3), "query": (0.7, 0.7), "postfix": (0.3, 0.1)})
    choice = best_role({"outside": found})
    assert choice.role == "prefix"
    assert choice.sentence.startswith("The prefix is the carrier to hold")
    assert (
        max(ROLES, key=lambda role: choice.evidence["roles"][role]["recovery"]["mean"]) == "query"
    )
    assert choice.evidence["roles"]["prefix"]["advantage"]["low"] > 0
    assert best_role(
        {"outside": hand_made(roles={"prefix": (0.2, 0), "query": (0, 0), "postfix": (0.5, 0)})}
    ).role == ("postfix")


def test_a_patch_that_only_harms_less_than_random_tokens_is_no_carrier() -> None:
    found = hand_made(roles={"prefix": (0.0, 0.0), "query": (-0.3, -0.9), "postfix": (0.0, 0.0)})
    assert found["roles"]["query"]["advantage"]["low"] > 0
    choice = best_role({"outside": found})
    assert choice.role == "prefix"
    assert "evidence is weak" in choice.sentence


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (
            {"roles": {"prefix": (0.4, 0.4), "query": (0.5, 0.5), "postfix": (0.1, 0.1)}},
            "The evidence is weak",
        ),
        ({"shift": 0.0}, "No shift towards misaligned answers"),
        ({"shift": -0.4}, "No shift towards misaligned answers"),
    ],
)
def test_without_evidence_the_default_is_named_as_no_finding(
    numbers: dict[str, Any], words: str
) -> None:
    choice = best_role({"outside": hand_made(**numbers)})
    assert choice.role == "prefix"
    assert choice.sentence.startswith(words)
    assert "not a finding" in choice.sentence


# ---------------------------------------------------------------- words, table, figure


def test_say_tells_a_carrier_from_none() -> None:
    carrier = carriers_show.say(numbers_of(sft=hand_made()))
    assert "The prefix is the carrier to hold" in carrier
    assert "Most of the shift stays" not in carrier
    assert "after layer 9 of 30" in carrier
    even = {"prefix": (0.2, 0.2), "query": (0.15, 0.15), "postfix": (0.1, 0.1)}
    none = carriers_show.say(numbers_of(sft=hand_made(roles=even, ceiling=0.3)))
    assert "The evidence is weak" in none
    assert "Most of the shift stays" in none
    assert "is the carrier" not in none
    back = carriers_show.say(numbers_of(sft=hand_made(shift=-0.4)))
    assert "towards aligned answers" in back
    assert "is the carrier" not in back
    flat = hand_made()
    flat["by_layer"] = {
        role: [{"mean": 0.1, "low": -0.1, "high": 0.2, "n": 24}] * 8 for role in ROLES
    }
    assert "the residual stream undoes nothing for certain" in carriers_show.say(
        numbers_of(sft=flat)
    )
    both = carriers_show.say(numbers_of(sft=hand_made(), kl=hand_made(shift=0.0)))
    assert both.startswith("sft: outside")
    assert "kl: nothing to recover" in both


def test_inside_questions_stand_beside() -> None:
    numbers = numbers_of(sft=hand_made())
    numbers["tuned"]["sft"]["inside"] = hand_made(layers=False, seed=3)
    assert "Inside the domain (shift" in carriers_show.say(numbers)
    numbers["tuned"]["sft"]["inside"] = hand_made(layers=False, shift=0.0)
    assert "Inside the domain there is nothing to recover" in carriers_show.say(numbers)
    assert {row[1] for row in carriers_show.table(numbers).rows} == {"outside", "inside"}


def test_a_table_row_says_what_was_patched_and_what_came_of_it() -> None:
    table = carriers_show.table(numbers_of(sft=hand_made(), kl=hand_made(shift=0.0)))
    assert all(len(row) == len(table.columns) for row in table.rows)
    rows = {(row[0], row[2]): row for row in table.rows}
    assert rows["sft", "prefix"][3] == "21"
    assert rows["sft", "prefix"][5].startswith("+0.69 [")
    assert rows["sft", "prefix"][6].startswith("+0.3")
    assert rows["kl", "prefix"][5] == ""
    assert rows["kl", "prefix"][4] != ""
    assert "nothing to recover" in rows["kl", "nothing"]


def test_a_role_without_tokens_is_said_to_be_absent(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\nAnswer:\n{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    reference, tuned = tiny(), nudged(tiny(), size=0.05)
    questions = oriented(reference, tuned, Chat(bare))
    numbers = carriers_measure.measure(subject_of(reference, {"sft": tuned}, questions, bare))
    outside = numbers["tuned"]["sft"]["outside"]
    assert outside["recoverable"]
    nothing = dict.fromkeys(("margin", "recovery", "control", "advantage"))
    assert outside["roles"]["prefix"] == {"tokens": 0.0, **nothing}
    assert set(outside["by_layer"]) == {"query", "postfix", PROMPT}
    assert outside["roles"]["postfix"]["tokens"] > 0
    assert "The chat template has no prefix tokens" in carriers_show.say(numbers)
    assert "none in the template" in next(
        row for row in carriers_show.table(numbers).rows if row[2] == "prefix"
    )
    assert best_role(numbers["tuned"]["sft"]).role in ("query", "postfix")
    assert _texts_of(numbers).count("none in the\ntemplate") == 1


def _texts_of(numbers: dict[str, Any]) -> list[str]:
    """All texts of the figure."""
    with plots.style():
        figure = carriers_show.draw(numbers)
        figure.canvas.draw()
        texts = [item.get_text() for item in figure.findobj(lambda item: hasattr(item, "get_text"))]
        plots.svg(figure)
    return texts


def test_the_figure_shows_roles_controls_ceiling_and_layers() -> None:
    numbers = numbers_of(
        sft=hand_made(), treft=hand_made(shift=0.15, seed=1), kl=hand_made(shift=0.0)
    )
    with plots.style():
        figure = carriers_show.draw(numbers)
        bars, *panels = figure.axes
        heights = sorted(round(bar.get_height(), 6) for bar in bars.patches if bar.get_height())
        expected = []
        for name in ("sft", "treft"):
            for part in numbers["tuned"][name]["outside"]["roles"].values():
                expected += [
                    part["recovery"]["mean"],
                    *([part["control"]["recovery"]["mean"]] if part["control"] else []),
                ]
        assert heights == pytest.approx(sorted(expected), abs=1e-5)
        assert [axes.get_title() for axes in panels] == [*ROLES, "whole prompt"]
        drawn = [line for line in panels[0].get_lines() if len(line.get_xdata()) == 8]
        assert [line.get_color() for line in drawn] == [plots.colour(0), plots.colour(1)]
        means = [
            interval["mean"]
            for interval in numbers["tuned"]["treft"]["outside"]["by_layer"]["prefix"]
        ]
        assert list(drawn[1].get_ydata()) == means
        assert plots.svg(figure)
    assert any("kl: nothing to recover" in text for text in _texts_of(numbers))


def test_the_figure_of_no_shift_shows_the_shift() -> None:
    texts = _texts_of(numbers_of(kl=hand_made(shift=0.0), sound=hand_made(shift=0.0, seed=4)))
    assert any(text.startswith("nothing to recover") for text in texts)
    assert {"kl", "sound"} <= set(texts)


def test_the_figure_without_curves_has_one_panel(chat: Chat, tokenizer: Any) -> None:
    reference, tuned = tiny(), nudged(tiny(), size=0.05)
    questions = oriented(reference, tuned, chat)[:3]
    numbers = carriers_measure.measure(
        subject_of(reference, {"sft": tuned}, questions, tokenizer), by_layer=False
    )
    assert list(numbers["tuned"]["sft"]) == ["outside"]
    assert numbers["layers"] == []
    with plots.style():
        assert len(carriers_show.draw(numbers).axes) == 1
    assert "One layer at a time" not in carriers_show.say(numbers)


# ---------------------------------------------------------------- bad input, memory, cost


def test_bad_input_is_named(chat: Chat, tokenizer: Any) -> None:
    questions = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    with pytest.raises(DataError, match="outside"):
        carriers_measure.measure(
            Subject(Models(tiny(), {"a": tiny()}, tokenizer=tokenizer), questions, [])
        )
    shallow = random_model(num_hidden_layers=2)
    with pytest.raises(ModelError, match="flat: num_hidden_layers is 2, the reference's is 3"):
        carriers_measure.measure(subject_of(tiny(), {"flat": shallow}, questions, tokenizer))


def test_a_model_with_layers_that_have_no_keys_is_refused(
    chat: Chat, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]

    def without_one(*arguments: Any) -> Any:
        taps = plain(*arguments)
        taps.kv = taps.kv[1:]
        return taps

    plain = carriers_measure.forward
    monkeypatch.setattr(carriers_measure, "forward", without_one)
    with pytest.raises(ModelError, match="2 of 3 layers have keys and values"):
        carriers_measure.measure(subject_of(tiny(), {"sft": tiny()}, questions, tokenizer))


def test_the_reference_is_spooled_to_disk_and_held_batch_by_batch(
    chat: Chat, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive: list[weakref.ref[Tensor]] = []
    files: set[int] = set()
    load = carriers_measure.load_file

    def watched(file: Path, device: str) -> dict[str, Tensor]:
        assert all(reference() is None for reference in alive)
        files.add(len(list(file.parent.parent.rglob("*.safetensors"))))
        held = load(file, device)
        alive.extend(weakref.ref(tensor) for tensor in held.values())
        return held

    monkeypatch.setattr(carriers_measure, "load_file", watched)
    questions = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    tuned = {"a": nudged(tiny(), size=0.05), "b": nudged(tiny(), seed=7, size=0.05)}
    carriers_measure.measure(subject_of(tiny(), tuned, questions, tokenizer, batch_tokens=1))
    assert files == {10}  # one for each text, where a batch holds one
    assert len(alive) == 2 * (10 * 2 * DEPTH + 6 * len(LAYERS))
    assert not list(tmp_path.iterdir())


def test_the_cost_is_what_is_spent(
    chat: Chat, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [PairedQuestion(f"{at}", "d", *texts) for at, texts in enumerate(ASKED)]
    models = {"reference": tiny(), "a": nudged(tiny()), "b": nudged(tiny(), seed=7)}
    spent, written = [0], [0]
    for model in models.values():
        find_head(model)
        model.model.embed_tokens.register_forward_pre_hook(
            lambda _m, args: spent.__setitem__(0, spent[0] + args[0].numel())
        )
    save = carriers_measure.save_file

    def watched(tensors: dict[str, Tensor], file: Path) -> None:
        written[0] += sum(tensor.nbytes for tensor in tensors.values())
        save(tensors, file)

    monkeypatch.setattr(carriers_measure, "save_file", watched)
    tuned = {"a": models["a"], "b": models["b"]}
    subject = subject_of(models["reference"], tuned, questions, tokenizer, batch_tokens=1)
    cost = carriers_measure.cost(subject)
    assert spent == [0]
    carriers_measure.measure(subject)
    assert cost.forward == spent[0]
    assert cost.backward == 0
    # The residual stream of inside questions is not kept.
    inside = sum(carriers_measure._prompt_tokens(text) for text in pair_texts(chat, subject.inside))
    assert cost.kept == written[0] + inside * len(LAYERS) * 16 * 4


def test_the_layers_are_spaced_evenly_and_leave_out_the_last() -> None:
    def layers(depth: int) -> tuple[int, ...]:
        return carriers_measure._layers(type("Config", (), {"num_hidden_layers": depth}))

    assert layers(1) == (1,)
    assert layers(2) == (1,)
    assert layers(3) == (1, 2)
    assert layers(30) == (1, 5, 9, 13, 17, 21, 25, 29)
    assert layers(80)[-1] == 79
    assert len(layers(80)) == carriers_measure.LAYERS
