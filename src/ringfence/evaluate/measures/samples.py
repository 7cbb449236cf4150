"""Greedy answers to a few questions of each domain, for reading; they give no numbers."""

from typing import Any

from pydantic import Field

from ...text.roles import Messages
from ...text.rows import PairedQuestion
from ...util.strict_yaml import Whole
from .base import Entry, Fields, MeasuredModel, Measurement
from .pairs import first_of_each_domain

ANSWER_TOKENS = 80


class SampleFields(Fields):
    samples: Whole = Field(
        2, ge=0, le=10**5, description="questions per domain answered greedily, for reading"
    )


class SampleItem(Entry):
    domain: str
    id: str
    question: str
    answer: str


class Samples(Measurement):
    """Greedy answers."""

    part = "samples"
    fields = SampleFields
    shape = list[SampleItem]

    def parts(self, config: Any) -> dict[str, list[Any]]:
        return {"samples": first_of_each_domain(config, config.samples)} if config.samples else {}

    def texts(self, item: tuple[str, PairedQuestion], config: Any) -> list[tuple[Messages, int]]:
        return [([{"role": "user", "content": item[1].question}], ANSWER_TOKENS)]

    def measure(
        self,
        part: str,
        items: list[tuple[str, PairedQuestion]],
        model: MeasuredModel,
        config: Any,
    ) -> list[dict[str, Any]]:
        prompts = [[{"role": "user", "content": q.question}] for _, q in items]
        answers = model.generate(prompts, ANSWER_TOKENS)
        return [
            {"set": s, "domain": q.domain, "id": q.id, "question": q.question, "answer": a}
            for (s, q), a in zip(items, answers)
        ]

    def complaint(self, value: Any) -> str:
        return ""


MEASUREMENT = Samples()
