"""Looks inside: where alignment eroded, and what carries it. One folder a diagnosis.

from ringfence.diagnose import Models, Subject
from ringfence.diagnose.erosion import measure, show

models = Models("Qwen/Qwen2.5-0.5B-Instruct", {"mine": "runs/mine/adapter"}, base="Qwen/Qwen2.5-0.5B")
numbers = measure.measure(Subject(models, inside, outside))
print(show.say(numbers))
"""

from .diagnosis import Subject
from .models import Models

__all__ = ["Models", "Subject"]
