"""How the package loads: cheaply, anywhere, with every public name documented."""

from __future__ import annotations

import inspect
import json
import sys
import sysconfig

import pytest

import mrelease
from calls import run_python
from mrelease import _mrelease

# Too dear for a program that only wants to kill.
DEAR = {
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "enum",
    "importlib",
    "re",
    "signal",
    "subprocess",
    "threading",
    "typing",
}


def fresh(program: str) -> list[str]:
    """The modules that a program loads in a fresh interpreter."""
    result = run_python(
        f"import json, sys; sys.path[:] = {sys.path!r}\n"
        "before = set(sys.modules)\n"
        f"{program}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        options=("-I", "-S"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    names: list[str] = json.loads(result.stdout)
    return names


@pytest.mark.parametrize(
    "program",
    ["import mrelease", "from mrelease import kill, terminate, release, Pidfd"],
)
def test_nothing_dear_is_imported(program: str) -> None:
    assert not [name for name in fresh(program) if name.partition(".")[0] in DEAR]


def test_the_package_alone_loads_only_the_system_calls() -> None:
    assert fresh("import mrelease") == ["mrelease", "mrelease._mrelease"]


def test_after_the_import_of_kill_a_kill_imports_nothing() -> None:
    program = """
import os
from mrelease import kill
reader, writer = os.pipe()
victim = os.fork()
if victim == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
before = set(sys.modules)
kill(victim, wait=True, measure=True)
os.waitpid(victim, 0)
"""
    assert fresh(program) == []


def test_the_lazy_names_are_public_and_the_rest_is_refused() -> None:
    assert set(mrelease._LAZY) <= set(mrelease.__all__)
    assert set(mrelease.__all__) <= set(dir(mrelease))
    for name in mrelease.__all__:
        assert getattr(mrelease, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mrelease.nothing  # noqa: B018


def test_the_module_for_asyncio_comes_with_the_package_when_it_is_asked_for() -> None:
    modules = fresh("import mrelease; mrelease.aio.kill")
    assert {"mrelease.aio", "asyncio"} <= {*modules}


# ---- Documentation

SIGNATURES = {
    "pidfd_open": "(pid, flags=0, /)",
    "pidfd_send_signal": "(pidfd, signal, flags=0, /)",
    "process_mrelease": "(pidfd, flags=0, /)",
    "kill_and_release": "(pidfd, /)",
    "bar_kill_and_release": "(pidfd, pid, /)",
    "kill_and_release_next": "(pipe, /)",
    "getcpu": "()",
    "mlockall": "(flags, /)",
}


def test_the_c_functions_have_these_signatures() -> None:
    functions = dict(inspect.getmembers(_mrelease, inspect.isbuiltin))
    assert {
        name: str(inspect.signature(function)) for name, function in functions.items()
    } == SIGNATURES


@pytest.mark.parametrize("name", [*SIGNATURES, *mrelease.__all__])
def test_every_public_name_is_documented_with_its_thread_safety(name: str) -> None:
    value = getattr(_mrelease, name, None) or getattr(mrelease, name)
    if isinstance(value, int):
        return
    text = inspect.getdoc(value)
    assert text
    if callable(value) and not inspect.isclass(value):
        assert "Thread-safe" in text


# ---- Loading

INTERPRETERS = """
import sys
def run(code):
    try:
        from concurrent import interpreters
    except ImportError:
        if sys.version_info >= (3, 13):
            import _interpreters
            interpreter = _interpreters.create("isolated")
            error = _interpreters.exec(interpreter, code)
            _interpreters.destroy(interpreter)
        else:
            import _xxsubinterpreters
            interpreter = _xxsubinterpreters.create(isolated=True)
            error = _xxsubinterpreters.run_string(interpreter, code)
            _xxsubinterpreters.destroy(interpreter)
        assert error is None, error
        return
    interpreter = interpreters.create()
    interpreter.exec(code)
    interpreter.close()
"""


@pytest.mark.needs("subinterpreters")
def test_it_loads_in_two_interpreters_with_gils_of_their_own() -> None:
    # The first import of all happens in a subinterpreter.
    code = (
        "import mrelease, os; p = mrelease.Pidfd.open(os.getpid()); "
        "assert not p.exited; p.close()"
    )
    result = run_python(f"{INTERPRETERS}\nrun({code!r})\nrun({code!r})\n{code}")
    assert (result.returncode, result.stderr) == (0, "")


def test_it_loads_again_after_deletion() -> None:
    code = """
import sys
import mrelease._mrelease as first
function = first.pidfd_open
del sys.modules["mrelease._mrelease"], first
import mrelease
del mrelease._mrelease
import mrelease._mrelease as second
assert second.pidfd_open is not function
assert second.getcpu() >= 0
"""
    result = run_python(code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="needs a free-threaded interpreter",
)
def test_the_gil_stays_off() -> None:
    result = run_python("import sys, mrelease; assert not sys._is_gil_enabled()")
    assert result.returncode == 0
