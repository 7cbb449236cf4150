"""Which answer of which question: the fields that answers and judgements have in common."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The place of an answer. Questions of one `cluster` are not independent."""

    set: str
    id: str
    form: str
    cluster: str
    paraphrase: int
    sample: int

    @property
    def question(self) -> tuple[str, str, str, int]:
        """One wording of a question in one form."""
        return self.set, self.id, self.form, self.paraphrase
