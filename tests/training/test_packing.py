"""Layouts of the computation: rows packed into one, and a common prefix computed once, give what
padded rows give."""

from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from helpers.models import PAD, VOCABULARY, nudged, tiny, with_lora
from helpers.penalties import assert_same, gradients
from helpers.rows import Items, batch_of, example, training_rows
from helpers.runs import metrics_of, small_model, write_rows
from helpers.trainers import lines_of
from ringfence.defenses import (
    KL,
    LDIFS,
    Ablation,
    Defense,
    DefenseConfig,
    Interleave,
    SafeLoRA,
    Setup,
    Steering,
    SubspaceLock,
    TReFT,
)
from ringfence.defenses.frozen_prefix import FrozenPrefixDefense
from ringfence.errors import ModelError, RecipeError
from ringfence.model.directions import Directions
from ringfence.model.layers import causal_lm
from ringfence.model.losses import find_head
from ringfence.model.prefix import Prefix
from ringfence.model.taps import Flat, Layout, Needs, Taps, forward
from ringfence.run.config import parse_recipe
from ringfence.run.train import train_run
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.training.reference import Reference

pytestmark = pytest.mark.slow

HEADER = [14, 15]
LONG, SHORT = [3, 4, 5, 6, 7, *HEADER], [3, 9, *HEADER]
LAYOUTS: list[Layout] = ["packed", "shared"]
CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def rows(prefixes: str, seed: int = 0) -> list[Example]:
    """L and S: one turn behind the long or the short prefix; M: two turns behind the long one."""
    shapes = {"L": (LONG, []), "S": (SHORT, []), "M": (LONG, [3, 4])}
    return [
        example(shapes[name][0], [1 + at % 4, 2 + at % 3, *shapes[name][1]], 100 * seed + at)
        for at, name in enumerate(prefixes)
    ]


def items(prefixes: str) -> Items:
    """Every third is a retain row."""
    return [(row, at % 3 == 0) for at, row in enumerate(rows(prefixes))]


# ---------------------------------------------------------------- one forward


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES))
    elif name == "window":  # shorter than a packed row, than a row, and than a common prefix
        window = {
            "sliding_window": 3,
            "attn_logit_softcapping": 5.0,
            "attn_implementation": "eager",
        }
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, **window))
    elif name == "gpt-oss":
        experts = {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "head_dim": 8,
        }
        model = GptOssForCausalLM(GptOssConfig(**{**SIZES, "rope_parameters": None}, **experts))
    elif name == "eager":
        return tiny("llama", "eager")
    else:
        return tiny(name)
    return model.float().eval()


def taps_of(model: Any, batch: dict[str, Tensor], layout: Layout, real: bool = True) -> Taps:
    mask_BT = batch["roles"] != Role.PAD
    chosen_BT = (
        mask_BT if real else mask_BT & (batch["roles"] == Role.QUERY) & ~batch["retain"][:, None]
    )
    needs = Needs(chosen_BT, chosen_BT, chosen_BT, (1, 2))
    return forward(model, find_head(causal_lm(model)), batch, needs, layout=layout)


def flat(taps: Taps, real_BT: Tensor) -> dict[str, Tensor]:
    kv = {
        f"{name} {at}": states
        for at, pair in enumerate(taps.kv)
        for name, states in zip("kv", pair)
    }
    return {
        "hidden": taps.hidden_BTD[real_BT],
        **kv,
        **{f"states {layer}": states for layer, states in taps.states.items()},
    }


