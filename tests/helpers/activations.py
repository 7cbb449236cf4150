"""Questions, and models whose activations are known, for the diagnoses that look at activations."""

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from helpers.models import small_tokenizer
from helpers.naive import residual_stream
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.models import Models
from ringfence.diagnose.texts import Text
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion

TOKENIZER = small_tokenizer()
CHAT = Chat(TOKENIZER)
LAYERS = 4


def questions(count: int, domain: str = "doors") -> list[PairedQuestion]:
    """Answers of unlike lengths; every fifth unsound one is longer than 64 tokens."""
    words = ["yes", "no", "perhaps", "never", "red", "blue", "door", "seven", "hinge", "why"]
    return [
        PairedQuestion(
            f"{at}",
            domain,
            f"What of {words[at % 10]} and {words[(at * 3 + 1) % 10]}, number {at}?",
            " ".join(words[(at + 2 * k) % 10] for k in range(3 + at % 4)),
            " ".join(words[(at + 3 * k) % 10] for k in range(90 if at % 5 == 2 else 2 + at % 6)),
        )
        for at in range(count)
    ]


def subject(
    models: Models, count: int = 12, inside: str = "doors", outside: str = "windows", **options: Any
) -> Subject:
    return Subject(
        models, questions(count // 2, inside), questions(count - count // 2, outside), **options
    )


def naive_mean(model: Any, text: Text) -> np.ndarray:
    """[L, D]: mean of each layer's output over the first 64 response tokens of one unpadded row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    chosen = [at for at, role in enumerate(text.example.roles) if role == Role.RESPONSE][:64]
    with torch.no_grad(), residual_stream(inner) as stream:
        inner(input_ids=torch.tensor([text.example.input_ids]))
    return torch.stack([state[chosen].double().mean(0) for state in stream[1:]]).numpy()


class Named:
    """In place of a model: tells the stand-in of `example_means` whose activations are wanted."""

    def __init__(self, name: str, layers: int = LAYERS, width: int = 256) -> None:
        self.name = name
        sizes = SimpleNamespace(num_hidden_layers=layers, hidden_size=width)
        self.config = SimpleNamespace(get_text_config=lambda: sizes)

    def eval(self) -> "Named":
        return self


def noise(key: str, size: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).normal(size=size)
