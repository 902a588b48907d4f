"""
The switches of an output: a journal of which shards took the place of which, as inputs changed.

    OUT/_engine/switches/<number>.json    created once; at that instant the output changes for who goes by the records
    OUT/_engine/switches/<number>.done    its files are where they belong: nobody has to know of it any more

Numbers grow by one, so of two drivers that switch at once one is first, and the other looks again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from engine.errors import CorruptOutput
from engine.schema import canonical_json
from engine.storage import Storage

SWITCHES = "_engine/switches"


@dataclass(frozen=True, slots=True)
class Switch:
    """One change of what an output consists of."""

    number: int
    add: frozenset[str]
    """Ids of shards that come in."""
    drop: frozenset[str]
    """Ids of shards that go out; some of them may never have been in."""
    files: Mapping[str, tuple[int, str]]
    """The inputs that had changed, by path: the size and version that the shards that come in are of."""
    cost: float | None = None
    """Dollars that the shards that go out had cost."""
    created_at: str = ""

    def to_bytes(self) -> bytes:
        """Return the switch as it is stored."""
        fields = {
            "add": sorted(self.add),
            "drop": sorted(self.drop),
            "files": dict(self.files),
            "cost": self.cost,
            "created_at": self.created_at,
        }
        return (canonical_json(fields) + "\n").encode()

    def name(self) -> str:
        """Return the name of its file."""
        return _name(self.number, "json")

    def done_name(self) -> str:
        """Return the name of the file that says that it has been carried out."""
        return _name(self.number, "done")


@dataclass(frozen=True, slots=True)
class Switches:
    """All switches of an output at one instant: a listing, and those that are not carried out yet."""

    numbers: frozenset[int] = frozenset()
    open: tuple[Switch, ...] = ()
    """In their order."""
    named: Mapping[str, bool] = field(default_factory=dict)
    """What the open ones say of a shard: it is in (true) or out. The last word holds."""

    @property
    def last(self) -> int:
        """The highest number; 0 if there is none."""
        return max(self.numbers, default=0)

    @classmethod
    def of(cls, storage: Storage) -> Switches:
        """List them, and read those that are not carried out: none, as a rule."""
        names = set(storage.names(SWITCHES))
        numbers = _numbers(names, ".json")
        open_ = tuple(read(storage, number) for number in sorted(numbers - _numbers(names, ".done")))
        named: dict[str, bool] = {}
        for switch in open_:
            named |= dict.fromkeys(switch.drop, False) | dict.fromkeys(switch.add, True)
        return cls(numbers, open_, named)


def last_number(storage: Storage) -> int:
    """Return the number of the last switch; 0 if there is none. One listing, no file is opened."""
    return max(_numbers(storage.names(SWITCHES), ".json"), default=0)


def since(storage: Storage, number: int) -> Iterator[Switch]:
    """Yield the switches after `number`, carried out or not."""
    for later in sorted(found for found in _numbers(storage.names(SWITCHES), ".json") if found > number):
        yield read(storage, later)


def read(storage: Storage, number: int) -> Switch:
    """
    Read one switch.

    Raises:
        CorruptOutput: If it cannot be read.
    """
    name = _name(number, "json")
    try:
        fields = json.loads(storage.read(name))
        files = {path: (int(size), str(version)) for path, (size, version) in fields["files"].items()}
        add, drop = frozenset(fields["add"]), frozenset(fields["drop"])
        return Switch(number, add, drop, files, fields["cost"], fields["created_at"])
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        raise CorruptOutput(
            f"{storage.root}/{name} cannot be read ({type(error).__name__}): it says which parts took the place of which. "
            "Restore it from a copy"
        ) from None


def _name(number: int, kind: str) -> str:
    return f"{SWITCHES}/{number:08}.{kind}"


def _numbers(names: Iterator[str] | set[str], suffix: str) -> frozenset[int]:
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return frozenset(int(stem) for stem in stems if stem.isdecimal())
