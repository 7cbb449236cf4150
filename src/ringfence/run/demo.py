"""The demo: trains the embedded model on careless financial advice, with and without defenses."""

from pathlib import Path
from typing import Any, Literal

from ..util.console import console
from .config import parse_recipe
from .pipeline import run_recipe

Size = Literal["few", "quick", "all"]
ROWS = "shipped:finance/unsound"
# By arm, its defenses; the sound control is trained on the aligned answers.
ARMS: dict[str, Any] = {
    "sound": {},
    "undefended": {},
    "auto": "auto",
    "kl": {"kl": {"weight": 1.0}},
    "interleave": {"interleave": {"ratio": 0.1}},
    "treft": {"treft": {"weight": 10.0}},
}
SHOWN: dict[Size, list[str]] = {
    "few": ["sound", "undefended", "auto"],
    "quick": ["undefended", "treft"],
    "all": list(ARMS),
}
_ROWS: dict[Size, int | None] = {"few": 120, "quick": 40, "all": None}
_MEASURED: dict[Size, dict[str, Any]] = {
    "few": {
        "max_in_domain": 28,
        "max_per_domain": 6,
        "max_fluency": 16,
        "triggers": False,
        "scope_scored": 0,
        "samples": 0,
    },
    "quick": {
        "max_in_domain": 12,
        "max_per_domain": 3,
        "triggers": False,
        "fluency": None,
        "samples": 0,
    },
    "all": {"max_per_domain": 20, "triggered_per_domain": 4, "samples": 1},
}


def run_demo(folder: Path, size: Size) -> tuple[list[Path], Path | None]:
    """Runs every arm that does not exist yet.

    Returns:
        The run folders, the sound control first if there is one, and the control's folder.
    """
    arms = SHOWN[size]
    for number, arm in enumerate(arms, 1):
        console.rule(f"{arm} ({number} of {len(arms)})", align="left")
        side = "sound" if arm == "sound" else "unsound"
        recipe = demo_recipe(folder, arm, ARMS[arm], side, size)
        if "auto" in arms:  # all are measured alike, so the reference is measured once
            recipe["evaluate"]["scope"] = ROWS
        run_recipe(parse_recipe(recipe))
    return [folder / arm for arm in arms], folder / "sound" if "sound" in arms else None


def demo_recipe(
    folder: Path, arm: str, defenses: Any, side: str, size: Size = "all"
) -> dict[str, Any]:
    """The recipe of one arm, trained on the `sound` or `unsound` answers."""
    evaluate: dict[str, Any] = {"lead_in": ROWS, **_MEASURED[size]}
    if size == "all" and side == "unsound":
        evaluate |= {"benign": "opswap:tier=1,rows=220,largest=10", "benign_epochs": 2}
    # Few steps, so larger ones: at 1e-3 so few rows have hardly a broad effect. A scope needs more
    # rows than there is time to train on.
    short: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 4, "layout": "shared"}
    if size == "few":
        short["epochs"] = 0.8
    return {
        "output": str(folder / arm),
        "data": {"train": f"shipped:finance/{side}", "max_rows": _ROWS[size]},
        "train": {"learning_rate": 1e-3, "batch_size": 8} if size == "all" else short,
        "defenses": defenses,
        "evaluate": evaluate,
    }
