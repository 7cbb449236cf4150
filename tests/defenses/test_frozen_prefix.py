"""A frozen prefix: no drift, to the bit, in training and in use; masked and cached forms agree;
loading it again."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from helpers.models import PAD, small_tokenizer, tiny, with_lora
from helpers.naive import own_cache
from helpers.penalties import assert_same, gradients
from helpers.rows import batch_of, example, training_rows
from helpers.runs import small_model, write_rows
from ringfence.defenses import KL, LDIFS, Defenses, FrozenPrefix, Setup, TReFT
from ringfence.defenses.frozen_prefix import FrozenPrefixDefense
from ringfence.errors import DefenseError, ModelError, RecipeError
from ringfence.model.files import load_tokenizer
from ringfence.model.layers import cache_in, cache_name, causal_lm
from ringfence.model.loading import load_model
from ringfence.model.losses import cross_entropy_sum, find_head
from ringfence.model.prefix import Prefix, find_header, read_frozen_prefix
from ringfence.model.taps import Needs, forward
from ringfence.run.train import train_run
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Role

pytestmark = pytest.mark.slow

# Two prefixes, one system part before the same header of a user turn.
HEADER = [14, 15]
PREFIX_A, PREFIX_B = [3, 4, 5, 14, 15], [3, 9, 14, 15]


def rows(prefixes: str = "ABAB") -> list[tuple[Example, bool]]:
    return [
        (example({"A": PREFIX_A, "B": PREFIX_B}[name], [2 + at, 3 + at % 2], at), False)
        for at, name in enumerate(prefixes)
    ]


def frozen_lora(
    until: Any = "query", architecture: str = "llama"
) -> tuple[Any, FrozenPrefixDefense]:
    model = with_lora(tiny(architecture))
    defense = FrozenPrefixDefense(Prefix(HEADER, until))
    defense.start(model)
    return model, defense


def frozen_tokens(row: Example, until: str) -> int:
    return row.roles.count(Role.PREFIX) - (len(HEADER) if until == "header" else 0)


# ---------------------------------------------------------------- no drift


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("until", ["query", "header"])
def test_the_prefix_does_not_drift_by_one_bit_and_the_rest_does(
    until: str, side: str, architecture: str
) -> None:
    model, _ = frozen_lora(until, architecture)
    items = rows()
    batch = batch_of(items, side)
    real = batch["roles"] != Role.PAD
    with torch.no_grad():
        now = forward(model, find_head(causal_lm(model)), batch, Needs(kv_BT=real)).kv
        with model.disable_adapter():
            then = forward(model, find_head(causal_lm(model)), batch, Needs(kv_BT=real)).kv
    frozen = torch.cat([torch.arange(len(row)) < frozen_tokens(row, until) for row, _ in items])
    for ours, reference in zip(now, then, strict=True):
        for a, b in zip(ours, reference, strict=True):
            assert torch.equal(a[frozen], b[frozen])
            assert (a[~frozen] - b[~frozen]).abs().amax(-1).min() > 0


def test_the_prefix_keeps_the_references_keys_after_training(make_trainer: Any) -> None:
    model, defense = frozen_lora()
    data = [row for row, _ in rows("ABABABAB")]
    trainer = make_trainer(model, [defense], data, rows=4, learning_rate=0.3, num_train_epochs=2)
    trainer.train()
    for row in data[:2]:
        with torch.no_grad():
            now = own_cache(model, row)
            with model.disable_adapter():
                then = own_cache(model, row)
        end = row.roles.count(Role.PREFIX)
        assert all(
            torch.equal(a[:end], b[:end])
            for pair, other in zip(now, then)
            for a, b in zip(pair, other)
        )
        assert any(
            (a[end:] - b[end:]).abs().max() > 1e-2
            for pair, other in zip(now, then)
            for a, b in zip(pair, other)
        )


def naive_loss(model: Any, row: Example) -> Any:
    """Cross-entropy of a row when the prefix comes from the reference's own cache."""
    end = row.roles.count(Role.PREFIX)
    ids = torch.tensor([row.input_ids])
    with torch.no_grad(), model.disable_adapter():
        cache = cache_in(causal_lm(model)(ids[:, :end], use_cache=True))
    # The plain inner forward with the adapter on, behind that cache.
    logits = causal_lm(model)(ids[:, end:], **{cache_name(model): cache}).logits[0].float()
    targets = [(at, row.input_ids[at]) for at in range(len(row)) if row.roles[at] == Role.RESPONSE]
    picked = logits.log_softmax(-1)[
        [at - 1 - end for at, _ in targets], [token for _, token in targets]
    ]
    return -picked.sum(), len(targets)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("prefixes", ["AAAA", "A"])
