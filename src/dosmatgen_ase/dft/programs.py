"""Runs of ``pw.x`` and ``projwfc.x``: limited in time, ended with this process, and their failures told apart."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dosmatgen_ase.dft.errors import ElectronicStructureError, InterruptedCalculation, ProgramNotStarted
from dosmatgen_ase.dft.settings import EspressoSettings

_CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)  # of a program's own making
_BANNERS = {"pw.x": "Program PWSCF", "projwfc.x": "Program PROJWFC"}  # the first that they print
_DISK_FULL = ("No space left on device", "Disk quota exceeded")  # of this machine, not of the structure
_GRACE = 2.0  # seconds in which a launcher may end what it has started
_PATIENCE = 10.0  # seconds by the clock for one of CPU time, before a calculation counts as hanging


@dataclass(frozen=True)
class Programs:
    """``pw.x`` and ``projwfc.x`` as the settings say that they are started and limited."""

    settings: EspressoSettings
    stop: threading.Event  # set from another thread to end the run

    @classmethod
    def find(cls, settings: EspressoSettings, stop: threading.Event) -> Programs:
        """Find the programs on the PATH.

        Raises
        ------
        FileNotFoundError
            If a program or the launcher is not there.
        """
        for name in (*shlex.split(settings.launcher)[:1], *_BANNERS):
            if shutil.which(name) is None:
                told = "apt-get install quantum-espresso, or load its module"
                raise FileNotFoundError(f"{name} is not on the PATH: {told}")
        return cls(settings, stop)

    def run(self, program: str, folder: Path, name: str) -> str:
        """Run a program on ``name.in`` in a folder and return what it wrote to ``name.out``.

        Raises
        ------
        ElectronicStructureError
            If it fails or takes too long, or (`InterruptedCalculation`) was stopped from outside.
        ProgramNotStarted
            If it does not work at all.
        OSError
            If the disk is full.
        """
        log, limit, launcher = folder / f"{name}.out", self.settings.time_limit, self.settings.launcher
        deadline = time.monotonic() + _PATIENCE * limit
        command = [*shlex.split(launcher), program, "-in", f"{name}.in"]
        # Unbuffered: a program that MPI aborts loses what is not yet written, and seems never to have started.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GFORTRAN_UNBUFFERED_PRECONNECTED": "1"}
        if not launcher:  # a program alone needs none of the daemons that Open MPI starts for it
            environment["OMPI_MCA_ess_singleton_isolated"] = "1"
        with log.open("w") as out, (folder / f"{name}.err").open("w") as err:
            # In a session of its own: what a launcher starts ends with it, and Ctrl-C reaches us alone.
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True, preexec_fn=partial(_confine, math.ceil(limit), not launcher),
            )  # fmt: skip
            try:
                guard = _guard(process.pid) if launcher else contextlib.nullcontext()
                self._stand_back(process.pid)
                with guard:
                    while process.poll() is None and not self.stop.is_set() and time.monotonic() < deadline:
                        self.stop.wait(0.02)
            finally:
                unfinished = process.poll() is None
                if unfinished:
                    self._end(process)
        text, code = log.read_text(errors="replace"), process.returncode
        # A launcher tells of a signal as a shell does; what it says when it is ended itself is its own affair.
        told = code - 128 if launcher and code - 128 in signal.valid_signals() else max(-code, 0)
        ended_by = signal.SIGKILL if unfinished else told
        too_slow = (unfinished and not self.stop.is_set()) or ended_by == signal.SIGXCPU
        if ended_by and not too_slow and ended_by not in _CRASHES:
            raise InterruptedCalculation(f"{program} ({name}) was stopped by signal {ended_by}", log)
        said = " ".join(log.with_suffix(".err").read_text(errors="replace").split())[-300:]
        if any(full in said + text[-2000:] for full in _DISK_FULL):
            raise OSError(errno.ENOSPC, f"no space left for {program} ({name})", str(folder))
        if _BANNERS[program] not in text:  # the same would happen to every structure
            raise ProgramNotStarted(f"{program} ({name}) did not start: {said or f'exit code {code}'} (see {log})")
        if too_slow:
            raise ElectronicStructureError(f"{program} ({name}) ran into the time limit of {limit:g} s", log)
        if ended_by:
            raise ElectronicStructureError(f"{program} ({name}) crashed with signal {ended_by}", log)
        if "JOB DONE" not in text:
            told = re.findall(r"Error in routine.*\n.*", text) or [f"exit code {code} {said}"]
            raise ElectronicStructureError(f"{program} ({name}) failed: {' '.join(told[0].split())}", log)
        return text

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End a program and what it has started; a launcher is asked first, as it knows of processes elsewhere."""
        if self.settings.launcher:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _stand_back(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended, or there are no groups
            if self.settings.nice:
                os.setpriority(os.PRIO_PROCESS, pid, self.settings.nice)
                # A session of its own is a scheduling group of its own on Linux, which counts instead.
                Path(f"/proc/{pid}/autogroup").write_text(str(self.settings.nice))


# Loaded here, as little is safe between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextlib.contextmanager
def _guard(group: int) -> Iterator[None]:
    """End a launcher, and what it started, with this process: a shell waits until the pipe to it is closed."""
    ends = f"read -r _; kill -s TERM -- -{group}; sleep {_GRACE}; kill -s KILL -- -{group}"
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        ["sh", "-c", ends], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    ) as shell:
        try:
            yield
        finally:
            shell.kill()


def _confine(cpu_seconds: int, with_parent: bool) -> None:
    """End this process with its parent, if it is to, and by SIGXCPU after so much CPU time."""
    if _LIBC is not None and with_parent:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the thread that made it ends
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = cpu_seconds if hard == resource.RLIM_INFINITY else min(cpu_seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
