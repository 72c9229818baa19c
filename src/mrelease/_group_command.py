"""``mrelease kill --tree`` and ``--cgroup``."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from time import monotonic

from ._groups import (
    cgroup_members,
    cgroup_pidfds,
    kill_cgroup,
    kill_tree,
    tree_members,
)
from ._kill_command import Command, row
from ._stops import open_known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._kill import KillResult
    from ._pidfd import Pidfd


class _Groups(Command):
    """Processes that belong together, with a line for all of them at the end."""

    def _print_total(self) -> None:
        """Print the sum of what has been said."""
        elapsed = monotonic() - self._start
        if self._dry_run:
            self._total("would kill", len(self.pids), sum(self._sizes.values()))
            return
        back = sum(result.released for result in self._results)
        freed = sum(result.freed or 0 for result in self._results)
        self._total(f"{back} back", len(self._results), freed, elapsed)

    def _total(
        self, outcome: str, count: int, size: int, elapsed: float | None = None
    ) -> None:
        if self.output.as_json:
            fields = {"total": count, "outcome": outcome, "bytes": size}
            self.output.fields({**fields, "elapsed": elapsed})
        else:
            what = f"{count} process{'' if count == 1 else 'es'}"
            self.output.line(row("total", what, outcome, size, elapsed))


class Trees(_Groups):
    """Processes and all their descendants."""

    def kill(self, targets: list[Any]) -> None:
        with ExitStack() as stack:
            for root in self._open(targets, stack):
                if any(result.pid == root.pid for result in self._results):
                    continue  # it was in the tree of another
                try:
                    self._tree(root)
                except (OSError, ValueError) as error:
                    self._fail(root.pid, error)
        self._print_total()

    def _tree(self, root: Pidfd) -> None:
        members = tree_members(root)
        self._note([*members, root.pid])
        if self._dry_run:
            self._list([*members, root.pid])
            return
        for pid, result in self._kill_tree(root, members).items():
            self._say(pid, result)

    def _kill_tree(
        self, root: Pidfd, members: dict[int, int]
    ) -> dict[int, KillResult | OSError]:
        if self._grace is None:
            results = self._watch(lambda: kill_tree(root, **self._options))
            return {result.pid: result for result in results}
        with ExitStack() as stack:
            asked = [root]
            for pid, started in members.items():
                with suppress(ProcessLookupError, ValueError):
                    asked.append(stack.enter_context(open_known(pid, started)))
            done = self._ask(asked)
            killed: dict[int, KillResult | OSError] = {}
            # After the root those whose parents have obeyed: they are not below it.
            for pidfd in asked:
                if pidfd not in done and pidfd.pid not in killed:
                    killed |= self._kill_one_tree(pidfd)
        obeyed = {pidfd.pid: result for pidfd, result in done.items()}
        return obeyed | killed

    def _kill_one_tree(self, root: Pidfd) -> dict[int, KillResult | OSError]:
        try:
            results = self._watch(lambda: kill_tree(root, **self._options))
        except ProcessLookupError:
            return {}  # it has obeyed after all
        except OSError as error:
            return {root.pid: error}
        return {result.pid: result for result in results}


class Cgroups(_Groups):
    """All that is in cgroups and below them."""

    def kill(self, targets: list[Any]) -> None:
        for path in targets:
            self._cgroup(path)
        self._print_total()

    def _cgroup(self, path: str) -> None:
        try:
            pids = cgroup_members(path)
            self._note(pids)
            if self._dry_run:
                self._list(pids)
                return
            for result in self._kill_cgroup(path):
                self._say(result.pid, result)
        except (OSError, ValueError) as error:
            self._fail(path, error)

    def _kill_cgroup(self, path: str) -> list[KillResult]:
        with ExitStack() as stack:
            asked: list[Pidfd] = []
            if self._grace is not None:
                asked += map(stack.enter_context, cgroup_pidfds(path))
            done = self._ask(asked)
            try:
                killed = self._watch(lambda: kill_cgroup(path, **self._options))
            except FileNotFoundError:
                killed = []  # it was removed, and so was empty
        return [*done.values(), *killed]
