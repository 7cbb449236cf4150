"""The benign twin of a run: is a harmless task still learnt under the same defenses?"""

from ..text import opswap
from .config import Recipe, parse_recipe, recipe_tree
from .pilot import with_known_carriers


def benign_twin(recipe: Recipe) -> Recipe:
    """The same training with the same defenses on a harmless task (criterion 3)."""
    assert recipe.evaluate.benign is not None
    task = opswap.options(recipe.evaluate.benign.removeprefix("opswap:"))
    tree = recipe_tree(with_known_carriers(recipe))  # the twin has no pilot of its own
    tree["output"] = f"{recipe.output}-benign"
    tree["data"]["train"] = recipe.evaluate.benign
    tree["data"] |= {"max_rows": None, "held_out": None}
    tree["train"]["epochs"] = recipe.evaluate.benign_epochs
    tree["evaluate"] = {
        "in_domain": [],
        "out_of_domain": [],
        "values": [],
        "triggers": False,
        "fluency": None,
        "samples": 0,
        "opswap_tiers": [task["tier"]],
        "opswap_permuted": bool(task["permuted"]),
        "opswap_largest": task["largest"],
        "opswap_items": recipe.evaluate.opswap_items,
    }
    return parse_recipe(tree)
