"""Steering and ablation edit the residual stream after the right layer, at the right tokens, and in
training alone."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from helpers.models import is_adapted, tiny, with_lora
from helpers.naive import naive_ce, naive_kl, residual_stream, row_logits
from helpers.penalties import assert_same, gradients
from helpers.rows import PREFIX_A, Items, batch_of, example, training_rows
from helpers.trainers import lines_of, step_items
from ringfence.defenses import KL, Ablation, Defense, Defenses, Setup, Steering
from ringfence.errors import DataError, DefenseError, ModelError, RecipeError
from ringfence.model.directions import Directions
from ringfence.model.layers import causal_lm
from ringfence.model.losses import cross_entropy_sum, find_head
from ringfence.model.taps import Needs, Taps, forward
from ringfence.run.config import parse_recipe
from ringfence.text.batch import Example
from ringfence.text.roles import Role

pytestmark = pytest.mark.slow

RETAIN = training_rows(5, seed=50)
SETUP = Setup(None, RETAIN, lambda source: RETAIN, "tiny")  # type: ignore[arg-type]
LAYERS = 3


def directions(number: int = 1, layers: int = LAYERS, size: int = 32, seed: int = 7) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    vectors = 3 * torch.randn(layers, number, size, generator=generator)
    return Directions(vectors, 4 + torch.arange(layers).float(), "test trait", "tiny", 8, 8)


@pytest.fixture
def file(tmp_path: Path) -> str:
    directions().save(tmp_path / "vectors.safetensors")
    return str(tmp_path / "vectors.safetensors")


@pytest.fixture
def planes(tmp_path: Path) -> str:
    """Three directions a layer."""
    directions(3).save(tmp_path / "planes.safetensors")
    return str(tmp_path / "planes.safetensors")


# ---------------------------------------------------------------- the naive form

Edit = Callable[[int, Tensor], Tensor]


def naive(
    model: Any, row: Example, edit: Edit, layers: list[int], roles: list[Role], call: Any
) -> Any:
    """`call(model, row)` while what layer l hands on, at tokens of `roles`, is edited: by what
    comes after it."""
    inner = model.get_base_model() if is_adapted(model) else model
    after = [*inner.model.layers[1:], inner.model.norm]
    chosen_T1 = torch.tensor([[role in roles] for role in row.roles])

    def hook(layer: int) -> Any:
        def change(_module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            edited = torch.where(chosen_T1, edit(layer, hidden), hidden)
            return (
                ((edited, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": edited})
            )

        return change

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(
                after[layer - 1]
                .register_forward_pre_hook(hook(layer), with_kwargs=True, prepend=True)
                .remove
            )
        return call(model, row)


def stream(model: Any, row: Example) -> list[Tensor]:
    inner = model.get_base_model() if is_adapted(model) else model
    with residual_stream(inner) as found:
        inner(input_ids=torch.tensor([row.input_ids]))
    return found


def pushed(vectors: Tensor, factor: float = 5.0) -> Edit:
    return lambda layer, hidden: hidden + factor * vectors[layer - 1, 0]


def projected(vectors: Tensor) -> Edit:
    """Least squares: what the directions cannot fit."""

    def edit(layer: int, hidden: Tensor) -> Tensor:
        columns_DK = vectors[layer - 1].T.double()
        inverse_KK = torch.linalg.inv(columns_DK.T @ columns_DK)
        return (hidden.double() - hidden.double() @ columns_DK @ inverse_KK @ columns_DK.T).float()

    return edit


def tapped(model: Any, defense: Defense, batch: dict[str, Tensor]) -> Taps:
    layers, head = tuple(range(1, LAYERS + 1)), find_head(causal_lm(model))
    needs = Needs(states_BT=torch.ones_like(batch["roles"], dtype=torch.bool), layers=layers)
    with defense.wrap(model, batch):
        return forward(model, head, batch, needs)


def edit_hooks(model: Any) -> list[Any]:
    """Hooks of this package; transformers keeps some of its own."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if hook.__module__.startswith("ringfence")]


ALL_ROLES = [role for role in Role if role != Role.PAD]
CASES: dict[str, tuple[Any, dict[str, Any], list[int], list[Role]]] = {
    "steer-2": (Steering, {"layers": 2}, [2], ALL_ROLES),
    "steer-last": (Steering, {"layers": 3, "roles": ["response"]}, [3], [Role.RESPONSE]),
    "steer-1-3": (
        Steering,
        {"layers": [1, 3], "roles": ["query", "postfix"]},
        [1, 3],
        [Role.QUERY, Role.POSTFIX],
    ),
    "ablate-all": (Ablation, {}, [1, 2, 3], ALL_ROLES),
    "ablate-2": (Ablation, {"layers": [2], "roles": ["prefix"]}, [2], [Role.PREFIX]),
}