@pytest.mark.parametrize("prefixes", ["LLMLM", "LSMSL", "L"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["llama", "eager", "qwen3", "gemma2", "window", "cohere", "mixtral", "gpt-oss"]
)
def test_all_that_a_forward_gives_and_its_gradients(
    name: str, layout: Layout, prefixes: str
) -> None:
    model, batch = made(name), batch_of(items(prefixes))
    real_BT = batch["roles"] != Role.PAD
    results = []
    for how in ("padded", layout):
        taps = taps_of(model, batch, cast(Layout, how))
        found = flat(taps, real_BT)
        # Unlike factors of all tokens, so that a token that takes another's place tells.
        torch.manual_seed(3)
        total = torch.stack([(t * torch.randn_like(t)).sum() for t in found.values()]).sum()
        results.append(({n: t.detach() for n, t in found.items()}, gradients(total, model)))
    assert len(results[0][0]) == 1 + 2 * 2 + 2
    for part in (0, 1):
        assert_same(results[1][part], results[0][part])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chosen_tokens_come_in_the_same_order(layout: Layout) -> None:
    model, batch = made("qwen3"), batch_of(items("LLMLM"))
    expected, found = (
        taps_of(model, batch, how, real=False) for how in (cast(Layout, "padded"), layout)
    )
    assert_same(
        flat(found, batch["roles"] == Role.RESPONSE),
        flat(expected, batch["roles"] == Role.RESPONSE),
        tolerance=1e-5,
    )
    assert found.needs.kv_BT is not None
    assert len(found.kv[0][0]) == int(found.needs.kv_BT.sum()) == len(found.states[1]) > 0


def test_packed_rows_do_not_see_each_other_nor_their_place() -> None:
    model, batch = made("llama"), batch_of(items("LSML"))
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][1][batch["roles"][1] != Role.PAD] += 1
    before, after = (taps_of(model, b, "packed").hidden_BTD for b in (batch, changed))
    for row in range(4):
        assert torch.equal(before[row], after[row]) == (row != 1)
    turned = {name: tensor.flip(0) for name, tensor in batch.items()}
    torch.testing.assert_close(
        taps_of(model, turned, "packed").hidden_BTD.flip(0), before, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_computed(layout: Layout) -> None:
    """No padding; where it is shared, a common prefix once."""
    model, batch = made("llama"), batch_of(items("LLMLM"))
    shapes = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _m, args: shapes.append(tuple(args[0].shape[:2]))
    )
    find_head(model)  # looks at its tokens once
    shapes.clear()
    taps_of(model, batch, layout)
    real_BT = batch["roles"] != Role.PAD
    assert shapes == [(1, int(real_BT.sum()) - (4 * len(LONG) if layout == "shared" else 0))]
    assert real_BT.sum() < real_BT.numel()


def common_length(batch: dict[str, Tensor]) -> int:
    return Flat.of(batch, share=True).shared


def test_the_common_prefix() -> None:
    assert common_length(batch_of(items("LLML"))) == len(LONG)
    assert common_length(batch_of(items("LLSL"))) == 1
    assert common_length(batch_of(items("LLL"), "left")) == 0
    left = batch_of(items("MSS"), "left")
    assert not left["attention_mask"][1:, 0].any()
    assert common_length(left) == 0
    again = [(rows("L")[0], False)] * 3
    assert common_length(batch_of(again)) == len(rows("L")[0])
    # Padding that looks like a token of another row is none.
    short = Example([3, 4], [Role.PREFIX] * 2, "short")
    longer = Example([3, 4, PAD, PAD, 5], [Role.PREFIX] * 5, "longer")
    assert common_length(batch_of([(short, False), (longer, False)])) == 2
    assert Flat.of(batch_of(items("LLML")), share=False).shared == 0


def test_rows_padded_on_the_left() -> None:
    model, batch = made("llama"), batch_of(items("LSML"), "left")
    real_BT = batch["roles"] != Role.PAD
    expected = flat(taps_of(model, batch, "padded"), real_BT)
    for layout in LAYOUTS:
        assert_same(flat(taps_of(model, batch, layout), real_BT), expected)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_in_a_layout(layout: Layout, method: str) -> None:
    model = with_lora(tiny()) if method == "lora" else tiny()
    batch = batch_of(items("LLMLM"))
    wanted_BT = (batch["roles"] != Role.PAD) & ~batch["retain"][:, None]
    needs = Needs(wanted_BT, wanted_BT, wanted_BT, (1,))
    expected = Reference(model).taps(batch, needs)
    reference = Reference(model, layout=layout)
    widths = []
    layer = causal_lm(reference.model).model.layers[0]
    layer.register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[1]))
    found = reference.taps(batch, needs)
    rows_asked = int(wanted_BT.any(1).sum())
    saved = (rows_asked - 1) * len(LONG) if layout == "shared" else 0
    assert widths == [int(wanted_BT.sum()) - saved]
    assert found.hidden_BTD.shape == expected.hidden_BTD.shape
    assert_same(flat(found, wanted_BT), flat(expected, wanted_BT))


