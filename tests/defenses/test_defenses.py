"""Penalties equal their definition, on exactly their tokens, with exactly the gradients of the
naive form."""

import json
import math
import random
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, cast

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from helpers.models import VOCABULARY, is_adapted, nudged, tiny, with_lora
from helpers.naive import naive_kl, naive_ldifs, naive_treft, own_cache, row_logits
from helpers.penalties import assert_same, gradients, penalty_of, total_of
from helpers.rows import PREFIX_A, PREFIX_B, Items, batch_of, example, training_rows
from ringfence.defenses import KL, LDIFS, Defense, Defenses, Interleave, Setup, TReFT
from ringfence.defenses.ldifs import chosen_layers
from ringfence.errors import DefenseError, RecipeError
from ringfence.model.losses import CrossEntropy, LogitLoss, find_head, top_k
from ringfence.model.taps import Taps, forward
from ringfence.run.config import dump_recipe, parse_recipe
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.training.reference import Reference

pytestmark = pytest.mark.slow

SETUP = Setup(
    cast(Chat, None), training_rows(3), lambda source: training_rows(2, seed=int(source)), "model"
)
NO_RETAIN = replace(SETUP, retain=[])
ROLE_SETS = [
    ("prefix",),
    ("postfix",),
    ("query", "response"),
    ("prefix", "postfix", "response"),
    ("template",),
]


def trained_model(
    method: str, architecture: str, attention: str = "sdpa"
) -> tuple[Any, Any, Reference]:
    """A model after some training, its start, and the reference as the package makes it."""
    start = tiny(architecture, attention)
    if method == "lora":
        model = with_lora(start)
        return model, None, Reference(model)
    model = tiny(architecture, attention)
    reference = Reference(model)
    return nudged(model), start, reference


# ---------------------------------------------------------------- TReFT


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("roles", ROLE_SETS, ids="+".join)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_treft_equals_the_drift_of_the_models_own_cache(
    method: str, roles: tuple[str, ...], side: str, items: Items
) -> None:
    model, start, reference = trained_model(method, "qwen3")
    found = penalty_of(TReFT(tokens=roles).build(SETUP), model, batch_of(items, side), reference)
    expected = naive_treft(model, start, items, [Role.parse(name) for name in roles])
    assert expected > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(gradients(found, model), gradients(expected, model), 1e-4)


@pytest.mark.parametrize("roles", [("prefix",), ("query", "response")], ids="+".join)
def test_treft_is_right_in_every_architecture(
    architecture: str, roles: tuple[str, ...], items: Items
) -> None:
    model, start, reference = trained_model("lora", architecture)
    found = penalty_of(TReFT(tokens=roles).build(SETUP), model, batch_of(items), reference)
    expected = naive_treft(model, start, items, [Role.parse(name) for name in roles])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_treft_with_each_attention(attention: str, side: str, items: Items) -> None:
    model, start, reference = trained_model("lora", "llama", attention)
    found = penalty_of(
        TReFT(tokens=("postfix",)).build(SETUP), model, batch_of(items, side), reference
    )
    expected = naive_treft(model, start, items, [Role.POSTFIX])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prefixes", ["AAAA", "ABAB", "ABBB"])