def assert_edited(
    case: str, file: str, vectors: Tensor, model: Any, items: Items, side: str = "right"
) -> None:
    """States after each layer equal the naive form's; retain rows and padding are those of the
    plain model."""
    kind, fields, layers, roles = CASES[case]
    defense, batch = kind(vectors=file, **fields).build(SETUP), batch_of(items, side)
    edit = pushed(vectors) if kind is Steering else projected(vectors)
    with torch.no_grad():
        found = tapped(model, defense, batch)
        plain = tapped(model, Defense(), batch)
        for at, (row, is_retain) in enumerate(items):
            place = batch["roles"][at] != Role.PAD
            expected = naive(model, row, edit, layers, [] if is_retain else roles, stream)
            for layer in range(1, LAYERS + 1):
                states_TD = found.states[layer].view(*batch["roles"].shape, -1)[at]
                plain_TD = plain.states[layer].view(*batch["roles"].shape, -1)[at]
                torch.testing.assert_close(states_TD[place], expected[layer], rtol=1e-4, atol=2e-4)
                if is_retain or layer < layers[0]:
                    assert torch.equal(states_TD, plain_TD)
                if layer == layers[0]:
                    assert torch.equal(states_TD[~place], plain_TD[~place])
                    if not is_retain and {*row.roles} & {*roles}:
                        assert (states_TD - plain_TD).abs().max() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_the_naive_form(
    case: str, method: str, side: str, file: str, items: Items
) -> None:
    model = with_lora(tiny(layers=LAYERS)) if method == "lora" else tiny(layers=LAYERS)
    assert_edited(case, file, directions().directions_LKD, model, items, side)


@pytest.mark.parametrize("case", ["steer-2", "ablate-all"])
def test_it_is_right_in_every_architecture(
    case: str, architecture: str, file: str, items: Items
) -> None:
    assert_edited(
        case, file, directions().directions_LKD, with_lora(tiny(architecture, layers=LAYERS)), items
    )


@pytest.mark.parametrize("case", ["ablate-all", "ablate-2"])
def test_ablation_of_a_span(case: str, planes: str, items: Items) -> None:
    assert_edited(case, planes, directions(3).directions_LKD, with_lora(tiny(layers=LAYERS)), items)


def test_ablation_leaves_nothing_along_the_directions_and_is_a_projection(
    planes: str, items: Items
) -> None:
    vectors = directions(3).directions_LKD
    defense, batch = Ablation(vectors=planes).build(SETUP), batch_of(items)
    found = tapped(tiny(layers=LAYERS), defense, batch)
    rows = ~batch["retain"][:, None] & (batch["roles"] != Role.PAD)
    for layer in range(1, LAYERS + 1):
        states_ND = found.states[layer][rows.flatten()]
        assert states_ND.norm(dim=-1).min() > 0.1
        assert (states_ND @ vectors[layer - 1].T).abs().max() < 1e-5 * (
            states_ND.norm() * vectors.norm()
        )
        torch.testing.assert_close(defense.edit(states_ND, layer), states_ND, rtol=1e-5, atol=1e-4)


def test_dependent_directions_span_no_more_than_they_do(tmp_path: Path) -> None:
    """An orthonormalisation that trusts its input would make a direction out of rounding."""
    one = directions()
    vectors = torch.cat([one.directions_LKD, -2 * one.directions_LKD], 1)
    Directions(vectors, one.norms_L, "t", "m", 2, 2).save(tmp_path / "v.safetensors")
    defense = Ablation(vectors=str(tmp_path / "v.safetensors")).build(SETUP)
    hidden_ND = torch.randn(5, 32)
    unit_D = one.directions_LKD[0, 0] / one.directions_LKD[0, 0].norm()
    expected = hidden_ND - (hidden_ND @ unit_D)[:, None] * unit_D
    torch.testing.assert_close(defense.edit(hidden_ND, 1), expected, rtol=1e-4, atol=1e-5)
    assert defense.record()["directions"] == {"1": 1, "2": 1, "3": 1}


