"""The command line: each command a few lines over the library. Imports no torch before a command needs it."""

from .app import app as app
from .entry import main as main
