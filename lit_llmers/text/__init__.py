"""Item texts as vectors."""