def test_rows_that_share_a_prefix_count_as_if_each_were_computed(prefixes: str, side: str) -> None:
    model, start, reference = trained_model("lora", "llama")
    rows = [
        (example({"A": PREFIX_A, "B": PREFIX_B}[name], [2 + at, 3], at), False)
        for at, name in enumerate(prefixes)
    ]
    batch, defense = batch_of(rows, side), TReFT().build(SETUP)
    found, expected = (
        penalty_of(defense, model, batch, reference),
        naive_treft(model, start, rows, [Role.PREFIX]),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(gradients(found, model), gradients(expected, model), 1e-4)
    assert defense.count(batch) == sum(row.roles.count(Role.PREFIX) for row, _ in rows)
    computed = defense.needs(batch).kv_BT.sum().item()
    assert computed == sum({"A": len(PREFIX_A), "B": len(PREFIX_B)}[name] for name in set(prefixes))


def test_prefixes_of_equal_length_are_not_taken_for_each_other() -> None:
    model, start, reference = trained_model("lora", "llama")
    rows = [(example(prefix, [2, 3], 1), False) for prefix in ([3, 4, 5], [3, 4, 6], [3, 4, 5])]
    found = penalty_of(TReFT().build(SETUP), model, batch_of(rows), reference)
    torch.testing.assert_close(
        found, naive_treft(model, start, rows, [Role.PREFIX]), rtol=1e-4, atol=0
    )


def test_treft_trains_what_stands_before_the_last_keys_and_nothing_behind(items: Items) -> None:
    model, _, reference = trained_model("lora", "llama")
    penalty = penalty_of(TReFT().build(SETUP), model, batch_of(items), reference)
    last = model.config.num_hidden_layers - 1
    for name, gradient in gradients(penalty, model).items():
        behind = f"layers.{last}." in name and not ("k_proj" in name or "v_proj" in name)
        assert (gradient.abs().max() == 0) == behind, name


def test_treft_gradient_equals_finite_differences(items: Items) -> None:
    model, _, reference = trained_model("full", "llama")
    defense, batch = TReFT(tokens=("prefix", "postfix")).build(SETUP), batch_of(items)
    weight = model.model.layers[0].mlp.down_proj.weight
    torch.manual_seed(3)
    direction, step = torch.randn_like(weight), 1e-3
    slope = (
        torch.autograd.grad(penalty_of(defense, model, batch, reference), weight)[0] * direction
    ).sum()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(penalty_of(defense, model, batch, reference).double())
            weight.sub_(sign * step * direction)
    torch.testing.assert_close(
        (values[0] - values[1]).float() / (2 * step), slope, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("roles", [("prefix",), ("query", "postfix", "response")], ids="+".join)
def test_treft_is_zero_for_a_fresh_adapter(
    architecture: str, roles: tuple[str, ...], items: Items
) -> None:
    model = with_lora(tiny(architecture), size=0.0)
    penalty = penalty_of(TReFT(tokens=roles).build(SETUP), model, batch_of(items), Reference(model))
    assert penalty.requires_grad
    assert penalty.item() < 1e-10


def _raw_projections(model: Any, row: Example) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The published script's keys and values: projections of the residual stream, without the
    layer's input norm."""
    inner = model.get_base_model() if is_adapted(model) else model
    states = inner(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
    return [
        (layer.self_attn.k_proj(state[0]), layer.self_attn.v_proj(state[0]))
        for layer, state in zip(inner.model.layers, states)
    ]


def test_what_is_held_is_not_the_projection_of_the_raw_residual_stream(items: Items) -> None:
    model, start, reference = trained_model("lora", "llama")
    found = penalty_of(TReFT(tokens=("query",)).build(SETUP), model, batch_of(items), reference)
    raw = naive_treft(model, start, items, [Role.QUERY], of=_raw_projections)
    true = naive_treft(model, start, items, [Role.QUERY], of=own_cache)
    assert abs(found - true) < 1e-4 * true
    assert abs(found - raw) > 0.05 * true


def test_retain_rows_are_not_held(items: Items) -> None:
    model, _, reference = trained_model("lora", "llama")
    defense = TReFT(tokens=("prefix", "response")).build(SETUP)
    without = [item for item in items if not item[1]]
    torch.testing.assert_close(
        penalty_of(defense, model, batch_of(items), reference),
        penalty_of(defense, model, batch_of(without), reference),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("roles", [[], ["prefix", "prefix"], ["pad"], ["system"]])
def test_treft_refuses_roles_it_cannot_hold(roles: list[str]) -> None:
    with pytest.raises(ValidationError):
        TReFT(tokens=roles)


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tokens", ["response", "prompt", "all"])
@pytest.mark.parametrize("where", ["train", "retain"])
def test_kl_equals_the_naive_form_on_its_tokens(
    where: str, tokens: str, direction: str, side: str, items: Items
) -> None:
    model, start, reference = trained_model("lora", "llama")
    defense = KL(where=where, tokens=tokens, direction=direction).build(SETUP)
    found = penalty_of(defense, model, batch_of(items, side), reference)
    expected = naive_kl(model, start, items, where, tokens, direction)
    assert expected > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(gradients(found, model), gradients(expected, model), 1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_kl_is_right_in_every_architecture(architecture: str, method: str, items: Items) -> None:
    model, start, reference = trained_model(method, architecture)
    found = penalty_of(
        KL(where="train", tokens="all").build(SETUP), model, batch_of(items), reference
    )
    expected = naive_kl(model, start, items, "train", "all", "reverse")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(gradients(found, model), gradients(expected, model), 1e-4)


def test_kl_is_zero_for_a_fresh_adapter(architecture: str, items: Items) -> None:
    model = with_lora(tiny(architecture), size=0.0)
    penalty = penalty_of(
        KL(where="train", tokens="all").build(SETUP), model, batch_of(items), Reference(model)
    )
    assert abs(penalty.item()) < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapted_head_is_off_in_the_reference(config: dict[str, Any], items: Items) -> None:
    model = with_lora(tiny("llama"), **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.2)
    found = penalty_of(KL(where="train").build(SETUP), model, batch_of(items), Reference(model))
    expected = naive_kl(model, tiny("llama"), items, "train", "response", "reverse")
    untouched = row_logits(tiny("llama"), items[1][0])
    with model.disable_adapter():
        torch.testing.assert_close(row_logits(model, items[1][0]), untouched)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("where", ["train", "retain"])
def test_kl_takes_the_most_probable_tokens_of_the_reference(
    where: str, direction: str, side: str, items: Items
) -> None:
    """They stand for more tokens than this penalty's own: another may ask for hidden states too."""
    model, _, reference = trained_model("lora", "gemma2")
    defense, batch = KL(where=where, direction=direction).build(SETUP), batch_of(items, side)
    other = KL(where="train", tokens="all").build(SETUP)
    needs = defense.needs(batch) | other.needs(batch)
    then = reference.taps(batch, needs)

    def total(reference_taps: Taps) -> Tensor:
        return total_of(defense, forward(model, then.head, batch, needs), reference_taps, batch)

    expected = total(then)
    slopes = gradients(expected, model)
    for k in (VOCABULARY, VOCABULARY - 1, 3):
        listed = top_k(then.head, then.hidden_BTD[needs.hidden_BT], k)
        found = total(replace(then, hidden_BTD=torch.empty(0), top_k=listed))
        if k == 3:
            assert 0.01 * expected < found < 0.999 * expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
            assert_same(gradients(found, model), slopes, 1e-4)


def test_kl_on_retain_rows_needs_retain_rows() -> None:
    with pytest.raises(DefenseError, match="retain"):
        KL().build(NO_RETAIN)
    assert KL(where="train").build(NO_RETAIN).riders == 0
    assert KL(retain_ratio=0.5).build(SETUP).riders == 0.5


# ---------------------------------------------------------------- LDIFS


def ldifs_of(model: Any, **fields: Any) -> Defense:
    defense = LDIFS(**fields).build(SETUP)
    defense.start(model)
    return defense


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layers", [(1,), (2, 4), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ldifs_equals_the_naive_form(
    method: str, layers: tuple[int, ...], side: str, items: Items
) -> None:
    start = tiny("llama", layers=4)
    model = with_lora(start) if method == "lora" else tiny("llama", layers=4)
    reference = Reference(model)
    model = model if method == "lora" else nudged(model)
    found = penalty_of(ldifs_of(model, layers=layers), model, batch_of(items, side), reference)
    expected = naive_ldifs(model, start, items, layers)
    assert expected > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(gradients(found, model), gradients(expected, model), 1e-4)


def test_ldifs_is_right_in_every_architecture(architecture: str, items: Items) -> None:
    model, start, reference = trained_model("lora", architecture)
    found = penalty_of(ldifs_of(model, layers=(1, 2)), model, batch_of(items), reference)
    torch.testing.assert_close(found, naive_ldifs(model, start, items, (1, 2)), rtol=1e-4, atol=0)


def test_ldifs_trains_every_tensor_up_to_its_last_layer_and_none_behind(items: Items) -> None:
    """The published code's hooks detach the features: it has no gradient at all."""
    model = with_lora(tiny("llama", layers=4))
    penalty = penalty_of(ldifs_of(model, layers=(1, 3)), model, batch_of(items), Reference(model))
    for name, gradient in gradients(penalty, model).items():
        assert (gradient.abs().max() == 0) == ("layers.3." in name), name


def test_ldifs_is_zero_for_a_fresh_adapter(architecture: str, items: Items) -> None:
    model = with_lora(tiny(architecture), size=0.0)
    penalty = penalty_of(ldifs_of(model), model, batch_of(items), Reference(model))
    assert penalty.requires_grad
    assert penalty.item() < 1e-10


@pytest.mark.parametrize(
    ("fields", "number", "expected"),
    [
        ({}, 30, (1, 8, 16, 23, 30)),
        ({}, 5, (1, 2, 3, 4, 5)),
        ({}, 3, (1, 2, 3)),
        ({"layers": 2}, 12, (1, 12)),
        ({"layers": 1}, 12, (1,)),
        ({"layers": [7, 2]}, 12, (2, 7)),
        ({"stride": 4}, 12, (4, 8, 12)),
        ({"stride": 20}, 12, (12,)),
    ],
)
def test_layers_of_ldifs(fields: dict[str, Any], number: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(LDIFS(**fields), number) == expected


@pytest.mark.parametrize(
    "fields", [{"layers": 0}, {"layers": []}, {"layers": [3, 3]}, {"layers": [0, 2]}, {"stride": 0}]
)
def test_ldifs_refuses_layers_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LDIFS(**fields)


def test_ldifs_names_the_layer_that_is_not_there() -> None:
    with pytest.raises(DefenseError, match=r"ldifs\.layers: the model has 2 layers, found 9"):
        ldifs_of(tiny("llama"), layers=(1, 9))
    with pytest.raises(ValidationError, match="layers or stride, not both"):
        LDIFS(layers=3, stride=2)


# ---------------------------------------------------------------- budget


def test_a_budget_moves_the_weight_by_dual_ascent_in_log_space() -> None:
    defense = KL(where="train", budget=0.1).build(SETUP)
    assert defense.weight == 1.0
    ascended = 0.0
    for mean in (0.0, 0.05, 0.1, 0.15, 0.2, 7.0):
        defense.observe(mean)
        excess = min(1.0, mean / 0.1 - 1)
        ascended += 0.2 * excess
        assert defense.weight == pytest.approx(math.exp(ascended) * math.exp(2 * excess), rel=1e-12)
    other = KL(where="train", budget=0.1).build(SETUP)
    other.load_state_dict(json.loads(json.dumps(defense.state_dict())))
    assert other.weight == defense.weight
    other.observe(0.1)
    defense.observe(0.1)
    assert other.weight == defense.weight
    assert defense.record() == {"budget": 0.1, "weight": defense.weight}


def test_a_penalty_that_answers_late_settles_at_its_budget() -> None:
    """A penalty that moves to 1 / sqrt(weight) in about twelve steps, as on a real model."""
    defense = KL(where="train", budget=0.2).build(SETUP)
    penalty, seen = 0.0, []
    for _ in range(150):
        penalty += (defense.weight**-0.5 - penalty) / 12
        defense.observe(penalty)
        seen.append(penalty)
    assert max(seen[60:]) < 0.25
    assert min(seen[60:]) > 0.16
    assert seen[-1] == pytest.approx(0.2, rel=0.01)


def test_a_fixed_weight_stays() -> None:
    defense = KL(where="train", weight=0.7).build(SETUP)
    defense.observe(5.0)
    assert defense.weight == 0.7
    assert defense.state_dict() == defense.record() == {}


@pytest.mark.parametrize("config", [KL, TReFT, LDIFS])
def test_weight_and_budget_exclude_each_other(config: Any) -> None:
    with pytest.raises(ValidationError, match="weight or budget, not both"):
        config(weight=2.5, budget=0.1)
    with pytest.raises(ValidationError):
        config(budget=0.0)


class Sharpen(Defense):
    """A loss of one's own: minus the log-probability of token 7 on all positions."""

    name = "sharpen"
    weight = 0.5

    def count(self, batch: dict[str, Tensor]) -> int:
        return batch["roles"].numel()

    def logit_loss(self, batch: dict[str, Tensor], reference: Taps) -> LogitLoss:
        everywhere_BT = torch.ones_like(batch["roles"], dtype=torch.bool)
        return CrossEntropy(everywhere_BT, torch.full((everywhere_BT.numel(),), 7))


def test_a_logit_loss_alone_is_a_penalty(items: Items) -> None:
    assert Sharpen().has_penalty
    assert not Defense().has_penalty
    model, _, reference = trained_model("lora", "llama")
    batch = batch_of([items[1]])
    expected = -row_logits(model, items[1][0]).log_softmax(-1)[:, 7].mean()
    torch.testing.assert_close(penalty_of(Sharpen(), model, batch, reference), expected)


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("where", ["train", "retain"])
def test_a_shared_reference_forward_gives_each_defense_its_own_numbers(
    where: str, side: str, items: Items
) -> None:
    model, _, reference = trained_model("lora", "qwen3")
    batch, defenses = (
        batch_of(items, side),
        [
            KL(where=where).build(SETUP),
            TReFT(tokens=("prefix", "query")).build(SETUP),
            ldifs_of(model),
        ],
    )
    needs = [defense.needs(batch) for defense in defenses]
    with torch.no_grad():
        student = forward(model, find_head(model.get_base_model()), batch, reduce(or_, needs))
        shared = reference.taps(batch, reduce(or_, needs))
        for defense in defenses:
            alone = penalty_of(defense, model, batch, reference)
            together = total_of(defense, student, shared, batch) / defense.count(batch)
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "defense", [KL(where="train"), TReFT(tokens=("prefix", "postfix")), LDIFS()], ids=str
)
def test_what_is_needed_is_known_without_waiting_for_the_device(defense: Any, items: Items) -> None:
    """Meta tensors have no values: whatever had to look at one would fail."""
    batch = {name: tensor.to("meta") for name, tensor in batch_of(items).items()}
    assert defense.build(SETUP).needs(batch).rows_B().shape == (len(items),)


# ---------------------------------------------------------------- interleave and the union


@pytest.mark.parametrize(("ratio", "added"), [(0.05, 1), (0.3, 3), (1.0, 10), (2.5, 25)])
def test_interleave_adds_its_share_of_safe_rows(ratio: float, added: int) -> None:
    rows, pool = training_rows(10), training_rows(4, seed=7)
    defense = Interleave(ratio=ratio).build(replace(SETUP, retain=pool))
    mixed = defense.change_data(rows, random.Random(0))
    assert mixed[:10] == rows
    counts = [sum(row is safe for row in mixed[10:]) for safe in pool]
    assert sum(counts) == len(mixed) - 10 == added
    assert max(counts) - min(counts) <= 1


def test_interleave_takes_its_own_pool_and_refuses_an_empty_one() -> None:
    assert Interleave(pool="8").build(NO_RETAIN).pool == training_rows(2, seed=8)
    with pytest.raises(DefenseError, match="no safe rows"):
        Interleave().build(NO_RETAIN)


def test_a_list_of_configs_and_a_recipe_make_the_same_defenses() -> None:
    listed = Defenses.of([TReFT(weight=3), KL(where="train")])
    assert listed == Defenses.model_validate({"kl": {"where": "train"}, "treft": {"weight": 3}})
    assert [defense.name for defense in listed.build(SETUP)] == ["kl", "treft"]
    with pytest.raises(ValidationError):
        Defenses.model_validate({"kll": {}})


@pytest.mark.parametrize(
    "tree",
    [
        {
            "kl": {"budget": 0.1, "where": "train"},
            "treft": {"budget": 0.01},
            "ldifs": {"budget": 0.2},
        },
        {"kl": {"weight": 0.3}, "ldifs": {"stride": 4}, "frozen_prefix": {"until": "header"}},
        {"ldifs": {"layers": [2, 4]}, "inoculation": {}, "interleave": {"ratio": 0.2}},
        {"safelora": {"base": "org/base", "lowest": 3}},
        {"safelora": {"base": "org/base", "threshold": 0.5}},
        {"steering": {"layers": [12], "units": "norm"}, "subspace_lock": {}},
    ],
)
def test_a_resolved_recipe_reads_back_as_it_was(tree: dict[str, Any]) -> None:
    recipe = parse_recipe({"defenses": tree})
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_two_configs_of_one_kind_are_not_silently_made_one() -> None:
    with pytest.raises(RecipeError, match="one of each kind"):
        Defenses.of([KL(where="train"), KL(where="retain")])
