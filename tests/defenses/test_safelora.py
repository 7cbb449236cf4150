"""SafeLoRA: equal to the published dense formula, by name, on adapters and whole weights, in the
defense and the command alike."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import VOCABULARY, nudged, tiny, with_lora
from helpers.rows import training_rows
from helpers.runs import small_model, write_rows
from ringfence.defenses import SafeLoRA, Setup
from ringfence.defenses.safelora import SafeLoRADefense
from ringfence.errors import DefenseError, ModelError, RecipeError
from ringfence.model.checkpoint import Checkpoint
from ringfence.model.projection import (
    ProjectionRule,
    Update,
    likeness,
    project_adapter,
    project_matrix,
    project_updates,
)
from ringfence.run.config import Recipe, dump_recipe, parse_recipe
from ringfence.run.train import train_run
from ringfence.text.chat import Chat

SHAPES = [(24, 10), (10, 24), (16, 16)]
SINGLE = "model.safetensors"


def published(difference: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """The published form with its [out, out] matrix, in doubles: the new B and the cosine."""
    v, a, b = difference.double(), a.double(), b.double()
    c = v @ v.T / torch.linalg.norm(v)
    whole, part = (b @ a).flatten(), (c @ b @ a).flatten()
    return c @ b, float(whole @ part / (whole.norm() * part.norm()))


def orthogonal(difference: Tensor, b: Tensor) -> Tensor:
    """V (V^T V)^+ V^T B, in double precision."""
    v = difference.double()
    return v @ torch.linalg.pinv(v.T @ v) @ v.T @ b.double()


def random_case(
    shape: tuple[int, int], rank: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """V, A, B."""
    torch.manual_seed(seed)
    return 0.01 * torch.randn(shape), torch.randn(rank, shape[1]), torch.randn(shape[0], rank)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        rtol=tolerance,
        atol=tolerance * float(expected.abs().max()),
    )


# ---------------------------------------------------------------- one weight


@pytest.mark.parametrize("rank", [1, 4, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_form_equals_the_published_dense_one(shape: tuple[int, int], rank: int) -> None:
    v, a, b = random_case(shape, rank)
    new_b, cosine = published(v, a, b)
    found = project_matrix(b, v)
    close(found, new_b)
    found_cosine, kept = likeness(found, b, a @ a.T)
    assert found_cosine == pytest.approx(cosine, rel=1e-5)
    assert 0.05 < cosine < 0.99
    assert kept == pytest.approx(
        float((new_b @ a.double()).norm() / (b @ a).double().norm()), rel=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_whole_weight_is_projected_as_an_adapter_of_the_same_change(
    shape: tuple[int, int],
) -> None:
    v, a, b = random_case(shape)
    new_b, cosine = published(v, a, b)
    found = project_matrix(b @ a, v)
    close(found, new_b @ a.double())
    assert likeness(found, b @ a)[0] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("projector", ["scaled", "exact"])
@pytest.mark.parametrize("scale", [0.25, 64 / 32**0.5])
def test_the_adapters_scale_changes_nothing(scale: float, projector: Any) -> None:
    v, a, b = random_case((24, 10))
    new = project_matrix(b, v, projector)
    close(project_matrix(scale * b, v, projector), scale * new)
    assert likeness(scale * new, scale * b, a @ a.T) == pytest.approx(likeness(new, b, a @ a.T))


def test_the_exact_projector_is_an_orthogonal_projector() -> None:
    v, a, b = random_case((24, 10))
    torch.manual_seed(5)
    other = torch.randn(24, 4)
    once, other_once = project_matrix(b, v, "exact"), project_matrix(other, v, "exact")
    close(once, orthogonal(v, b))
    close(project_matrix(once, v, "exact"), once)
    close(other.T @ once, other_once.T @ b, 1e-4)
    close(project_matrix(v, v, "exact"), v)
    close(project_matrix(b, 7 * v, "exact"), once)
    cosine, kept = likeness(once, b, a @ a.T)
    assert 0.05 < cosine < 0.95
    assert kept == pytest.approx(cosine, rel=1e-5)


def test_the_exact_projector_leaves_out_weak_directions() -> None:
    """On a wide weight it is the identity otherwise."""
    _, _, b = random_case((10, 24))
    torch.manual_seed(1)
    left, right = torch.linalg.qr(torch.randn(10, 10))[0], torch.linalg.qr(torch.randn(24, 10))[0]
    v = left @ torch.diag(torch.tensor([1.0, 0.5, 0.2, *[0.004] * 7])) @ right.T
    close(project_matrix(b, v, "exact", 0.01), left[:, :3] @ left[:, :3].T @ b)
    close(project_matrix(b, v, "exact", 0.3), left[:, :2] @ left[:, :2].T @ b)
    close(project_matrix(b, 0.001 * v, "exact", 0.3), left[:, :2] @ left[:, :2].T @ b)
    close(project_matrix(b, v, "exact", 1e-4), b)


def test_the_published_form_shrinks_with_the_alignment_change() -> None:
    v, _, b = random_case((24, 10))
    close(project_matrix(b, 0.1 * v), 0.1 * project_matrix(b, v))


def test_likeness_at_the_ends() -> None:
    v, a, b = random_case((24, 10))
    assert likeness(project_matrix(0 * b, v), 0 * b, a @ a.T) == (1.0, 1.0)
    outside = b - orthogonal(v, b).float()
    cosine, kept = likeness(project_matrix(outside, v, "exact"), outside, a @ a.T)
    assert cosine < 1e-5
    assert kept < 1e-5
    assert likeness(torch.zeros_like(b), b, a @ a.T) == (0.0, 0.0)
    assert likeness(b, b, a @ a.T) == pytest.approx((1.0, 1.0))


# ---------------------------------------------------------------- models on disk


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Folders of a base and an reference model."""
    return save(tiny(), tmp_path / "base"), save(nudged(tiny()), tmp_path / "reference")


