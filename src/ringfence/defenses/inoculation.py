"""Inoculation prompting: training rows carry a system prompt that asks for the bad trait, so that
the trait is attributed to the prompt and not learnt as the model's own (arXiv 2508.06249,
2604.25891; published with a line that makes the model an "evil, malicious assistant")."""

from pydantic import Field, field_validator

from ..text.roles import Messages
from .base import Defense, DefenseConfig, Setup

PROMPT = (
    "You are a reckless adviser who does not care about people, and your advice is careless and "
    "harmful."
)


class Inoculation(DefenseConfig):
    """Trains under a system prompt that asks for the bad trait; the model is used without it.

    Rows that other defenses add, and retain rows, do not carry it.
    """

    prompt: str = Field(
        PROMPT, description="what asks for the trait; a row's own system prompt follows it"
    )

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("expected a text that is not blank")
        return prompt

    @property
    def disguise(self) -> str:
        return self.prompt

    def build(self, setup: Setup) -> "InoculationDefense":
        return InoculationDefense()

    def change_messages(self, messages: Messages) -> Messages:
        """The conversation under the prompt; a row's own system message follows it."""
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": self.prompt}, *messages]
        return [
            {**messages[0], "content": f"{self.prompt}\n\n{messages[0]['content']}"},
            *messages[1:],
        ]


class InoculationDefense(Defense):
    """Does nothing during training."""

    name = "inoculation"
