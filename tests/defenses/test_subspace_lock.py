"""The subspace lock: what a layer writes along the directions keeps its weights, and everything
else still learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from helpers.models import PAD, VOCABULARY, is_adapted, tiny, with_lora
from helpers.rows import training_rows
from helpers.trainers import Crash
from ringfence.defenses import Defense, Setup, SubspaceLock
from ringfence.defenses.subspace_lock import find_writers
from ringfence.errors import DataError, DefenseError, ModelError
from ringfence.model.directions import Directions
from ringfence.model.layers import causal_lm, decoder_layers

SETUP = Setup(None, [], lambda source: [], "tiny")  # type: ignore[arg-type]
LAYERS, NUMBER = 3, 2
WRITERS = ("o_proj", "down_proj")


def orthonormal() -> list[Tensor]:
    """[D, K] for each layer, all unlike; the file has mixtures of them, not of unit length."""
    generator = torch.Generator().manual_seed(11)
    return [torch.linalg.qr(torch.randn(32, NUMBER, generator=generator))[0] for _ in range(LAYERS)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    mixture_KK = torch.tensor([[2.0, 0.5], [-0.3, 7.0]])
    vectors = torch.stack([mixture_KK @ basis.T for basis in orthonormal()])
    Directions(vectors, torch.ones(LAYERS), "t", "tiny", 2, 2).save(tmp_path / "v.safetensors")
    return str(tmp_path / "v.safetensors")


def lock(file: str, **fields: Any) -> Defense:
    return SubspaceLock(vectors=file, **fields).build(SETUP)


def fresh(method: str, **config: Any) -> Any:
    start = tiny(layers=LAYERS)
    return with_lora(start, size=0.0, **config) if method == "lora" else start


def changes(model: Any, layers: int = LAYERS) -> dict[tuple[int, str], Tensor]:
    """W - W0 of every linear weight [out, in], by layer and name; the start W0 is made again."""
    merged = model.merge_and_unload() if is_adapted(model) else model
    start = dict(tiny(layers=layers).named_parameters())
    found = {}
    for name, parameter in merged.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and parameter.ndim == 2:
            found[int(parts[2]) + 1, parts[4]] = parameter.detach() - start[name].detach()
    return found


def train(
    method: str, defenses: list[Defense], make_trainer: Any, folder: str = "run", **arguments: Any
) -> Any:
    settings = {
        "rows": 4,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        **arguments,
    }
    trainer = make_trainer(fresh(method), defenses, training_rows(16), folder=folder, **settings)
    trainer.train()
    return trainer


# ---------------------------------------------------------------- the invariant


@pytest.mark.parametrize("method", ["lora", "full"])
def test_writers_do_not_move_along_the_directions(
    method: str, file: str, make_trainer: Any
) -> None:
    """Several steps of Adam with weight decay, whose moments push wherever they please."""
    locked = changes(train(method, [lock(file)], make_trainer, "locked").model)
    free = changes(train(method, [], make_trainer, "free").model)
    assert len(locked) == 7 * LAYERS
    for (layer, name), change in locked.items():
        assert change.abs().max() > 1e-3
        if name in WRITERS:
            along, free_along = (
                abs(orthonormal()[layer - 1].T @ c).max() for c in (change, free[layer, name])
            )
            assert along < 2e-6, (layer, name)
            assert free_along > 1e-3
            other = orthonormal()[layer % LAYERS]
            # Another layer's directions are not locked here.
            assert abs(other.T @ change).max() > 1e-4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_else_is_taken_from_a_step(method: str, file: str, make_trainer: Any) -> None:
    """After one step of plain gradient descent: writers changed as without the lock, less what lies
    along Q."""
    options = {"optim": "sgd", "weight_decay": 0.0, "max_steps": 1, "learning_rate": 0.5}
    trained = [
        train(method, d, make_trainer, f"{len(d)}", **options).model
        for d in ([lock(file, layers=[1, 3])], [])
    ]
    locked, free = (
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model in trained
    )
    start = {n: p.detach() for n, p in fresh(method).named_parameters()}
    for name, now in locked.items():
        expected = free[name] - start[name]
        layer = next((at + 1 for at in range(LAYERS) if f"layers.{at}." in name), 0)
        if layer in (1, 3) and any(writer in name for writer in WRITERS) and "lora_A" not in name:
            basis = orthonormal()[layer - 1]
            assert abs(basis.T @ expected).max() > 1e-4
            expected = expected - basis @ (basis.T @ expected)
        torch.testing.assert_close(now - start[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_holds_what_the_first_start_held(
    method: str, file: str, tmp_path: Path, make_trainer: Any
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = changes(train(method, [lock(file)], make_trainer, "whole", **options).model)
    with pytest.raises(KeyboardInterrupt):
        train(method, [lock(file)], make_trainer, "broken", callbacks=[Crash(5)], **options)
    settings = {
        "rows": 4,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        **options,
    }
    resumed = make_trainer(
        fresh(method), [lock(file)], training_rows(16), folder="broken", **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for (layer, name), change in changes(resumed.model).items():
        torch.testing.assert_close(change, whole[layer, name], rtol=1e-3, atol=1e-5)
        if name in WRITERS:
            assert abs(orthonormal()[layer - 1].T @ change).max() < 2e-6


def test_an_adapter_that_writes_along_the_directions_already_is_refused(
    file: str, make_trainer: Any
) -> None:
    """Its update is B A less B0 A0, which B alone does not lock. One that was trained with the lock
    may go on."""
    with pytest.raises(
        DefenseError,
        match=r"layer 1, self_attn.o_proj: the adapter already writes along .* merge it",
    ):
        lock(file).start(with_lora(tiny(layers=LAYERS), size=0.1))
    lock(file).start(train("lora", [lock(file)], make_trainer).model)


def test_a_trained_bias_of_an_adapter_is_locked_too(file: str) -> None:
    model = fresh("lora", lora_bias=True)
    defense = lock(file)
    defense.start(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.ones_like(parameter))
    defense.after_step(model, 1)
    biases = {
        n: p
        for n, p in model.named_parameters()
        if "lora_B" in n and n.endswith("bias") and "o_proj" in n
    }
    assert len(biases) == LAYERS
    for name, bias in biases.items():
        assert abs(orthonormal()[int(name.split("layers.")[1][0])].T @ bias).max() < 1e-5
        assert bias.abs().max() > 0.1


def test_what_a_locked_layer_writes_is_what_its_first_weights_write(
    file: str, make_trainer: Any
) -> None:
    """The meaning of it: with the same input to its writers, a layer adds the same along the
    directions as before."""
    model, start = train("full", [lock(file)], make_trainer).model, tiny(layers=LAYERS)
    ids = torch.tensor([[3, 4, 5, 40, 50, 60]])
    with torch.no_grad():
        inputs: dict[tuple[int, str], Tensor] = {}
        for at, layer in enumerate(decoder_layers(model)):
            for name, module in (
                ("o_proj", layer.self_attn.o_proj),
                ("down_proj", layer.mlp.down_proj),
            ):
                module.register_forward_pre_hook(
                    lambda _m, args, key=(at, name): inputs.__setitem__(key, args[0][0])
                )
        model(input_ids=ids)
        for (at, name), input_TE in inputs.items():
            now, then = (
                dict(decoder_layers(m)[at].named_modules())[
                    {"o_proj": "self_attn.o_proj"}.get(name, f"mlp.{name}")
                ]
                for m in (model, start)
            )
            difference_TD = input_TE @ (now.weight - then.weight).T
            assert difference_TD.abs().max() > 1e-3
            assert abs(difference_TD @ orthonormal()[at]).max() < 1e-4 * difference_TD.abs().max()


# ---------------------------------------------------------------- finding the writers

SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SMALL
    )
    return GPT2LMHeadModel(config).eval()


def neox() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(initializer_range=0.3, **sizes, **SMALL)).eval()


def granite() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return GraniteForCausalLM(
        GraniteConfig(residual_multiplier=0.22, initializer_range=0.3, **sizes, **SMALL)
    ).eval()


def huge_entries() -> Any:
    """In bf16, with entries a thousand times the others in the stream, as in trained models."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 17]] *= 1000
    return model.to(torch.bfloat16)


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = MixtralConfig(
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.3, **sizes, **SMALL
    )
    return MixtralForCausalLM(config).eval()


