"""Decisions from outside: scores and masks that another tool made."""
