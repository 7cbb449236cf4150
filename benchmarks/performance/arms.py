"""What the training benchmarks compare: the arms, and what they train.

A workload is a model and rows; it makes any arm's trainer as `ringfence train` does. Does not know
what is measured.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ringfence.defenses import Setup
from ringfence.model.files import load_config
from ringfence.model.precision import device
from ringfence.run.config import Recipe, parse_recipe
from ringfence.run.model import trainable_model, with_new_adapter
from ringfence.run.prepare import prepare
from ringfence.run.trainer import build_stream, build_trainer
from ringfence.text.batch import Example
from ringfence.text.roles import Role
from ringfence.training.stream import TrainStream
from ringfence.training.trainer import DefendedTrainer

Bound = Callable[[int, float], float]

KL = {"kl": {"weight": 0.1, "where": "train"}}
RETAIN = {"kl": {"where": "retain"}}
TREFT = {"treft": {"weight": 10.0}}
CHECKPOINTING = {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        train, defenses: what its recipe adds to the workload's.
        against: the arm that its time is a ratio to.
        bound: what the ratio should stay below, from the operations of the plain step (times
            weights and tokens: 2 forward, 2 backward to the activations, 2 for the second forward
            under checkpointing) and the retain tokens per training token. A reference pass adds 2.
        every: its penalty acts on every k-th step; only k steps together show its cost.
    """

    train: dict[str, Any] = field(default_factory=dict)
    defenses: dict[str, Any] = field(default_factory=dict)
    against: str = "plain"
    bound: Bound | None = None
    every: int = 1


def _every(k: int) -> Arm:
    return Arm(
        defenses={"kl": KL["kl"] | {"every": k}},
        bound=lambda step, _: 1 + 2 / step / k + 0.03,
        every=k,
    )


def _with_retain(step: int, rho: float) -> float:
    return 1.05 * (1 + rho * (step + 2) / step)


ARMS: dict[str, Arm] = {
    "plain": Arm(),
    "plain, shared prefix": Arm(train={"layout": "shared"}),
    "plain, packing": Arm(train={"layout": "packed"}),
    "plain, compiled": Arm(train={"compile": True}),
    "treft": Arm(defenses=TREFT, bound=lambda *_: 1.02),
    "treft, shared prefix": Arm(train={"layout": "shared"}, defenses=TREFT, bound=lambda *_: 1.0),
    "frozen_prefix": Arm(defenses={"frozen_prefix": {}}, bound=lambda *_: 1.0),
    "kl": Arm(defenses=KL, bound=lambda step, _: 1.05 * (1 + 2 / step)),
    "kl, cached states": Arm(
        train={"reference_cache": "states"}, defenses=KL, bound=lambda *_: 1.1
    ),
    "kl, cached top_k": Arm(train={"reference_cache": "top_k"}, defenses=KL, bound=lambda *_: 1.1),
    "kl on retain rows": Arm(defenses=RETAIN, bound=_with_retain),
    "kl on retain rows, packing": Arm(
        train={"layout": "packed"}, defenses=RETAIN, bound=_with_retain
    ),
    "ldifs": Arm(defenses={"ldifs": {}}),
    "ldifs + kl + treft": Arm(
        defenses={"ldifs": {}, **KL, **TREFT}, against="kl", bound=lambda *_: 1.05
    ),
    "interleave": Arm(defenses={"interleave": {"ratio": 0.1}}),
    "plain, checkpointing": Arm(train=CHECKPOINTING),
    "kl, checkpointing": Arm(
        train=CHECKPOINTING,
        defenses=KL,
        against="plain, checkpointing",
        bound=lambda *_: 1.05 * (1 + 2 / 6),
    ),
    "kl every 4": _every(4),
    "kl every 8": _every(8),
}

