"""Looks inside: where alignment eroded, and what carries it. One module a diagnosis."""