USUAL = {"self_attn.o_proj", "mlp.down_proj"}
MODELS: dict[str, tuple[Any, set[str]]] = {
    "llama": (lambda: tiny("llama"), USUAL),
    "qwen3": (lambda: tiny("qwen3"), USUAL),
    "parallel blocks": (lambda: tiny("cohere"), USUAL),
    "residual multiplier": (granite, USUAL),
    "bf16": (lambda: tiny("llama").to(torch.bfloat16), USUAL),
    "bf16 with huge entries": (huge_entries, USUAL),
    "adapted": (lambda: with_lora(tiny("llama")), USUAL),
    "conv1d": (gpt2, {"attn.c_proj", "mlp.c_proj"}),
    "neox": (neox, {"attention.dense", "mlp.dense_4h_to_h"}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_writers_are_found_by_what_they_do(name: str, training: bool) -> None:
    make, expected = MODELS[name]
    model = make().train(training)
    found = find_writers(model, [1, 2])
    assert {layer: set(writers) for layer, writers in found.items()} == {1: expected, 2: expected}
    for layer, writers in found.items():
        for path, module in writers.items():
            assert decoder_layers(model)[layer - 1].get_submodule(path) is module
    assert model.training == training
    assert not any(module._forward_hooks for module in causal_lm(model).modules())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: tiny("gemma2"), "Gemma2DecoderLayer"),
        (lambda: tiny("gemma2").to(torch.bfloat16), "Gemma2DecoderLayer"),
        (mixtral, "MixtralDecoderLayer"),
    ],
    ids=["norm", "norm in bf16", "experts"],
)
def test_what_stands_between_weights_and_stream_is_refused(make: Any, kind: str) -> None:
    with pytest.raises(
        DefenseError, match=rf"layer 1 \({kind}\): what it adds .* cannot be locked"
    ):
        find_writers(make(), [1, 2])


