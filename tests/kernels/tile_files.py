"""What the tests of several kinds of tile config files check in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def changed(file: Path, keys: tuple[Any, ...], value: Any) -> str:
    """The text of a config file with another value at one place."""
    data = json.loads(file.read_text())
    *above, last = keys
    place = data
    for key in above:
        place = place[key]
    place[last] = value
    return json.dumps(data)


def check_refusal(folder: Path, read: Callable[[Path], object], text: str, message: str) -> None:
    """``read`` raises of a file with this text, and names the file."""
    path = folder / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="sm_90.json: ") as caught:
        read(path)
    assert message in str(caught.value)