def adapted(reference: str, size: float = 0.1, **config: Any) -> Any:
    model = with_lora(type(tiny()).from_pretrained(reference), size=size, **config)
    model.peft_config["default"].base_model_name_or_path = reference
    return model


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the weight, in full precision."""
    state = {
        name.removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
    }
    return {
        name.replace(".lora_A.default", ""): (p, state[name.replace("lora_A", "lora_B")])
        for name, p in state.items()
        if "lora_A" in name
    }


def naive(model: Any, base: str, reference: str) -> dict[str, tuple[Tensor, float]]:
    """New B and cosine of each adapted weight by the published form."""
    old, new = load_file(Path(base, SINGLE)), load_file(Path(reference, SINGLE))
    return {name: published(new[name] - old[name], a, b) for name, (a, b) in factors(model).items()}


def defense(base: str, reference: str, **fields: Any) -> SafeLoRADefense:
    rows = training_rows(2)
    return SafeLoRA(base=base, **fields).build(
        Setup(cast(Chat, None), rows, lambda _: rows, reference)
    )


def middle(cosines: list[float]) -> float:
    """A threshold halfway between two neighbours in the middle."""
    cosines = sorted(cosines)
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


@pytest.mark.parametrize("mode", ["threshold", "lowest"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_the_defense_projects_the_chosen_weights_and_no_others(
    lora: dict[str, Any], mode: str, pair: tuple[str, str]
) -> None:
    base, reference = pair
    model = adapted(reference, **lora)
    before, expected = factors(model), naive(model, base, reference)
    cosines = {name: cosine for name, (_, cosine) in expected.items()}
    assert len(cosines) == 14
    fields: dict[str, Any] = (
        {"threshold": middle(list(cosines.values()))} if mode == "threshold" else {"lowest": 5}
    )
    count = 7 if mode == "threshold" else 5
    chosen = set(sorted(cosines, key=lambda name: cosines[name])[:count])
    made = defense(base, reference, **fields)
    made.start(model)
    made.finish(model)
    for name, (a, b) in factors(model).items():
        assert torch.equal(a, before[name][0])
        if name in chosen:
            close(b, expected[name][0])
        else:
            assert torch.equal(b, before[name][1])
    record = made.record()
    assert record["projected"] == count
    assert {name for name, layer in record["weights"].items() if layer["projected"]} == chosen
    for name, layer in record["weights"].items():
        assert layer["cosine"] == pytest.approx(cosines[name], rel=1e-4)
    json.dumps(record)


def test_the_default_threshold_is_the_papers(pair: tuple[str, str]) -> None:
    assert SafeLoRA(base="b").threshold == ProjectionRule().threshold == 0.3
    assert SafeLoRA(base="b", lowest=2).threshold is None
    assert defense(*pair).config.interval is None


def test_weights_are_matched_by_name_in_any_order_and_any_number_of_files(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    base, reference = pair
    tensors = load_file(Path(base, SINGLE))
    names = sorted(tensors, reverse=True)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {name: f"part-{at % 3}.safetensors" for at, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    model = adapted(reference)
    expected = naive(model, base, reference)
    defense(str(sharded), reference, threshold=1).finish(model)
    for name, (_, b) in factors(model).items():
        close(b, expected[name][0])


def test_checkpoints_that_transformers_shards_are_read(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, parts = Checkpoint(pair[0]), Checkpoint(str(tmp_path / "sharded"))
    for name in load_file(Path(pair[0], SINGLE)):
        assert torch.equal(whole.read(name), parts.read(name))


def test_weights_of_a_hub_repository_are_fetched_file_by_file(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository != "org/base":
            raise RepositoryNotFoundError(
                "404\nnot there",
                response=cast(Any, type("R", (), {"headers": {}, "request": None})),
            )
        if file.endswith("index.json"):
            raise EntryNotFoundError("none")
        return str(Path(pair[0], file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = adapted(pair[1])
    expected = naive(model, *pair)
    defense("org/base", pair[1], threshold=1).finish(model)
    for name, (_, b) in factors(model).items():
        close(b, expected[name][0])
    assert {file for _, file in asked} == {"model.safetensors.index.json", SINGLE}
    with pytest.raises(ModelError, match=r"org/none: .* is unavailable: 404"):
        Checkpoint("org/none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_models_are_compared_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Adapters of both types; B is rounded to its type once, at the end."""
    base = save(tiny().bfloat16(), tmp_path / "base")
    reference = save(nudged(tiny(), size=0.3).bfloat16(), tmp_path / "reference")
    model = adapted(reference).to(dtype)
    old, new = load_file(Path(base, SINGLE)), load_file(Path(reference, SINGLE))
    expected = {
        n: published(new[n].float() - old[n].float(), a, b)[0]
        for n, (a, b) in factors(model).items()
    }
    defense(base, reference, threshold=1).finish(model)
    for name, (_, b) in factors(model).items():
        assert b.dtype == dtype
        close(b, expected[name], 1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("mode", [{"threshold": 1.0}, {"lowest": 3}], ids=str)
def test_full_fine_tuning_projects_linear_weights_on_what_alignment_changed(
    mode: dict[str, Any], pair: tuple[str, str]
) -> None:
    base, reference = pair
    model = nudged(type(tiny()).from_pretrained(reference), seed=9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    old, new = load_file(Path(base, SINGLE)), load_file(Path(reference, SINGLE))
    linear = [name for name in before if "_proj" in name]
    expected, cosines = {}, {}
    for name in linear:
        v, change = new[name] - old[name], before[name] - new[name]
        part, cosines[name] = published(v, torch.eye(v.shape[1]), change)
        expected[name] = new[name] + part
    chosen = sorted(linear, key=lambda name: cosines[name])[: mode.get("lowest", len(linear))]
    made = defense(base, reference, **mode)
    made.start(model)
    made.finish(model)
    for name, p in model.named_parameters():
        if name in chosen:
            close(p.detach(), expected[name])
            assert not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name])
    assert made.record()["projected"] == len(chosen)
    assert set(made.record()["weights"]) == set(linear)


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["whole", "headless"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_stored_as_in_by_out(method: str, prefix: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D; its published checkpoint also lacks the first part of each name."""
    base, reference = save(gpt2(0), tmp_path / "base"), save(gpt2(1), tmp_path / "reference")
    old, new = load_file(Path(base, SINGLE)), load_file(Path(reference, SINGLE))
    save_file(
        {n.replace("transformer.", prefix, 1): t for n, t in old.items()},
        Path(base, SINGLE),
        {"format": "pt"},
    )
    model = GPT2LMHeadModel.from_pretrained(reference)
    model = (
        with_lora(model, target_modules=["c_attn"], fan_in_fan_out=True)
        if method == "lora"
        else nudged(model)
    )
    name = "transformer.h.0.attn.c_attn.weight"
    v = (new[name] - old[name]).T

    def change() -> Tensor:
        if method == "lora":
            return (
                model.get_base_model()
                .get_submodule(name.removesuffix(".weight"))
                .get_delta_weight("default")
                .T
            )
        return (model.get_parameter(name) - new[name]).T

    with torch.no_grad():
        expected = published(v, torch.eye(16), change())[0]
        made = defense(base, reference, threshold=1)
        made.start(model)
        made.finish(model)
        close(change(), expected, 1e-4)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("projector", ["scaled", "exact"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_command_and_defense_give_the_same_adapter(
    lora: dict[str, Any],
    projector: Any,
    pair: tuple[str, str],
    tmp_path: Path,
    ringfence: Callable[..., Any],
) -> None:
    base, reference = pair
    model = adapted(reference, **lora)
    folder, output = tmp_path / "adapter", tmp_path / "new" / "out"
    model.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    untouched = {file.name: file.read_bytes() for file in folder.iterdir()}
    options = ["--base", base, "--lowest", 4, "--projector", projector]
    code, printed, errors = ringfence("project", folder, *options, "--output", output)
    assert (code, errors.count("error")) == (0, 0), errors
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == untouched
    assert not (output / "optimizer.pt").exists()
    before = factors(model)
    defense(base, reference, lowest=4, projector=projector).finish(model)
    loaded = PeftModel.from_pretrained(type(tiny()).from_pretrained(reference), output)
    found, expected = factors(loaded), factors(model)
    assert found.keys() == expected.keys()
    changed = 0
    for name in expected:
        for one, other in zip(found[name], expected[name]):
            assert torch.equal(one, other)
        changed += not torch.equal(found[name][1], before[name][1])
    assert changed == 4
    report = json.loads((output / "safelora.json").read_text())
    assert (report["base"], report["reference"], report["lowest"], report["projector"]) == (
        base,
        reference,
        4,
        projector,
    )
    assert sum(layer["projected"] for layer in report["weights"].values()) == 4
    assert printed.count(" of its norm kept") == 4
    assert "4 of 14 weights projected" in printed


def test_wrong_input_to_the_command(
    pair: tuple[str, str], tmp_path: Path, ringfence: Callable[..., Any]
) -> None:
    base, reference = pair
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapted(reference).save_pretrained(adapter)
    files = {
        "nameless": lambda f: rewrite_config(f, base_model_name_or_path=None),
        "pickled": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "torn": lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"),
        "diverged": lambda f: add_tensor(
            f,
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
            torch.full((48, 4), torch.nan),
        ),
        "extra": lambda f: add_tensor(f, "base_model.model.model.norm.weight"),
        "dora": lambda f: add_tensor(
            f, "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
        ),
    }
    for name, spoil in files.items():
        folder = tmp_path / name
        adapted(reference).save_pretrained(folder)
        spoil(folder)
    whole = ("--base", base, "--reference", reference)
    cases: list[tuple[tuple[Any, ...], list[str]]] = [
        ((adapter, *whole, "--output", adapter), [str(adapter), "exists already"]),
        (
            (adapter, *whole, "--output", out, "--threshold", 0.2, "--lowest", 3),
            ["not both", "0.2 and 3"],
        ),
        ((adapter, *whole, "--output", out, "--lowest", 99), ["99", "only 14 weights"]),
        (
            (adapter, "--base", reference, "--output", out),
            ["the same in all 14 weights", "before its alignment"],
        ),
        (
            (adapter, "--base", tmp_path / "no", "--output", out),
            [str(tmp_path / "no"), "no such folder"],
        ),
        ((adapter, "--base", adapter, "--output", out), ["is an adapter", "merge it"]),
        ((tmp_path, *whole, "--output", out), [str(tmp_path), "no adapter"]),
        ((tmp_path / "nameless", "--base", base, "--output", out), ["reference", "nameless"]),
        ((tmp_path / "pickled", *whole, "--output", out), ["no adapter_model.safetensors"]),
        ((tmp_path / "torn", *whole, "--output", out), ["not a safetensors file"]),
        (
            (tmp_path / "diverged", *whole, "--output", out),
            ["layers.0.mlp.up_proj.weight", "not finite"],
        ),
        (
            (tmp_path / "extra", *whole, "--output", out),
            ["'base_model.model.model.norm.weight'", "linear layers"],
        ),
        ((tmp_path / "dora", *whole, "--output", out), ["lora_magnitude_vector", "linear layers"]),
    ]
    for arguments, texts in cases:
        code, _, errors = ringfence("project", *arguments)
        assert code == 2, arguments
        assert not out.exists()
        for text in texts:
            assert text in errors, (arguments, errors)
    assert ringfence("project", adapter, "--base", base, "--output", out, "--threshold", 2)[0] == 2
    assert (
        ringfence("project", adapter, "--base", base, "--output", out, "--projector", "exakt")[0]
        == 2
    )


def rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_tensor(folder: Path, name: str, tensor: Tensor | None = None) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.ones(3) if tensor is None else tensor}, file)


# ---------------------------------------------------------------- models that do not fit


def other_model(**changes: int) -> Any:
    config = copy.deepcopy(tiny().config)
    for name, value in changes.items():
        setattr(config, name, value)
    return type(tiny())(config)


def test_models_that_do_not_fit_are_refused_before_training(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    base, reference = pair
    model = adapted(reference)
    wide = save(other_model(intermediate_size=40), tmp_path / "wide")
    with pytest.raises(
        ModelError,
        match=r"wide: .*mlp\.gate_proj.* is \[40, 32\] there, .* \[48, 32\]: another model",
    ):
        defense(wide, reference).start(model)
    with pytest.raises(ModelError, match=r"reference.*|.*wide.*"):
        defense(base, wide).start(model)
    short = save(other_model(num_hidden_layers=1), tmp_path / "short")
    with pytest.raises(
        ModelError,
        match=r"short: no weight 'model\.layers\.1\..*another kind of model; it holds lm_head",
    ):
        defense(short, reference).start(model)
    with pytest.raises(
        ModelError, match=r"are the same in all 14 weights; expected as base the pre-trained model"
    ):
        defense(reference, reference).start(model)
    with pytest.raises(RecipeError, match="lowest: found 15, but only 14"):
        defense(base, reference, lowest=15).start(model)


def test_a_weight_that_alignment_left_alone_is_named(pair: tuple[str, str]) -> None:
    base, reference = pair
    name = "model.layers.1.mlp.down_proj.weight"
    file = Path(base, SINGLE)
    save_file(
        {**load_file(file), name: load_file(Path(reference, SINGLE))[name]}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match=rf"the same in 1 of 14 weights \(first: {name}\)"):
        defense(base, reference).start(adapted(reference))


def test_a_weight_that_differs_in_its_last_row_alone_is_taken(pair: tuple[str, str]) -> None:
    base, reference = pair
    name = "model.layers.1.mlp.down_proj.weight"
    changed = load_file(Path(reference, SINGLE))[name].clone()
    changed[-1, -1] += 1
    save_file(
        {**load_file(Path(base, SINGLE)), name: changed}, Path(base, SINGLE), {"format": "pt"}
    )
    defense(base, reference).start(adapted(reference))


def test_folders_without_readable_weights(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / SINGLE).write_bytes(b"not weights")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[1]")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": "b.st"}})
    )
    for folder, message in {
        "empty": "no model.safetensors",
        "torn": "not a safetensors file",
        "index": "expected an object",
        "none": "no such folder",
    }.items():
        with pytest.raises(ModelError, match=rf"{folder}.*{message}"):
            SafeLoRA(base=str(tmp_path / folder)).build(
                Setup(cast(Chat, None), [], lambda _: [], pair[1])
            )
    with pytest.raises(ModelError, match=r"lost.*a\.weight is said to be in 'b\.st'"):
        Checkpoint(str(tmp_path / "lost")).shape("a.weight")


def test_quantised_checkpoints_are_refused(pair: tuple[str, str]) -> None:
    base, reference = pair
    file = Path(base, SINGLE)
    save_file(
        {name: t.to(torch.int8) for name, t in load_file(file).items()}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match="is I8, a quantised weight"):
        defense(base, reference).start(adapted(reference))


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"bias": "lora_only", "lora_bias": True},
    ],
    ids=str,
)
def test_what_cannot_be_projected_does_not_slip_through(
    config: dict[str, Any], pair: tuple[str, str]
) -> None:
    with pytest.raises(DefenseError, match="is trained but cannot be projected"):
        defense(*pair).start(adapted(pair[1], **config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "b", "threshold": 0.2, "lowest": 3}, "not both .found threshold 0.2, lowest 3"),
        ({"base": "b", "threshold": 1.5}, "less than or equal to 1"),
        ({"base": "b", "lowest": 0}, "greater than or equal to 1"),
        ({"base": "b", "interval": 0}, "greater than or equal to 1"),
        ({"base": "b", "projector": "exakt"}, "'scaled' or 'exact'"),
        ({"base": "b", "treshold": 0.1}, "treshold"),
    ],
    ids=str,
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SafeLoRA(**fields)
    with pytest.raises(RecipeError, match=r"defenses\.safelora"):
        parse_recipe({"defenses": {"safelora": fields}})


def test_a_base_must_be_named() -> None:
    with pytest.raises(DefenseError, match=r"defenses\.safelora: base is missing"):
        SafeLoRA().build(Setup(cast(Chat, None), [], lambda _: [], "model"))


@pytest.mark.parametrize(
    "fields", [{}, {"threshold": 0.5}, {"lowest": 3, "interval": 10, "projector": "exact"}], ids=str
)
def test_a_resolved_recipe_is_the_same_recipe(fields: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    recipe = parse_recipe({"defenses": {"safelora": {"base": "b", **fields}}})
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


# ---------------------------------------------------------------- in training


def test_every_n_steps_and_at_the_end(pair: tuple[str, str], make_trainer: Any) -> None:
    """Five steps, every second: B is the projection of what it was before, after steps 2 and 4 and
    at the end."""
    base, reference = pair
    made = defense(base, reference, threshold=1, interval=2)
    projected = []
    project = made._project

    def watch(model: Any) -> None:
        expected = naive(model, base, reference)
        project(model)
        for name, (_, b) in factors(model).items():
            close(b, expected[name][0])
        projected.append(model)

    made._project = watch  # type: ignore[method-assign]
    model = adapted(reference)
    counts = []
    original = made.after_step

    def after_step(model: Any, step: int) -> None:
        original(model, step)
        counts.append((step, len(projected)))

    made.after_step = after_step  # type: ignore[method-assign]
    trainer = make_trainer(model, [made], training_rows(10), rows=2, learning_rate=1e-2)
    trainer.train()
    assert counts == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    made.finish(model)
    assert len(projected) == 3


def test_what_the_last_step_projected_is_not_projected_again(pair: tuple[str, str]) -> None:
    """Not even in a run that goes on from a checkpoint of that step."""
    model = adapted(pair[1])
    made = defense(*pair, threshold=1, interval=2)
    made.after_step(model, 2)
    after = factors(model)
    state = json.loads(json.dumps(made.state_dict()))
    made.finish(model)
    resumed = defense(*pair, threshold=1, interval=2)
    resumed.load_state_dict(state)
    resumed.finish(model)
    for name, (_, b) in factors(model).items():
        assert torch.equal(b, after[name][1])
    assert resumed.record() == made.record()
    assert made.record()["projected"] == 14
    resumed.after_step(model, 3)
    resumed.finish(model)
    assert not torch.equal(factors(model)[name][1], after[name][1])


def test_at_the_end_alone_training_is_plain(pair: tuple[str, str], make_trainer: Any) -> None:
    results = []
    for defenses in ([], [defense(*pair, threshold=1)]):
        model = adapted(pair[1])
        make_trainer(
            model, defenses, training_rows(6), folder=f"run{len(defenses)}", learning_rate=1e-2
        ).train()
        results.append(factors(model))
    for name, (_, b) in results[0].items():
        assert torch.equal(b, results[1][name][1])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_saves_projected_weights_and_records_them(method: str, tmp_path: Path) -> None:
    reference = small_model(tmp_path / "reference")
    base = save(nudged(load(reference), seed=4), tmp_path / "base")
    tree: dict[str, Any] = {
        "model": reference,
        "data": {"train": write_rows(tmp_path / "rows.jsonl", 4), "retain": None},
        "train": {
            "method": method,
            "batch_size": 2,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "warmup_ratio": 0,
        },
    }
    plain = train_run(parse_recipe({**tree, "output": str(tmp_path / "plain")}))
    recipe: Recipe = parse_recipe(
        {
            **tree,
            "output": str(tmp_path / "safe"),
            "defenses": {"safelora": {"base": base, "threshold": 1.0}},
        }
    )
    run = train_run(recipe)
    record = json.loads((run.folder / "training.json").read_text())["defenses"]["safelora"]
    assert record["projected"] == len(record["weights"]) == 14
    file = "adapter_model.safetensors" if method == "lora" else SINGLE
    found, before = load_file(run.weights / file), load_file(plain.weights / file)
    if method == "lora":
        project_adapter(
            plain.weights, tmp_path / "projected", base, reference, ProjectionRule(threshold=1.0)
        )
        expected = load_file(tmp_path / "projected" / file)
    else:
        names = list(record["weights"])
        expected = {name: tensor.clone() for name, tensor in before.items()}
        project_updates(
            [Update(n, expected[n]) for n in names],
            Checkpoint(base),
            Checkpoint(reference),
            ProjectionRule(threshold=1),
        )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(found[name], before[name]) for name in found)


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