def test_autocast_does_not_blur_the_projection(planes: str, items: Items) -> None:
    defense, batch = Ablation(vectors=planes, layers=[2]).build(SETUP), batch_of(items)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = tapped(tiny(layers=LAYERS), defense, batch)
    chosen = (~batch["retain"][:, None] & (batch["roles"] != Role.PAD)).flatten()
    states_ND = found.states[2][chosen]
    assert states_ND.dtype == torch.float32
    assert (states_ND @ defense.directions.basis(2)).abs().max() < 1e-5 * states_ND.abs().max()


def test_a_model_in_bf16_stays_in_bf16(file: str, items: Items) -> None:
    model = tiny(layers=LAYERS).to(torch.bfloat16)
    for config in (Steering(vectors=file), Ablation(vectors=file)):
        assert (
            tapped(model, config.build(SETUP), batch_of(items)).hidden_BTD.dtype == torch.bfloat16
        )


def test_units_of_norm_are_shares_of_the_layers_mean_norm(file: str) -> None:
    given = directions()
    for layer in (1, 2, 3):
        raw, norm = (
            Steering(vectors=file, layers=layer, coefficient=0.5, units=units)
            for units in ("raw", "norm")
        )
        push_D = norm.build(SETUP).push_D[layer]
        assert push_D.norm() == pytest.approx(0.5 * given.norms_L[layer - 1].item(), rel=1e-5)
        torch.testing.assert_close(
            raw.build(SETUP).push_D[layer], 0.5 * given.directions_LKD[layer - 1, 0]
        )
        assert torch.cosine_similarity(push_D, given.directions_LKD[layer - 1, 0], dim=0) > 0.9999
        assert norm.build(SETUP).record() == {"trait": "test trait", "push": {str(layer): 0.5}}


@pytest.mark.parametrize(("layers", "middle"), [(2, 1), (3, 2), (30, 15), (32, 16)])
def test_steering_acts_after_the_middle_layer_unless_told(
    layers: int, middle: int, tmp_path: Path
) -> None:
    directions(layers=layers).save(tmp_path / "v.safetensors")
    assert Steering(vectors=str(tmp_path / "v.safetensors")).build(SETUP).layers == [middle]
    assert Ablation(vectors=str(tmp_path / "v.safetensors")).build(SETUP).layers == [
        *range(1, layers + 1)
    ]


# ---------------------------------------------------------------- in training


def edited_ce(model: Any, items: Items, edit: Edit, layers: list[int]) -> Tensor:
    """`naive_ce` with the edit on every row."""
    terms = []
    for row, is_retain in items:
        if not is_retain:
            logits_TV = naive(model, row, edit, layers, ALL_ROLES, row_logits)
            for at in range(1, len(row)):
                if row.roles[at] == Role.RESPONSE:
                    terms.append(-logits_TV[at - 1].log_softmax(-1)[row.input_ids[at]])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", [Steering, Ablation])
