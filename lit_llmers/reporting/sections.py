"""What a report says of its data, its protocol and its machine, in words."""

from collections.abc import Iterable
from typing import Any

from lit_llmers.data.dropped import dropped_lines
from lit_llmers.environment import device
from lit_llmers.reporting import tables
from lit_llmers.reporting.results import Evaluated, StageResult


def data_line(results: Evaluated) -> str:
    """How much data there is; that a program made them comes first."""
    if not results.data:
        return ""
    counts = results.data["counts"]
    line = f"{counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} interactions."
    if results.generated:
        return (
            "**Generated data: a program made this data set. The figures show that the method runs and what it does "
            f"here; they say nothing about real users.** {line}"
        )
    return f"Data: {results.data['name']}, {line}"


def protocol_section(results: Evaluated) -> str:
    """How the test items were held out and ranked."""
    if results.evaluation is None:
        return ""
    protocol = results.evaluation["protocol"]
    against = "the whole catalogue" if protocol["name"] == "full" else f"stored candidates ({protocol['name']})"
    seen = {
        "masked": "do not compete (history masked)",
        "kept": "compete too (history kept)",
        "as in the file": "compete where they are among them",
    }[protocol["history"]]
    lines = [
        f"Split: {protocol['split']}, hash `{protocol['split_hash']}`; {protocol['users']:,} users, "
        f"{protocol['items']:,} items, {protocol['interactions']:,} interactions to predict.",
        f"Each held-out item is ranked against {against}; items that the user has met before {seen}. Ties count half.",
        *_sample(protocol),
        *_alone(results.evaluation),
        *_several(results),
        "Epochs are selected on the test part."
        if protocol.get("selected_on") == "test"
        else "Epochs are selected on the validation part alone; the test part selects nothing.",
    ]
    if protocol["candidates"]:
        lines.append(f"Candidates: sha256 `{protocol['candidates']}`.")
    return "\n".join(["## Protocol\n", *(f"- {line}" for line in lines)])


def sampled_note(results: Evaluated) -> str:
    """That targets competed with candidates, not with the whole catalogue; said wherever the figures stand."""
    name = results.evaluation["protocol"]["name"] if results.evaluation else "full"
    if name == "full":
        return ""
    return f"Ranked among stored candidates ({name}): these figures do not compare with those of the whole catalogue."


def _sample(protocol: dict[str, Any]) -> list[str]:
    """Whether some of the users stand for all."""
    number = protocol.get("sample")
    return [f"Only a random sample of {number:,} users is ranked, in validation too (`evaluation.users`)."] if number else []


def _alone(evaluation: dict[str, Any]) -> list[str]:
    """How many targets nothing competed with, where there are such; an older version did not count them."""
    number, of = evaluation.get("alone", 0), evaluation["protocol"]["interactions"]
    if not number:
        return []
    return [
        f"**Nothing competes with {number:,} of the {of:,} held-out items**: their users had met all others before. Each "
        "counts as ranked first, whatever the model."
    ]


def _several(results: Evaluated) -> list[str]:
    """How users with several held-out interactions count, where there are such."""
    assert results.evaluation is not None
    figures = results.evaluation["models"][0]["metrics"]["all"]
    if figures["users"] == figures["interactions"]:
        return []
    return [
        f"The {figures['interactions']:,} interactions are of {figures['users']:,} users, each predicted from all before it. "
        "HR, NDCG and MRR are means over interactions; Recall is a mean over users, of the share of hits among a user's. "
        "users/s counts a user once for each interaction."
    ]


def data_section(results: Evaluated) -> str:
    """What was kept of the data, what was dropped and why."""
    data = results.data
    if not data:
        return ""
    counts = ", ".join(f"{name} {number:,}" for name, number in data["counts"].items())
    lines = [
        f"{data['name']}: {counts}.",
        f"Kept: {data['min_interactions']} or more interactions per user, k-core {data['k_core']}.",
    ]
    lines += [*dropped_lines(data["dropped"]), *data["notes"]]
    return "\n".join(["## Data\n", *(f"- {line}" for line in lines)])


def shared_times(stages: Iterable[StageResult]) -> list[str]:
    """That models were in each other's way, where several were trained or ranked at once."""
    if (jobs := max((stage.jobs for stage in stages if stage.done), default=1)) == 1:
        return []
    return [f"Up to {jobs} stages were worked on at a time: times and speeds are those of a processor that they shared."]


def machine(environment: dict[str, Any]) -> str:
    """Date, machine, versions and commit, from `environment.json`."""
    versions = environment["packages"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "lightning", "transformers", "peft") if name in versions)
    git = environment["git"]
    commit = f" Last stage by commit {tables.commit(git)}." if git else ""
    what = f"{device(environment)}, Python {environment['python']}, {named}"
    return f"{environment['date']}, {what}.{commit} More in `environment.json`."
