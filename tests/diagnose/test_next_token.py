"""Next-token distributions: entropies and divergences of the naive softmax, and what the yardsticks
rule out."""

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import SMALL, random_model, unigram
from helpers.paired_answers import INSIDE, OUTSIDE, SETS, answer_tokens, subject
from ringfence.diagnose.diagnosis import Numbers
from ringfence.diagnose.next_token import measure as next_token_measure
from ringfence.diagnose.next_token import show as next_token_show
from ringfence.diagnose.next_token.measure import POSITIONS
from ringfence.errors import DataError, ModelError
from ringfence.stats import mean_interval
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

NAMES = ["base", "reference", "undefended", "kl"]
SPANS = {"first": 1, "early": 8}
Distributions = dict[str, dict[str, list[Tensor]]]


@pytest.fixture(scope="module")
def numbers(loaded: dict[str, Any], tokenizer: Any) -> Numbers:
    """Measured with several batches, of several tiles each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token_measure, "TILE_ELEMENTS", 3 * SMALL)
        return json.loads(
            json.dumps(next_token_measure.measure(subject(loaded, tokenizer, batch_tokens=150)))
        )


def naive(model: Any, tokenizer: Any, question: PairedQuestion) -> Tensor:
    """The distributions of the first tokens of the aligned answer, from one row alone, in double
    precision."""
    messages = [{"role": "user", "content": question.question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = answer_tokens(tokenizer, question, "aligned")
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0].double()
    start = len(prompt_ids) - 1
    return logits.softmax(-1)[start : start + min(8, len(answer_ids))]


@pytest.fixture(scope="module")
def distributions(loaded: dict[str, Any], tokenizer: Any) -> Distributions:
    """By model and set, of each question [positions, V]."""
    return {
        name: {
            where: [naive(model, tokenizer, q) for q in questions]
            for where, questions in SETS.items()
        }
        for name, model in loaded.items()
    }


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def of_questions(values: list[Tensor], span: str) -> np.ndarray:
    return np.array([float(value[: SPANS[span]].mean()) for value in values])


def naive_kl(
    distributions: Distributions, one: str, other: str, where: str, span: str
) -> np.ndarray:
    pairs = zip(distributions[one][where], distributions[other][where])
    return of_questions([kl(p, q) for p, q in pairs], span)


def close(interval: dict[str, float], values: np.ndarray) -> None:
    assert interval["mean"] == pytest.approx(values.mean(), rel=1e-3, abs=1e-4)
    assert interval["n"] == len(values)
    expected, slack = mean_interval(values.tolist()), 2e-3 * np.abs(values).max() + 1e-6
    assert (interval["low"], interval["high"]) == pytest.approx(
        (expected.low, expected.high), abs=slack
    )


# ---------------------------------------------------------------- numbers


def test_the_texts_try_what_they_should(tokenizer: Any) -> None:
    lengths = [len(answer_tokens(tokenizer, q, "aligned")) for q in [*INSIDE, *OUTSIDE]]
    assert min(lengths) < POSITIONS < max(lengths)
    assert len(set(lengths)) > 3
    assert SPANS["early"] == POSITIONS


def test_entropies_are_those_of_the_softmax(numbers: Numbers, distributions: Distributions) -> None:
    assert list(numbers["entropy"]) == NAMES
    for name, by_set in numbers["entropy"].items():
        for where in SETS:
            entropies = [-(p * p.log()).sum(-1) for p in distributions[name][where]]
            for span in SPANS:
                close(by_set[where][span], of_questions(entropies, span))


def test_divergences_are_those_of_the_softmax(
    numbers: Numbers, distributions: Distributions
) -> None:
    directions = []
    for where in SETS:
        for span in SPANS:
            alignment = naive_kl(distributions, "reference", "base", where, span)
            close(numbers["alignment"][where][span], alignment)
            for name, scores in numbers["tuned"].items():
                from_reference = naive_kl(distributions, name, "reference", where, span)
                from_base = naive_kl(distributions, name, "base", where, span)
                close(scores["from_reference"][where][span], from_reference)
                close(scores["from_base"][where][span], from_base)
                close(scores["nearer_base"][where][span], from_reference - from_base)
                close(scores["to_base"][where][span], alignment - from_base)
                share = scores["of_alignment"][where][span]
                assert share["mean"] == pytest.approx(
                    from_reference.mean() / alignment.mean(), rel=1e-3
                )
                assert share["low"] < share["mean"] < share["high"]
                turned = naive_kl(distributions, "reference", name, where, span)
                directions.append(abs(turned.mean() / from_reference.mean() - 1))
    assert max(directions) > 0.01, directions  # the other direction would be seen


def test_outside_is_compared_with_inside(numbers: Numbers, distributions: Distributions) -> None:
    for name, scores in numbers["tuned"].items():
        for span in SPANS:
            means = {
                where: naive_kl(distributions, name, "reference", where, span).mean()
                for where in SETS
            }
            found = scores["outside_minus_inside"][span]
            assert found["mean"] == pytest.approx(
                means["outside"] - means["inside"], rel=1e-3, abs=1e-4
            )
            assert found["n"] == len(INSIDE) + len(OUTSIDE)
            assert found["low"] < found["mean"] < found["high"]


def test_batches_and_tiles_do_not_change_a_number(
    numbers: Numbers, loaded: dict[str, Any], tokenizer: Any
) -> None:
    whole = next_token_measure.measure(subject(loaded, tokenizer))
    assert whole["example"]["tokens"] == numbers["example"]["tokens"]
    for name, scores in whole["tuned"].items():
        for key in ("from_reference", "from_base"):
            for where in SETS:
                found = numbers["tuned"][name][key][where]["early"]
                assert scores[key][where]["early"] == pytest.approx(found, rel=1e-3, abs=1e-4)


def test_the_example_is_the_median_question_with_every_models_likeliest_tokens(
    numbers: Numbers, distributions: Distributions, tokenizer: Any
) -> None:
    columns = [
        naive_kl(distributions, name, "reference", "outside", "first")
        for name in ("undefended", "kl")
    ]
    place = int(np.argmin(sum(np.abs(column - np.median(column)) for column in columns)))
    example = numbers["example"]
    assert (example["domain"], example["id"]) == (OUTSIDE[place].domain, OUTSIDE[place].id)
    first = {name: distributions[name]["outside"][place][0] for name in NAMES}
    readable = {
        token: tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎").replace("\t", "→")
        for p_V in first.values()
        for token in p_V.topk(5).indices.tolist()
    }
    likeliest = sorted(
        readable, key=lambda token: -max(float(p_V[token]) for p_V in first.values())
    )[:12]
    likeliest.sort(key=lambda token: -float(first["reference"][token]))
    assert example["tokens"] == [readable[token] for token in likeliest]
    for name, p_V in first.items():
        assert example["probabilities"][name] == pytest.approx(
            p_V[likeliest].tolist(), rel=1e-3, abs=1e-7
        )


def test_the_cost_is_what_is_read_and_kept(
    loaded: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, look = [], next_token_measure._look

    def looking(*arguments: Any) -> Any:
        seen = look(*arguments)
        kept.append(seen.logprobs_KV.numel() * seen.logprobs_KV.element_size())
        return seen

    monkeypatch.setattr(next_token_measure, "_look", looking)
    looked = subject(loaded, tokenizer)
    next_token_measure.measure(looked)
    cost = next_token_measure.cost(looked)
    assert cost.kept == sum(kept)
    assert kept[0] == kept[1] > 4 * kept[2] > 0
    lengths = []
    for q in [*INSIDE, *OUTSIDE]:
        messages = [{"role": "user", "content": q.question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        lengths.append(len(prompt_ids) + min(8, len(answer_tokens(tokenizer, q, "aligned"))))
    assert cost.forward == 4 * sum(lengths)


# ---------------------------------------------------------------- the yardsticks


def test_a_model_that_moved_elsewhere_did_not_go_back_to_a_broad_base(tokenizer: Any) -> None:
    """Against the reference and the base alone (the published comparison) it looks as if it had: a
    broad base is near to everything."""
    flat, sure, elsewhere = torch.zeros(SMALL), torch.zeros(SMALL), torch.zeros(SMALL)
    sure[500], elsewhere[600] = 12.0, 13.0
    back = 0.5 * sure
    models = {"base": flat, "reference": sure, "elsewhere": elsewhere, "back": back}
    models = {name: unigram(logits_V) for name, logits_V in models.items()}
    numbers = next_token_measure.measure(subject(models, tokenizer))
    for where in SETS:
        gone, came = (numbers["tuned"][name] for name in ("elsewhere", "back"))
        assert (
            gone["from_base"][where]["early"]["mean"]
            < gone["from_reference"][where]["early"]["mean"] - 1
        )
        assert gone["nearer_base"][where]["early"]["low"] > 1
        assert gone["to_base"][where]["early"]["high"] < -0.05
        assert came["to_base"][where]["early"]["low"] > 1
    said = dict(zip(("elsewhere", "back"), next_token_show.say(numbers).split("back: over")))
    assert said["elsewhere"].count("no way back to the base") == 2
    assert "went back" not in said["elsewhere"]
    assert said["back"].count("tuning went back towards it") == 2
    assert "no way back" not in said["back"]


def test_the_sentence_follows_the_intervals(numbers: Numbers) -> None:
    def with_contrast(low: float, high: float) -> str:
        changed = copy.deepcopy(numbers)
        for scores in changed["tuned"].values():
            scores["outside_minus_inside"]["early"] |= {
                "mean": (low + high) / 2,
                "low": low,
                "high": high,
            }
        return next_token_show.say(changed)

    assert with_contrast(-0.5, -0.1).count("changed more inside the domain than outside") == 2
    assert with_contrast(0.1, 0.5).count("changed more outside the domain than inside") == 2
    assert with_contrast(-0.1, 0.1).count("not confined to the domain") == 2

    def with_way(nearer: int, back: int) -> str:
        changed = copy.deepcopy(numbers)
        for scores in changed["tuned"].values():
            for key, sign in {"nearer_base": nearer, "to_base": back}.items():
                for spans in scores[key].values():
                    spans["early"] |= {
                        "low": -0.1 if sign == 0 else sign,
                        "high": 0.1 if sign == 0 else sign,
                    }
        return next_token_show.say(changed)

    assert with_way(1, 1).count("nearer to the base than to the reference") == 4
    assert with_way(1, 0).count("but no nearer to the base than the reference is") == 4
    assert with_way(-1, -1).count("nearer to the reference than to the base") == 4
    assert with_way(-1, -1).count("but further from the base than the reference is") == 4
    assert with_way(0, 0).count("about as near to the base as to the reference") == 4
    outside = numbers["tuned"]["kl"]["from_reference"]["outside"]["early"]["mean"]
    assert (
        f"{outside:.2f} ["
        in next_token_show.say(numbers).split("kl: over")[1].split("outside the domain")[0]
    )


def test_models_that_cannot_be_compared(loaded: dict[str, Any], tokenizer: Any) -> None:
    few = {"inside": [], "outside": OUTSIDE[:1]}
    same = {"base": loaded["reference"], "reference": loaded["reference"], "kl": loaded["kl"]}
    with pytest.raises(ModelError, match="base: it gives the same distributions as the reference"):
        next_token_measure.measure(subject(same, tokenizer, **few))
    larger = {"reference": loaded["reference"], "kl": random_model(vocab_size=SMALL + 8)}
    with pytest.raises(
        ModelError, match=rf"reference: its vocabulary has {SMALL} tokens, .* {SMALL + 8}"
    ):
        next_token_measure.measure(subject(larger, tokenizer, **few))
    with pytest.raises(DataError, match="no paired questions"):
        next_token_measure.measure(subject(loaded, tokenizer, inside=[], outside=[]))


# ---------------------------------------------------------------- table and figure


@pytest.fixture(scope="module")
def without_base(loaded: dict[str, Any], tokenizer: Any) -> Numbers:
    models = {name: loaded[name] for name in ("reference", "kl")}
    return next_token_measure.measure(subject(models, tokenizer, inside=[], outside=OUTSIDE[:1]))


def test_without_a_base_only_the_reference_is_compared_with(
    without_base: Numbers, numbers: Numbers
) -> None:
    assert without_base["tuned"]["kl"].keys() == {"from_reference"}
    assert "alignment" not in without_base
    table, said = next_token_show.table(without_base), next_token_show.say(without_base)
    assert "base" not in " ".join([*table.columns, said])
    assert "[one alone]" in table.rows[1][-1]
    with plots.style():
        figure = next_token_show.draw(without_base)
        assert len(figure.axes[1].patches) == 1
        assert b"</svg>" in plots.svg(figure)


def test_the_table_has_a_row_for_each_model_and_set(numbers: Numbers) -> None:
    table = next_token_show.table(numbers)
    assert [row[0] for row in table.rows] == NAMES * 2
    assert [row[1] for row in table.rows[::4]] == ["inside (2)", "outside (5)"]
    rows = {(row[0], row[1][:3]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    scores, row = numbers["tuned"]["kl"], rows["kl", "out"]
    from_reference = scores["from_reference"]["outside"]
    expected = {
        "entropy, first token": f"{numbers['entropy']['kl']['outside']['first']['mean']:.2f} [",
        "entropy, first 8": f"{numbers['entropy']['kl']['outside']['early']['mean']:.2f} [",
        "KL from reference, first token": f"{from_reference['first']['mean']:.2f} [",
        "KL from reference, first 8": f"{from_reference['early']['mean']:.2f} [",
        "KL from base, first 8": f"{scores['from_base']['outside']['early']['mean']:.2f} [",
        "nearer base, first 8": f"{scores['nearer_base']['outside']['early']['mean']:+.2f} [",
        "back to base, first 8": f"{scores['to_base']['outside']['early']['mean']:+.2f} [",
        "times alignment, first 8": f"{scores['of_alignment']['outside']['early']['mean']:.2f} [",
    }
    for column, start in expected.items():
        assert row[column].startswith(start), column
    alignment = numbers["alignment"]["inside"]["early"]["mean"]
    assert rows["reference", "ins"]["KL from base, first 8"].startswith(f"{alignment:.2f} [")
    assert rows["base", "ins"]["KL from base, first 8"] == ""


def test_the_figure_shows_the_numbers(numbers: Numbers) -> None:
    numbers = copy.deepcopy(numbers)
    numbers["example"]["tokens"][:2] = ["$\\frac$", "$$"]  # no mathematics for matplotlib
    with plots.style():
        figure = next_token_show.draw(numbers)
        figure.savefig(io.BytesIO(), format="svg")
    tokens, *panels = figure.axes
    example = numbers["example"]
    assert [label.get_text() for label in tokens.get_yticklabels()] == example["tokens"]
    widths = [bar.get_width() for bar in tokens.patches]
    assert widths == [p for name in NAMES for p in example["probabilities"][name]]
    places = [bar.get_y() + bar.get_height() / 2 for bar in tokens.patches]
    assert np.round(places).tolist() == list(range(len(example["tokens"]))) * 4
    for axes, span in zip(panels, SPANS):
        tuned = numbers["tuned"].values()
        bars = [scores["from_reference"] for scores in tuned]
        bars += [numbers["alignment"], *(scores["from_base"] for scores in tuned)]
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [scores[where][span]["mean"] for scores in bars for where in SETS]
