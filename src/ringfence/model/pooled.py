"""Mean states of what users say: the last user turn's content, after some layers of a model, from
forward passes that end at the deepest of them. Kept on disk, so memory does not grow with their
number.

Shapes: N prompts, L layers, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..text.roles import Encoded
from .layers import cache_name, causal_lm
from .scope import Probe, mean_states
from .scoring import Advance, PromptRow, check_positions, common_prefix, forward_batches
from .taps import CommonPrefix
from .turn import UserTurn


@contextmanager
def pooled_states(
    model: Any,
    turn: UserTurn,
    prompts: Sequence[Encoded],
    layers: list[int],
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> Iterator[np.ndarray]:
    """Mean states [N, L, D], float32, of a reference; a peft model's adapters are off.

    Args:
        prompts: rendered as for generation.
        layers: from 1, in ascending order.
    """
    inner = causal_lm(model)
    decoder = inner.get_decoder()
    size = inner.config.get_text_config().hidden_size
    shape = (len(prompts), len(layers), size)
    asked = [PromptRow(e.input_ids, [], e.prefix_length) for e in prompts]
    lengths = [len(row) for row in asked]
    check_positions(model, lengths)
    prefixes: dict[tuple[int, ...], CommonPrefix] = {}
    with TemporaryDirectory() as folder:
        kept = np.memmap(Path(folder) / "states", np.float32, "w+", shape=shape)
        for places in forward_batches(lengths, batch_tokens, inner.device):
            rows = [torch.tensor(asked[place].prompt) for place in places]
            ids = pad_sequence(rows, batch_first=True).to(inner.device)
            real = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(ids)
            content = turn.content(ids, real.bool())
            inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            with torch.no_grad():
                prefix = common_prefix(model, [asked[place] for place in places], prefixes)
                if prefix is not None:
                    start = prefix.hidden_1PD.shape[1]
                    inputs["input_ids"], content = ids[:, start:], content[:, start:]
                    inputs[cache_name(model)] = prefix.cache_of(len(places))
                with mean_states(model, layers, content) as means:
                    decoder(**inputs, attention_mask=real)
            kept[places] = torch.stack([means[at] for at in layers], 1).cpu().numpy()
            advance(len(places))
        yield kept
        del kept


def decisions(
    model: Any,
    probe: Probe,
    prompts: Sequence[Encoded],
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[tuple[bool, float]]:
    """Whether each prompt is inside a scope, with its score; from the states of the reference of a
    peft model."""
    with (
        model.disable_adapter(),
        pooled_states(model, probe.turn, prompts, probe.layers, batch_tokens, advance) as states,
    ):
        found = torch.from_numpy(np.array(states))
    scores = probe.scores({at: found[:, place] for place, at in enumerate(probe.layers)})
    return [(bool(score > probe.threshold), float(score)) for score in scores]