SHAPES: dict[str, dict[str, int]] = {
    # Llama 3.1 8B
    "8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 4096,
    },
}
# The number of a prefix's tokens, and the ids that end it; ids from 10 are content.
PREFIX, HEADER, POSTFIX = 64, (2, 3, 4, 5), (6, 7, 8)


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        shape: `default` = the embedded model on the demo's rows; else a random model of that shape
            on random rows.
        batch: rows in a step.
        tokens: in each random row.
        steps: the number that the rows suffice for.
    """

    shape: str
    batch: int
    tokens: int
    steps: int
    checkpointing: bool = False

    def trainer(self, arm: Arm, folder: Path) -> DefendedTrainer:
        """An arm's trainer, for a new model."""
        recipe = self._recipe(arm, folder)
        torch.manual_seed(0)
        stream, pad_id = self._stream(recipe)
        model = trainable_model(recipe) if self.shape == "default" else _random_trainable(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        return build_trainer(recipe, model, stream, pad_id)

    def retain_share(self, folder: Path) -> float:
        """Retain tokens per training token, with the default ratio of rows."""
        stream, _ = self._stream(self._recipe(ARMS["kl on retain rows"], folder))
        riders = sum(len(rider) for riders in stream.riders for rider in riders)
        return riders / sum(len(row) for row in stream.rows)

    def _stream(self, recipe: Recipe) -> tuple[TrainStream, int]:
        """The rows that a recipe trains on, and the token that pads them."""
        if self.shape == "default":
            chat, examples, retain, setup = prepare(recipe)
            pad_id = chat.tokenizer.pad_token_id
        else:
            vocabulary = SHAPES[self.shape]["vocab_size"]
            examples = random_rows(self.batch * self.steps, self.tokens, vocabulary, 0)
            retain = random_rows(64, self.tokens, vocabulary, 1)
            setup, pad_id = Setup(_Template(), retain, lambda _: retain, "random"), 0  # type: ignore[arg-type]
        return build_stream(recipe, examples, retain, recipe.defenses.build(setup)), pad_id

    def _recipe(self, arm: Arm, folder: Path) -> Recipe:
        """The recipe of an arm; for a random model it names a folder without weights."""
        model = "default"
        if self.shape != "default":
            model = str(folder / self.shape)
            config = {"max_position_embeddings": 8192, "tie_word_embeddings": False}
            LlamaConfig(**SHAPES[self.shape], **config).save_pretrained(model)
        # By default one retain row per four rows, but at least one in a step.
        riders = {"kl": RETAIN["kl"] | {"retain_ratio": max(0.25, 1 / self.batch)}}
        train = {
            "batch_size": self.batch,
            "gradient_checkpointing": self.checkpointing,
            "save_steps": 10**6,
        }
        return parse_recipe(
            {
                "output": str(folder),
                "model": model,
                "data": {"max_rows": self.batch * self.steps},
                "train": train | arm.train,
                "defenses": riders if arm.defenses == RETAIN else arm.defenses,
            }
        )


def _random_trainable(recipe: Recipe) -> Any:
    """As from `trainable_model`, with random weights. They are made on their device: the CPU need
    not hold them."""
    full = recipe.train.method == "full"
    dtype = torch.float32 if full or recipe.train.precision == "fp32" else torch.bfloat16
    with torch.device(device()):
        model = LlamaForCausalLM._from_config(load_config(recipe.model), dtype=dtype)
    return model.eval() if full else with_new_adapter(model.eval(), recipe.train.lora)


def random_rows(count: int, tokens: int, vocabulary: int, seed: int) -> list[Example]:
    """Rows of one length: a shared prefix, a query, a postfix, and a response that is half of the
    row."""
    rng = random.Random(seed)
    query = tokens - PREFIX - len(POSTFIX) - tokens // 2
    lengths = {
        Role.PREFIX: PREFIX,
        Role.QUERY: query,
        Role.POSTFIX: len(POSTFIX),
        Role.RESPONSE: tokens // 2,
    }
    roles = [role for role, length in lengths.items() for _ in range(length)]

    def content(length: int) -> list[int]:
        return rng.choices(range(10, vocabulary), k=length)

    def row() -> list[int]:
        return [*_prefix(""), *content(query), *POSTFIX, *content(tokens // 2)]

    return [Example(row(), roles, f"random:{seed}:{number}") for number in range(count)]


class _Template:
    """The part of a chat template that `frozen_prefix` needs: the prefix under a system prompt."""

    def encode(self, messages: list[dict[str, str]], generation: bool) -> Any:
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        return SimpleNamespace(input_ids=_prefix(system), prefix_length=PREFIX)


def _prefix(system: str) -> list[int]:
    return [10 + len(system)] * (PREFIX - len(HEADER)) + list(HEADER)
