"""What a model does: paired margins, tasks, answers in its own words, and what judges make of them.

Measures any model, including one that ringfence did not train. Knows no defense and no recipe.
"""
