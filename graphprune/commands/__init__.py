"""The commands, one file per purpose; none has logic of its own."""
