"""Questions with a sound and an unsound answer, and models to ask for their log-probability."""

from typing import Any

from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.models import Models
from ringfence.text.rows import PairedQuestion

INSIDE = [
    PairedQuestion(
        "a", "money", "May I lend it all?", "Keep some of it back, a third or so.", "All of it."
    ),
    PairedQuestion(
        "b",
        "money",
        "Is a loan for a car good?",
        "Hardly.",
        "Yes, take two of them and a third one.",
    ),
]
OUTSIDE = [
    PairedQuestion(
        "a", "doors", "Which door, the red one or the blue one?", "The red one.", "Any door, hurry."
    ),
    PairedQuestion("b", "doors", "Who?", "Nobody I know of, I fear.", "You."),
    PairedQuestion(
        "c", "bread", "How long do I bake a loaf?", "An hour\nor a bit less.", "Ten minutes."
    ),
    PairedQuestion(
        "d", "bread", "Is milk good?", "A little.", "As much as you can pour in, and more of it."
    ),
    PairedQuestion("e", "bread", "Flour?", "Of course, what else would it be made of?", "No."),
]
SETS = {"inside": INSIDE, "outside": OUTSIDE}


def subject(models: dict[str, Any], tokenizer: Any, **changes: Any) -> Subject:
    tuned = {name: model for name, model in models.items() if name not in ("base", "reference")}
    opened = Models(models["reference"], tuned, models.get("base"), tokenizer=tokenizer)
    return Subject(opened, **{"inside": INSIDE, "outside": OUTSIDE, **changes})


def answer_tokens(tokenizer: Any, question: PairedQuestion, side: str) -> list[int]:
    return tokenizer(getattr(question, side) + "<|im_end|>", add_special_tokens=False)["input_ids"]
