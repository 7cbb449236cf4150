"""What a conversation is, and the roles of its tokens (`chat` finds them)."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Message = dict[str, Any]
Messages = list[Message]
Span = tuple[int, int]
SpecialTokens = Literal["allow", "escape", "refuse"]


class ChatSettings(BaseModel):
    """How conversations are rendered and read, in training and after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enable_thinking: bool = Field(False, description="answers start with the template's reasoning")
    date: str | None = Field(
        None, pattern=r"^\d{4}-\d\d-\d\d$", description="today, where the template says it"
    )
    special_tokens: SpecialTokens = Field(
        "allow", description="control tokens in the text of a message"
    )


class Role(IntEnum):
    """The role of one token. PAD is given by the collator, never by a template."""

    PAD = 0
    PREFIX = 1
    QUERY = 2
    POSTFIX = 3
    RESPONSE = 4
    TEMPLATE = 5

    @classmethod
    def parse(cls, name: str) -> "Role":
        return cls[name.upper()]


@dataclass(frozen=True)
class Row:
    """One conversation and where it came from (`file.jsonl:12`), for messages and records."""

    messages: Messages
    origin: str


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: `input_ids[t]` has role `roles[t]` and covers
    `text[slice(*offsets[t])]`.

    `spans` are the characters of every message except system prompts, by its number.
    """

    text: str
    input_ids: list[int]
    roles: list[Role]
    offsets: list[Span]
    spans: dict[int, Span] = field(default_factory=dict, compare=False)

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens; they come first."""
        return self.roles.count(Role.PREFIX)


def tools_of(messages: Messages) -> list[dict[str, Any]]:
    """The tools of a conversation: those of all its messages, each once."""
    tools: list[dict[str, Any]] = []
    for message in messages:
        tools += [tool for tool in message.get("tools", []) if tool not in tools]
    return tools


def is_learnt(message: dict[str, Any]) -> bool:
    """Whether the loss is taken on what a message says."""
    return message["role"] == "assistant" and message.get("weight") != 0


def requests(row: Row) -> list[Messages]:
    """The conversation up to each user turn whose answer is learnt; else up to its last user
    turn."""
    users = [at for at, message in enumerate(row.messages) if message["role"] == "user"]
    learnt = [at for at in users if at + 1 < len(row.messages) and is_learnt(row.messages[at + 1])]
    return [row.messages[: at + 1] for at in learnt or users[-1:]]