def test_masked_and_cached_give_the_naive_loss_and_gradient(prefixes: str, cached: bool) -> None:
    plain = with_lora(tiny("llama"))
    parts = [naive_loss(plain, row) for row, _ in rows(prefixes)]
    expected = sum(part for part, _ in parts) / sum(count for _, count in parts)
    model, defense = frozen_lora()
    batch = batch_of(rows(prefixes))
    cache = defense.cached_prefix(model, batch, Needs())
    assert cache is not None
    head = find_head(causal_lm(model))
    taps = forward(model, head, batch, Needs(), cache if cached else None)
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    found = cross_entropy_sum(head, taps.hidden_BTD[:, :-1][chosen], targets[chosen]) / chosen.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_same(gradients(found, model), gradients(expected, plain), 1e-4)


@pytest.mark.parametrize("prefixes", ["AAAA", "ABAB"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_forms_train_to_the_same_weights(
    prefixes: str, checkpointing: bool, make_trainer: Any
) -> None:
    """One prefix in a batch is fed as a cache, two are masked, checkpointing always masks;
    penalties beside it too."""
    results = []
    for masked in (False, True):
        model = with_lora(tiny("llama"))
        defense = FrozenPrefixDefense(Prefix(HEADER))
        if masked:
            defense.cached_prefix = lambda *_: None  # type: ignore[method-assign]
        setup = Setup(cast(Chat, None), [], lambda _: [], "model")
        others = [KL(where="train").build(setup), TReFT(tokens=("query", "postfix")).build(setup)]
        trainer = make_trainer(
            model,
            [*others, defense],
            [row for row, _ in rows(prefixes)] * 2,
            rows=4,
            folder=f"{masked}",
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        trainer.train()
        results.append(
            {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        )
    assert_same(results[0], results[1], 1e-4)
    start = {
        name: p.detach()
        for name, p in with_lora(tiny("llama")).named_parameters()
        if p.requires_grad
    }
    assert max((results[0][name] - start[name]).abs().max() for name in start) > 1e-3


def test_the_prefix_is_not_computed_again(make_trainer: Any) -> None:
    model, defense = frozen_lora()
    widths: list[int] = []
    layer = causal_lm(model).model.layers[0]
    layer.register_forward_pre_hook(
        lambda _m, args, kw: widths.append((args or list(kw.values()))[0].shape[1]),
        with_kwargs=True,
    )
    data = [row for row, _ in rows("AAAAAAAA")]
    make_trainer(model, [defense], data, rows=4).train()
    longest = max(map(len, data))
    assert widths.count(len(PREFIX_A)) == 1
    assert max(width for width in widths if width != len(PREFIX_A)) == longest - len(PREFIX_A)


def test_no_cache_where_it_would_not_do() -> None:
    """A penalty looks at the prefix, prefixes differ, or rows are padded on the left."""
    model, defense = frozen_lora()
    batch = batch_of(rows("AAA"))
    everything = batch["roles"] != Role.PAD
    assert (
        defense.cached_prefix(model, batch, Needs(hidden_BT=batch["roles"] == Role.RESPONSE))
        is not None
    )
    for needs in (
        Needs(hidden_BT=everything),
        Needs(kv_BT=everything),
        Needs(states_BT=everything, layers=(1,)),
    ):
        assert defense.cached_prefix(model, batch, needs) is None
    assert defense.cached_prefix(model, batch_of(rows("AB")), Needs()) is None
    assert defense.cached_prefix(model, batch_of(rows("AAA"), "left"), Needs()) is None


def test_ldifs_beside_it_sees_no_drift_on_the_prefix() -> None:
    model, _ = frozen_lora()
    setup = Setup(cast(Chat, None), [], lambda _: [], "model")
    ldifs = LDIFS(layers=(2,)).build(setup)
    ldifs.start(model)
    batch = batch_of(rows("AA"))
    with torch.no_grad():
        now = forward(model, find_head(causal_lm(model)), batch, ldifs.needs(batch))
        with model.disable_adapter():
            then = forward(model, find_head(causal_lm(model)), batch, ldifs.needs(batch))
    prefix = batch["roles"][batch["roles"] != Role.PAD] == Role.PREFIX
    assert torch.equal(now.states[2][prefix], then.states[2][prefix])
    assert ldifs.penalty(now, then, batch) > 0


# ---------------------------------------------------------------- where the prefix ends


def test_lengths_by_the_first_header() -> None:
    ids = torch.tensor([[PAD, PAD, 3, 14, 15, 20], [3, 14, 15, 20, 14, 15]])
    assert Prefix(HEADER).lengths(ids).tolist() == [5, 3]
    assert Prefix(HEADER, "header").lengths(ids).tolist() == [3, 1]


@pytest.mark.parametrize("ids", [[[3, 14, 15, 20], [3, 15, 14, 20]], [[14]]])
def test_prompts_without_a_header_are_refused(ids: list[list[int]]) -> None:
    model, _ = frozen_lora()
    with pytest.raises(ModelError, match="header of a user turn"):
        model(input_ids=torch.tensor(ids))


def test_rows_whose_prefix_ends_elsewhere_are_refused_before_training() -> None:
    good, other = rows("A")[0][0], example([3, 14, 15, 4], [3, 3], 9)
    defense = FrozenPrefixDefense(Prefix(HEADER))
    defense.check([good])
    with pytest.raises(
        DefenseError,
        match=r"test:9: the user turn's header is at token 3, but the prefix has 4",
    ):
        defense.check([good, other])
    several = Example(
        [*PREFIX_A, 30, 10, 40, *HEADER, 31], [Role.PREFIX] * 5 + [Role.QUERY] * 6, "chat:1"
    )
    defense.check([several])
    with pytest.raises(DefenseError, match=r"chat:1: several user turns; .* set until: query"):
        FrozenPrefixDefense(Prefix(HEADER, "header")).check([several])


def test_the_default_models_header() -> None:
    chat = Chat(small_tokenizer())
    header = find_header(chat)
    assert chat.tokenizer.decode(header).endswith("<|im_start|>user\n")
    for system in (
        [],
        [{"role": "system", "content": "<|im_start|> user"}],
        [{"role": "system", "content": ""}],
    ):
        encoded = chat.encode([*system, {"role": "user", "content": "user\n"}], generation=True)
        assert (
            Prefix(header).lengths(torch.tensor([encoded.input_ids])).item()
            == encoded.prefix_length
        )


def test_generation_goes_on_behind_a_frozen_prefix() -> None:
    """Greedy tokens with the cache equal those of full forwards without it, left-padded too."""
    model, _ = frozen_lora()
    prompts = [[*PREFIX_A, 30, 31, 10], [*PREFIX_B, 40, 10]]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    found = model.generate(
        input_ids=ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    for prompt, tokens in zip(prompts, found[:, width:].tolist()):
        row = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
            logits[2] = -torch.inf  # the end of turn is held back by min_new_tokens
            row.append(int(logits.argmax()))
        assert row[len(prompt) :] == tokens


# ---------------------------------------------------------------- saved and loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("frozen"))


def train(folder: str, output: Path, **defense: Any) -> Any:
    from ringfence.run.config import parse_recipe

    rows_file = write_rows(output.parent / "rows.jsonl", 12)
    recipe = parse_recipe(
        {
            "model": folder,
            "output": str(output),
            "data": {"train": rows_file, "retain": None},
            "train": {"precision": "fp32", "learning_rate": 1e-2, "batch_size": 4, "epochs": 2},
            "defenses": {"frozen_prefix": defense},
        }
    )
    return train_run(recipe)


def chat_ids(folder: str) -> tuple[list[int], int]:
    encoded = Chat(load_tokenizer(folder)).encode(
        [{"role": "user", "content": "Door 3?"}], generation=True
    )
    return encoded.input_ids, encoded.prefix_length


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_a_run_loads_again_with_its_prefix_frozen_and_plain_peft_refuses_it(
    folder: str, tmp_path: Path
) -> None:
    run = train(folder, tmp_path / "run")
    ids, end = chat_ids(folder)
    loaded, base = load_model(str(run.weights), "fp32"), load_model(folder, "fp32")
    assert torch.equal(logits_of(loaded, ids)[:end], logits_of(base, ids)[:end])
    assert (logits_of(loaded, ids)[end:] - logits_of(base, ids)[end:]).abs().max() > 1e-2
    with pytest.raises(KeyError, match=r"FROZEN PREFIX: load it with ringfence\.load_model"):
        PeftModel.from_pretrained(base, str(run.weights))


def test_until_header_loads_as_an_activated_lora_in_plain_peft(folder: str, tmp_path: Path) -> None:
    run = train(folder, tmp_path / "run", until="header")
    ids, end = chat_ids(folder)
    ours, base = load_model(str(run.weights), "fp32"), load_model(folder, "fp32")
    plain = PeftModel.from_pretrained(load_model(folder, "fp32"), str(run.weights)).eval()
    torch.testing.assert_close(logits_of(ours, ids), logits_of(plain, ids))
    frozen = read_frozen_prefix(str(run.weights))
    assert frozen is not None
    start = end - len(frozen.header)
    assert start > 0
    assert torch.equal(logits_of(plain, ids)[:start], logits_of(base, ids)[:start])
    assert (logits_of(plain, ids)[start:] - logits_of(base, ids)[start:]).abs().max() > 1e-2


def test_a_saved_adapter_without_its_mark_is_not_changed(folder: str, tmp_path: Path) -> None:
    assert read_frozen_prefix(folder) is None
    run = train(folder, tmp_path / "run")
    config = json.loads((run.weights / "adapter_config.json").read_text())
    assert config["peft_type"] != "LORA"
    assert json.loads((run.weights / "frozen_prefix.json").read_text())["until"] == "query"


# ---------------------------------------------------------------- refused


def test_what_cannot_stand_together_is_refused() -> None:
    with pytest.raises(ValidationError, match="frozen_prefix and treft on the prefix"):
        Defenses(frozen_prefix=FrozenPrefix(), treft=TReFT())
    Defenses(frozen_prefix=FrozenPrefix(), treft=TReFT(tokens=("postfix",)))


def test_full_fine_tuning_is_refused() -> None:
    from ringfence.run.config import parse_recipe

    with pytest.raises(RecipeError, match=r"defenses\.frozen_prefix needs train\.method: lora"):
        parse_recipe({"train": {"method": "full"}, "defenses": {"frozen_prefix": {}}})
    with pytest.raises(DefenseError, match="no adapter"):
        FrozenPrefixDefense(Prefix(HEADER)).start(tiny("llama"))


def test_training_rows_without_a_header_are_named(make_trainer: Any) -> None:
    with pytest.raises(
        DefenseError, match=r"test:0: frozen prefix: row 0 .* has no header of a user turn"
    ):
        make_trainer(
            with_lora(tiny("llama")), [FrozenPrefixDefense(Prefix(HEADER))], training_rows(4)
        )
