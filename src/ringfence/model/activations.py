"""Mean activations of answers, layer by layer, and the batches they are read from. Does not know
what they are used for.

Shapes: B rows, T tokens, N response tokens, L layers, D hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..text.batch import Batch, Example, collate
from ..text.chat import Chat
from ..text.roles import Role
from .files import pad_id
from .layers import causal_lm, decoder_layers
from .losses import find_head
from .scoring import forward_batches
from .taps import Needs, forward


def batches(
    examples: Sequence[Example], chat: Chat, batch_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Batch by batch, longest rows first: the places of its rows in `examples`, and the batch,
    padded on the right, with input_ids, attention_mask, position_ids, roles [B, T]."""
    for places in forward_batches([len(example) for example in examples], batch_tokens, device):
        padded = collate([[(examples[place], False)] for place in places], pad_id(chat.tokenizer))
        yield places, {name: tensor.to(device) for name, tensor in padded.items()}


def first_response_tokens(batch: Batch, number: int) -> Tensor:
    """Mask [B, T] of the first `number` response tokens of each row."""
    is_response_BT = batch["roles"] == Role.RESPONSE
    return is_response_BT & (is_response_BT.cumsum(1) <= number)


def mean_activations(
    model: Any,
    chat: Chat,
    examples: Sequence[Example],
    batch_tokens: int,
    layers: Sequence[int] | None = None,
    first: int | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batch by batch: the places of its rows in `examples`, their mean residual stream over
    response tokens (including the end of the turn) after every layer, [B, L, D], and the mean
    length of the same vectors, [B, L]; float32 on the CPU.

    Args:
        layers: only these, from 1.
        first: only this number of response tokens.
    """
    head = find_head(causal_lm(model))
    layers = tuple(layers or range(1, len(decoder_layers(model)) + 1))
    for places, batch in batches(examples, chat, batch_tokens, model.device):
        mask_BT = first_response_tokens(batch, first or batch["roles"].shape[1])
        with torch.no_grad():
            taps = forward(model, head, batch, Needs(states_BT=mask_BT, layers=layers))
        # Row b of the pool averages over the tokens of row b of the batch.
        pool_BN = F.one_hot(mask_BT.nonzero()[:, 0], len(places)).T / mask_BT.sum(1, keepdim=True)
        states = [taps.states[layer].float() for layer in layers]
        means_BLD = torch.stack([pool_BN @ state_ND for state_ND in states], 1)
        norms_BL = torch.stack([pool_BN @ state_ND.norm(dim=-1) for state_ND in states], 1)
        yield places, means_BLD.cpu(), norms_BL.cpu()
