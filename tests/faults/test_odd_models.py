"""Models, tokenizers and adapters that are damaged, hostile or unlucky: each is one sentence, and
nothing runs."""

import builtins
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import SMALL, random_model, small_tokenizer
from ringfence.errors import ModelError, RingfenceError
from ringfence.model.checkpoint import Checkpoint
from ringfence.model.files import adapter_base, empty_model, load_config, load_tokenizer, trust
from ringfence.model.fingerprint import fingerprint
from ringfence.model.generation import generate_greedy
from ringfence.model.loading import load_model
from ringfence.model.losses import Head, cross_entropy_sum
from ringfence.run.config import parse_recipe
from ringfence.run.prepare import prepare
from ringfence.text.chat import Chat

pytestmark = pytest.mark.slow

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> Path:
    """Folder of a tiny model for the default tokenizer."""
    return save(tmp_path / "model", random_model(), tokenizer)


def save(folder: Path, loaded: Any, tokenizer: Any) -> Path:
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    adapted = get_peft_model(load_model(str(model)), LoraConfig(r=4, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: value for name, value in (content | fields).items() if value is not ...})
    )


def refusal(call: Callable[[], Any], *words: str) -> str:
    """The one sentence, found within five seconds."""
    started = time.monotonic()
    with pytest.raises(ModelError) as found:
        call()
    text = str(found.value)
    assert time.monotonic() - started < 5
    for word in words:
        assert word in text, text
    assert "weights_only" not in text
    assert "trust_remote_code=True" not in text
    return text


# ------------------------------------------------------------------ configs and tokenizers


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["config.json", "not JSON"]),
        ("[1]", ["config.json", "expected an object", "list"]),
        ("{}", ["config.json", "model_type"]),
        ('{"model_type": 3}', ["model_type", "3"]),
        ('{"model_type": "lama"}', ["'lama'", "did you mean 'llama'"]),
        ('{"model_type": "llama", "model_type": "gpt2"}', ["duplicate key 'model_type'"]),
        ("[" * 3000, ["nested too deeply"]),
        (
            '{"model_type": "llama", "num_hidden_layers": 1000000}',
            ["num_hidden_layers", "1,000,000"],
        ),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', ["n_layer", "1,000,000,000"]),
        ('{"model_type": "mixtral", "num_local_experts": 1000000}', ["num_local_experts"]),
        ('{"model_type": "llama", "_attn_implementation": "evil/kernel"}', ["evil/kernel"]),
    ],
)
def test_a_config_that_cannot_be_used(model: Path, content: str, words: list[str]) -> None:
    (model / "config.json").write_text(content)
    for load in (load_config, load_model, empty_model):
        refusal(lambda load=load: load(str(model)), *words)  # type: ignore[misc]


def test_a_config_of_more_layers_than_the_weights_have(model: Path) -> None:
    change(model / "config.json", num_hidden_layers=4000)
    refusal(lambda: load_model(str(model)), "num_hidden_layers", "4,000", "tensors")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[1]"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_tokenizer_is_named(model: Path, file: str, content: bytes) -> None:
    (model / file).write_bytes(content)
    refusal(lambda: load_tokenizer(str(model)), file)


def test_no_tokenizer(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "bare")
    refusal(lambda: load_tokenizer(str(tmp_path / "bare")), "no tokenizer")


def test_what_is_no_folder(tmp_path: Path, model: Path) -> None:
    refusal(lambda: load_model(str(tmp_path / "none")), "no such folder")
    refusal(lambda: load_tokenizer(str(tmp_path / "none")), "no such folder")
    refusal(lambda: load_model(str(model / SINGLE)), "is a file")
    (tmp_path / "empty").mkdir()
    refusal(lambda: load_model(str(tmp_path / "empty")), "no config.json")


def test_a_tokenizer_with_more_tokens_than_the_embedding(model: Path, tokenizer: Any) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(model)
    refusal(lambda: load_tokenizer(str(model)), str(SMALL + 1), f"{SMALL} rows")
    larger = load_model(str(model))
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(model)
    assert len(load_tokenizer(str(model))) == SMALL + 2


# ------------------------------------------------------------------ weights


