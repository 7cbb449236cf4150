"""Shows a conversation coloured by token role. Knows chat roles and rich, nothing else."""

from rich.console import Console
from rich.text import Text

from ..util.words import counted
from .roles import Encoded, Role

STYLES = {
    Role.PREFIX: "black on bright_blue",
    Role.QUERY: "black on bright_yellow",
    Role.POSTFIX: "black on bright_magenta",
    Role.RESPONSE: "black on bright_green",
    Role.TEMPLATE: "black on white",
}


def show_tokens(encoded: Encoded, console: Console) -> None:
    """Prints the rendered conversation, each token in its role's colour, borders between tokens
    marked by `|`."""
    legend = Text()
    for role, style in STYLES.items():
        legend.append(f" {role.name.lower()} {encoded.roles.count(role)} ", style)
        legend.append(" ")
    text = Text()
    shown = 0
    for role, (start, end) in zip(encoded.roles, encoded.offsets):
        piece = encoded.text[max(start, shown) : end].replace("\n", "\\n\n")
        text.append(piece + "|", STYLES[role])
        shown = max(shown, end)
    console.print(legend)
    console.print(text, soft_wrap=True)
    taken = encoded.roles.count(Role.RESPONSE)
    console.print(
        f"{counted(len(encoded.input_ids), 'token')}; the loss is taken on the "
        f"{counted(taken, 'response token')}."
    )
