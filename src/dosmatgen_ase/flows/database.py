"""A database in files, for where there is no MongoDB: outputs of jobs and the state of FireWorks, for one worker.

FireWorks' mongomock store saves its state when the process ends, and maggma's JSONStore writes over its own file: a
kill or a full disk would cost what is in them. Here files are replaced as a whole, and the state is saved whenever a
job begins or ends, so that ``lpad detect_lostruns --rerun`` finds the job of a killed launcher.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bson import json_util
from jobflow import JobStore
from maggma.stores import JSONStore

from dosmatgen_ase.dos.readers.common import READ_ERRORS
from dosmatgen_ase.files import finite, write_atomic

if TYPE_CHECKING:
    from fireworks import LaunchPad


class WholeJSONStore(JSONStore):
    """A JSONStore whose file is old or new, never half written, and never taken for empty where it cannot be read."""

    def connect(self, force_reset: bool = False) -> None:
        """Read the file.

        Raises
        ------
        ValueError
            If it is no JSON: a JSONStore would go on without its documents, and write over them.
        """
        for path in map(Path, self.paths if self._coll is None or force_reset else ()):
            if path.exists() and path.stat().st_size == 0:
                write_atomic(path, b"[]")  # a JSONStore that was killed while it made its file
            if path.exists():
                try:
                    self.read_json_file(path)
                except (*READ_ERRORS, OSError) as error:
                    reason = " ".join(str(error).split())[:200]
                    fix = "mend it (NaN must be null), or move it away"
                    raise ValueError(f"{path} cannot be read: {reason}: {fix}") from None
        super().connect(force_reset)

    def update_json_file(self) -> None:
        """Replace the file by what the store holds; NaN and infinity, which JSON does not know, become null.

        Raises
        ------
        OSError
            If it cannot be written, as on a full disk; the file stays as it was.
        """
        documents = [{key: value for key, value in d.items() if key != "_id"} for d in self.query()]
        try:
            text = json.dumps(documents, default=datetime.isoformat, allow_nan=False)
        except ValueError:
            text = json.dumps(finite(documents), default=datetime.isoformat, allow_nan=False)
        write_atomic(Path(self.paths[0]), text.encode())


def file_job_store(folder: Path) -> JobStore:
    """Outputs in ``outputs.json`` and, their arrays, ``outputs_data.json`` of a folder."""
    paths = (str(folder / f"{name}.json") for name in ("outputs", "outputs_data"))
    outputs, data = (WholeJSONStore(path, read_only=False) for path in paths)
    return JobStore(outputs, additional_stores={"data": data})


def file_launchpad(path: Path) -> LaunchPad:
    """FireWorks' LaunchPad on a file, made if it is not there. Call it before anything imports fireworks.

    Raises
    ------
    OSError
        Later, from a launch: if the file cannot be written. It stays as it was.
    """
    if not path.exists():
        write_atomic(path, b"{}")
    os.environ["MONGOMOCK_SERVERSTORE_FILE"] = str(path)  # read when fireworks is imported
    from fireworks import LaunchPad

    def save(state: Any) -> None:
        write_atomic(path, json_util.dumps(state.to_dict()).encode())

    launchpad = LaunchPad()
    state = launchpad.connection._store
    # Called at the end of the process, too, for this one and for those that FireWorks makes to run its jobs.
    type(state)._to_file = save

    def saved(change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def change_and_save(*arguments: Any, **options: Any) -> Any:
            result = change(*arguments, **options)
            save(state)
            return result

        return change_and_save

    for name in ("checkout_fw", "complete_launch"):
        setattr(launchpad, name, saved(getattr(launchpad, name)))
    return launchpad
