"""The build: on systems and CPUs that this machine is not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "_mrelease.c"

pytestmark = pytest.mark.skipif(
    not SOURCE.exists() or not shutil.which("cc"),
    reason="needs the C source and a C compiler",
)


def numbers(*macros: str) -> list[int] | str:
    """The system call numbers for a CPU with these macros and headers without them."""
    text = SOURCE.read_text()
    begin = text.index("// ==== System call numbers")
    text = text[begin : text.index("// ==== Arguments")]
    names = "process_mrelease", "pidfd_open", "pidfd_send_signal"
    text += "".join(f"\nNUMBER __NR_{name}" for name in names)
    result = subprocess.run(
        ["cc", "-E", "-P", "-undef", *(f"-D{macro}" for macro in macros), "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        return result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("NUMBER")]
    # Such as "NUMBER (4000 + 448)".
    terms = [re.findall(r"0x[0-9a-f]+|[0-9]+", line) for line in lines]
    return [sum(int(term, 0) for term in found) for found in terms]


MIPS = ("__mips__", "_MIPS_SIM_ABI32=1", "_MIPS_SIM_NABI32=2", "_MIPS_SIM_ABI64=3")


@pytest.mark.parametrize(
    ("macros", "expected"),
    [
        (("__x86_64__",), [448, 434, 424]),
        (("__i386__",), [448, 434, 424]),
        (("__aarch64__",), [448, 434, 424]),
        (("__arm__",), [448, 434, 424]),
        (("__powerpc__",), [448, 434, 424]),
        (("__s390__",), [448, 434, 424]),
        (("__riscv",), [448, 434, 424]),
        (("__alpha__",), [558, 544, 534]),
        ((*MIPS, "_MIPS_SIM=1"), [4448, 4434, 4424]),
        ((*MIPS, "_MIPS_SIM=2"), [6448, 6434, 6424]),
        ((*MIPS, "_MIPS_SIM=3"), [5448, 5434, 5424]),
        (
            ("__x86_64__", "__ILP32__"),
            [0x40000000 + number for number in (448, 434, 424)],
        ),
    ],
)
def test_known_cpus_have_their_numbers(
    macros: tuple[str, ...], expected: list[int]
) -> None:
    assert numbers(*macros) == expected


def test_an_unknown_cpu_is_refused() -> None:
    assert "process_mrelease is not known for this CPU" in str(numbers("__vax__"))


def test_the_numbers_of_the_headers_are_taken() -> None:
    headers = [
        "__NR_process_mrelease=1",
        "__NR_pidfd_open=2",
        "__NR_pidfd_send_signal=3",
    ]
    assert numbers("__vax__", *headers) == [1, 2, 3]


def test_off_linux_the_build_stops_with_one_line() -> None:
    pytest.importorskip("setuptools")
    program = (
        "import runpy, setuptools, sys; sys.platform = 'darwin'; "
        "runpy.run_path('setup.py')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1
    line = "mrelease needs Linux: no process_mrelease(2) on darwin\n"
    assert result.stderr == line
