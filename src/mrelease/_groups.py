"""Many processes that belong together: a cgroup, a tree."""

from __future__ import annotations

import os
from errno import EINTR, ENODEV, ENOSYS, EPERM
from marshal import dumps, loads
from time import CLOCK_BOOTTIME, clock_gettime, monotonic

from . import _cgroup, _child, _proc
from ._batch import CROWD, Batch, unopened, wait_while_fewer
from ._kill import SIGKILL, KillResult, Options, check_victim
from ._pidfd import INFINITY, Pidfd
from ._proc import NO_DESCRIPTOR
from ._sched import has_idle_cpu
from ._stops import Stops, open_known
from ._tree import Tree, is_descendant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias, Unpack

    from ._cgroup import Cgroup
    from ._types import KillOptions, Target

    _Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# A process of a cgroup is large, and released before cgroup.kill, if it has this part
# of the cgroup's memory. So a bomb's many processes are not: a release would wait for
# each while it holds its memory's lock, to fork, and has no CPU.
_LARGE = 1 / CROWD
# Seconds that this may take, for each process and each byte: a bomb starves the caller.
_PATIENCE = 0.1
_PATIENCE_PROCESS = 1e-4
_PATIENCE_BYTE = 1 / 2**30
# Rounds in which nobody could be killed, though others were there than before: they are
# not ours to kill. One that forks and exits all the time is missed in most rounds.
_IDLE_ROUNDS = 1000
# Rounds in a row that show nobody new, until that is believed: a list may miss one that
# is forked while the kernel makes it.
_STILL_ROUNDS = 3
_PIDS_ROOM = 1 << 25  # bytes: five each for the four million pids that Linux can have


def cgroup_pidfds(path: _Path, *, recursive: bool = True) -> Iterator[Pidfd]:
    """Open the processes of a cgroup, v1 or v2: cgroup.procs as pidfds.

    Each is proven to be a member, so none that got a member's pid can slip in: by the
    cgroup id that the kernel tells of a pidfd (Linux 6.13, v2), else by a look into
    /proc/PID/cgroup at a moment when it was surely alive. Each Pidfd is the caller's
    to close; close them as you go, and a cgroup may have more processes than there are
    descriptors. Those that join meanwhile may be missed. recursive: the cgroups below
    it as well, as far as they are there.

    Raises ValueError if the directory is no cgroup, FileNotFoundError and the like if
    it cannot be read, OSError with EOPNOTSUPP for a threaded cgroup (cgroups(7)), with
    ENOSYS without the /proc of the pid namespace, each with the path; and while
    iterating OSError with EMFILE when no descriptor is left.
    Linux 5.3. Thread-safe, but for one iterator in two threads.
    """
    return _members(_cgroup.find(path), recursive)


def kill_cgroup(path: _Path, **options: Unpack[KillOptions]) -> list[KillResult]:
    """Kill all processes in a cgroup and below it, v1 or v2, and free their memory.

    The large ones are killed and released first; then cgroup.kill (v2, Linux 5.14) ends
    the rest, whatever it forks, and that is released. Where there are idle CPUs all are
    left to cgroup.kill, unless they are to be measured. Where cgroup.kill is
    missing or not permitted, processes are killed until none is left, and those that
    fork meanwhile are stopped first.

    The options are kill()'s, timeout as for kill_all(). Returns a result for each
    process that was seen. One that had exited before it could be opened is "exited"
    with 0 attempts; one that was moved to another cgroup meanwhile is "alive"; one that
    may not be signalled, or that /proc hides so that it is not proven, is "alive", its
    errno EPERM. Members of other pid namespaces have no pid here: only cgroup.kill
    kills them. With no descriptor left cgroup.kill still kills, from a forked child,
    whom it can, which is not a process whose first thread has exited, and nothing is
    released: the results say "exiting", their errno is EMFILE. Where there is no
    cgroup.kill, a forked child of the caller lets whoever is stopped go on, should the
    caller be killed.

    Raises ValueError for the root cgroup, the caller's own and those above it, one
    that holds pid 1, and what is no cgroup; FileNotFoundError and the like if it
    cannot be read; PermissionError if none of its processes may be signalled; OSError
    with ENOSYS without the /proc of the pid namespace: all with the path, and with
    nothing killed. Linux 5.15 for the release. Thread-safe.
    """
    settings = Options(**options)
    try:
        cgroup = _cgroup.find(path)
        members = _check_cgroup(cgroup, os.getpid())
        killer = cgroup.open_kill()
    except OSError as error:
        if error.errno not in NO_DESCRIPTOR:
            raise
        return _kill_in_child(os.fsdecode(path), settings, error)
    try:
        with Batch(settings) as batch:
            if killer is None:
                return _kill_one_by_one(cgroup, {*members}, batch)
            return _kill_by_file(cgroup, killer, members, batch)
    finally:
        if killer is not None:
            os.close(killer)