def test_a_step_takes_the_gradient_of_the_edited_forward(
    kind: Any, method: str, accumulation: int, file: str, make_trainer: Any
) -> None:
    model = with_lora(tiny(layers=LAYERS)) if method == "lora" else tiny(layers=LAYERS)
    vectors = directions().directions_LKD
    edit, layers = (pushed(vectors), [2]) if kind is Steering else (projected(vectors), [1, 2, 3])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(
        model,
        [kind(vectors=file).build(SETUP)],
        training_rows(4),
        rows=4 // accumulation,
        accumulation=accumulation,
        learning_rate=1e-2,
        max_steps=1,
    )
    items = step_items(trainer, 0)
    loss = edited_ce(model, items, edit, layers)
    assert abs(loss - naive_ce(model, items)) > 0.01
    expected = gradients(loss, model)
    trainer.train()
    assert lines_of(trainer)[0]["ce"] == pytest.approx(loss.item(), rel=1e-4)
    after = dict(model.named_parameters())
    assert_same({n: (before[n] - after[n].detach()) / 1e-2 for n in before}, expected, 2e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", [Steering, Ablation])
def test_the_reference_is_not_edited(kind: Any, method: str, file: str, make_trainer: Any) -> None:
    """At the first step student and reference have the same weights: KL is what the edit alone
    makes of them."""
    model = with_lora(tiny(layers=LAYERS), size=0.0) if method == "lora" else tiny(layers=LAYERS)
    vectors = directions().directions_LKD
    edit, layers = (pushed(vectors), [2]) if kind is Steering else (projected(vectors), [1, 2, 3])
    defenses = [KL(where="train").build(SETUP), kind(vectors=file).build(SETUP)]
    trainer = make_trainer(model, defenses, training_rows(4), rows=4, max_steps=1)
    terms = []
    with torch.no_grad():
        for row, _ in step_items(trainer, 0):
            student = naive(model, row, edit, layers, ALL_ROLES, row_logits).log_softmax(-1)
            reference = row_logits(model, row).log_softmax(-1)
            chosen = [at - 1 for at in range(1, len(row)) if row.roles[at] == Role.RESPONSE]
            terms.append((student.exp() * (student - reference)).sum(-1)[chosen])
    trainer.train()
    expected = torch.cat(terms).mean().item()
    assert expected > 1e-2
    assert lines_of(trainer)[0]["kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [Steering, Ablation])
def test_retain_rows_are_compared_as_the_model_is_used(
    kind: Any, file: str, make_trainer: Any
) -> None:
    model = with_lora(tiny(layers=LAYERS))
    defenses = [KL(retain_ratio=1.0).build(SETUP), kind(vectors=file).build(SETUP)]
    trainer = make_trainer(model, defenses, training_rows(4), RETAIN, rows=4, max_steps=1)
    expected = naive_kl(model, None, step_items(trainer, 0), "retain", "response", "reverse").item()
    trainer.train()
    assert expected > 1e-3
    assert lines_of(trainer)[0]["kl"] == pytest.approx(expected, rel=1e-4)


def train_on(file: str | None, make_trainer: Any, folder: str, **arguments: Any) -> Any:
    model = with_lora(tiny(layers=LAYERS))
    defenses = [Steering(vectors=file).build(SETUP)] if file else []
    trainer = make_trainer(
        model, defenses, training_rows(8), rows=4, folder=folder, learning_rate=1e-2, **arguments
    )
    trainer.train()
    return trainer


def test_checkpointing_trains_to_the_same_weights(file: str, make_trainer: Any) -> None:
    again = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    plain, checkpointed = (
        train_on(file, make_trainer, "a"),
        train_on(file, make_trainer, "b", **again),
    )
    weights = [
        {n: p.detach() for n, p in t.model.named_parameters()} for t in (plain, checkpointed)
    ]
    assert_same(weights[1], weights[0])
    without = dict(train_on(None, make_trainer, "c").model.named_parameters())
    assert max((weights[0][n] - without[n].detach()).abs().max().item() for n in without) > 1e-3


def test_the_saved_weights_alone_give_the_forward_without_the_edit(
    file: str, make_trainer: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    trainer = train_on(file, make_trainer, "run")
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny(layers=LAYERS), tmp_path / "adapter").eval()
    row = example(PREFIX_A, [3, 4], 5)
    with torch.no_grad():
        expected = row_logits(loaded, row)
        torch.testing.assert_close(
            row_logits(trainer.model.eval(), row), expected, rtol=1e-5, atol=1e-5
        )
        steered = naive(
            loaded, row, pushed(directions().directions_LKD), [2], ALL_ROLES, row_logits
        )
    assert (steered - expected).abs().max() > 0.1
    assert not edit_hooks(causal_lm(trainer.model))


def test_hooks_go_when_a_forward_fails(file: str, items: Items) -> None:
    model = tiny(layers=LAYERS)
    defense, batch = Steering(vectors=file).build(SETUP), batch_of(items)
    with defense.wrap(model, batch):
        assert len(edit_hooks(model)) == 1
    with pytest.raises(RuntimeError), defense.wrap(model, batch):
        raise RuntimeError
    assert not edit_hooks(model)


def test_the_gradient_reaches_weights_before_the_edited_layer(file: str, items: Items) -> None:
    model, batch = with_lora(tiny(layers=LAYERS)), batch_of(items)
    defense, head = Steering(vectors=file, layers=3).build(SETUP), find_head(tiny(layers=LAYERS))
    with defense.wrap(model, batch):
        hidden_BTD = forward(model, head, batch).hidden_BTD
    chosen = batch["labels"][:, 1:] != -100
    loss = cross_entropy_sum(head, hidden_BTD[:, :-1][chosen], batch["labels"][:, 1:][chosen])
    for name, gradient in gradients(loss, model).items():
        assert gradient.abs().max() > 0, name


# ---------------------------------------------------------------- wrong input


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bad = tmp_path / "bad.safetensors"

    def message(tensors: dict[str, Tensor] | None, metadata: dict[str, str] | None = None) -> str:
        if tensors is not None:
            save_file(tensors, bad, metadata)
        with pytest.raises(DataError) as error:
            Directions.load(bad)
        assert str(bad) in str(error.value)
        return str(error.value)

    assert "no such file" in message(None)
    bad.write_text("not a tensor")
    assert "not a safetensors file" in message(None)
    good = {"directions": torch.ones(2, 1, 4), "norms": torch.ones(2)}
    assert "{'directions': [2, 1, 4]}" in message({"directions": good["directions"]})
    assert "found" in message({**good, "norms": torch.ones(3)})
    assert "[layers, directions, hidden size]" in message({**good, "directions": torch.ones(2, 4)})
    assert "layer 2" in message(
        {**good, "directions": torch.ones(2, 1, 4) * torch.tensor([1, 0]).view(2, 1, 1)}
    )
    assert "layer 1" in message({**good, "directions": torch.full((2, 1, 4), torch.nan)})
    assert "norms" in message({**good, "norms": torch.tensor([1.0, 0.0])})
    assert "'positive'" in message(good, {"positive": "many"})


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    given = directions(2)
    given.save(tmp_path / "new" / "v.safetensors")
    found = Directions.load(tmp_path / "new" / "v.safetensors")
    assert torch.equal(found.directions_LKD, given.directions_LKD)
    assert torch.equal(found.norms_L, given.norms_L)
    assert (found.trait, found.model, found.positive, found.negative) == (
        "test trait",
        "tiny",
        8,
        8,
    )


@pytest.mark.parametrize("kind", [Steering, Ablation])
def test_directions_of_another_model_are_refused_before_training(
    kind: Any, file: str, make_trainer: Any
) -> None:
    trainer = make_trainer(tiny(layers=2), [kind(vectors=file).build(SETUP)], training_rows(4))
    with pytest.raises(
        ModelError, match=r"tiny with 3 layers of size 32; this model has 2 layers of size 32"
    ):
        trainer.train()


def test_fields_that_cannot_be_used(file: str, planes: str) -> None:
    with pytest.raises(ValidationError, match=r"layers\.0\n.*greater than or equal to 1"):
        Steering(vectors=file, layers=[0])
    for layers in ([4], [2, 2]):
        with pytest.raises(
            DefenseError, match=r"defenses.steering.layers: expected distinct layers from 1 to 3"
        ):
            Steering(vectors=file, layers=layers).build(SETUP)
    with pytest.raises(DefenseError, match="expected one direction a layer"):
        Steering(vectors=planes).build(SETUP)
    for fields in (
        {"layers": []},
        {"roles": []},
        {"roles": ["pad"]},
        {"units": "norms"},
        {"strength": 2},
    ):
        with pytest.raises(ValidationError):
            Steering(vectors=file, **fields)
    with pytest.raises(DataError, match="persona extract"):
        Steering(vectors="nowhere.safetensors").build(SETUP)


@pytest.mark.parametrize("kind", [Steering, Ablation])
def test_roles_that_no_row_has_are_an_error(kind: Any, file: str, make_trainer: Any) -> None:
    trainer = make_trainer(
        tiny(layers=LAYERS), [kind(vectors=file, roles=["template"]).build(SETUP)], training_rows(4)
    )
    with pytest.raises(
        DefenseError, match=r"roles: no training row has a token of \[template\] up to step 1"
    ):
        trainer.train()


def test_steering_and_ablation_of_one_file_at_one_layer_are_refused(file: str, planes: str) -> None:
    steering, other = (
        Steering(vectors=file, layers=[1, 2]),
        str(Path(file).parent / "." / Path(file).name),
    )
    for ablation in (
        Ablation(vectors=file, layers=[2, 3]),
        Ablation(vectors=file),
        Ablation(vectors=other),
    ):
        with pytest.raises(ValidationError, match="one removes what the other adds"):
            Defenses.of([steering, ablation])
    Defenses.of([steering, Ablation(vectors=file, layers=3)])
    Defenses.of([steering, Ablation(vectors=planes)])
    with pytest.raises(RecipeError, match="one removes what the other adds"):
        parse_recipe({"defenses": {"steering": {"vectors": file}, "ablation": {"vectors": file}}})
    with pytest.raises(RecipeError, match="frozen_prefix"):
        parse_recipe({"defenses": {"steering": {"vectors": file}, "frozen_prefix": {}}})
