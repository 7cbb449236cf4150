"""Looks inside: where alignment eroded, and what carries it. One module a diagnosis.

from ringfence.diagnose import Models, Subject, erosion

models = Models("Qwen/Qwen2.5-0.5B-Instruct", {"mine": "runs/mine/adapter"}, base="Qwen/Qwen2.5-0.5B")
numbers = erosion.measure(Subject(models, inside, outside))
print(erosion.say(numbers))
"""

from .diagnosis import Subject
from .models import Models

__all__ = ["Models", "Subject"]
