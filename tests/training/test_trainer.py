"""DefendedTrainer: losses, normalisation, number of forwards, resuming."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import tiny, with_lora
from helpers.naive import naive_ce, naive_kl, naive_ldifs, naive_treft
from helpers.penalties import assert_same, gradients
from helpers.rows import PREFIX_A, PREFIX_B, Items, batch_of, example, training_rows
from helpers.trainers import RETAIN, Crash, build, lines_of, step_items
from ringfence.defenses import KL, LDIFS, DefenseConfig, Interleave, TReFT
from ringfence.errors import DefenseError
from ringfence.model.layers import causal_lm
from ringfence.model.taps import Needs, forward
from ringfence.text.batch import Example
from ringfence.text.roles import Role
from ringfence.training import trainer as trainer_module
from ringfence.training.reference import Reference

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- losses of a step


ALL = (
    KL(weight=0.7, where="retain", retain_ratio=0.5),
    LDIFS(weight=0.4, layers=(1, 2)),
    TReFT(weight=3.0, tokens=("prefix", "postfix")),
)
SETS: dict[str, tuple[DefenseConfig, ...]] = {
    "none": (),
    "kl-train": (KL(weight=0.7, where="train", tokens="all"),),
    "kl-retain": (KL(weight=0.7, where="retain", retain_ratio=0.5),),
    "kl-same-tokens": (KL(weight=0.7, where="train", tokens="response", direction="forward"),),
    "treft": (TReFT(weight=3.0),),
    "ldifs": (LDIFS(weight=0.4, layers=(1, 2)),),
    "all": ALL,
}


def naive_parts(model: Any, configs: tuple[DefenseConfig, ...], items: Items) -> dict[str, Tensor]:
    """Unweighted means over all tokens of the step."""
    parts = {"ce": naive_ce(model, items)}
    for config in configs:
        if isinstance(config, KL):
            parts["kl"] = naive_kl(
                model, None, items, config.where, config.tokens, config.direction
            )
        if isinstance(config, LDIFS):
            assert isinstance(config.layers, tuple)
            parts["ldifs"] = naive_ldifs(model, None, items, config.layers)
        if isinstance(config, TReFT):
            parts["treft"] = naive_treft(
                model, None, items, [Role.parse(name) for name in config.tokens]
            )
    return parts


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_a_step_is_the_mean_over_all_its_tokens(
    name: str, shape: tuple[int, int], llama_lora: Any, make_trainer: Any
) -> None:
    """Loss, logged penalties and the change of the weights equal the naive form on the rows of the
    whole step."""
    configs, rate = SETS[name], 1e-2
    before = {n: p.detach().clone() for n, p in llama_lora.named_parameters() if p.requires_grad}
    rows, accumulation = shape
    trainer = make_trainer(
        llama_lora,
        build(*configs),
        training_rows(7),
        RETAIN,
        rows,
        accumulation,
        learning_rate=rate,
        max_steps=1,
    )
    items = step_items(trainer, 0)
    parts = naive_parts(llama_lora, configs, items)
    loss = parts["ce"] + sum(
        config.weight * parts[type(config).__name__.lower()] for config in configs
    )
    expected = gradients(loss, llama_lora)
    trainer.train()
    [line] = lines_of(trainer)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    for part, value in parts.items():
        assert line[part] == pytest.approx(value.item(), rel=1e-4, abs=2e-6)
    after = {n: p.detach() for n, p in llama_lora.named_parameters() if p.requires_grad}
    assert_same({n: (before[n] - after[n]) / rate for n in before}, expected, 1e-3)


@pytest.mark.parametrize("name", SETS)
def test_accumulation_does_not_change_training(name: str, make_trainer: Any) -> None:
    """1 x 8 and 4 x 2 rows, and a short last step of 1 x 5 and 2 + 2 + 1."""
    results = []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = with_lora(tiny("llama"))
        trainer = make_trainer(
            model,
            build(*SETS[name]),
            training_rows(13),
            RETAIN,
            rows,
            accumulation,
            f"{rows}",
            learning_rate=3e-3,
        )
        trainer.train()
        results.append(
            (
                lines_of(trainer),
                {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
            )
        )
    (lines, weights), (other_lines, other_weights) = results
    assert [line["step"] for line in lines] == [1, 2]
    for line, other in zip(lines, other_lines, strict=True):
        for part in ("loss", "ce", *(type(config).__name__.lower() for config in SETS[name])):
            assert line[part] == pytest.approx(
                other[part], rel=1e-4, abs=1e-4 if part == "loss" else 2e-6
            )
    assert_same(other_weights, weights)
    start = {
        n: p.detach() for n, p in with_lora(tiny("llama")).named_parameters() if p.requires_grad
    }
    assert max((weights[n] - start[n]).abs().max().item() for n in start) > 1e-3


def test_a_model_without_loss_arguments_is_scaled_alike(llama_lora: Any, make_trainer: Any) -> None:
    """Trainer would divide such a model's loss by the number of accumulation steps once more."""
    llama_lora.get_base_model().accepts_loss_kwargs = False
    trainer = make_trainer(llama_lora, [], training_rows(4), rows=1, accumulation=4)
    trainer.train()
    assert lines_of(trainer)[0]["loss"] == pytest.approx(
        naive_ce(llama_lora, step_items(trainer, 0)).item(), rel=1e-4
    )


