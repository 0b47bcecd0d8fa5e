"""The `bigops` command in this process."""

from __future__ import annotations

import pytest

from bigops import cli


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    try:
        code = cli.main(argv)
    except SystemExit as leave:  # argparse
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
