"""Errors that a user can mend: each names the thing that is wrong and the cure, and is shown without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something in the command, the configuration or the data is wrong. The message says what, where, and what to do."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not among the known ones; it lists them all."""
    names = sorted(known)
    return UserError(f"Unknown {kind} '{name}'.{nearest(name, names)} There is: {', '.join(names) or 'none'}.")
