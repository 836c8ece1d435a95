"""Weights adjusted after a cut, so that outputs match the original's again."""
