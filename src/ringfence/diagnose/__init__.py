"""Looks inside: where alignment eroded, and what carries it. One folder for each diagnosis.

from ringfence.diagnose import Models, Subject
from ringfence.diagnose.erosion import measure, show

tuned = {"mine": "runs/mine/adapter"}
models = Models("Qwen/Qwen2.5-0.5B-Instruct", tuned, base="Qwen/Qwen2.5-0.5B")
numbers = measure.measure(Subject(models, inside, outside))
print(show.say(numbers))
"""

from .diagnosis import Subject
from .models import Models

__all__ = ["Models", "Subject"]
