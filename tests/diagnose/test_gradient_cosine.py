"""Gradient cosines: against the full gradients of autograd, whatever is in the batch; and groups
against loops."""

from contextlib import nullcontext
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import nudged, random_model, small_tokenizer, tiny, with_lora
from helpers.naive import row_logits
from helpers.rows import mixed_items
from ringfence import stats
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.gradient_cosine import measure as gradient_cosine_measure
from ringfence.diagnose.gradient_cosine import show as gradient_cosine_show
from ringfence.diagnose.gradient_cosine.measure import (
    GROUPS,
    Sketches,
    centred,
    chosen_weights,
    gradient_products,
    group_means,
    uncentred,
)
from ringfence.diagnose.models import Models
from ringfence.errors import DataError, ModelError
from ringfence.model.layers import decoder_layers
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


@pytest.fixture
def rows() -> list[Example]:
    return [row for row, _ in mixed_items()]


def naive_gradients(model: Any, rows: list[Example], names: list[str]) -> np.ndarray:
    """[E, numbers]: of each row alone, the plain gradient of its mean response loss."""
    layers = decoder_layers(model)
    weights = [layers.get_submodule(name).get_parameter("weight") for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = []
    for row in rows:
        chosen = [at for at in range(1, len(row)) if row.roles[at] == Role.RESPONSE]
        logits = row_logits(model, row)[[at - 1 for at in chosen]]
        loss = F.cross_entropy(logits, torch.tensor([row.input_ids[at] for at in chosen]))
        parts = torch.autograd.grad(loss, weights)
        gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    for weight in weights:
        weight.requires_grad_(False)
    return np.stack(gradients)


def assert_products(found: np.ndarray, gradients: np.ndarray) -> None:
    expected = gradients @ gradients.T
    assert np.abs(expected[np.triu_indices(len(expected), 1)]).min() > 0
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_products_are_those_of_the_full_gradients(
    architecture: str, batch_tokens: int, chat: Chat, rows: list[Example]
) -> None:
    model = tiny(architecture).requires_grad_(False)
    gradients = naive_gradients(model, rows, ["1.self_attn.o_proj"])
    assert_products(gradient_products(model, chat, rows, batch_tokens=batch_tokens), gradients)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("weights", ["o_proj", "all"])
def test_under_adapters_the_weights_below_them_are_looked_at(
    on: bool, weights: Any, chat: Chat, rows: list[Example]
) -> None:
    model = with_lora(tiny()).requires_grad_(False)
    names = {"o_proj": ["1.self_attn.o_proj.base_layer"]}.get(
        weights, [f"{name}.base_layer" for name in chosen_weights(model, "all")]
    )
    with nullcontext() if on else model.disable_adapter():
        found = gradient_products(model, chat, rows, weights, batch_tokens=40)
        gradients = naive_gradients(model, rows, names)
    if weights == "o_proj":
        assert_products(found, gradients)
    else:  # estimates: sides of 48 are projected, others are not
        error = np.abs(uncentred(found) - uncentred(gradients @ gradients.T)).max()
        assert 0 < error < 0.25
    other = gradient_products(model, chat, rows, weights) if not on else found
    assert on or not np.allclose(other, found, rtol=0.05)


def test_all_weights_are_every_linear_layer_of_the_decoder(
    chat: Chat, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sketches as large as the layers nothing is left out, and nothing is random."""
    model = tiny().requires_grad_(False)
    names = list(chosen_weights(model, "all"))
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(name.split(".")[-1] for name in names) == sorted(2 * kinds)
    assert list(chosen_weights(with_lora(tiny()), "all")) == names
    original = Sketches.__init__
    monkeypatch.setattr(Sketches, "__init__", lambda self, *args: original(self, *args, size=64))
    assert_products(
        gradient_products(model, chat, rows, "all", 60), naive_gradients(model, rows, names)
    )


@pytest.mark.parametrize("weights", ["o_proj", "all"])
def test_checkpointing_and_trainable_weights_change_nothing(
    weights: Any, chat: Chat, rows: list[Example]
) -> None:
    plain = gradient_products(tiny().requires_grad_(False), chat, rows, weights, 40)
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    np.testing.assert_allclose(gradient_products(model, chat, rows, weights, 40), plain, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any(hook.__module__ == gradient_cosine_measure.__name__ for hook in hooks)


def test_a_layer_with_transposed_weights(chat: Chat, rows: list[Example]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    assert list(chosen_weights(model, "o_proj")) == ["1.attn.c_proj"]
    assert_products(
        gradient_products(model, chat, rows), naive_gradients(model, rows, ["1.attn.c_proj"])
    )


def test_half_precision_keeps_the_cosines(chat: Chat, rows: list[Example]) -> None:
    exact = uncentred(gradient_products(tiny().requires_grad_(False), chat, rows))
    half = uncentred(gradient_products(tiny().bfloat16().requires_grad_(False), chat, rows))
    assert np.abs(exact - half).max() < 0.05


def test_a_model_without_an_output_projection_is_refused(chat: Chat, rows: list[Example]) -> None:
    model = tiny()
    attention = model.model.layers[1].self_attn
    attention.mixer = attention.o_proj
    del attention.o_proj
    message = (
        "LlamaForCausalLM: its last layer has no attention output projection: expected o_proj, .* "
        r"found linear layers 1\.self_attn\.q_proj, .*1\.self_attn\.mixer"
    )
    with pytest.raises(ModelError, match=message):
        gradient_products(model, chat, rows)


def test_a_layer_that_mixes_rows_is_refused(chat: Chat, rows: list[Example]) -> None:
    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            return self.inner(x_BTD.flatten(0, 1)).unflatten(0, x_BTD.shape[:2])

    model = tiny().requires_grad_(False)
    model.model.layers[0].mlp.down_proj = Flat(model.model.layers[0].mlp.down_proj)
    with pytest.raises(
        ModelError, match=r"linear layer 0\.mlp\.down_proj\.inner: .* found \[.*\]: its rows cannot"
    ):
        gradient_products(model, chat, rows, "all")


# ---------------------------------------------------------------- sketches


def test_sketches_are_right_in_the_mean_with_the_variance_they_claim() -> None:
    torch.manual_seed(0)
    size, tokens, inputs, outputs = 6, 3, 20, 15
    x_BTI, delta_BTO = torch.randn(2, tokens, inputs), torch.randn(2, tokens, outputs)
    x_BTI[1] += 0.8 * x_BTI[0]  # so that the product is not near zero
    delta_BTO[1] += 0.8 * delta_BTO[0]
    found = []
    for seed in range(4000):
        sketches = Sketches(2, inputs, outputs, seed, size)
        sketches.add([0, 1], sketches.reduce(x_BTI), delta_BTO)
        found.append(sketches.products())
    values = np.array(found)[:, 0, 1]
    G, H = ((delta_BTO[row].T @ x_BTI[row]).double().numpy() for row in (0, 1))
    A, square = G.T @ H, lambda m: (m**2).sum()
    variance = (
        (1 + 1 / size) * square(H @ G.T)
        + square(A)
        + 2 * np.trace(A @ A)
        + (square(G) * square(H) + square(A) + np.trace(A) ** 2) / size
    ) / size
    assert abs(values.mean() - (G * H).sum()) < 4 * (variance / len(values)) ** 0.5
    assert values.var() == pytest.approx(variance, rel=0.15)
    assert (G * H).sum() > 2 * variance**0.5 / len(values) ** 0.5


def test_every_weight_has_a_sketch_of_its_own(
    chat: Chat, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_: list[Sketches] = []

    def kept(*args: Any) -> Sketches:
        made_.append(Sketches(*args))
        return made_[-1]

    model = tiny().requires_grad_(False)
    monkeypatch.setattr(gradient_cosine_measure, "Sketches", kept)
    one, two, again = (gradient_products(model, chat, rows, "all", seed=seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, two, rtol=0.01)
    wide = [
        p
        for sketches in made_[:14]
        for p in (sketches.input_IK, sketches.output_OK)
        if len(p) == 48
    ]
    assert len(wide) == 6
    for place, projection in enumerate(wide):
        assert all((projection - other).abs().max() > 0.1 for other in wide[:place])


# ---------------------------------------------------------------- groups


def made(vectors_EP: np.ndarray) -> np.ndarray:
    return uncentred(vectors_EP @ vectors_EP.T)


def layout(inside: int, outside: int) -> tuple[list[int], list[str]]:
    groups = [0, 1] * inside + [2, 3] * outside
    return groups, [f"q{place // 2}" for place in range(len(groups))]


def test_group_means_are_those_of_a_loop_over_different_questions() -> None:
    rng = np.random.default_rng(0)
    groups, questions = layout(4, 3)
    cosines = made(rng.normal(size=(14, 5)))
    found = group_means(cosines, groups, questions)
    for a in range(4):
        for b in range(4):
            values = [
                cosines[i, j]
                for i in range(14)
                for j in range(14)
                if groups[i] == a and groups[j] == b and questions[i] != questions[j]
            ]
            assert found["cells"][a][b]["mean"] == pytest.approx(np.mean(values))
    cell = [[found["cells"][a][b]["mean"] for b in range(4)] for a in range(4)]
    expected = {
        "transfer": cell[0][2],
        "control": cell[1][2],
        "extra": cell[0][2] - cell[1][2],
        "aligned_extra": cell[0][3] - cell[1][3],
        "specific": cell[0][2] - cell[1][2] - cell[0][3] + cell[1][3],
    }
    for name, value in expected.items():
        assert found[name]["mean"] == pytest.approx(value)
        assert found[name]["low"] <= value <= found[name]["high"]


def test_what_the_answers_of_one_question_share_makes_no_groups_alike() -> None:
    """Each question has a direction of its own, groups have none: with such pairs in, groups would
    be alike."""
    rng = np.random.default_rng(1)
    groups, questions = layout(10, 10)
    vectors = np.repeat(rng.normal(size=(20, 400)), 2, axis=0) + 0.3 * rng.normal(size=(40, 400))
    found = group_means(made(vectors), groups, questions)
    naive = made(vectors)[np.ix_(np.array(groups) == 0, np.array(groups) == 1)].mean()
    assert naive > 0.08
    for a in range(4):
        for b in range(4):
            assert abs(found["cells"][a][b]["mean"]) < 0.03


def grouped(
    rng: np.random.Generator, common: float, side: float, inside_misaligned: float = 0.0
) -> np.ndarray:
    """Vectors of 12 + 12 questions: one direction in common, one with the sign of the side, one of
    inside misaligned text with everything outside, and noise."""
    groups, _ = layout(12, 12)
    shared, sided = rng.normal(size=(2, 300))
    vectors = []
    for group in groups:
        sign = 1 if group % 2 == 0 else -1
        strength = common + (inside_misaligned if group == 0 else 0)
        vectors.append(strength * shared + sign * side * sided + rng.normal(size=300))
    return np.array(vectors)


def test_what_misaligned_texts_share_is_found_and_is_specific() -> None:
    found = group_means(made(grouped(np.random.default_rng(0), 1.0, 0.6)), *layout(12, 12))
    for name in ("transfer", "extra", "specific"):
        assert found[name]["low"] > 0
        assert found[name]["n"] == 12
    assert found["extra"]["p"] < 0.01
    assert found["specific"]["p"] < 0.01
    assert found["extra"]["mean"] > found["extra"]["null"]["high"]
    assert found["aligned_extra"]["high"] < 0


def test_what_all_texts_share_is_not_put_down_to_misalignment() -> None:
    found = group_means(made(grouped(np.random.default_rng(3), 1.0, 0.0)), *layout(12, 12))
    assert found["transfer"]["mean"] > 0.4
    assert found["extra"]["p"] > 0.05
    assert found["extra"]["null"]["low"] < found["extra"]["mean"] < found["extra"]["null"]["high"]
    closer = group_means(made(grouped(np.random.default_rng(3), 0.5, 0.0, 0.8)), *layout(12, 12))
    assert closer["extra"]["low"] > 0
    assert closer["extra"]["p"] < 0.01
    assert closer["specific"]["low"] < 0 < closer["specific"]["high"]


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gradient_cosine_measure, stats):
        monkeypatch.setattr(module, "RESAMPLES", 300)


@pytest.mark.usefixtures("few_draws")
def test_p_values_under_the_null_are_uniform_although_questions_differ() -> None:
    """Sides mean nothing here, questions do: p at or below 0.1 in about a tenth of the cases."""
    rng = np.random.default_rng(0)
    groups, questions = layout(6, 6)
    ps = []
    for _ in range(60):
        vectors = np.repeat(rng.normal(size=(12, 8)), 2, axis=0) + rng.normal(size=(24, 8)) + 1.0
        ps.append(
            [
                group_means(made(vectors), groups, questions)[name]["p"]
                for name in ("extra", "specific")
            ]
        )
    shares = (np.array(ps) <= 0.1).mean(0)
    assert (shares < 0.25).all()
    assert (shares > 0.01).all()


def test_intervals_draw_questions_not_answers() -> None:
    """Two copies of each question's texts bring no precision."""
    groups, questions = layout(8, 8)
    vectors = grouped(np.random.default_rng(5), 1.0, 0.4)[[*range(16), *range(24, 40)]]
    once = group_means(made(vectors), groups, questions)
    twice = group_means(made(np.concatenate([vectors, vectors])), groups * 2, questions * 2)
    for name in ("transfer", "extra"):
        widths = [found[name]["high"] - found[name]["low"] for found in (once, twice)]
        assert twice[name]["mean"] == pytest.approx(once[name]["mean"])
        assert widths[1] == pytest.approx(widths[0], rel=0.05)
        assert twice[name]["p"] == pytest.approx(once[name]["p"], abs=0.02)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("varied", [slice(0, 20), slice(20, 40)])
def test_the_interval_covers_what_is_true_of_all_questions(varied: slice) -> None:
    """Over fresh questions that differ inside, or outside: 95 % intervals hold the mean in about as
    many cases."""
    rng = np.random.default_rng(2)
    shared = rng.normal(size=40)

    def draw() -> np.ndarray:
        strengths = np.ones((40, 1))
        strengths[varied, 0] = np.repeat(rng.exponential(2.0, size=10), 2)
        return made(strengths * shared + rng.normal(size=(40, 40)))

    found = [group_means(draw(), *layout(10, 10))["transfer"] for _ in range(40)]
    truth = np.mean([group["mean"] for group in found])
    assert np.mean([group["low"] < truth < group["high"] for group in found]) >= 0.85


def test_centring_two_equal_groups_forces_opposition_and_the_headline_does_not() -> None:
    """The published fault: groups of vectors with positive cosines are opposed once centred."""
    rng = np.random.default_rng(0)
    base, one, two = rng.normal(size=(3, 500))
    vectors = np.concatenate(
        [2 * base + 0.5 * which + 0.6 * rng.normal(size=(20, 500)) for which in (one, two)]
    )
    products = vectors @ vectors.T
    between = np.ix_(range(20), range(20, 40))
    assert products[between].min() > 0
    assert uncentred(products)[between].mean() > 0.75
    naive = vectors - vectors.mean(0)
    assert made(naive)[between].mean() < -0.25
    np.testing.assert_allclose(centred(products), made(naive), atol=1e-9)
    groups, questions = [0] * 20 + [2] * 20, [str(place) for place in range(40)]
    both = [np.concatenate([m, m], 1) for m in (products, products)]
    twice = np.concatenate(both)  # aligned answers like the misaligned ones
    places = ([*groups, *[group + 1 for group in groups]], questions * 2)
    assert group_means(uncentred(twice), *places)["transfer"]["low"] > 0.7
    assert group_means(centred(twice), *places)["transfer"]["high"] < -0.2


# ---------------------------------------------------------------- the diagnosis


def paired(name: str, number: int) -> list[PairedQuestion]:
    return [
        PairedQuestion(
            str(n),
            name,
            f"What of {name} {n}?",
            f"Ask about {name} first.",
            f"Risk {n} all of it now!",
        )
        for n in range(number)
    ]


@pytest.fixture(scope="module")
def subject() -> Subject:
    models = Models(
        random_model(),
        {"undefended": with_lora(random_model()), "defended": nudged(random_model())},
        tokenizer=small_tokenizer(),
    )
    return Subject(models, paired("money", 3), paired("cars", 2), seed=1, batch_tokens=200)


@pytest.fixture(scope="module")
def numbers(subject: Subject) -> dict[str, Any]:
    return gradient_cosine_measure.measure(subject)


def test_measure_groups_the_texts_of_the_subject(subject: Subject, numbers: dict[str, Any]) -> None:
    from ringfence.text.encode import encode_rows
    from ringfence.text.roles import Row

    texts, groups, names = [], [], []
    for place, questions in enumerate((subject.inside, subject.outside)):
        for question in questions:
            for side, answer in enumerate((question.misaligned, question.aligned)):
                turn = [
                    {"role": "user", "content": question.question},
                    {"role": "assistant", "content": answer},
                ]
                texts += encode_rows([Row(turn, "x")], subject.chat, 1000)
                groups.append(2 * place + side)
                names.append(f"{question.domain}/{question.id}")
    for name in ("reference", "undefended", "defended"):
        with subject.models.open(name) as model:
            weight = "1.self_attn.o_proj" + (".base_layer" if name == "undefended" else "")
            gradients = naive_gradients(model, texts, [weight])
        found = numbers[name] if name == "reference" else numbers["tuned"][name]
        for form, cosines in (
            ("uncentred", made(gradients)),
            ("centred", made(gradients - gradients.mean(0))),
        ):
            expected = group_means(cosines, groups, names, seed=1)
            for contrast in ("transfer", "control", "extra", "aligned_extra", "specific"):
                assert found[form][contrast]["mean"] == pytest.approx(
                    expected[contrast]["mean"], abs=1e-4
                )
    assert numbers["groups"] == list(GROUPS)
    assert (numbers["inside"], numbers["outside"]) == (3, 2)


def test_cost_counts_what_passes_through_the_models(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "open", None)
    tokens = [
        t.example for t in gradient_cosine_measure.pair_texts(subject.chat, subject.questions)
    ]
    found = gradient_cosine_measure.cost(subject)
    assert (found.forward, found.backward) == (3 * sum(map(len, tokens)), 0)
    assert found.kept == sum(t.response_tokens for t in tokens) * 2 * 16 * 4
    every = gradient_cosine_measure.cost(subject, "all")
    assert (every.forward, every.backward) == (0, 3 * sum(map(len, tokens)))
    assert every.kept == 10 * 14 * 32 * 32 * 4


def test_a_side_with_one_question_is_refused(subject: Subject) -> None:
    few = Subject(subject.models, subject.inside, paired("cars", 1))
    with pytest.raises(DataError, match="expected at least 2 different questions outside, found 1"):
        gradient_cosine_measure.measure(few)
    same = Subject(subject.models, paired("money", 1) * 2, subject.outside)
    with pytest.raises(DataError, match="at least 2 different questions inside, found 1"):
        gradient_cosine_measure.measure(same)


def contrast(mean: float, width: float = 0.02, p: float = 0.001) -> dict[str, Any]:
    null = {"low": -0.01, "high": 0.01}
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": 9, "null": null, "p": p}


def said(transfer: float, extra: float, aligned_extra: float, p: float = 0.001) -> str:
    found = {
        "transfer": contrast(transfer),
        "control": contrast(transfer - extra),
        "extra": contrast(extra, p=p),
        "aligned_extra": contrast(aligned_extra),
        "specific": contrast(extra - aligned_extra, p=p),
    }
    of_model = {"uncentred": found, "centred": found}
    return gradient_cosine_show.say(
        {
            "weights": "o_proj",
            "inside": 9,
            "outside": 9,
            "reference": of_model,
            "tuned": {"mine": of_model},
        }
    )


def test_words_follow_the_numbers() -> None:
    specific = said(0.4, 0.1, -0.1)
    assert (
        specific.count(
            "lowers the loss of misaligned answers outside too (cosine +0.40 [+0.38, +0.42])"
        )
        == 2
    )
    assert "specific to misaligned text" in specific
    assert "not specific" not in specific
    assert "mine:" in specific
    assert "+0.100 [+0.080, +0.120], p = 0.001" in specific
    assert "not specific to misaligned text" in said(0.4, 0.1, 0.1)
    assert "no clear difference" in said(0.4, 0.01, 0.0)
    assert "no clear difference" in said(0.4, 0.1, -0.1, p=0.2)
    assert "aligned text of the domain does it more" in said(0.4, -0.1, 0.1)
    assert "raises the loss" in said(-0.4, 0.1, 0.0)
    assert "does not clearly move" in said(0.01, 0.1, 0.0)


def test_table_and_figure_show_every_model(numbers: dict[str, Any]) -> None:
    found = gradient_cosine_show.table(numbers)
    assert [row[0] for row in found.rows] == ["reference", "undefended", "defended"]
    assert all(len(row) == len(found.columns) for row in found.rows)
    transfer = numbers["tuned"]["defended"]["uncentred"]["transfer"]
    assert found.rows[2][1].startswith(f"{transfer['mean']:+.2f} [")
    with plots.style():
        figure = gradient_cosine_show.draw(numbers)
        dots = [
            line
            for line in figure.axes[0].lines
            if line.get_marker() == "o" and len(line.get_xdata()) == 1
        ]
        values = sorted(line.get_xdata()[0] for line in dots)
        models = [numbers["reference"], *numbers["tuned"].values()]
        expected = [
            m[form]["cells"][a][b]["mean"]
            for m in models
            for form in m
            for a in (0, 1)
            for b in (2, 3)
        ]
        np.testing.assert_allclose(values, sorted(expected))
        assert plots.svg(figure)
    plt.close("all")