def kill_tree(target: Target, **options: Unpack[KillOptions]) -> list[KillResult]:
    """Kill a process and all its descendants, and free their memory.

    Each is stopped (SIGSTOP) before its children are looked for, until no new one
    appears, so that none can fork its way out; then the descendants are killed and
    released, the largest first, and the process itself last. If that fails midway,
    those that were stopped and not killed are continued; if the caller is killed, too,
    by a child that it forks for that.

    The options are kill()'s, timeout as for kill_all(). Returns a result for each,
    the process itself last. A descendant that may not be signalled is "alive", its
    errno EPERM.

    Children that had been re-parented before the call, because their parent had
    exited, cannot be found; nor can those whose parent exits while it is looked for,
    those that /proc hides (hidepid), and those that a process forks that cannot be
    stopped in time because it is stuck in the kernel. A cgroup has no such gaps.

    Raises as kill(), also ValueError if the caller is a descendant, and OSError with
    ENOSYS without the /proc of its pid namespace; then nothing was killed. Linux 5.15
    for the release, 5.3 for the kill. Thread-safe.
    """
    settings = Options(**options)
    with Pidfd.open(target) as root, Stops() as stops, Batch(settings) as batch:
        check_victim(root)
        _check_tree(root.pid)
        tree = Tree(root, stops)
        gone = _kill_found(tree, batch)
        last = batch.add(root, own=False)
        batch.flush()
        # The children of those that could not be stopped in time.
        gone += _kill_found(tree, batch)
        batch.finish()
        _forget_killed(stops, batch)
        others = [sequence for sequence in batch.begun if sequence is not last]
        return gone + batch.killed([*others, last])


def cgroup_members(path: _Path) -> list[int]:
    """The pids that kill_cgroup() would kill now; raises as it does."""
    return [*_check_cgroup(_cgroup.find(path), os.getpid())]


def tree_members(root: Pidfd) -> dict[int, int]:
    """The pids, with start times, of the descendants that kill_tree() would kill now.

    Raises as it does.
    """
    check_victim(root)
    _check_tree(root.pid)
    return dict(Tree(root).look())


def _members(cgroup: Cgroup, recursive: bool) -> Iterator[Pidfd]:
    for part in cgroup.walk() if recursive else [cgroup]:
        for pid in part.pids():
            if pidfd := part.open(pid):
                yield pidfd


def _check_cgroup(cgroup: Cgroup, caller: int) -> dict[int, Cgroup]:
    """Raise ValueError unless a cgroup may be killed; return who is in it."""
    if cgroup.is_root:
        raise ValueError(f"refusing to kill {cgroup.path}: it is the root cgroup")
    members = _list(cgroup)
    if caller in members:
        raise ValueError(f"refusing to kill {cgroup.path}: the caller is in it")
    if 1 in members:
        raise ValueError(f"refusing to kill {cgroup.path}: pid 1 is in it")
    return members


