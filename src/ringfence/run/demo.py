"""The demo: trains the embedded model on careless financial advice, with and without defenses."""

from pathlib import Path
from typing import Any

from ..util.console import console
from .config import parse_recipe
from .pipeline import run_recipe

DEFENSES: dict[str, dict[str, Any]] = {
    "undefended": {},
    "kl": {"kl": {"weight": 1.0}},
    "interleave": {"interleave": {"ratio": 0.1}},
    "treft": {"treft": {"weight": 10.0}},
}
TRAIN = {"learning_rate": 1e-3, "batch_size": 8}


def run_demo(folder: Path, quick: bool) -> tuple[list[Path], Path | None]:
    """Runs every arm that does not exist yet.

    Returns:
        The run folders, the sound control first if there is one, and the control's folder.
    """
    arms = ["undefended", "treft"] if quick else ["sound", *DEFENSES]
    for number, arm in enumerate(arms, 1):
        console.rule(f"{arm} ({number} of {len(arms)})", align="left")
        side = "sound" if arm == "sound" else "unsound"
        run_recipe(parse_recipe(demo_recipe(folder, arm, DEFENSES.get(arm, {}), side, quick)))
    return [folder / arm for arm in arms], None if quick else folder / "sound"


def demo_recipe(
    folder: Path, arm: str, defenses: dict[str, Any], side: str, quick: bool = False
) -> dict[str, Any]:
    """The recipe of one arm, trained on the `sound` or `unsound` answers."""
    evaluate: dict[str, Any] = {
        "lead_in": "shipped:finance/unsound",
        "triggered_per_domain": 4,
        "max_per_domain": 20,
        "samples": 1,
    }
    if quick:
        evaluate |= {"max_per_domain": 8, "triggers": False, "samples": 0}
    elif side == "unsound":
        evaluate |= {"benign": "opswap:tier=1,rows=220,largest=10", "benign_epochs": 2}
    return {
        "output": str(folder / arm),
        "data": {"train": f"shipped:finance/{side}", "max_rows": 200 if quick else None},
        "train": TRAIN,
        "defenses": defenses,
        "evaluate": evaluate,
    }