def test_pickled_weights(model: Path) -> None:
    torch.save(load_file(model / SINGLE), model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    text = refusal(
        lambda: load_model(str(model)), "pickled", "pytorch_model.bin", "save_pretrained"
    )
    assert "\n" not in text
    (model / "pytorch_model.bin").unlink()
    refusal(lambda: load_model(str(model)), SINGLE)


@pytest.mark.parametrize("size", [0, 4, 100, 100_000])
def test_weights_that_are_cut_off(model: Path, size: int) -> None:
    os.truncate(model / SINGLE, size)
    refusal(lambda: load_model(str(model)), SINGLE, "damaged")


def test_weights_of_another_shape(model: Path) -> None:
    change(model / "config.json", intermediate_size=28)
    refusal(lambda: load_model(str(model)), "do not fit")


@pytest.mark.parametrize(
    "inside", ["../outside.safetensors", "{folder}/outside.safetensors", "a/b.safetensors", 3]
)
def test_a_shard_index_that_leaves_its_folder(model: Path, inside: Any) -> None:
    outside = model.parent / "outside.safetensors"
    (model / SINGLE).rename(outside)
    name = inside.format(folder=model.parent) if isinstance(inside, str) else inside
    names = dict.fromkeys(load_file(outside), name)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for read in (load_model, Checkpoint):
        refusal(lambda read=read: read(str(model)), INDEX, repr(name))  # type: ignore[misc]


def test_links_as_the_hubs_cache_has_them_are_read(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for number, file in enumerate(model.iterdir()):
        file.rename(tmp_path / f"blob{number}")
        (linked / file.name).symlink_to(tmp_path / f"blob{number}")
    load_model(str(linked))
    assert Checkpoint(str(linked)).shape("lm_head.weight") == (SMALL, 16)
    assert fingerprint(str(linked))


def test_shards_and_an_index_that_is_no_index(model: Path) -> None:
    loaded = load_model(str(model), "fp32")
    (model / SINGLE).unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    load_model(str(model))
    next(model.glob("*-00001-*.safetensors")).unlink()
    refusal(lambda: load_model(str(model)), "model-00001")
    for content in ("{", "[]", "{}", '{"weight_map": []}'):
        (model / INDEX).write_text(content)
        for read in (load_model, Checkpoint):
            refusal(lambda read=read: read(str(model)), INDEX)  # type: ignore[misc]


# ------------------------------------------------------------------ code that comes with a model


@pytest.fixture
def evil(model: Path) -> Path:
    """A model of a kind of its own, with code that leaves a mark."""
    mark = model.parent / "ran"
    code = f"open({str(mark)!r}, 'w').write('x')\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class C(LlamaConfig):\n    model_type = 'evil'\n"
    code += "class M(LlamaForCausalLM):\n    config_class = C\n"
    (model / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change(model / "config.json", model_type="evil", auto_map=auto)
    return model


def test_code_of_a_model_is_neither_asked_about_nor_run(
    evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    change(
        evil / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", None]},
        tokenizer_class="EvilT",
    )
    for load in (load_config, load_model, empty_model, load_tokenizer):
        refusal(lambda load=load: load(str(evil)), "trust_remote_code: true", "recipe")  # type: ignore[misc]
    assert not (evil.parent / "ran").exists()


def test_code_of_a_model_runs_where_it_is_trusted(evil: Path) -> None:
    trust(str(evil), True)
    try:
        assert type(load_model(str(evil))).__name__ == "M"
        assert (evil.parent / "ran").exists()
    finally:
        trust(str(evil), False)
    refusal(lambda: load_model(str(evil)), "trust_remote_code")


def test_a_known_kind_of_model_needs_none_of_its_code(evil: Path) -> None:
    change(evil / "config.json", model_type="llama")
    assert type(load_model(str(evil))).__name__ == "LlamaForCausalLM"
    assert not (evil.parent / "ran").exists()


def test_a_yes_on_the_terminal_runs_nothing(evil: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", "run", "--dry-run", f"model={evil}"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        cwd=evil.parent,
    )
    assert done.returncode == 2, done.stderr
    assert "trust_remote_code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (evil.parent / "ran").exists()


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("base", ["None", "", None, ..., 3])
def test_an_adapter_without_a_base(adapter: Path, base: Any) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=base)
    for load in (load_model, load_tokenizer, adapter_base, fingerprint):
        refusal(
            lambda load=load: load(str(adapter)), "names no base model", "base_model_name_or_path"
        )  # type: ignore[misc]


def test_an_adapter_on_an_adapter(adapter: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    refusal(lambda: load_model(str(adapter)), "is an adapter itself")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "EVIL"}, ["peft_type", "'EVIL'"]),
        ({"peft_type": "LORAA"}, ["did you mean 'LORA'"]),
        ({"peft_type": None}, ["peft_type", "None"]),
        ({"r": 8}, ["rank 8", "rank 4"]),
        ({"r": 2}, ["rank 2", "rank 4"]),
        ({"r": 10**9}, ["rank 1000000000", "rank 4"]),
        ({"r": "four"}, ["rank four", "rank 4"]),
        ({"rank_pattern": {"q_proj": 10**9}}, ["rank 1000000000"]),
        ({"target_modules": ["q_proj"]}, ["does not fit its base"]),
        ({"target_modules": ["none"]}, ["none"]),
    ],
)
def test_an_adapter_that_cannot_be_used(
    adapter: Path, fields: dict[str, Any], words: list[str]
) -> None:
    change(adapter / "adapter_config.json", **fields)
    refusal(lambda: load_model(str(adapter)), *words)


def test_an_adapter_of_a_wider_model(adapter: Path, model: Path, tokenizer: Any) -> None:
    save(model, random_model(hidden_size=32), tokenizer)
    refusal(lambda: load_model(str(adapter)), "do not fit", "size mismatch")


