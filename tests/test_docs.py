"""The documentation: complete, and true of the code that it is of."""

from __future__ import annotations

import argparse
import errno
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mrelease
from mrelease import _cli, _output, aio

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMPLETIONS = {
    "bash": ROOT / "share/bash-completion/completions/mrelease",
    "fish": ROOT / "share/fish/vendor_completions.d/mrelease.fish",
    "zsh": ROOT / "share/zsh/site-functions/_mrelease",
}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source's docs/")


def page(name: str) -> str:
    return (DOCS / name).read_text()


PUBLIC = [
    *(f"mrelease.{name}" for name in mrelease.__all__),
    *(f"mrelease.aio.{name}" for name in aio.__all__),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_entry_with_an_example(name: str) -> None:
    directive = r"^\.\. (?:auto(?:function|class)|py:data):: "
    entries = re.split(directive, page("api.rst"), flags=re.M)[1:]
    (entry,) = [one for one in entries if re.match(rf"{re.escape(name)}\b", one)]
    if not name.startswith("mrelease.PIDFD_"):
        assert ">>> " in entry


def test_nothing_else_has_an_entry() -> None:
    found = re.findall(r"^\.\. (?:auto\w+|py:\w+):: ([\w.]+)", page("api.rst"), re.M)
    assert sorted(found) == sorted(PUBLIC)


def parsers() -> Iterator[argparse.ArgumentParser]:
    whole = _cli._parser()
    yield whole
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


OPTIONS = {
    option
    for parser in parsers()
    for action in parser._actions
    for option in action.option_strings
}


def test_the_page_of_the_command_has_all_its_options_and_no_other() -> None:
    terms = re.findall(r"^(`-.+)\n: ", page("command.md"), re.M)
    found = {word for term in terms for word in re.findall(r"(?<=`)--?[\w-]+", term)}
    assert found == OPTIONS


def test_the_page_of_the_command_has_all_exit_statuses() -> None:
    listed = re.findall(r"^\| (\d+) \|", page("command.md"), re.M)
    statuses = {
        value
        for name, value in vars(_output).items()
        if name.isupper() and name not in vars(errno) and isinstance(value, int)
    }
    assert set(map(int, listed)) == statuses


def test_the_manual_page_has_all_options() -> None:
    text = (ROOT / "share/man/man1/mrelease.1").read_text().replace("\\-", "-")
    assert f'"{mrelease.__version__}"' in text
    assert {option for option in OPTIONS if option in text} == OPTIONS


def outcomes() -> list[str]:
    source = Path(str(sys.modules["mrelease._kill"].__file__)).read_text()
    found = re.search(r"_Outcome: TypeAlias = Literal\[(.*?)\]", source, re.S)
    assert found
    return re.findall(r'"\w+"', found[1])


def test_every_outcome_is_explained() -> None:
    for outcome in outcomes():
        assert f"| `{outcome}` |" in page("guide.md")
        assert f"`{outcome}`" in page("errors.md")
        assert outcome in str(mrelease.KillResult.__doc__)


def test_the_newest_release_of_the_changelog_is_the_version() -> None:
    releases = re.findall(
        r"^## ([\d.]+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert releases[0] == mrelease.__version__


# ---- Completion

# What the shell reads first: the completion, and a command that shows its arguments.
SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "source {file}; mrelease() {{ echo got:$*:; }}\n",
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        'source {file}; function mrelease; echo "got:$argv:"; end\n',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        """\
autoload -U compinit; fpath=({file.parent} $fpath)
compinit -u -D; mrelease() {{ echo got:$*: }}
""",
    ),
}


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_a_shell_completes_the_command(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    command, begin = SHELLS[shell]
    # Each line has one completion only, which the shell has to make before it runs it.
    typed = begin.format(file=COMPLETIONS[shell]) + "".join(
        ["mrelease doc\t--js\t\n", "mrelease kill --cg\t/proc/self/tas\t\n", "exit 0\n"]
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    ) as process:
        os.close(follower)
        os.write(leader, typed.encode())
        seen = b""
        try:
            while part := os.read(leader, 65536):
                seen += part
        except OSError:  # EIO: the shell has ended
            pass
        os.close(leader)
    assert process.returncode == 0
    assert b"got:doctor --json:" in seen, seen.decode()
    assert b"got:kill --cgroup /proc/self/task" in seen, seen.decode()
