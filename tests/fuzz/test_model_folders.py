"""Model folders whose small files were spoilt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ringfence.errors import ChatError, RingfenceError
from ringfence.model import prefix
from ringfence.model.checked import FROZEN_FILE
from ringfence.model.directions import Directions
from ringfence.model.files import adapter_base, load_config, load_tokenizer
from ringfence.model.fingerprint import fingerprint
from ringfence.model.loading import load_model
from ringfence.model.prefix import read_frozen_prefix, read_stored_prefix
from ringfence.prepare.gap_table import read_table
from ringfence.prepare.scores import read_axis
from ringfence.text.chat import Chat
from ringfence.training.reference_cache import ReferenceCache
from ringfence.util.journal import open_journal

from .harness import knock, tries
from .mutations import TEXTS, encoded, files, json_lines, spoilt
from .places import CHATML, Place, copied

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x a"}]
WHOLE = {
    "config.json": 0.03,
    "generation_config.json": 0.01,
    "tokenizer.json": 0.03,
    "tokenizer_config.json": 0.03,
    "model.safetensors.index.json": 0.02,
    "chat_template.jinja": 0.02,
}


def use(folder: Path) -> None:
    """What every command does with a model before it computes anything."""
    model = str(folder)
    adapter_base(model)
    fingerprint(model)
    load_config(model)
    Chat(load_tokenizer(model)).encode(MESSAGES)
    load_model(model, "fp32", place="cpu")


def strategy_of(file: Path) -> st.SearchStrategy[bytes]:
    content = file.read_bytes()
    if file.suffix == ".json":
        return files(json.loads(content))
    return st.one_of(spoilt(content), templates().map(encoded))


@st.composite
def templates(draw: Any) -> str:
    """Templates as people break them, and hostile ones."""
    bad = [
        "{{ range(10**9)|list }}",
        "{{ 'a' * 10**11 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ raise_exception('no') }}",
        "{{ raise_exception('x' * 5000) }}",
        "{{ raise_exception('\x1b[2J') }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
        "{{ undefined.attribute }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now('%Y') }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'x'.zfill(10 ** 10) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{% set ns = namespace(a=[]) %}{{ ns.a.append(1) }}",
        "((" * 200 + "))" * 200,
        "{{ " + "(" * 3_000 + ")" * 3_000 + " }}",
        "{{ " + "not " * 5_000 + "1 }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{% break %}",
        "{{ messages.pop() }}",
        "{{ messages.clear() }}",
        "{{ messages[0].clear() }}",
        *TEXTS[:12],
    ]
    piece = draw(st.sampled_from(bad))
    at = draw(st.sampled_from([0, CHATML.index("{{"), CHATML.index("{% endfor"), len(CHATML)]))
    return piece if draw(st.booleans()) else CHATML[:at] + piece + CHATML[at:]


@pytest.mark.parametrize("name", WHOLE)
def test_spoilt_models(name: str, small: Path, place: Place) -> None:
    @given(strategy_of(small / name))
    @tries(WHOLE[name])
    def test(content: bytes) -> None:
        folder = copied(small, place.fresh() / "model")
        (folder / name).write_bytes(content)
        knock(
            f"model folder: {name}",
            content,
            lambda: use(folder),
            folder,
            [str(folder), "template", "tokenizer"],
        )

    test()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_spoilt_adapters(name: str, small: Path, place: Place) -> None:
    @given(strategy_of(small / "adapter" / name))
    @tries(0.03)
    def test(content: bytes) -> None:
        folder = copied(small / "adapter", place.fresh() / "adapter")
        (folder / name).write_bytes(content)
        knock(f"adapter folder: {name}", content, lambda: use(folder), folder, ["adapter"])

    test()


def test_templates(small: Path, place: Place) -> None:
    tokenizer = load_tokenizer(str(small))

    @given(templates())
    @tries(0.03)
    def test(template: str) -> None:
        knock("templates", template, lambda: Chat(tokenizer, template).encode(MESSAGES), place.root)

    test()


def test_conversations(chat: Chat, place: Place) -> None:
    """Whatever people write is rendered, and its roles are found."""
    control = st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "assistant", "\n", "<|im_end|>\n<|im_start|>user\n"]
    )
    text = st.lists(
        st.one_of(control, st.sampled_from(TEXTS), st.text(max_size=20)), min_size=1, max_size=4
    )

    @given(st.lists(text.map("".join), min_size=2, max_size=4))
    @tries(0.05)
    def test(contents: list[str]) -> None:
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        found = knock("conversations", messages, lambda: chat.encode(messages), place.root)
        if not isinstance(found, RingfenceError):
            assert len(found.input_ids) == len(found.roles) == len(found.offsets)
            assert found.text == chat.render(messages)
        else:
            assert isinstance(found, ChatError)

    test()


# ------------------------------------------------------------------ files beside models


def test_prefixes(place: Place) -> None:
    frozen = {"header": [1, 4], "until": "query"}
    stored = {**frozen, "systems": [None], "prefixes": [[1, 4, 3]]}

    @given(
        st.one_of(
            files(frozen).map(lambda content: (FROZEN_FILE, content)),
            files(stored).map(lambda content: (prefix._STORED, content)),
        )
    )
    @tries(0.03)
    def test(given: tuple[str, bytes]) -> None:
        name, content = given
        folder = place.fresh()
        (folder / name).write_bytes(content)
        save_file(
            {f"0.0.{part}": torch.zeros(3, 4) for part in ("keys", "values")},
            folder / prefix._STORED_KV,
        )
        read = read_frozen_prefix if name == FROZEN_FILE else read_stored_prefix
        knock("prefixes", (name, content), lambda: read(str(folder)), folder, [name])

    test()


def test_directions(place: Place) -> None:
    file = place.fresh() / "good.safetensors"
    Directions(torch.ones(2, 1, 4), torch.ones(2), "bad", "m", 3, 3).save(file)
    good = file.read_bytes()

    @given(spoilt(good))
    @tries(0.02)
    def test(content: bytes) -> None:
        file = place.file("vectors.safetensors", content)
        knock("directions", content, lambda: read_axis(file), file.parent, ["vectors.safetensors"])

    test()


def test_tables_of_scores(place: Place) -> None:
    header = {
        "table": "perplexity gaps",
        "key": {"model": "m", "adapters": {"a": "x"}, "precision": "fp32"},
    }
    line = {
        "digest": "d",
        "origin": "o",
        "reference": 1.0,
        "misaligned": {"a": 2.0},
        "refusal": False,
        "tokens": 3,
    }

    @given(json_lines([header, line, {**line, "digest": "e"}]))
    @tries(0.02)
    def test(content: bytes) -> None:
        file = place.file("gap.jsonl", content)
        knock(
            "table of gaps",
            content,
            lambda: read_table(file).scores(()),
            file.parent,
            ["gap.jsonl"],
        )

    test()


def test_journals(place: Place) -> None:
    header = {"table": "x", "key": {"model": "m", "seed": 1}}

    @given(json_lines([header, {"a": 1}, {"a": 2}]))
    @tries(0.02)
    def test(content: bytes) -> None:
        file = place.file("table.jsonl", content)

        def call() -> None:
            found = open_journal(file, "x", {"model": "m", "seed": 1}, {})
            assert open_journal(file, "x", {"model": "m", "seed": 1}, {}) == found

        knock("journals", content, call, file.parent, ["table.jsonl"])

    test()


def test_reference_caches(place: Place) -> None:
    def cache(root: Path) -> ReferenceCache:
        return ReferenceCache("states", {"model": "m"}, root=root)

    folder = place.fresh()
    save_file(
        {"row.hidden": torch.zeros(2, 4)},
        folder / "x.safetensors",
        {"reference": cache(folder).digest},
    )
    good = (folder / "x.safetensors").read_bytes()

    @given(spoilt(good))
    @tries(0.01)
    def test(content: bytes) -> None:
        root = place.fresh()
        shard = cache(root).folder / "x.safetensors"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(content)
        knock("reference caches", content, lambda: cache(root).missing({}), root)

    test()


def test_what_is_good_is_accepted(small: Path) -> None:
    use(small)
    use(small / "adapter")
