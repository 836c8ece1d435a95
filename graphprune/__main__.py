"""`python -m graphprune`, where the command is not on the path."""

from graphprune.cli import main

main()