def _kill_by_file(
    cgroup: Cgroup, killer: int, members: dict[int, Cgroup], batch: Batch
) -> list[KillResult]:
    """Release the largest, write to cgroup.kill, release the rest."""
    pids = {*members}
    try:
        _kill_large(members, batch)
    except OSError as error:
        if error.errno not in NO_DESCRIPTOR:
            raise
    batch.patience = INFINITY  # nobody is left whose kill would have to wait
    lacking = _kill_rest(cgroup, killer, pids, members, batch)
    batch.finish()
    # Whoever was gone, or might not be signalled any more, cgroup.kill has killed.
    answers = [batch.results[sequence] for sequence in batch.begun]
    results = [one for one in answers if isinstance(one, KillResult) and one.signal]
    begun = {sequence.pidfd.pid for sequence in batch.begun}
    others = (pids | begun) - {result.pid for result in results}
    return results + _rest(cgroup, batch.options, lacking, others)


def _write_kill(killer: int) -> None:
    try:
        os.write(killer, b"1")
    except OSError as error:
        if error.errno != ENODEV:  # it has been removed, and so was empty
            raise


def _list(cgroup: Cgroup) -> dict[int, Cgroup]:
    """The pids in a cgroup and below it, and where each is."""
    return {pid: part for part in cgroup.walk() for pid in part.pids()}


def _kill_large(members: dict[int, Cgroup], batch: Batch) -> None:
    """Kill and release the large ones, the largest first, for a reasonable time."""
    batch.had_idle_cpu = has_idle_cpu([*members])
    if batch.had_idle_cpu and not batch.options.measure:
        return  # nothing is starved: cgroup.kill is the sooner
    end = monotonic() + _PATIENCE + len(members) * _PATIENCE_PROCESS
    sizes: dict[int, int] = {}
    for pid in members:
        sizes[pid] = _proc.anonymous(pid) or 0
        if monotonic() > end:
            return
    large = max(1, _LARGE * sum(sizes.values()))
    for pid in sorted(sizes, key=sizes.__getitem__, reverse=True):
        end += sizes[pid] * _PATIENCE_BYTE
        if sizes[pid] < large or monotonic() > end:
            break
        if _add_permitted(pid, members[pid], batch) and not batch.had_idle_cpu:
            batch.flush()
    batch.flush()


def _add_permitted(pid: int, part: Cgroup, batch: Batch) -> bool:
    """Have a member killed by the next flush(), and say so, if it may be signalled."""
    pidfd = batch.open(part.open, pid)
    if pidfd is None:
        return False
    try:
        check_victim(pidfd)
    except OSError:  # cgroup.kill needs no right to signal
        pidfd.close()
        return False
    batch.add(pidfd)
    return True


def _kill_rest(
    cgroup: Cgroup,
    killer: int,
    pids: set[int],
    members: dict[int, Cgroup],
    batch: Batch,
) -> int:
    """Write to cgroup.kill, again if somebody has joined since, and release the rest.

    Adds the joiners to the pids. Returns the errno if descriptors run out.
    """
    lacking = 0
    tried: set[int] = set()
    for _ in range(_IDLE_ROUNDS):
        _write_kill(killer)
        written = monotonic()
        living: set[int] = set()
        try:
            until = written + batch.options.timeout
            wait_while_fewer(lambda: len(cgroup.all_pids()), until)
            listed = _list(cgroup)
            left = {**_unlisted(members, listed), **listed}
            living = _add_dying(left, batch, written, SIGKILL)
            # A process whose first thread has exited survives a write (Linux 6.18).
            for pid in (living & pids) - tried:
                _add_permitted(pid, left[pid], batch)
            members = {**members, **listed}
        except OSError as error:
            if error.errno not in NO_DESCRIPTOR:
                raise
            lacking = error.errno
        batch.flush()
        if living <= tried:
            break
        tried |= living & pids
        pids |= living  # who may be gone when they are next looked for
    return lacking


