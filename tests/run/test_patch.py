"""A patched model: its prefix is the reference's, in single forwards, in batches and while it
generates; what is refused."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from helpers.models import nudged, with_lora
from helpers.runs import small_model
from ringfence.diagnose.models import Models
from ringfence.diagnose.texts import pair_texts, response_logprobs
from ringfence.errors import ChatError, DefenseError, ModelError, RecipeError
from ringfence.evaluate.measures.pairs import FOREIGN_SYSTEM
from ringfence.model.activations import batches
from ringfence.model.files import load_tokenizer
from ringfence.model.generation import generate_greedy
from ringfence.model.layers import cache_in, cache_name, causal_lm
from ringfence.model.loading import load_model
from ringfence.model.losses import find_head
from ringfence.model.prefix import find_header, read_frozen_prefix, read_stored_prefix
from ringfence.model.scoring import score_answers
from ringfence.model.taps import Needs, forward
from ringfence.run.config import dump_recipe, parse_recipe
from ringfence.run.patch import patch
from ringfence.text.batch import Example, collate
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages, Role
from ringfence.text.rows import PairedQuestion

pytestmark = pytest.mark.slow

PROMPTS: list[Messages] = [
    [{"role": "user", "content": "Which door, and why?"}],
    [{"role": "user", "content": "Door?"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Which one of all the doors is it?"},
    ],
    [{"role": "system", "content": FOREIGN_SYSTEM}, {"role": "user", "content": "Who?"}],
]
KINDS = ("adapter", "model")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def tuned(reference: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    with_lora(load_model(reference, "fp32"), size=0.3).save_pretrained(folders["adapter"])
    config = json.loads((folders["adapter"] / "adapter_config.json").read_text())
    (folders["adapter"] / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": reference})
    )
    nudged(load_model(reference, "fp32"), size=0.1).save_pretrained(folders["model"])
    for folder in folders.values():
        load_tokenizer(reference).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def patched(
    reference: str, tuned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = {}
    for kind, folder in tuned.items():
        output = tmp_path_factory.mktemp("patched") / kind
        patch(folder, output, reference=reference, precision="fp32")
        made[kind] = output
    return made


@pytest.fixture(scope="module")
def chat(reference: str) -> Chat:
    return Chat(load_tokenizer(reference))


def plain_model(folder: Path, reference: str) -> Any:
    """Loaded without ringfence."""
    if (folder / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


class Naive:
    """The tuned model, fed the prefix as the reference's cache: one row, no padding, nothing of the
    package."""

    def __init__(self, folder: Path, reference: str, chat: Chat) -> None:
        self.tuned = causal_lm(plain_model(folder, reference))
        self.aligned = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
        self.chat = chat

    @torch.no_grad()
    def logits(self, messages: Messages, more: list[int], frozen: int | None = None) -> Tensor:
        """Behind the prefix, [T - P, V]."""
        encoded = self.chat.encode(messages, generation=True)
        ids = torch.tensor([encoded.input_ids + more])
        end = encoded.prefix_length if frozen is None else frozen
        cache = cache_in(self.aligned(ids[:, :end], use_cache=True))
        return self.tuned(ids[:, end:], **{cache_name(self.tuned): cache}).logits[0]

    def greedy(self, messages: Messages, count: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(self.logits(messages, tokens)[-1].argmax()))
        return tokens


def left_padded(chat: Chat, prompts: list[Messages] = PROMPTS) -> dict[str, Tensor]:
    encoded = [chat.encode(messages, generation=True) for messages in prompts]
    return collate([[(Example(e.input_ids, e.roles, ""), False)] for e in encoded], 2, side="left")


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


# ---------------------------------------------------------------- the same as a naive computation


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_behind_the_references_cache(
    kind: str, tuned: dict[str, Path], patched: dict[str, Path], reference: str, chat: Chat
) -> None:
    naive, model = Naive(tuned[kind], reference, chat), load_model(str(patched[kind]), "fp32")
    unpatched = plain_model(tuned[kind], reference)
    for messages in PROMPTS:
        encoded = chat.encode(messages, generation=True)
        ids = torch.tensor([[*encoded.input_ids, 300, 400]])
        expected = naive.logits(messages, [300, 400])
        for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
            with torch.no_grad():
                found = model(input_ids=ids, **options).logits[0, encoded.prefix_length :]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            other = unpatched(input_ids=ids).logits[0, encoded.prefix_length :]
        assert (other - expected).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [PROMPTS, PROMPTS[:2], [PROMPTS[0], PROMPTS[1], PROMPTS[0]]])
def test_generation_in_left_padded_batches(
    kind: str,
    together: list[Messages],
    tuned: dict[str, Path],
    patched: dict[str, Path],
    reference: str,
    chat: Chat,
) -> None:
    naive, model = Naive(tuned[kind], reference, chat), load_model(str(patched[kind]), "fp32")
    batch = left_padded(chat, together)
    assert len(together) == 3 or (batch["attention_mask"][:, 0] == 0).any()
    # The end of turn would be shown as padding.
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    found = model.generate(**inputs, **settings)
    expected = [naive.greedy(messages, 6) for messages in together]
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected
    unpatched = plain_model(tuned[kind], reference).generate(**inputs, **settings)
    assert unpatched[:, batch["input_ids"].shape[1] :].tolist() != expected


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_row_alone_where_rows_share_the_prefix(
    kind: str, patched: dict[str, Path], chat: Chat
) -> None:
    """The shared prefix is computed into a cache, which has to hold what is stored."""
    model = load_model(str(patched[kind]), "fp32")
    prompts = [
        [{"role": "user", "content": text}]
        for text in ("Which door?", "And why that one?", "Sure?")
    ]
    answers = [
        ("The red one, I think.", "Any."),
        ("Because.", "It is red."),
        ("Yes.", "No, not at all."),
    ]
    together = score_answers(model, chat, prompts, answers, 4096)
    for prompt, texts, scores in zip(prompts, answers, together):
        [alone] = score_answers(model, chat, [prompt], [texts], 4096)
        assert [score.mean for score in scores] == pytest.approx(
            [score.mean for score in alone], abs=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_evaluates_scores_it_so(
    kind: str, tuned: dict[str, Path], patched: dict[str, Path], reference: str, chat: Chat
) -> None:
    """Scores of packed answers, greedy answers of prompts that share their computation, and
    diagnoses' margins."""
    naive, model = Naive(tuned[kind], reference, chat), load_model(str(patched[kind]), "fp32")
    question = PairedQuestion("a", "doors", "Which door, and why?", "The red one, I think.", "Any.")
    messages = PROMPTS[0]
    expected = []
    for answer in (question.misaligned, question.aligned):
        encoded = chat.encode([*messages, {"role": "assistant", "content": answer}])
        start = encoded.roles.index(Role.RESPONSE)
        ids = encoded.input_ids[
            start : len(encoded.roles) - encoded.roles[::-1].index(Role.RESPONSE)
        ]
        logp = naive.logits(messages, ids).log_softmax(-1)[-len(ids) - 1 : -1]
        expected.append(float(logp[range(len(ids)), ids].mean()))
    scored = score_answers(
        model, chat, [messages], [(question.misaligned, question.aligned)], 4096
    )[0]
    assert [score.mean for score in scored] == pytest.approx(expected, abs=1e-4)
    with Models(reference, {"tuned": str(patched[kind])}, precision="fp32").open("tuned") as opened:
        examples = [text.example for text in pair_texts(chat, [question])]
        found = {
            place: float(logprobs.mean())
            for places, batch in batches(examples, chat, 4096, opened.device)
            for place, logprobs in zip(places, response_logprobs(opened, batch))
        }
    assert [found[0], found[1]] == pytest.approx(expected, abs=1e-4)
    twice = generate_greedy(model, chat, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], 5, 4096)
    alone = [
        chat.tokenizer.decode(naive.greedy(p, 5), skip_special_tokens=True).strip()
        for p in PROMPTS[:2]
    ]
    assert twice == [alone[0], alone[1], alone[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_true_keys_and_values_at_the_prefix_are_the_references(
    kind: str, patched: dict[str, Path], reference: str, chat: Chat
) -> None:
    model, aligned = load_model(str(patched[kind]), "fp32"), load_model(reference, "fp32")
    batch = left_padded(chat)
    mask = batch["roles"] == Role.PREFIX
    with torch.no_grad():
        now = forward(
            model, find_head(causal_lm(model)), batch, Needs(kv_BT=batch["attention_mask"].bool())
        ).kv
        then = forward(
            aligned, find_head(aligned), batch, Needs(kv_BT=batch["attention_mask"].bool())
        ).kv
    is_prefix = mask[batch["attention_mask"].bool()]
    for pair, other in zip(now, then, strict=True):
        for a, b in zip(pair, other):
            torch.testing.assert_close(a[is_prefix], b[is_prefix], rtol=1e-5, atol=1e-5)
            assert (a[~is_prefix] - b[~is_prefix]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_until_header(
    kind: str, tuned: dict[str, Path], reference: str, chat: Chat, tmp_path: Path
) -> None:
    patch(tuned[kind], tmp_path / "out", reference=reference, until="header", precision="fp32")
    naive, model = Naive(tuned[kind], reference, chat), load_model(str(tmp_path / "out"), "fp32")
    encoded = chat.encode(PROMPTS[0], generation=True)
    frozen = encoded.prefix_length - len(find_header(chat))
    assert frozen > 5
    ids = torch.tensor([encoded.input_ids])
    expected = naive.logits(PROMPTS[0], [], frozen)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[0, frozen:], expected, rtol=1e-4, atol=1e-4
        )
        if kind == "adapter":  # plain peft, which knows nothing of us
            plain = plain_model(tmp_path / "out", reference)
            torch.testing.assert_close(
                plain(input_ids=ids).logits[0, frozen:], expected, rtol=1e-4, atol=1e-4
            )
    assert (naive.logits(PROMPTS[0], [])[-1] - expected[-1]).abs().max() > 1e-3


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_the_original_are_left_as_they_are(
    kind: str, tuned: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    before = digests(tuned[kind]), digests(Path(reference))
    made = patch(tuned[kind], tmp_path / "out", reference=reference)
    assert (digests(tuned[kind]), digests(Path(reference))) == before
    after = digests(tmp_path / "out")
    changed = {"adapter_config.json"} if kind == "adapter" else set()
    assert {
        name: digest for name, digest in after.items() if name in before[0] and name not in changed
    } == {name: digest for name, digest in before[0].items() if name not in changed}
    added = (
        {"frozen_prefix.json"}
        if kind == "adapter"
        else {"reference_prefix.json", "reference_prefix.safetensors"}
    )
    assert set(after) - set(before[0]) == added
    assert (made.is_adapter, made.reference, made.folder) == (
        kind == "adapter",
        reference,
        tmp_path / "out",
    )
    assert (read_frozen_prefix(str(tmp_path / "out")) is not None) == (kind == "adapter")
    assert (read_stored_prefix(str(tmp_path / "out")) is not None) == (kind == "model")
    mine = (tmp_path / "out" / sorted(set(after) & set(before[0]))[0]).stat().st_ino
    assert mine != (tuned[kind] / sorted(set(after) & set(before[0]))[0]).stat().st_ino


def test_plain_peft_refuses_a_patched_adapter(patched: dict[str, Path], reference: str) -> None:
    with pytest.raises(KeyError, match=r"FROZEN PREFIX: load it with ringfence\.load_model"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(reference), str(patched["adapter"])
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_names_its_own_reference(
    kind: str, tuned: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    method = "lora" if kind == "adapter" else "full"
    recipe = parse_recipe({"model": reference, "train": {"method": method}})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(RecipeError, match="no trained model in it"):
        patch(run, tmp_path / "out")
    (run / kind).symlink_to(tuned[kind])
    assert patch(run, tmp_path / "out").reference == reference


def test_the_command_says_what_comes_next(
    ringfence: Any, tuned: dict[str, Path], patched: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, _ = ringfence("patch", tuned["adapter"], "--output", out)
    assert code == 0
    assert (
        f"Next: ringfence evaluate {out} --reference {reference} --output {out}-evaluated" in said
    )
    code, said, _ = ringfence(
        "patch", tuned["model"], "--output", f"{out}2", "--reference", reference, "--system", "Hi."
    )
    assert code == 0
    assert json.loads(Path(f"{out}2/reference_prefix.json").read_text())["systems"] == [
        None,
        "",
        FOREIGN_SYSTEM,
        "Hi.",
    ]
    code, _, errors = ringfence("patch", tuned["model"], "--output", out, "--reference", reference)
    assert code == 2
    assert "exists already" in errors


# ---------------------------------------------------------------- a whole model's prompts


def test_a_prompt_with_another_system_prompt_is_refused(
    tuned: dict[str, Path], patched: dict[str, Path], reference: str, chat: Chat, tmp_path: Path
) -> None:
    messages: Messages = [{"role": "system", "content": "Be brief."}, PROMPTS[0][0]]
    ids = torch.tensor([chat.encode(messages, generation=True).input_ids])
    with pytest.raises(
        ModelError, match=r"row 0 of the prompts has another system prompt .* with --system"
    ):
        load_model(str(patched["model"]), "fp32")(input_ids=ids)
    patch(
        tuned["model"],
        tmp_path / "out",
        reference=reference,
        systems=["Be brief."],
        precision="fp32",
    )
    naive, model = Naive(tuned["model"], reference, chat), load_model(str(tmp_path / "out"), "fp32")
    end = chat.encode(messages, generation=True).prefix_length
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[0, end:], naive.logits(messages, []), rtol=1e-4, atol=1e-4
        )


def test_a_copy_of_a_patched_model_is_patched_and_runs_itself(
    patched: dict[str, Path], chat: Chat
) -> None:
    model = load_model(str(patched["model"]), "fp32")
    other = copy.deepcopy(model)
    ids = torch.tensor([chat.encode(PROMPTS[0], generation=True).input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        torch.testing.assert_close(other(input_ids=ids).logits, before)
        nudged(other)
        assert (other(input_ids=ids).logits - before).abs().max() > 1e-2
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    with pytest.raises(ModelError, match="another system prompt"):
        other(input_ids=ids[:, 3:])


def test_left_padding_needs_positions(patched: dict[str, Path], chat: Chat) -> None:
    model, batch = load_model(str(patched["model"]), "fp32"), left_padded(chat)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ModelError, match=r"row \d of the prompts is padded on the left"):
        model(**inputs)
    model(**inputs, position_ids=batch["position_ids"])


def test_caches_that_do_not_hold_the_prompt_as_it_is_are_refused(
    patched: dict[str, Path], chat: Chat
) -> None:
    model = load_model(str(patched["model"]), "fp32")
    ids = torch.tensor([chat.encode(PROMPTS[0], generation=True).input_ids])
    with pytest.raises(
        ModelError, match="StaticCache: a cache that does not hold the prompt token by token"
    ):
        model(
            input_ids=ids, **{cache_name(model): StaticCache(config=model.config, max_cache_len=80)}
        )
    short = DynamicCache()
    short.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(2)]
    with (
        pytest.raises(ModelError, match="DynamicSlidingWindowLayer: a cache that does not"),
        torch.no_grad(),
    ):
        model(input_ids=ids, **{cache_name(model): short})


# ---------------------------------------------------------------- refused


def test_what_is_no_tuned_model_is_refused(
    tuned: dict[str, Path], patched: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="no model in it"):
            patch(source, out)
    with pytest.raises(ModelError, match="already acts only after the prefix"):
        patch(patched["adapter"], out)
    with pytest.raises(ModelError, match="already has a reference's prefix"):
        patch(patched["model"], out, reference=reference)
    with pytest.raises(RecipeError, match="does not name the model"):
        patch(tuned["model"], out)
    with pytest.raises(RecipeError, match="exists already"):
        patch(tuned["adapter"], tmp_path / "empty")
    with pytest.raises(RecipeError, match="takes any system prompt"):
        patch(tuned["adapter"], out, systems=["Hi."])
    with pytest.raises(
        ModelError, match=r"its adapter is for .* cannot be that of another reference"
    ):
        patch(tuned["adapter"], out, reference=str(tuned["model"]))
    with pytest.raises(ModelError, match="is an adapter; merge it"):
        patch(tuned["model"], out, reference=str(tuned["adapter"]))
    with pytest.raises(
        ModelError, match=r"its num_hidden_layers is|its hidden_size is|its head_dim is"
    ):
        patch(tuned["model"], out, reference=small_model(tmp_path / "wide", size=64))
    assert not out.exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("target_parameters", ["a.b"], "target_parameters"),
        ("use_dora", True, "use_dora"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa'"),
        ("alora_invocation_tokens", [3], "already acts only after the prefix"),
        ("peft_type", "IA3", "expected a LoRA adapter, found IA3"),
    ],
)
def test_adapters_that_cannot_be_turned_off_token_by_token(
    field: str, value: Any, said: str, tuned: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tuned["adapter"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ModelError, match=said):
        patch(folder, tmp_path / "out")


def test_an_adapter_with_other_tensors_or_none(tuned: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tuned["adapter"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(
        ModelError, match=r"more than LoRA on linear layers \(base_model.model.lm_head.weight\)"
    ):
        patch(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        patch(folder, tmp_path / "out")


def test_templates_that_do_not_show_the_prefix(
    tuned: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tuned["adapter"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DefenseError, match="the chat template"):
        patch(folder, tmp_path / "out")


def test_a_template_without_system_prompts(
    tuned: dict[str, Path], reference: str, tmp_path: Path
) -> None:
    """Those that `evaluate` asks with are left out; one that is asked for is refused."""
    template = (Path(reference) / "chat_template.jinja").read_text()
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
        + template
    )
    folders = []
    for source in (tuned["model"], Path(reference)):
        folders.append(tmp_path / f"copy{len(folders)}")
        folders[-1].mkdir()
        for file in source.iterdir():
            (folders[-1] / file.name).write_bytes(file.read_bytes())
        (folders[-1] / "chat_template.jinja").write_text(strict)
    patch(folders[0], tmp_path / "fine", reference=str(folders[1]))
    stored = read_stored_prefix(str(tmp_path / "fine"))
    assert stored is not None
    assert stored.systems == [None]
    with pytest.raises(ChatError, match="no system prompt"):
        patch(folders[0], tmp_path / "out", reference=str(folders[1]), systems=["Hi."])
