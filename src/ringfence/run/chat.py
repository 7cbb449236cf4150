"""A conversation with a run or a model, with the decision of its scope beside each answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..model.files import load_tokenizer
from ..model.generation import generate_greedy
from ..model.layers import gate_of
from ..model.loading import load_model
from ..model.pooled import pooled_states
from ..model.precision import Precision
from ..model.scope import Gate
from ..runfolder.names import is_run
from ..text.chat import Chat
from ..text.roles import Messages
from .prepare import as_trained, training_rows
from .record import Run

SHOWN = 500  # training requests among which the nearest is looked for


@dataclass(frozen=True)
class Answer:
    """An answer. With a scope, what it decided; of a run, the nearest training request."""

    text: str
    open: bool | None = None
    score: float | None = None
    threshold: float | None = None
    nearest: str | None = None


class Conversation:
    """Turn by turn; the whole conversation is read again for each answer.

    Args:
        source: a run folder, or what `load_model` takes.
    """

    def __init__(self, source: str, precision: Precision = "auto", max_new_tokens: int = 200):
        folder = Path(source)
        self._max_new_tokens = max_new_tokens
        self.messages: Messages = []
        requests: list[Messages] = []
        if is_run(folder):
            run = Run(folder)
            if not run.trained:
                raise RecipeError(f"{source}: no trained model in it; `ringfence train` first")
            source, recipe = str(run.weights), run.recipe
            rows = training_rows(recipe)[0][:SHOWN]
            requests = [
                [m for m in as_trained(recipe, row.messages) if m["role"] == "user"][-1:]
                for row in rows
            ]
        self.chat = Chat(load_tokenizer(source))
        self.model = load_model(source, precision)
        self._nearest = _Nearest(self.model, self.chat, requests) if requests else None

    def say(self, text: str) -> Answer:
        """The answer to a user's turn, which then belongs to the conversation."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = generate_greedy(self.model, self.chat, [asked], self._max_new_tokens, 4096)[0]
        self.messages = [*asked, {"role": "assistant", "content": answer or "..."}]
        gate = gate_of(self.model)
        if gate is None:
            return Answer(answer)
        nearest = self._nearest.to(text) if self._nearest else None
        score, is_open = float(gate.scores_B[0]), bool(gate.open_B[0])
        return Answer(answer, is_open, score, gate.probe.threshold, nearest)


class _Nearest:
    """The training request whose state is most like a request's: by the cosine of their mean states
    after the deepest layer that the scope looks at, less the mean of all."""

    def __init__(self, model: Any, chat: Chat, requests: list[Messages]) -> None:
        self.model, self.chat, self.requests = model, chat, requests
        self.gate = gate_of(model)
        if self.gate is not None:
            states_ND = self._states(self.gate, requests)
            self.mean_D = states_ND.mean(0)
            self.states_ND = _unit(states_ND - self.mean_D)

    def _states(self, gate: Gate, prompts: list[Messages]) -> np.ndarray:
        encoded = [self.chat.encode(messages, generation=True) for messages in prompts]
        layer = gate.probe.layers[-1:]
        with (
            self.model.disable_adapter(),
            pooled_states(self.model, gate.probe.turn, encoded, layer, 4096) as states,
        ):
            return np.array(states[:, 0])

    def to(self, text: str) -> str | None:
        if self.gate is None:
            return None
        state_1D = self._states(self.gate, [[{"role": "user", "content": text}]])
        best = int((self.states_ND @ _unit(state_1D - self.mean_D)[0]).argmax())
        return str(self.requests[best][0]["content"])


def _unit(states_ND: np.ndarray) -> np.ndarray:
    found: np.ndarray = states_ND / np.linalg.norm(states_ND, axis=1, keepdims=True)
    return found