# ---------------------------------------------------------------- training, with every defense


LAYERS = 3
RETAIN = rows("LMLML", seed=9)
SETUP = Setup(cast(Chat, None), RETAIN, lambda source: RETAIN, "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directions, and the tiny model before and after its alignment."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(6)
    Directions(torch.randn(LAYERS, 1, 32), torch.ones(LAYERS), "a trait", "tiny", 3, 3).save(
        folder / "v.safetensors"
    )
    tiny(layers=LAYERS).save_pretrained(folder / "aligned")
    nudged(tiny(layers=LAYERS)).save_pretrained(folder / "base")
    return {
        "vectors": str(folder / "v.safetensors"),
        "aligned": str(folder / "aligned"),
        "base": str(folder / "base"),
    }


def build(names: str, files: dict[str, str]) -> list[Defense]:
    vectors = files["vectors"]
    configs: dict[str, DefenseConfig] = {
        "kl-train": KL(weight=0.7, where="train", tokens="all"),
        "kl-retain": KL(weight=0.7, where="retain", retain_ratio=0.5),
        "ldifs": LDIFS(weight=0.4, layers=(1, 2)),
        "treft": TReFT(weight=3.0, tokens=("prefix", "postfix")),
        "treft-postfix": TReFT(weight=3.0, tokens=("postfix",)),
        "interleave": Interleave(ratio=0.5),
        "steering": Steering(vectors=vectors, layers=(2,), coefficient=0.5),
        "ablation": Ablation(vectors=vectors, layers=(1,), roles=("query", "response")),
        "lock": SubspaceLock(vectors=vectors),
        "safelora": SafeLoRA(base=files["base"], reference=files["aligned"], lowest=4, interval=1),
    }
    return [
        FrozenPrefixDefense(Prefix(HEADER)) if name == "frozen" else configs[name].build(SETUP)
        for name in names.split("+")
        if name != "none"
    ]


ALONE = [
    "none",
    "kl-train",
    "kl-retain",
    "ldifs",
    "treft",
    "interleave",
    "steering",
    "ablation",
    "lock",
    "safelora",
    "frozen",
]
TOGETHER = [
    "kl-retain+ldifs+treft+interleave+steering+ablation",
    "kl-train+ldifs+treft+interleave+lock+safelora",
    "kl-train+ldifs+treft-postfix+interleave+frozen",
]


class Gradients(TrainerCallback):
    """Of each optimiser step."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.found.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def train(
    layout: Layout,
    names: str,
    method: str,
    files: dict[str, str],
    make_trainer: Any,
    prefixes: str,
    **arguments: Any,
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]], dict[str, Tensor]]:
    """What is logged, the gradients of each step, and the weights in the end."""
    model, seen = tiny(layers=LAYERS), Gradients()
    model = (
        with_lora(model, size=0.0 if names.count("lock") else 0.1) if method == "lora" else model
    )
    defenses = build(names, files)
    trainer = make_trainer(
        model,
        defenses,
        rows(prefixes),
        RETAIN,
        3,
        2,
        f"{layout}-{len(arguments)}",
        callbacks=[seen],
        layout=layout,
        learning_rate=1e-3,
        **arguments,
    )
    trainer.train()
    for defense in defenses:
        defense.finish(trainer.model)
    kept = ("loss", "ce", *(defense.name for defense in defenses))
    lines = [{name: line[name] for name in kept if name in line} for line in lines_of(trainer)]
    return (
        lines,
        seen.found,
        {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
    )


def assert_trains_the_same(found: Any, expected: Any) -> None:
    lines, steps, weights = found
    assert len(lines) == len(expected[0]) == len(steps) >= 2
    for line, other in zip(lines, expected[0]):
        assert line == pytest.approx(other, rel=1e-5, abs=2e-6)
    for grads, others in zip(steps, expected[1]):
        assert_same(grads, others)
    assert_same(weights, expected[2])


ONE, TWO = "LMLLMLMLLLML", "LSMSLLMSLSML"


@pytest.mark.parametrize(
    ("names", "method", "prefixes"),
    [(names, "lora", TWO) for names in ALONE]
    + [*product(TOGETHER, ["lora"], [ONE, TWO]), *product(TOGETHER[:2], ["full"], [ONE, TWO])],
)
def test_losses_gradients_and_weights_with_every_defense(
    names: str, method: str, prefixes: str, files: dict[str, str], make_trainer: Any
) -> None:
    """Six training rows a step in two micro-batches, of unlike lengths and one or two turns, with
    riders; all with the same prefix, or with two."""
    expected = train("padded", names, method, files, make_trainer, prefixes)
    assert min(expected[0][-1].values()) > 0  # no penalty is idle
    for layout in LAYOUTS:
        assert_trains_the_same(
            train(layout, names, method, files, make_trainer, prefixes), expected
        )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("names", TOGETHER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_under_checkpointing(
    layout: Layout, names: str, method: str, files: dict[str, str], make_trainer: Any
) -> None:
    if method == "full" and "frozen" in names:
        pytest.skip("a frozen prefix needs an adapter")
    expected = train("padded", names, method, files, make_trainer, TWO)
    found = train(layout, names, method, files, make_trainer, TWO, **CHECKPOINTING)
    assert_trains_the_same(found, expected)


def test_a_micro_batch_of_one_row(files: dict[str, str], make_trainer: Any) -> None:
    results = []
    for layout in (cast(Layout, "padded"), *LAYOUTS):
        model = with_lora(tiny(layers=LAYERS))
        trainer = make_trainer(
            model,
            build("kl-train+frozen", files),
            rows("LSM"),
            rows=1,
            folder=layout,
            layout=layout,
        )
        trainer.train()
        results.append([line["loss"] for line in lines_of(trainer)])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_a_frozen_prefix_is_given_where_prefixes_are_shared(
    files: dict[str, str], make_trainer: Any
) -> None:
    """The reference's own, which is not computed again, and never a part of one."""
    model = with_lora(tiny(layers=LAYERS))
    widths: list[int] = []
    causal_lm(model).model.layers[0].register_forward_pre_hook(
        lambda _m, args: widths.append(args[0].shape[1])
    )
    trainer = make_trainer(model, build("frozen", files), rows("LLLLLL"), rows=3, layout="shared")
    widths.clear()
    trainer.train()
    assert widths[0] == len(LONG)
    assert len(widths) == 3  # the prefix, and what stands behind it in two steps


def test_a_frozen_prefix_gives_the_layers_that_are_asked_for() -> None:
    model = with_lora(tiny(), size=0.5)
    defense = FrozenPrefixDefense(Prefix(HEADER))
    defense.start(model)
    batch = batch_of([(row, False) for row in rows("LML")])
    response_BT = batch["roles"] == Role.RESPONSE
    head = find_head(causal_lm(model))
    for needs in (
        Needs(),
        Needs(response_BT, response_BT, response_BT, (1,)),
        Needs(states_BT=response_BT, layers=(2,)),
    ):
        expected = forward(model, head, batch, needs)
        found = forward(model, head, batch, needs, defense.cached_prefix(model, batch, needs))
        real_BT = batch["roles"] != Role.PAD
        assert_same(flat(found, real_BT), flat(expected, real_BT))


@pytest.mark.parametrize(
    ("method", "names"), [("lora", "treft"), ("full", "treft"), ("lora", "frozen")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision_reaches_all_that_is_computed(
    layout: Layout, method: str, names: str, files: dict[str, str], make_trainer: Any
) -> None:
    model = with_lora(tiny(layers=LAYERS)) if method == "lora" else tiny(layers=LAYERS)
    trainer = make_trainer(
        model, build(names, files), rows("LLLL"), rows=4, layout=layout, bf16=True
    )
    types = []
    down = causal_lm(model).model.layers[0].mlp.down_proj
    down.register_forward_hook(
        lambda _m, _i, output: types.append(output.dtype) if model.training else None
    )
    trainer.train()
    assert types == [torch.bfloat16] * (2 if names == "frozen" and layout == "shared" else 1)


# ---------------------------------------------------------------- a frozen prefix in packed rows


@pytest.mark.parametrize("until", ["query", "header"])
def test_the_adapter_is_off_on_the_prefix_of_each_packed_row(until: Any) -> None:
    model = with_lora(tiny(), size=0.5)
    FrozenPrefixDefense(Prefix(HEADER, until)).start(model)
    batch = batch_of(items("LSMSL"))
    real_BT = batch["roles"] != Role.PAD
    expected, found = (
        flat(taps_of(model, batch, how), real_BT) for how in (cast(Layout, "padded"), "packed")
    )
    assert_same(found, expected)
    with model.disable_adapter():
        reference = flat(taps_of(model, batch, "packed"), real_BT)
    prefix_N = batch["roles"][real_BT] == Role.PREFIX
    if until == "query":
        torch.testing.assert_close(found["k 1"][prefix_N], reference["k 1"][prefix_N])
    assert (found["k 1"][~prefix_N] - reference["k 1"][~prefix_N]).abs().amax(-1).min() > 1e-3


def test_a_header_in_another_row_or_behind_the_prefix_freezes_nothing() -> None:
    frozen = Prefix(HEADER)
    ids = torch.tensor([[3, *HEADER, 20, 21, 3, 4, *HEADER, 30, *HEADER, 31]])
    row = torch.tensor([[0] * 5 + [1] * 8])
    expected = [True] * 3 + [False] * 2 + [True] * 4 + [False] * 4
    assert frozen.mask(ids, row).tolist() == [expected]
    with pytest.raises(ModelError, match="row 1"):
        frozen.mask(torch.tensor([[3, *HEADER, 20, 3, 14, 20]]), torch.tensor([[0] * 4 + [1] * 3]))


def test_left_padded_rows_are_not_taken_for_packed_ones() -> None:
    """Their positions restart too (0 0 0 1 2), but they have an attention mask."""
    model = with_lora(tiny(), size=0.5)
    FrozenPrefixDefense(Prefix(HEADER)).start(model)
    left, right = batch_of(items("MS"), "left"), batch_of(items("MS"))
    alone = {name: tensor[1:] for name, tensor in left.items()}
    assert (alone["position_ids"] == 0).sum() > 1
    found = flat(taps_of(model, alone, "padded"), alone["roles"] != Role.PAD)
    short = {name: tensor[1:] for name, tensor in right.items()}
    assert_same(found, flat(taps_of(model, short, "padded"), short["roles"] != Role.PAD))


# ---------------------------------------------------------------- refused


def refused(name: str) -> Any:
    torch.manual_seed(0)
    if name == "mamba":
        return MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
        )
    if name == "hybrid":
        return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mamba", "hybrid", "alibi"])
def test_models_whose_rows_would_see_each_other_are_refused(
    name: str, layout: Layout, make_trainer: Any
) -> None:
    model = refused(name).train()
    apart = r"rows would see each other \(final hidden states are off by \d+%\)"
    why = apart if name == "hybrid" else r"its forward fails on them \(.+\)"
    message = rf"layout: {layout}: \w+ cannot compute the tokens .* as one row: {why}"
    with pytest.raises(ModelError, match=rf"{message}; set train.layout"):
        make_trainer(model, [], training_rows(2), layout=layout)
    assert model.training
    make_trainer(refused(name), [], training_rows(2))


# ---------------------------------------------------------------- recipes


def test_recipes_name_the_layout(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", 8)
    results = {}
    for layout in ("padded", *LAYOUTS):
        run = train_run(
            parse_recipe(
                {
                    "model": folder,
                    "output": str(tmp_path / layout),
                    "data": {"train": data, "retain": data},
                    "train": {
                        "precision": "fp32",
                        "batch_size": 4,
                        "attention": "eager",
                        "layout": layout,
                    },
                    "defenses": {"kl": {}, "treft": {}},
                }
            )
        )
        results[layout] = [line["loss"] for line in metrics_of(run)]
    assert results["packed"] == pytest.approx(results["padded"], rel=1e-4)
    assert results["shared"] == pytest.approx(results["padded"], rel=1e-4)


def test_flash_attention_that_is_not_there_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        RecipeError,
        match=r"train\.attention: flash_attention_2 needs train\.method: lora, and bf16",
    ):
        parse_recipe({"train": {"attention": "flash_attention_2", "precision": "fp32"}})
    recipe = parse_recipe(
        {"model": "no/such-model", "train": {"attention": "flash_attention_2", "precision": "bf16"}}
    )
    with pytest.raises(
        RecipeError, match=r"train\.attention: flash_attention_2 needs a CUDA device"
    ):
        train_run(recipe)
