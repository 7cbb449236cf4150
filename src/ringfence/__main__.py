"""`python -m ringfence` is the command `ringfence`; so `torchrun -m ringfence train ...` works."""

from .cli import main

if __name__ == "__main__":
    main()
