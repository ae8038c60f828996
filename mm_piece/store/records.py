"""What a store's manifest records: its base, and each of its deltas."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ManifestEntry:
    """One delta in the manifest."""

    position: int
    task: str
    file: str
    sha256: str
    parent: str
    entries: int
    bytes: int


@dataclass(frozen=True)
class BaseRecord:
    """The base of a store: what it is and where it lies. Only the fingerprint is sure to be there.

    `facts` is the record as it stands in the manifest. It may have facts that this library does not
    know: they are kept, in their order.
    """

    facts: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Identity at a glance: names, shapes, dtypes and a sample of all tensors."""
        return self.facts["fingerprint"]

    @property
    def digest(self) -> str | None:
        """Identity of every bit."""
        return self.facts.get("digest")

    @property
    def family(self) -> str | None:
        """Transformers' `model_type`."""
        return self.facts.get("family")

    @property
    def dtype(self) -> str | None:
        """Dtype that the deltas were trained in, by name."""
        return self.facts.get("dtype")

    @property
    def parameters(self) -> int | None:
        """Number of parameters."""
        return self.facts.get("parameters")

    @property
    def bytes(self) -> int | None:
        """Size of all parameters."""
        return self.facts.get("bytes")

    @property
    def folder(self) -> str | None:
        """Where the base lies, relative to the store."""
        return self.facts.get("folder")

    @property
    def hub(self) -> str | None:
        """Repository of a base on the Hub."""
        return self.facts.get("hub")

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of that repository."""
        return self.facts.get("revision")

    def with_facts(self, facts: Mapping[str, Any]) -> "BaseRecord":
        """Return the record with other or further facts."""
        return BaseRecord({**self.facts, **facts})

    def without_folder(self) -> "BaseRecord":
        """Return the record for the Hub: no folder of one computer means anything on another."""
        facts = {key: value for key, value in self.facts.items() if key != "folder"}
        return BaseRecord(facts)
