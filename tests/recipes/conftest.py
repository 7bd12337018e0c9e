"""What several files about recipes plan with."""

import pytest

from lit_llmers.data import sources


@pytest.fixture
def no_files(monkeypatch):
    """Plan without the files and the network that a data source would look at."""

    class Nothing:
        def fingerprint(self):
            return {"content": "unknown"}

    monkeypatch.setattr(sources, "source_of", lambda config: Nothing())
