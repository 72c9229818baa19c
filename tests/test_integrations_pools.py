"""Workers of other libraries, killed by mrelease: their bookkeeping must not notice.

Each example runs twice, in a Python of its own: as it is, and with a plain kill in the
place of mrelease's. Both must print the same, warn of the same, and leave nobody.
"""

from __future__ import annotations

import subprocess

import pytest

from calls import TESTS, run_python

EXAMPLES = TESTS.parent / "examples"

EXPECTED = {
    "kill_futures": "broken pool\nbroken pool\nkilled True\n",
    "kill_joblib": "terminated workers\nanswers [0, 1]\nexit codes {-9}\n",
    "kill_multiprocessing": "exit code -9\nexit codes [-9, -9]\n",
    "kill_psutil": "largest True\nexit status -9\n",
    "kill_subprocess": "exit status -9\n",
}

PLAIN = """
import os
import mrelease
mrelease.kill = lambda target, **options: os.kill(target.pid, 9)
mrelease.kill_all = lambda targets, **options: [os.kill(t.pid, 9) for t in targets]
"""

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="needs the source's examples/"
)


# None that is left when it is over may be a zombie, and the living are the helpers that
# multiprocessing keeps until the exit.
LEFT = """
import psutil
for child in psutil.Process().children():
    command = " ".join(child.cmdline())
    helper = "forkserver" in command or "resource_tracker" in command
    if child.status() == psutil.STATUS_ZOMBIE or not helper:
        print("left:", child)
"""


def run(name: str, *, plain: bool) -> subprocess.CompletedProcess[str]:
    path = EXAMPLES / f"{name}.py"
    program = f"import runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')\n"
    return run_python(
        (PLAIN if plain else "") + program + LEFT, options=("-X", "dev", "-W", "error")
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.needs("joblib"))
        if name == "kill_joblib"
        else name
        for name in EXPECTED
    ],
)
def test_an_example_ends_as_with_a_plain_kill(name: str) -> None:
    ours, plain = run(name, plain=False), run(name, plain=True)
    assert ours.stdout == EXPECTED[name], ours.stderr
    assert plain.stdout == EXPECTED[name], plain.stderr
    # No semaphore leaked, no child forgotten, that the plain kill has not as well.
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr) == (0, "")
