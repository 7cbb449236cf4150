"""The command `ringfence`, also as `python -m ringfence`; so `torchrun -m ringfence train ...` works."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C while that is imported needs no traceback either."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
