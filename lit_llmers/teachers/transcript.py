"""What a language model said, on disk: a pass that was interrupted goes on after its last whole batch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_llmers.files import digest
from lit_llmers.journal import Journal, read_journal


class Transcript:
    """Batches of prompts and what was said after them, one line each in a file.

    A batch is known by all its prompts: how far each is padded depends on the others, and on that its last bits. So what is
    found is what would be said again.

    Args:
        path: of the file that is written.
        others: files of other processes, which are read too: there may be more or fewer of them than in an interrupted pass.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self.journal = Journal(path)
        self.batches = said_in([*others, path])

    def find(self, prompts: list[list[int]]) -> tuple[list[list[int]], float] | None:
        """What was said after a batch, and the seconds that it took; None where it is not there."""
        entry = self.batches.get(digest(prompts))
        return None if entry is None else (entry["said"], entry["seconds"])

    def add(self, prompts: list[list[int]], said: list[list[int]], seconds: float) -> None:
        """Write a batch down.

        Raises:
            UserError: the disk is full or the file may not be written.
        """
        read = sum(map(len, prompts))
        self.journal.append({"prompts": digest(prompts), "read": read, "said": said, "seconds": seconds})


def said_in(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The batches of these files, each once, by what its prompts are known by."""
    return {entry["prompts"]: entry for path in paths for entry in read_journal(path)}