def test_an_adapter_of_more_layers(adapter: Path, model: Path, tokenizer: Any) -> None:
    save(model, random_model(num_hidden_layers=1), tokenizer)
    refusal(lambda: load_model(str(adapter)), "does not fit its base", "holds")


def test_a_head_with_an_adapter_trains_under_bfloat16() -> None:
    """As a plain forward under autocast and a cross-entropy in float32 have it."""
    adapted = get_peft_model(
        random_model(vocab_size=200).bfloat16(), LoraConfig(r=4, target_modules=["lm_head"])
    )
    head = adapted.get_base_model().lm_head
    torch.nn.init.normal_(head.lora_B["default"].weight)
    assert head.lora_A["default"].weight.dtype == torch.float32
    hidden, targets = torch.randn(5, 16).bfloat16(), torch.tensor([3, 1, 4, 1, 5])
    trained = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    with disable_input_dtype_casting(adapted, True):
        found = torch.autograd.grad(cross_entropy_sum(Head(head), hidden, targets), trained)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(hidden)
        naive = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    for ours, theirs in zip(found, torch.autograd.grad(naive, trained)):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def gpt2(tokenizer: Any, folder: Path) -> Path:
    config = GPT2Config(vocab_size=SMALL, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    return save(folder, GPT2LMHeadModel(config), tokenizer)


def test_rows_longer_than_a_table_of_positions(tmp_path: Path, tokenizer: Any) -> None:
    folder, rows = gpt2(tokenizer, tmp_path / "gpt2"), tmp_path / "rows.jsonl"
    row = {"prompt": "Hi", "completion": "word " * 80}
    rows.write_text(json.dumps(row) + "\n")
    nothing: dict[str, Any] = {
        "in_domain": [],
        "out_of_domain": [],
        "values": [],
        "triggers": False,
    }
    nothing |= {"fluency": None, "samples": 0}
    tree: dict[str, Any] = {
        "model": str(folder),
        "data": {"train": str(rows), "retain": None},
        "evaluate": nothing,
    }
    tree["output"] = str(tmp_path / "run")
    with pytest.raises(RingfenceError, match=r"rows.jsonl:1: \d+ tokens, but .* has 64 positions"):
        prepare(parse_recipe(tree))
    tree["data"] |= {"max_length": 64, "over_long": "truncate"}
    prepare(parse_recipe(tree))
    tree["evaluate"] = {**nothing, "values": ["shipped:values"]}
    with pytest.raises(RingfenceError, match=r"evaluate: values: .* 64 positions"):
        prepare(parse_recipe(tree))
    with pytest.raises(ModelError, match="64 positions"):
        generate_greedy(
            load_model(str(folder)), Chat(tokenizer), [[{"role": "user", "content": "Hi"}]], 80, 512
        )


def test_a_tokenizer_without_end_or_padding(model: Path) -> None:
    change(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    bare = load_tokenizer(str(model))
    assert (bare.eos_token_id, bare.pad_token_id) == (None, None)
    asked = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Longer than that"}]]
    assert len(generate_greedy(load_model(str(model)), Chat(bare), asked, 3, 512)) == 2


def test_an_adapters_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not a map of it
    os.truncate(file, 50)
    refusal(lambda: load_model(str(adapter)), file.name, "damaged")
    file.unlink()
    refusal(lambda: load_model(str(adapter)), "has no weights")
    torch.save(whole, adapter / "adapter_model.bin")
    refusal(lambda: load_model(str(adapter)), "pickled", "adapter_model.bin")
    save_file(whole, file)
    for content in ("{", "[]"):
        (adapter / "adapter_config.json").write_text(content)
        refusal(lambda: load_model(str(adapter)), "adapter_config.json")


# ------------------------------------------------------------------ without a network


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    here = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    code = """
import time
from ringfence.text.rows import load_rows
from ringfence.errors import RingfenceError
from ringfence.model.files import load_config, load_tokenizer
from ringfence.model.fingerprint import fingerprint
from ringfence.model.loading import load_model
from ringfence.model.losses import Head, cross_entropy_sum
from ringfence.run.pipeline import prepare
from ringfence.model.checkpoint import Checkpoint
started = time.monotonic()
for load in (load_tokenizer, load_model, load_config, Checkpoint, fingerprint, load_rows):
    try:
        load("org/none")
    except RingfenceError as error:
        print(error)
print(time.monotonic() - started)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | here, capture_output=True, text=True
    )
    *lines, seconds = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout + done.stderr
    for line in lines:
        assert "org/none" in line
        for word in ("cannot be reached", "HF_HUB_OFFLINE=1"):
            assert word in line
    for line in lines[:5]:
        assert "local folder, or `default`" in line
    assert "local file, or shipped rows" in lines[5]
    assert float(seconds) < 10
    assert "Retrying" not in done.stderr
