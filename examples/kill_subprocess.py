"""Kill a child of subprocess: its memory is back before wait() collects the status.

python examples/kill_subprocess.py
"""

from __future__ import annotations

import subprocess

from mrelease import kill


def main() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        kill(child, timeout=None)
        # mrelease never reaps: the exit status is still there.
        print("exit status", child.wait())


if __name__ == "__main__":
    main()