def _unlisted(
    members: dict[int, Cgroup], listed: dict[int, Cgroup]
) -> dict[int, Cgroup]:
    """Who is there, but not in the list any more: a first thread that is gone.

    The last thread of such a process may still hold all of its memory.
    """
    return {
        pid: part
        for pid, part in members.items()
        if pid not in listed and os.path.exists(f"/proc/{pid}")
    }


def _add_dying(
    members: dict[int, Cgroup], batch: Batch, since: float, signal: int | None
) -> set[int]:
    """Have whom somebody else has killed released; return who is not dying."""
    begun = {sequence.pidfd.pid for sequence in batch.begun}
    living: set[int] = set()
    for pid, part in members.items():
        if pid in begun or _proc.is_kernel_thread(pid):
            continue
        if not (pidfd := batch.open(part.open, pid)):
            continue
        if _proc.dying(pid) is False:
            pidfd.close()
            living.add(pid)
        else:
            batch.add_dying(pidfd, since, signal)
    return living


def _rest(
    cgroup: Cgroup, options: Options, lacking: int, pids: set[int]
) -> list[KillResult]:
    """The results of those that cgroup.kill has killed, and nobody else."""
    try:
        left = {*cgroup.all_pids()}
    except OSError as error:
        if error.errno not in NO_DESCRIPTOR:
            raise
        left = pids
    results: list[KillResult] = []
    for pid in pids:
        if pid not in left:
            # Nor could it be opened, if there were descriptors.
            results.append(_unlisted_one(pid, options, SIGKILL))
        elif _proc.is_kernel_thread(pid) or _proc.dying(pid) is False:
            results.append(unopened(pid, options, "alive", errno=EPERM))
        else:
            results.append(
                unopened(pid, options, "exiting", signal=SIGKILL, errno=lacking)
            )
    return results


def _kill_one_by_one(cgroup: Cgroup, pids: set[int], batch: Batch) -> list[KillResult]:
    """Kill until nobody is left who is not dying."""
    with Stops() as stops:
        known: set[tuple[int, int | None]] = set()
        idle = still = 0
        while idle < _IDLE_ROUNDS and still < _STILL_ROUNDS:
            idle = 0 if _kill_living(cgroup, batch) else idle + 1
            # Whoever was not there before was forked meanwhile, perhaps by one that
            # has ended by itself since it was listed.
            present = batch.open(_present, cgroup)
            still = still + 1 if idle and present <= known else 0
            known = present
            # If those who fork were killed one by one, others might fill their places
            # in the meantime.
            while _stop_living(cgroup, batch, stops):
                pass
        _forget_killed(stops, batch)
    _add_dying(_list(cgroup), batch, monotonic(), None)
    batch.finish()
    results = batch.killed(batch.begun)
    begun = {sequence.pidfd.pid for sequence in batch.begun}
    left = {*cgroup.all_pids()} - begun
    # Not to be proven members, as /proc hides them; or kernel threads.
    results += [unopened(pid, batch.options, "alive", errno=EPERM) for pid in left]
    gone = pids - begun - left
    results += [_unlisted_one(pid, batch.options, None) for pid in gone]
    if results and all(one.errno == EPERM and not one.attempts for one in results):
        raise PermissionError(EPERM, os.strerror(EPERM), cgroup.path)
    return results


def _unlisted_one(pid: int, options: Options, signal: int | None) -> KillResult:
    """The result of a member that is none any more: it has exited, or was moved out."""
    if _lives_on(pid, options):
        return unopened(pid, options, "alive")
    return unopened(pid, options, "exited", signal=signal)


def _lives_on(pid: int, options: Options) -> bool:
    """Whether the process that had a pid before the call has it still, and lives."""
    since = _proc.running_since(pid)
    if since is None:
        return False
    call = clock_gettime(CLOCK_BOOTTIME) - (monotonic() - options.start)
    return since < int(call * os.sysconf("SC_CLK_TCK"))


