"""Write the completion of the command for bash, zsh and fish, from its own parser.

python docs/completions.py FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shtab

from mrelease import _cli

# Where each shell looks, below /usr/share or /usr/local/share.
FILES = {
    "bash": "bash-completion/completions/mrelease",
    "fish": "fish/vendor_completions.d/mrelease.fish",
    "zsh": "zsh/site-functions/_mrelease",
}

# What a target can be: a directory with --cgroup, else a pid.
TARGETS = {
    "bash": """\
_mrelease_targets() {
  case " ${COMP_WORDS[*]} " in
    *" --cgroup "*) compgen -d -- "$1" ;;
    *) compgen -W "$(cd /proc && echo [0-9]*)" -- "$1" ;;
  esac
}
""",
    "fish": """\
function _mrelease_targets
  if contains -- --cgroup (commandline -opc)
    __fish_complete_directories (commandline -ct)
  else
    __fish_complete_pids
  end
end
""",
    "zsh": """\
_mrelease_targets() {
  if (( ${words[(I)--cgroup]} )); then _files -/; else _pids; fi
}
""",
}
CALLS = {
    "bash": "_mrelease_targets",
    "fish": "(_mrelease_targets)",
    "zsh": "_mrelease_targets",
}


def parser() -> argparse.ArgumentParser:
    """The command's parser, with what a shell is to offer for a target."""
    whole = _cli._parser()
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            # A shell shows the short help beside a name, not the description.
            for choice in action._choices_actions:
                action.choices[choice.dest].description = choice.help
            targets = action.choices["kill"]._actions
            (target,) = [one for one in targets if one.dest == "targets"]
            setattr(target, "complete", CALLS)  # noqa: B010 - shtab's, not argparse's
    return whole


def main(folder: Path) -> None:
    for shell, name in FILES.items():
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        text: str = shtab.complete(parser(), shell, preamble=TARGETS[shell])
        lines = [line.rstrip() for line in text.strip().splitlines()]
        to.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
