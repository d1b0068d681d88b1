"""The other end of `worker`: starts it, sends jobs, and survives its loss."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proof.discover import BENCHMARKS
from proof.jobs import Job

START_SECONDS = 180.0  # importing PyTorch from a cold disk, under a sanitizer


class Lost(Exception):
    """A worker ended, or was ended, without an answer."""


@dataclass(frozen=True)
class Surroundings:
    """What every worker is started with."""

    device: str
    launches: int
    folders: tuple[Path, ...]

    def command(self) -> list[str]:
        """Return the command line of a worker."""
        options = ["--device", self.device, "--launches", str(self.launches)]
        for folder in self.folders:
            options += ["--cases", str(folder)]
        return [
            sys.executable,
            "-W",
            "ignore",
            str(BENCHMARKS / "gpu_proof.py"),
            "--worker",
            *options,
        ]


class Worker:
    """One worker process; a new one is started when it is asked after a loss."""

    def __init__(
        self,
        surroundings: Surroundings,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [*prefix, *surroundings.command()]
        self._environment = {**os.environ, **(variables or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        self._log_start = 0

    def ask(self, job: Job, seconds: float) -> dict[str, Any]:
        """Return the answer to a job; Lost if there is none in time."""
        try:
            process = self._started()
            process.stdin.write(json.dumps(job).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            line = self._line(process, seconds)
        except (BrokenPipeError, TimeoutError) as error:
            self.end()
            reason = str(error) if isinstance(error, TimeoutError) else "the process ended"
            raise Lost(f"{reason} {self.last_words()}".strip()) from error
        return dict(json.loads(line))

    def close(self, seconds: float = 30) -> int:
        """Let the worker end by itself; return its exit status."""
        if self._process is None:
            return 0
        if self._process.stdin:
            self._process.stdin.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            return -1

    def end(self) -> None:
        """End the worker now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """Return the end of what the worker printed since it was started."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log_start, self._log.tell() - 1500))
        return self._log.read().decode(errors="replace").strip()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._log_start = self._log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment,
                bufsize=0,
            )
            self._line(self._process, START_SECONDS)
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        until = time.monotonic() + seconds
        read = b""
        descriptor = process.stdout.fileno()  # type: ignore[union-attr]
        while not read.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"no answer in {seconds:.0f} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise BrokenPipeError
            read += part
        return read
