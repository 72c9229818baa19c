"""Kill the largest child that psutil finds, and have psutil collect its status.

python examples/kill_psutil.py
"""

from __future__ import annotations

import subprocess
import sys

import psutil

from mrelease import kill

HOG = "import sys; memory = b'x' * (64 << 20); print(flush=True); sys.stdin.read()"


def main() -> None:
    with (
        subprocess.Popen(["sleep", "1000"]) as small,
        subprocess.Popen(
            [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as large,
    ):
        assert large.stdout
        large.stdout.readline()
        children = psutil.Process().children()
        largest = max(children, key=lambda child: child.memory_info().rss)
        # psutil knows a process by its pid and its start: one that has gone is refused.
        kill(largest, timeout=None)
        print("largest", largest.pid == large.pid)
        print("exit status", largest.wait())
        kill(small, timeout=None)


if __name__ == "__main__":
    main()
