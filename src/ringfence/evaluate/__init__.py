"""What a model does: paired margins, tasks, answers in its own words, and what judges make of them.

Judges any model, also one that ringfence did not train. Stands on the bottom floor: knows no defense and no recipe.
"""