def test_retain_rows_are_not_learnt(make_trainer: Any) -> None:
    """With weight 0 the riders are there but change neither cross-entropy nor weights."""
    changes = []
    for configs in ((), (KL(weight=0.0, retain_ratio=1.0),)):
        model = with_lora(tiny("llama"))
        folder = f"riders{len(configs)}"
        trainer = make_trainer(
            model, build(*configs), training_rows(8), RETAIN, 4, folder=folder, learning_rate=1e-2
        )
        assert sum(is_retain for _, is_retain in step_items(trainer, 0)) == (4 if configs else 0)
        trainer.train()
        changes.append(
            (
                [line["ce"] for line in lines_of(trainer)],
                {n: p.detach() for n, p in model.named_parameters()},
            )
        )
    # Riders draw from the generator after the order is drawn, so both runs see the same rows.
    assert changes[0][0] == pytest.approx(changes[1][0], rel=1e-4)
    assert_same(changes[1][1], changes[0][1])


@pytest.mark.parametrize("where", ["train", "retain"])
def test_every_k_acts_on_each_kth_step_times_k(
    where: str, llama_lora: Any, make_trainer: Any
) -> None:
    """Over two epochs of five steps, each with its own rows."""
    kl, treft = KL(weight=0.5, where=where, every=2), TReFT(weight=2.0, every=3)
    trainer = make_trainer(
        llama_lora, build(kl, treft), training_rows(18), RETAIN, 4, num_train_epochs=2
    )
    trainer.train()
    lines = lines_of(trainer)
    assert len(lines) == 10
    for step, line in enumerate(lines):
        items = step_items(trainer, step % 5, epoch=step // 5)
        expected = naive_ce(llama_lora, items)
        if step % 2 == 0:
            expected = expected + 2 * 0.5 * naive_kl(
                llama_lora, None, items, where, "response", "reverse"
            )
        if step % 3 == 0:
            expected = expected + 3 * 2.0 * naive_treft(llama_lora, None, items, [Role.PREFIX])
        assert line["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-4), step
        assert ("kl" in line, "treft" in line) == (step % 2 == 0, step % 3 == 0)


def test_a_logged_penalty_is_the_mean_over_the_steps_it_acted_on(
    llama_lora: Any, make_trainer: Any
) -> None:
    trainer = make_trainer(
        llama_lora, build(TReFT(every=2)), training_rows(16), rows=4, logging_steps=4
    )
    trainer.train()
    values = [
        naive_treft(llama_lora, None, step_items(trainer, step), [Role.PREFIX]).item()
        for step in (0, 2)
    ]
    assert lines_of(trainer)[0]["treft"] == pytest.approx(sum(values) / 2, rel=1e-4)


def test_logs_are_means_over_the_steps_since_the_last(llama_lora: Any, make_trainer: Any) -> None:
    trainer = make_trainer(
        llama_lora, build(*ALL), training_rows(16), RETAIN, 2, 2, logging_steps=2
    )
    trainer.train()
    lines = lines_of(trainer)
    assert [line["step"] for line in lines] == [2, 4]
    for at, line in enumerate(lines):
        parts = [
            naive_parts(llama_lora, ALL, step_items(trainer, 2 * at + step)) for step in (0, 1)
        ]
        for name in ("ce", "kl", "treft"):
            assert line[name] == pytest.approx(
                sum(part[name].item() for part in parts) / 2, rel=1e-4, abs=2e-6
            )


# ---------------------------------------------------------------- errors, never a silent zero


def test_a_role_that_no_row_has_raises(llama_lora: Any, make_trainer: Any) -> None:
    trainer = make_trainer(llama_lora, build(TReFT(tokens=("template",))), training_rows(4))
    with pytest.raises(DefenseError, match="treft"):
        trainer.train()


def test_a_micro_batch_without_the_role_is_no_error(llama_lora: Any, make_trainer: Any) -> None:
    """Only one of four rows has two turns; the step as a whole has template tokens."""
    rows = [*training_rows(3), example(PREFIX_A, [2, 3, 2, 3], 77)]
    trainer = make_trainer(
        llama_lora, build(TReFT(weight=2, tokens=("template",))), rows, rows=1, accumulation=4
    )
    trainer.train()
    expected = naive_treft(llama_lora, None, [(row, False) for row in rows], [Role.TEMPLATE])
    assert lines_of(trainer)[0]["treft"] == pytest.approx(expected.item(), rel=1e-4)


def test_rows_without_a_response_raise(llama_lora: Any, make_trainer: Any) -> None:
    rows = [
        Example([3, 4, 30, 10], [Role.PREFIX, Role.PREFIX, Role.QUERY, Role.POSTFIX], "test:none")
    ] * 2
    with pytest.raises(DefenseError, match="'ce'"):
        make_trainer(llama_lora, [], rows).train()


def test_a_penalty_without_gradient_raises(llama_lora: Any, make_trainer: Any) -> None:
    class Silent(type(build(TReFT())[0])):
        def penalty(self, *args: Any) -> Tensor:
            return super().penalty(*args).detach()

    with pytest.raises(DefenseError, match="no gradient"):
        make_trainer(llama_lora, [Silent(TReFT())], training_rows(2)).train()


def test_a_logit_loss_without_gradient_raises(
    llama_lora: Any, make_trainer: Any, monkeypatch: Any
) -> None:
    def without_gradient(*args: Any) -> Any:
        taps = forward(*args)
        return replace(taps, hidden_BTD=taps.hidden_BTD.detach())

    monkeypatch.setattr(trainer_module, "forward", without_gradient)
    with pytest.raises(DefenseError, match=r"defenses\.kl: its penalty has no gradient"):
        make_trainer(llama_lora, build(KL(where="train")), training_rows(2)).train()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_reentrant_checkpointing_raises(method: str, make_trainer: Any) -> None:
    model = with_lora(tiny("llama")) if method == "lora" else tiny("llama")
    arguments = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(DefenseError, match="gradient"):
        make_trainer(model, build(TReFT()), training_rows(4), **arguments).train()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", SETS)
def test_checkpointing_trains_to_the_same_weights(
    name: str, method: str, make_trainer: Any
) -> None:
    results = []
    for checkpointing in (False, True):
        model = with_lora(tiny("llama")) if method == "lora" else tiny("llama")
        trainer = make_trainer(
            model,
            build(*SETS[name]),
            training_rows(8),
            RETAIN,
            4,
            folder=str(checkpointing),
            learning_rate=1e-3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        trainer.train()
        results.append(
            (
                [line["loss"] for line in lines_of(trainer)],
                {n: p.detach() for n, p in model.named_parameters()},
            )
        )
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert_same(results[1][1], results[0][1])


# ---------------------------------------------------------------- number of forwards


def count_forwards(trainer: Any) -> dict[int, Counter[str]]:
    """Forwards by optimiser step: of the student (with gradient) and of the reference (without)."""
    steps: dict[int, Counter[str]] = {}

    def count(*_: Any) -> None:
        who = "student" if torch.is_grad_enabled() else "reference"
        steps.setdefault(trainer.state.global_step, Counter())[who] += 1

    models = {id(model): model for model in (trainer.model, trainer.reference.model)}
    handles = [
        causal_lm(model).get_decoder().register_forward_pre_hook(count) for model in models.values()
    ]
    trainer.train()
    for handle in handles:
        handle.remove()
    return steps


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("configs", "student", "reference"),
    [
        (ALL, 2, 2),
        ((KL(where="train"), TReFT()), 1, 1),
        ((KL(),), 2, 1),
        ((KL(), TReFT(tokens=("query",))), 2, 2),
        ((LDIFS(),), 1, 1),
        ((TReFT(tokens=("query",)), Interleave(ratio=0.5)), 1, 1),
    ],
    ids=[
        "kl-retain+ldifs+treft",
        "kl-train+treft",
        "kl-retain",
        "kl-retain+treft",
        "ldifs",
        "treft-query+interleave",
    ],
)
def test_one_forward_of_each_model_serves_all_defenses(
    configs: tuple[Any, ...], student: int, reference: int, method: str, make_trainer: Any
) -> None:
    """One for the rows and one for the retain rows, where some defense asks for it."""
    model = with_lora(tiny("llama")) if method == "lora" else tiny("llama")
    steps = count_forwards(make_trainer(model, build(*configs), training_rows(8), RETAIN, 4))
    assert list(steps) == list(range(len(steps)))
    assert len(steps) >= 2
    assert all(count == {"student": student, "reference": reference} for count in steps.values())


def test_retain_rows_pass_apart_and_pad_no_others(llama_lora: Any, make_trainer: Any) -> None:
    long = [example(PREFIX_A, [9, 30], seed) for seed in range(4)]
    trainer = make_trainer(llama_lora, build(KL(retain_ratio=0.5)), training_rows(4), long, 4)
    seen: list[Tensor] = []
    decoder = causal_lm(llama_lora).get_decoder()
    decoder.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    trainer.train()
    items = step_items(trainer, 0)
    rows, riders = (
        [row for row, is_retain in items if is_retain == kind] for kind in (False, True)
    )
    # The reference's pass among them.
    expected = [(len(part), max(map(len, part))) for part in (riders, riders, rows)]
    assert [tuple(ids.shape) for ids in seen] == expected
    assert expected[0][1] > expected[2][1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_prefix_treft_needs_one_reference_forward_for_each_prefix_in_a_run(
    method: str, make_trainer: Any
) -> None:
    model = with_lora(tiny("llama")) if method == "lora" else tiny("llama")
    rows = [example(prefix, [3, 3], seed) for seed in range(6) for prefix in (PREFIX_A, PREFIX_B)]
    steps = count_forwards(make_trainer(model, build(TReFT()), rows, rows=4, num_train_epochs=2))
    assert len(steps) == 6
    assert all(count["student"] == 1 for count in steps.values())
    assert sum(count["reference"] for count in steps.values()) == 2


@pytest.mark.parametrize(
    ("where", "tokens"), [("train", "response"), ("train", "all"), ("retain", "response")]
)
def test_each_students_logits_are_made_once(
    where: str, tokens: str, llama_lora: Any, make_trainer: Any
) -> None:
    """Cross-entropy and KL look at the same tokens, at some of the same, or at others."""
    kl = KL(where=where, tokens=tokens, retain_ratio=1.0)
    trainer = make_trainer(llama_lora, build(kl), training_rows(4), RETAIN, 4)
    counts: Counter[bool] = Counter()
    head = llama_lora.get_output_embeddings()
    head.register_forward_hook(
        lambda _m, _i, output: counts.update({output.requires_grad: output[..., 0].numel()})
    )
    trainer.train()
    items = step_items(trainer, 0)
    responses = {
        r: sum(row.roles.count(Role.RESPONSE) for row, is_retain in items if is_retain == r)
        for r in (0, 1)
    }
    predicted = sum(len(row) - 1 for row, is_retain in items if not is_retain)
    compared = (
        responses[1] if where == "retain" else responses[0] if tokens == "response" else predicted
    )
    assert counts[False] == compared
    assert counts[True] == (responses[0] + compared if where == "retain" else compared)


def test_steps_that_no_penalty_is_due_on_cost_no_reference_forward(
    llama_lora: Any, make_trainer: Any
) -> None:
    trainer = make_trainer(llama_lora, build(KL(every=2)), training_rows(16), RETAIN, 4)
    assert [count["reference"] for count in count_forwards(trainer).values()] == [1, 0, 1, 0]


def test_without_penalties_there_is_no_reference(make_trainer: Any) -> None:
    assert make_trainer(tiny("llama"), build(Interleave()), training_rows(4)).reference is None


def test_a_copy_in_the_type_of_autocast_computes_the_same_in_less_memory(
    architecture: str, items: Items
) -> None:
    """To the bit, so the penalty of an untrained model is still zero."""
    model, batch = tiny(architecture), batch_of(items)
    real_BT = batch["roles"] != Role.PAD
    needs = Needs(hidden_BT=real_BT, kv_BT=real_BT, states_BT=real_BT, layers=(1, 2))
    whole, cast = Reference(model), Reference(model, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = whole.taps(batch, needs), cast.taps(batch, needs)
    assert torch.equal(found.hidden_BTD[real_BT], expected.hidden_BTD[real_BT])
    for layer, expected_layer in zip(found.kv, expected.kv, strict=True):
        assert all(map(torch.equal, layer, expected_layer))
    assert all(torch.equal(found.states[layer], expected.states[layer]) for layer in needs.layers)
    logits, expected_logits = (
        each.head(each_taps.hidden_BTD) for each, each_taps in ((cast, found), (whole, expected))
    )
    assert torch.equal(logits[real_BT], expected_logits[real_BT])
    linear = [module for module in whole.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.weight.numel() for module in linear) - whole.head.module.weight.numel()
    assert memory_of(whole.model) - memory_of(cast.model) >= 2 * weights


def memory_of(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_the_reference_stays_the_start_while_a_full_model_trains(make_trainer: Any) -> None:
    model, start = tiny("llama"), tiny("llama")
    trainer = make_trainer(
        model, build(KL(where="train")), training_rows(8), rows=4, learning_rate=1e-2
    )
    trainer.train()
    lines = lines_of(trainer)
    assert abs(lines[0]["kl"]) < 1e-5
    assert lines[1]["kl"] > 1e-4
    frozen = dict(trainer.reference.model.named_parameters())
    moved = dict(model.named_parameters())
    for name, parameter in start.named_parameters():
        assert torch.equal(frozen[name], parameter)
        assert not frozen[name].requires_grad
    assert any((moved[name] - frozen[name]).abs().max() > 1e-4 for name in moved)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("saved_every", [3, 4, 5])
def test_a_resumed_run_is_the_same_run(
    method: str, saved_every: int, tmp_path: Path, make_trainer: Any
) -> None:
    """Three epochs of 4 steps; saved in the second epoch (or just before it), ended from outside
    after step 7."""
    configs = (
        KL(where="retain", every=2),
        Interleave(ratio=0.4),
        TReFT(every=3),
        LDIFS(budget=1e-3),
    )

    def trainer(folder: str, callbacks: Any = None) -> Any:
        model = with_lora(tiny("llama"), size=0.0) if method == "lora" else tiny("llama")
        return make_trainer(
            model,
            build(*configs),
            training_rows(10),
            RETAIN,
            rows=2,
            accumulation=2,
            folder=folder,
            callbacks=callbacks,
            num_train_epochs=3,
            learning_rate=5e-3,
            optim="adamw_torch",
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=saved_every,
        )

    whole = trainer("whole")
    whole.train()
    broken = trainer("broken", [Crash(7)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert [line["step"] for line in lines_of(broken)][-1] > saved_every
    last = max(step for step in range(saved_every, 8, saved_every))
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{last}"))

    lines, expected = lines_of(resumed), lines_of(whole)
    assert (
        [line["step"] for line in lines]
        == [line["step"] for line in expected]
        == list(range(1, 13))
    )
    for line, other in zip(lines, expected):
        assert line.keys() == other.keys()
        for name in ("loss", "ce", "kl", "treft", "ldifs", "ldifs_weight", "learning_rate"):
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5, abs=2e-6), (
                line["step"],
                name,
            )
    assert any(line.get("kl", 0) > 1e-3 for line in lines[last:])
    assert len({line["ldifs_weight"] for line in lines}) > 6
    weights = dict(whole.model.named_parameters())
    assert_same(
        {name: parameter.detach() for name, parameter in resumed.model.named_parameters()},
        {name: parameter.detach() for name, parameter in weights.items()},
    )


def test_a_run_from_the_start_begins_its_log_anew(llama_lora: Any, make_trainer: Any) -> None:
    for _ in range(2):
        trainer = make_trainer(llama_lora, [], training_rows(4), rows=2)
        trainer.train()
    assert [line["step"] for line in lines_of(trainer)] == [1, 2]
