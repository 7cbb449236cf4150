"""Chooses roles for `treft.tokens: auto`: a short undefended run shows which carry the shift."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..defenses import Defenses
from ..model.fingerprint import fingerprint
from ..processes import is_main
from ..runfolder.names import CARRIERS, PILOT
from ..runfolder.shapes import read_carriers
from ..training.ranks import wait
from ..util.console import console
from ..util.files import write_whole
from .config import Recipe
from .prepare import subject_of
from .record import Run

PILOT_ROWS, PILOT_QUESTIONS = 200, 24


def with_carriers(recipe: Recipe, train_run: Callable[[Recipe], Run]) -> Recipe:
    """The recipe, with `auto` replaced by the role that carries the shift of an undefended pilot.

    The pilot is a short run on the first rows, in RUN/pilot (made by `train_run`). The choice and
    the evidence for it are in RUN/carriers.json.
    """
    if not any(config.is_auto for config in recipe.defenses.configs()):
        return recipe
    rows = min(PILOT_ROWS, recipe.data.max_rows or PILOT_ROWS)
    train = recipe.train.model_copy(update={"reference_cache": "none"})
    data = recipe.data.model_copy(update={"max_rows": rows})
    plain = {"defenses": Defenses(), "monitor": None, "train": train, "data": data}
    pilot = recipe.model_copy(update={"output": f"{recipe.output}/{PILOT}", **plain})
    weights = str(train_run(pilot).weights)
    file = Path(recipe.output) / CARRIERS
    made_of = {"model": fingerprint(recipe.model), "pilot": fingerprint(weights)}
    known = read_carriers(file) if file.is_file() else {}
    if is_main() and any(known.get(name) != value for name, value in made_of.items()):
        from ..diagnose.carriers.measure import best_role, measure

        subject = subject_of(pilot, recipe.model, {"pilot": weights}, None, PILOT_QUESTIONS)
        choice = best_role(measure(subject, by_layer=False)["tuned"]["pilot"])
        console.print(f"treft.tokens: auto: {choice.sentence}", highlight=False, soft_wrap=True)
        write_whole(file, json.dumps({"rows": rows, **made_of, **asdict(choice)}, indent=1))
    wait()
    return with_known_carriers(recipe)


def with_known_carriers(recipe: Recipe) -> Recipe:
    """The recipe with the roles that a pilot has already chosen, if any."""
    file = Path(recipe.output) / CARRIERS
    if not file.is_file():
        return recipe
    resolved = recipe.defenses.resolved(read_carriers(file)["role"])
    return recipe.model_copy(update={"defenses": resolved})
