"""Which state of the code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(file: Path) -> str | None:
    """Commit of the clone that a file belongs to.

    Returns
    -------
    str or None
        40 digits, and ``-dirty`` if the clone has changes that are not committed. None if git does not track the file:
        where it is installed, in whosever repository that may be.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