def _present(cgroup: Cgroup) -> set[tuple[int, int | None]]:
    """The pids that are listed, with start times, as pids are reused."""
    return {(pid, _proc.started(pid)) for pid in cgroup.all_pids()}


def _forget_killed(stops: Stops, batch: Batch) -> None:
    for sequence in batch.begun:
        if sequence.signal == SIGKILL:
            stops.forget(sequence.pidfd.pid)


def _kill_living(cgroup: Cgroup, batch: Batch) -> bool:
    """Kill who is not dying; say whether there was any that could be killed."""
    fresh = [batch.add(pidfd) for pidfd in _living(cgroup, batch)]
    batch.flush()
    return any(not isinstance(batch.results.get(one), OSError) for one in fresh)


def _stop_living(cgroup: Cgroup, batch: Batch, stops: Stops) -> int:
    count = 0
    for pidfd in _living(cgroup, batch):
        with pidfd:
            count += stops.stop(pidfd)
    return count


def _living(cgroup: Cgroup, batch: Batch) -> Iterator[Pidfd]:
    """The members that are not dying, but for those that may not be signalled."""
    tried = {sequence.pidfd.pid for sequence in batch.begun}
    refused = {
        sequence.pidfd.pid
        for sequence, result in batch.results.items()
        # One that has gone may have left its pid to another member.
        if isinstance(result, OSError) and not isinstance(result, ProcessLookupError)
    }
    for part in cgroup.walk():
        for pid in part.pids():
            if pid in refused:
                continue
            pidfd = batch.open(part.open, pid)
            if pidfd is None:
                continue
            dying = _proc.dying(pid)
            unsure = dying is None and pid in tried
            if dying or unsure or _proc.is_kernel_thread(pid):
                pidfd.close()
            else:
                yield pidfd


def _kill_in_child(path: str, options: Options, lack: OSError) -> list[KillResult]:
    """Write to cgroup.kill in a child, which can close its copies of descriptors."""
    caller = os.getpid()

    def kill() -> bytes:
        try:
            _child.close_all()
            cgroup = _cgroup.find(path)
            pids = [*_check_cgroup(cgroup, caller)]
            killer = cgroup.open_kill()
            if killer is None:
                raise lack
            _write_kill(killer)
        except ValueError as error:
            return dumps((0, str(error), []))
        except OSError as error:
            return dumps((error.errno, error.strerror, []))
        return dumps((0, "", pids))

    answer, killed = _child.run(kill, _PIDS_ROOM)
    if not answer:
        how = f"was killed by signal {killed}" if killed else "gave no answer"
        raise OSError(EINTR, f"The child that was to kill {how}", path)
    errno, message, pids = loads(answer)
    if errno:
        raise OSError(errno, message, path)
    if message:
        raise ValueError(message)
    lacking = lack.errno or 0
    return [
        unopened(pid, options, "exiting", signal=SIGKILL, errno=lacking) for pid in pids
    ]


def _check_tree(pid: int) -> None:
    """Raise, with nothing touched, unless a process's tree may be killed."""
    if not _proc.is_ours():
        what = "No /proc of this pid namespace, to find the children"
        raise OSError(ENOSYS, what)
    if is_descendant(os.getpid(), pid):
        raise ValueError(f"refusing to kill the tree of {pid}: the caller is in it")


def _kill_found(tree: Tree, batch: Batch) -> list[KillResult]:
    """Kill descendants until no new one appears; return the results of the gone."""
    gone: list[KillResult] = []
    while fresh := tree.look_until_none():
        for pid, started in fresh:
            try:
                batch.add(batch.open(open_known, pid, started))
            except (ProcessLookupError, ValueError):
                gone.append(unopened(pid, batch.options, "exited"))
        batch.flush()
    return gone
