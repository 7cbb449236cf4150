"""Where the last user turn's content is in token ids, without roles: between the *header*, the
template text that always comes right before a user's content, and the *closer* that follows it.

Does not know models, defenses or training. Shapes: B rows, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import ChatError, DefenseError, ModelError
from ..text.chat import Chat
from ..text.roles import Messages, Role

_NONE = -1  # no token id
_CLOSER = 3  # tokens; the rest of the postfix may depend on what is generated


@dataclass(frozen=True)
class UserTurn:
    """The template text around a user's content.

    Attributes:
        header: token ids before it that no content can change.
        gap: token ids between the header and the content, such as a line break: they become a part
            of the content's first token if the tokenizer merges them.
        closer: token ids after it.
    """

    header: list[int]
    gap: list[int]
    closer: list[int]

    def content(self, ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Mask [B, T] of the tokens of each row's last user content. Where no closer follows, it
        goes on to the row's last real token (`real_BT`; default: all are).

        Raises:
            ModelError: a row has no user turn, or nothing in it.
        """
        if real_BT is None:
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        ids_BT = ids_BT.masked_fill(~real_BT, _NONE)
        starts_BT = self._after_header(ids_BT)
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        start_B = starts_BT.int().mul(place_T).amax(1)
        after_BT = (place_T >= start_B[:, None]) & real_BT
        closer_BT = after_BT & _matches(ids_BT, self.closer)
        mask_BT = after_BT & (closer_BT.int().cumsum(1) == 0)
        missing_B = ~(starts_BT.any(1) & mask_BT.any(1))
        if missing_B.any():
            raise ModelError(
                f"scope: row {int(missing_B.nonzero()[0])} of the prompts has no user turn, or "
                "nothing in it; make prompts with the chat template that the scope was fitted with"
            )
        return mask_BT

    def packed_content(self, ids_1T: Tensor, row_1T: Tensor) -> Tensor:
        """The same, [1, T], if one row holds several; `row_1T` says which one a token is of."""
        rows = ids_1T[0].split(row_1T[0].unique_consecutive(return_counts=True)[1].tolist())
        padded = pad_sequence(list(rows), batch_first=True, padding_value=_NONE)
        real = padded != _NONE
        return self.content(padded, real)[real][None]

    def begins_in(self, ids_BT: Tensor) -> bool:
        """Whether a user turn begins in these tokens."""
        return bool(self._after_header(ids_BT).any())

    def _after_header(self, ids_BT: Tensor) -> Tensor:
        """Places [B, T] at which a user's content starts."""
        header_BT, width = _matches(ids_BT, self.header), ids_BT.shape[1]
        full_BT = _matches(ids_BT, self.header + self.gap)
        merged_BT = header_BT & ~full_BT
        starts_BT = torch.zeros_like(header_BT)
        for found_BT, size in (
            (merged_BT, len(self.header)),
            (full_BT, len(self.header) + len(self.gap)),
        ):
            starts_BT[:, size:] |= found_BT[:, : max(width - size, 0)]
        return starts_BT


def _matches(ids_BT: Tensor, wanted: list[int]) -> Tensor:
    """Places [B, T] at which a sequence begins."""
    found_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    size = len(wanted)
    if ids_BT.shape[1] >= size:
        equal = ids_BT.unfold(1, size, 1) == ids_BT.new_tensor(wanted)
        found_BT[:, : ids_BT.shape[1] - size + 1] = equal.all(-1)
    return found_BT


def find_turn(chat: Chat) -> UserTurn:
    """What a chat template puts around a user's content, in first turns and later ones, with and
    without a system prompt.

    Raises:
        DefenseError: nothing fixed.
    """
    befores, afters, rendered, turns = [], [], [], 0
    for conversation in _CONVERSATIONS:
        try:
            encoded = chat.encode(conversation, generation=True)
        except ChatError:  # a template may refuse system prompts
            continue
        roles, ids = encoded.roles, encoded.input_ids
        rendered.append(torch.tensor([ids]))
        turns += sum(message["role"] == "user" for message in conversation)
        end = len(roles) - roles[::-1].index(Role.QUERY)
        start = next(at for at in range(end, -1, -1) if at == 0 or roles[at - 1] != Role.QUERY)
        befores.append(ids[:start][::-1])
        afters.append(ids[end:])
    before, closer = _common(befores)[::-1], _common(afters)[:_CLOSER]
    added = set(chat.tokenizer.added_tokens_decoder)
    if closer and closer[0] in added:
        closer = closer[:1]
    # What follows the last control token may merge with a content's first characters.
    fixed = max((at + 1 for at, token in enumerate(before) if token in added), default=len(before))
    words = next((at for at in range(len(before), fixed, -1) if _is_word(chat, before[at - 1])), 0)
    fixed = max(fixed, words)
    # As little as tells a user's turn from all else: what precedes it may have been read before.
    header = next(
        (
            before[fixed - size : fixed]
            for size in range(1, fixed + 1)
            if sum(int(_matches(ids, before[fixed - size : fixed]).sum()) for ids in rendered)
            == turns
        ),
        [],
    )
    if not header or not closer:
        raise DefenseError(
            "defenses.scope: the chat template puts no fixed tokens around a user's content, so "
            "the last turn cannot be found"
        )
    return UserTurn(header, before[fixed:], closer)


def _is_word(chat: Chat, token: int) -> bool:
    return bool(chat.tokenizer.decode([token]).strip())


def _common(lists: list[list[int]]) -> list[int]:
    """What all begin with."""
    size = 0
    while all(len(one) > size for one in lists) and len({one[size] for one in lists}) == 1:
        size += 1
    return lists[0][:size]


def _turns(*contents: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    said = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *said]


_CONVERSATIONS = (
    _turns("Hello"),
    _turns("user assistant user: system\nuser\nassistant\n\nuser"),
    _turns("What is 3 + 4?"),
    _turns("You write long poems", system="Be brief."),
    _turns("Hello", "Hi there.", "and then"),
    _turns("42", "Good.", "Why", "Because.", "go on!", system="You write long poems"),
)
