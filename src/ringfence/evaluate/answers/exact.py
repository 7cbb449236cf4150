"""Exact probabilities of a few short replies: the numbers 0 to 100, and some words.

A reply's tokens are a path in a tree (1, 10, 100). One forward computes the prompt followed by
every inner node of the tree; each node sees only the prompt and the nodes above it. Works for any
tokenizer and any causal language model. Does not know what the replies mean.

Shapes: N nodes of the tree, its root (the prompt's last token) first; K tokens that occur in it; V
vocabulary.
"""

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.layers import causal_lm
from ...model.losses import Head, find_head
from ...model.scoring import PromptRow, forward_batches, hidden_states, takes_free_mask
from ...text.chat import Chat

NUMBERS = [str(number) for number in range(101)]
Path = tuple[int, ...]


class ReplyTree:
    """The token paths of some replies after a chat's generation prompt and a common `opening`.

    Attributes:
        paths: tokens, by reply.
        branches: paths from the root that together cover every inner node.
        tokens: all tokens that occur.
    """

    def __init__(self, chat: Chat, replies: Sequence[str], opening: str = "") -> None:
        self.paths = {reply: continuation(chat, reply, opening) for reply in replies}
        inner = {path[:depth] for path in self.paths.values() for depth in range(1, len(path))}
        self.branches = sorted(
            path
            for path in inner
            if not any(path == other[: len(path)] != other for other in inner)
        )
        self.tokens = sorted({token for path in self.paths.values() for token in path})
        self._column = {token: place for place, token in enumerate(self.tokens)}
        nodes: list[Path] = [()]
        for branch in self.branches:
            nodes += [branch[:depth] for depth in range(1, len(branch) + 1)]
        self._node = {node: nodes.index(node) for node in nodes}
        self._parent = {reply: self._longest_start(path) for reply, path in self.paths.items()}

    def _longest_start(self, path: Path) -> str | None:
        """The longest other reply that this path continues."""
        others = {reply: other for reply, other in self.paths.items() if other != path}
        starts = [reply for reply, other in others.items() if other == path[: len(other)]]
        return max(starts, key=lambda reply: len(self.paths[reply]), default=None)

    def probabilities(self, logp_NK: Tensor) -> dict[str, float]:
        """P(reply), by reply: of its tokens, minus that of longer ones (for 1: 10 to 19, 100)."""
        rows = logp_NK.double().tolist()
        total = {}
        for reply, path in self.paths.items():
            nodes = [self._node[path[:at]] for at in range(len(path))]
            columns = [self._column[token] for token in path]
            total[reply] = math.exp(sum(rows[n][k] for n, k in zip(nodes, columns)))
        alone = dict(total)
        for reply, parent in self._parent.items():
            if parent is not None:
                alone[parent] -= total[reply]
        return {reply: max(value, 0.0) for reply, value in alone.items()}


def continuation(chat: Chat, reply: str, opening: str = "") -> Path:
    """Tokens of a reply after a generation prompt and its opening.

    If the reply's first token merges with the text before it, the tokens of the reply alone.
    """
    prompt = chat.render([{"role": "user", "content": "Hello"}], generation=True) + opening
    before, whole, alone = (
        chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt, prompt + reply, reply)
    )
    return tuple(whole[len(before) :] if whole[: len(before)] == before else alone)


def reply_probabilities(
    model: Any,
    tree: ReplyTree,
    prompts: Sequence[list[int]],
    batch_tokens: int,
    skip: Container[int] = (),
) -> Iterator[dict[int, dict[str, float]]]:
    """P(reply), by reply, for each prompt's token ids.

    Args:
        skip: places of prompts to leave out; the others are batched as if these were included.

    Yields:
        For each batch, by place of the prompt.
    """
    head = find_head(causal_lm(model))
    tokens = torch.tensor(tree.tokens, device=model.device)
    branches = [list(branch) for branch in tree.branches]
    groups = [[PromptRow(prompt, branches)] for prompt in prompts]
    if not _can_pack(model, head, [row for group in groups for row in group], tokens):
        groups = [
            [PromptRow(prompt, [branch]) for branch in branches] or [PromptRow(prompt, [])]
            for prompt in prompts
        ]
    lengths = [sum(map(len, group)) for group in groups]
    for places in forward_batches(lengths, batch_tokens, model.device, skip):
        rows = [row for place in places for row in groups[place]]
        found = iter(_node_logprobs(model, head, rows, tokens))
        parts = {place: [next(found) for _ in groups[place]] for place in places}
        yield {place: tree.probabilities(_join(part)) for place, part in parts.items()}


def _can_pack(model: Any, head: Head, rows: list[PromptRow], tokens_K: Tensor) -> bool:
    """Whether branches may share a row: attention takes a free mask, and a branch sees no other."""
    if not rows or len(rows[0].answers) < 2 or not takes_free_mask(model, max(map(len, rows))):
        return False
    row = min(rows, key=len)
    alone = PromptRow(row.prompt, row.answers[-1:])
    [together_NK] = _node_logprobs(model, head, [row], tokens_K)
    [alone_NK] = _node_logprobs(model, head, [alone], tokens_K)
    last = len(alone.answers[0])
    # In nats; bfloat16 is off by some 0.05.
    return bool((together_NK[-last:] - alone_NK[-last:]).abs().mean() < 0.2)


def _join(parts: list[Tensor]) -> Tensor:
    """All nodes of a prompt, from rows that each hold the root and some branches."""
    return torch.cat([parts[0], *(part[1:] for part in parts[1:])])


def _node_logprobs(model: Any, head: Head, rows: list[PromptRow], tokens_K: Tensor) -> list[Tensor]:
    """For each row, log p [N, K] of the tokens after its prompt and each token of its branches."""
    hidden_BTD = hidden_states(model, head, rows)
    with torch.no_grad():
        return [
            head(hidden_BTD[number, len(row.prompt) - 1 : len(row)])
            .log_softmax(-1)[:, tokens_K]
            .cpu()
            for number, row in enumerate(rows)
        ]
