"""The command line. Each command is thin, and imports torch only if it needs it."""

from .app import app as app
from .entry import main as main
