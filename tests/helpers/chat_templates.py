"""Every chat template that TRL ships, with a tokenizer that has its markers as single tokens."""

import copy
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringfence.model.files import load_tokenizer
from ringfence.text.chat import Chat

DEFAULT = "default"
MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # <|im_end|>
    r"|<｜[^｜<>\s]{1,40}｜>"  # <｜User｜>
    r"|<\|[a-z_]+>|<[a-z_]+\|>"  # <|turn>  <turn|>
    r"|\[/?INST\]|\[gMASK\]|</s>|<sop>|<image>"
    r"|</?think>|</?tool_response>|<(?:start|end)_of_(?:turn|utterance)>"
)


@dataclass(frozen=True)
class Family:
    """What is known of the models of a template: their end-of-sequence token and how a response's
    turn ends.

    `last_end` is the end of the last response, None where it is `end` too.
    """

    eos: str
    end: str
    last_end: str | None = None


# By the start of the template's name; the longest start wins.
FAMILIES = {
    "cohere": Family("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family("<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek": Family("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    DEFAULT: Family("<|im_end|>", "<|im_end|>"),
    "diffusion_gemma": Family("<eos>", "<turn|>"),
    "gemma": Family("<eos>", "<end_of_turn>"),
    "gemma4": Family("<eos>", "<turn|>"),
    "glm4moe": Family("<|endoftext|>", "<|user|>", last_end="<|endoftext|>"),
    "glm4moe_training": Family("<|endoftext|>", "<|user|>"),
    "gptoss": Family("<|return|>", "<|end|>", last_end="<|return|>"),
    "idefics3": Family("<end_of_utterance>", "<end_of_utterance>"),
    "lfm2": Family("<|im_end|>", "<|im_end|>"),
    "llama3": Family("<|eot_id|>", "<|eot_id|>"),
    "llava_next": Family("</s>", "</s>"),
    "muse_glimmer": Family("<|eot|>", "<|eot|>"),
    "nemotron": Family("<|im_end|>", "<|im_end|>"),
    "phi3": Family("<|endoftext|>", "<|end|>", last_end="<|end|>\n<|endoftext|>"),
    "qwen": Family("<|im_end|>", "<|im_end|>"),
    "smolvlm": Family("<end_of_utterance>", "<end_of_utterance>"),
}


def _folder() -> Path:
    spec = find_spec("trl")
    assert spec is not None, "TRL is needed: its wheel ships the chat templates"
    return Path(spec.origin).parent / "chat_templates"


SHIPPED = sorted(path.stem for path in _folder().glob("*.jinja"))
ALL = [DEFAULT, *SHIPPED]


@cache
def _default_tokenizer() -> Any:
    return load_tokenizer(DEFAULT)


@cache
def source(name: str) -> str:
    """The Jinja text of a template."""
    return (
        load_tokenizer(DEFAULT).chat_template
        if name == DEFAULT
        else (_folder() / f"{name}.jinja").read_text("utf-8")
    )


def family(name: str) -> Family:
    starts = [start for start in FAMILIES if name.startswith(start)]
    assert starts, (
        f"{name}: TRL ships a template that FAMILIES does not know; add how its responses end"
    )
    return FAMILIES[max(starts, key=len)]


def markers(name: str) -> list[str]:
    """The literal markers that a template writes or reads."""
    return sorted(set(MARKER.findall(source(name))) | {family(name).eos})


@cache
def _tokenizer(special: tuple[str, ...], eos: str) -> Any:
    tokenizer = copy.deepcopy(_default_tokenizer())
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": eos, "bos_token": "<bos>"})
    return tokenizer


def tokenizer(name: str, plain: bool = False) -> Any:
    """The default model's tokenizer with the template's markers as single tokens; with `plain`, as
    ordinary text."""
    if name == DEFAULT and not plain:
        return _default_tokenizer()
    if plain:
        return _tokenizer((), "<|endoftext|>")
    return _tokenizer(tuple(markers(name)), family(name).eos)


@cache
def chat(name: str, plain: bool = False) -> Chat:
    return Chat(tokenizer(name, plain), source(name))
