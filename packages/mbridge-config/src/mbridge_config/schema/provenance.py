"""Where a config came from: its name, and for each key that was set the place where it was set."""

import dataclasses

from mbridge_config.problems import Problem, Where


@dataclasses.dataclass(kw_only=True, slots=True)
class Provenance:
    """`places` has an entry for each key and section that a file or argument set, under its full name.

    `failed` holds the keys whose value could not be used and that have their default instead; rules that read
    one of them are skipped, so that one mistake is reported once.
    """

    name: str | None = None
    file: str | None = None
    places: dict[str, Where] = dataclasses.field(default_factory=dict)
    failed: set[str] = dataclasses.field(default_factory=set)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def was_set(self, key: str) -> bool:
        """Whether a file or an argument set `key`."""
        return key in self.places

    def where(self, key: str | None) -> Where | None:
        """The place of `key`, or of the nearest section around it that was set."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return None
