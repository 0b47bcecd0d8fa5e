"""Reading config files of tiles: JSON of a known format, whose fields are held to what they may be.

Whatever is wrong raises ValueError: file, place, what was expected and what came.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Rule = tuple[str, object, str]
"""(name of a field, whether it is as it may be, what it may be)."""


def expect(where: str, good: object, what: str, got: object) -> None:
    """Raise ValueError where not ``good``; ``where`` begins with the file."""
    if not good:
        raise ValueError(f"{where}: expected {what}; got {got}")


def read_fields(path: Path, form: str, keys: Collection[str]) -> dict[str, Any]:
    """The fields ``keys`` of the file of format ``form``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a readable JSON file; got {error}") from error
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    expect(f"{path}: format", found == form, repr(form), repr(found))
    return fields_of(f"{path}: top level", data, keys)


def fields_of(where: str, data: object, keys: Collection[str]) -> dict[str, Any]:
    """``data`` as a dict of exactly ``keys``."""
    got = sorted(data) if isinstance(data, dict) else type(data).__name__
    whole = isinstance(data, dict) and set(data) == set(keys)
    expect(where, whole, f"the fields {', '.join(keys)}", got)
    return data  # type: ignore[return-value]


def powers_of(where: str, data: object, keys: Collection[str]) -> dict[str, int]:
    """``data`` as a dict of exactly ``keys``, all of them powers of two."""
    fields = fields_of(where, data, keys)
    expect(where, all(map(is_power_of_two, fields.values())), "powers of two", fields)
    return fields


def entries_of(
    path: Path, name: str, data: object, read: Callable[[str, object], T]
) -> tuple[T, ...]:
    """What ``read`` makes of each item of a list, with its place."""
    expect(f"{path}: {name}", isinstance(data, list), "a list", type(data).__name__)
    assert isinstance(data, list)
    return tuple(read(f"{path}: {name}[{i}]", item) for i, item in enumerate(data))


def hold(where: str, fields: dict[str, Any], rules: Iterable[Rule]) -> None:
    """Hold ``fields`` to ``rules``; one rule may count on those before it."""
    for name, good, what in rules:
        expect(f"{where}: {name}", good, what, repr(fields[name]))


def launch_rules(fields: dict[str, Any], dtypes: Iterable[str], stages: int = 64) -> Iterator[Rule]:
    """Of the fields that a line has in each kind of file, but for its tile."""
    yield "aligned", type(fields["aligned"]) is bool, "true or false"
    known = sorted(dtypes)
    yield "dtypes", are_some_of(fields["dtypes"], known), f"some of {known}"
    yield "group_m", is_whole(fields["group_m"], 64), "1 to 64"
    yield "num_stages", is_whole(fields["num_stages"], stages), f"1 to {stages}"
    yield "num_warps", is_power_of_two(fields["num_warps"], 32), "a power of two up to 32"


def is_whole(value: object, most: int) -> bool:
    """Whether it is an int from 1 to ``most``."""
    return type(value) is int and 1 <= value <= most


def is_power_of_two(value: object, most: int = 2**31) -> bool:
    """Whether it is an int that is one, at most ``most``."""
    return type(value) is int and 0 < value <= most and value & (value - 1) == 0


def are_some_of(value: object, known: Iterable[str]) -> bool:
    """Whether it is a list of at least one of ``known`` and of nothing else."""
    return isinstance(value, list) and bool(value) and set(known).issuperset(map(str, value))


def is_tile(value: object, least: int = 1) -> bool:
    """Whether it is a list of three powers of two from ``least`` on."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(is_power_of_two(size) and size >= least for size in value)
    )


def is_limit(value: object) -> bool:
    """Whether it is None, or a number of rows."""
    return value is None or (type(value) is int and value > 0)


def by_device(folder: Path, read: Callable[[Path], T]) -> dict[str, T]:
    """What ``read`` makes of all files of a folder, by the device that they name."""
    tables = map(read, sorted(folder.glob("*.json")))
    return {table.device: table for table in tables}  # type: ignore[attr-defined]
