"""`python -m ringfence` is the command `ringfence`; so `torchrun -m ringfence train ...` works."""

import sys


def main() -> None:
    """Ctrl-C while the command line itself is imported prints no traceback either."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
