"""What every cell of the matrix works with: its log, its commands, its counts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

CACHE = Path(
    os.environ.get("MRELEASE_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "mrelease-matrix"
).absolute()

NOBODY = 65534


class Failure(Exception):
    """The cell has failed, for this reason."""


class Skip(Exception):
    """The cell cannot be run here, for this reason."""


@dataclass
class Run:
    """One run of pytest in a cell."""

    label: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of the skipped, how many

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.label}: {counts}"


@dataclass
class Job:
    """A cell being run: where it works, logs, and what it has found out."""

    name: str
    source: Path  # the checkout to be tested
    work: Path  # a directory of its own, removed at the end
    log: IO[str]
    args: list[str]  # for pytest, in place of the whole suite
    wheels: Path | None = None  # a folder of those to be tested, built elsewhere
    on: dict[str, str] = field(default_factory=dict)  # kernel, Python, CPU: as seen
    runs: list[Run] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)  # which the tests print

    def say(self, text: str) -> None:
        self.log.write(text + "\n")
        self.log.flush()

    def run(
        self,
        *command: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 3000,
    ) -> int:
        """Run a command that ends when we do; its output goes to the log."""
        words = ["setpriv", "--pdeathsig", "KILL", *map(str, command)]
        self.say("+ " + shlex.join(map(str, command)))
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{command[0]}: not done in {timeout:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):  # it has ended, with all its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def must(
        self,
        *command: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command without which there is no cell."""
        if status := self.run(*command, cwd=cwd, env=env):
            raise Failure(f"{command[0]}: exit status {status}")

    def counted(self, label: str, output: str, status: int) -> None:
        """Take the counts from pytest's last line; complain if it ran no test."""
        run = Run(label)
        self.runs.append(run)
        for line in reversed(output.splitlines()):
            if re.search(r"\d+ [a-z]+.* in [\d.]+s", line):
                for number, word in re.findall(r"(\d+) ([a-z]+)", line):
                    if word in ("passed", "xfailed"):
                        run.passed += int(number)
                    elif word in ("failed", "error", "errors", "xpassed"):
                        run.failed += int(number)
                    elif word == "skipped":
                        run.skipped += int(number)
                break
        for number, reason in re.findall(
            r"^SKIPPED \[(\d+)\] [^ ]+: (.+)$", output, re.M
        ):
            run.reasons[reason] = run.reasons.get(reason, 0) + int(number)
        for name, number in re.findall(r"^@@ figure (.+) (\d+)$", output, re.M):
            self.figures[name] = self.figures.get(name, 0) + int(number)
        if status == 0 and not run.passed:
            raise Failure(f"{label}: no test was run")
        if status:
            raise Failure(f"{label}: pytest's exit status is {status}")

    def logged(self, start: int) -> str:
        self.log.flush()
        with open(self.log.name, errors="replace") as log:
            log.seek(start)
            return log.read()


# A machine that does something else, or is emulated, needs more than a minute a test.
PYTEST = ["--timeout", "300", "-p", "no:cacheprovider"]


@contextmanager
def job(
    name: str, source: Path, args: Sequence[str], wheels: Path | None = None
) -> Iterator[Job]:
    (CACHE / "logs").mkdir(parents=True, exist_ok=True)
    (CACHE / "work").mkdir(exist_ok=True)
    with (
        open(CACHE / "logs" / f"{name}.log", "w+") as log,
        tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CACHE / "work") as work,
    ):
        os.chmod(work, 0o755)
        yield Job(name, source, Path(work), log, list(args), wheels)


def output(*command: object) -> str:
    """What a command prints; the command must work."""
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout.strip()