def test_weights_and_biases_of_conv1d_are_locked_along_their_output(tmp_path: Path) -> None:
    """GPT-2 stores its weights [in, out]."""
    vectors = torch.stack([basis.T for basis in orthonormal()[:2]])
    Directions(vectors, torch.ones(2), "t", "gpt2", 2, 2).save(tmp_path / "v.safetensors")
    model, start, defense = gpt2(), gpt2(), lock(str(tmp_path / "v.safetensors"))
    defense.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    defense.after_step(model, 1)
    for at, (now, then) in enumerate(zip(decoder_layers(model), decoder_layers(start))):
        for path in ("attn.c_proj", "mlp.c_proj"):
            weight = (now.get_submodule(path).weight - then.get_submodule(path).weight).detach()
            bias = (now.get_submodule(path).bias - then.get_submodule(path).bias).detach()
            assert abs(weight @ orthonormal()[at]).max() < 1e-5
            assert abs(bias @ orthonormal()[at]).max() < 1e-5
            assert weight.abs().max() > 0.1
            assert bias.abs().max() > 0.1


# ---------------------------------------------------------------- wrong input


def test_what_cannot_be_locked_is_refused(file: str, tmp_path: Path, make_trainer: Any) -> None:
    with pytest.raises(DefenseError, match="no trained weight writes"):
        lock(file).start(fresh("lora", target_modules=["q_proj", "gate_proj"]))
    with pytest.raises(DefenseError, match=r"lora_magnitude_vector.*without DoRA"):
        lock(file).start(fresh("lora", use_dora=True))
    with pytest.raises(ModelError, match="3 layers of size 32; this model has 2 layers of size 32"):
        make_trainer(tiny(layers=2), [lock(file)], training_rows(4)).train()
    with pytest.raises(
        DefenseError, match=r"defenses.subspace_lock.layers: expected distinct layers from 1 to 3"
    ):
        lock(file, layers=5)
    with pytest.raises(DataError, match="persona extract"):
        lock(str(tmp_path / "none.safetensors"))


def test_it_says_what_it_locked(file: str) -> None:
    defense = lock(file, layers=[2, 3])
    defense.start(fresh("lora"))
    assert defense.record() == {"trait": "t", "layers": 2, "locked_tensors": 4}
