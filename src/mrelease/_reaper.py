"""Kills in the background, by threads with a priority and CPUs of their own."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from operator import index, setitem
from queue import SimpleQueue
from select import POLLIN, poll
from struct import Struct
from sys import exc_info
from threading import Condition, RLock, Thread, current_thread, get_native_id
from time import monotonic, sleep

from ._kill import SIGKILL, KillResult, Options, Sequence
from ._locks import locked, uninterrupted
from ._mrelease import kill_and_release_next
from ._pidfd import INFINITY, Pidfd, milliseconds
from ._sched import check_nice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self, Unpack

    from ._types import KillOptions, Target


_PATIENCE = 0.1  # seconds between looks at what no thread tells of
# To a worker: a pidfd to kill, and the pid whose threads to bar from its CPU, or 0.
_ORDER = Struct("=ii")
_LOOK = _ORDER.pack(-1, 0)  # at the queue


class Reaper:
    """Worker threads that kill in the background, so that no caller is ever stuck.

    A release takes as long as the memory is large, and without a bound while the victim
    is stuck in the kernel; here it takes a worker's time. With every worker busy the
    SIGKILL is sent at once by the calling thread, and the release follows when one is
    free: a kill never queues. A free worker waits outside of Python, so that it kills
    and releases as soon as it is told to, however busy other threads are with Python.

    workers: how many releases may run at once.
    nice: the priority of its threads, -20 to 19; None: that of the calling thread.
    cpus: the CPUs that its threads may run on; None: those of the calling thread.

    One more thread watches for exits and deadlines.

    Raises OSError if nice or cpus are refused (CAP_SYS_NICE for a lower nice), and
    RuntimeError where no thread can be started, such as in a subinterpreter without
    daemon threads. Use it as a context manager, which closes it. Thread-safe. After a
    fork it can be closed in the child, and no more: make another there. Linux 5.15 for
    the releases, 5.3 for the kills.

    The interpreter's exit sends each kill that was begun, and then waits at most 0.1
    seconds for what the threads are doing: it does not wait for results.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        nice: int | None = None,
        cpus: Iterable[int] | None = None,
    ) -> None:
        self._pool = Pool(workers, nice, None if cpus is None else set(cpus))

    def kill(
        self, target: Target, **options: Unpack[KillOptions]
    ) -> Future[KillResult]:
        """Kill a process and free its memory in the background: see mrelease.kill().

        Returns a future. It has its result when the memory is known to be back, with
        wait=True when the process has exited, and at the latest after timeout seconds,
        even if the release is still blocked. Cancelling it gives up the result, not the
        kill. Its callbacks run in a thread of the Reaper: they should be quick.

        Raises at once as kill() for a target or an option that is refused, and
        RuntimeError if the Reaper is closed, or from before a fork. If the SIGKILL
        itself fails, by a filter perhaps, the error may be the future's. Thread-safe.
        """
        settings = Options(**options)
        pidfd = Pidfd.open(target)
        sequence = Sequence(pidfd, settings)
        try:
            sequence.check()
        except BaseException:
            pidfd.close()
            raise
        return self._pool.start(sequence)

    def close(self, wait: bool = True) -> None:
        """Take no more kills; those that were begun go on to their results.

        wait: until all have theirs, and the threads have ended, but for one whose
            release is blocked beyond its timeout: that ends when the kernel lets it.

        A second call may wait for what the first did not. Thread-safe.
        """
        self._pool.close(wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Task:
    """One kill of a pool, whose lock guards it."""

    __slots__ = ("cancelled", "future", "queued", "running", "sequence", "settled")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.future: Future[KillResult] = Future()
        self.cancelled = False  # the future is, whose own lock is not waited for
        self.queued = False  # for a worker
        self.running = False  # in a worker
        self.settled = False  # the future has been given up, or gets its result

    def due(self) -> float:
        """When the watcher has to look at it again, if it has not exited by then."""
        if self.cancelled and not self.settled:
            return 0.0  # at once: the wake-up may have been taken before it was seen
        deadline = INFINITY if self.settled else self.sequence.deadline
        if self.queued or self.running:
            return deadline
        # Its next release may be due though nobody waits for the result.
        return min(deadline, self.sequence.due)

    def is_over(self) -> bool:
        """Whether nobody waits for it, and nothing is to be done any more."""
        # A release that is under way may have to be tried again, until the deadline.
        due = monotonic() if self.running else self.sequence.due
        is_idle = due > self.sequence.deadline or due == INFINITY
        return self.settled and not self.queued and is_idle


class Pool:
    """The threads of a Reaper: workers, which may block, and one that watches.

    A free worker waits for a pidfd from a pipe, which it kills and releases before it
    takes the GIL; or for word that a release is in the queue.
    """

    def __init__(
        self, workers: int, nice: int | None = None, cpus: set[int] | None = None
    ) -> None:
        if index(workers) < 1:
            raise ValueError(f"a Reaper needs one worker or more, not {workers}")
        if nice is not None:
            check_nice(nice)
        self.pid = os.getpid()
        # For all below. Not the Condition: a handler that raises as that is entered or
        # left, which is done in Python, might leave it locked. By locked() in threads
        # that handlers may run in, so not in the pool's own.
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._queue: deque[_Task] = deque()
        self._handed: dict[int, _Task] = {}  # through the pipe, by the pidfd
        self._tasks: set[_Task] = set()
        self._idle = 0  # workers that wait at the pipe
        self._looks: list[None] = []  # words to look at the queue in the pipe
        self._watching = False  # the watcher waits
        self._closing = False
        self._exiting = False  # the interpreter, and with it the threads
        self._threads: set[Thread] = set()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pipe = self._inlet = -1
        try:
            self._pipe, self._inlet = os.pipe2(os.O_CLOEXEC)
            for run in (self._watch, *[self._work] * workers):
                self._start_thread(run, nice, cpus)
        except BaseException:
            self.close(wait=True)
            raise
        atexit.register(self._leave_nothing_undone)

    def start(self, sequence: Sequence) -> Future[KillResult]:
        """Go on with a kill; its Pidfd is the pool's to close, whatever happens."""
        task = _Task(sequence)
        try:
            task.future.add_done_callback(partial(self._look_if_cancelled, task))
            if self.pid != os.getpid():
                raise RuntimeError(
                    f"this Reaper's threads are in process {self.pid}, which made it: "
                    "after a fork the child has to make its own"
                )
            locked(self._lock, partial(self._take, task))
        except BaseException:
            if task not in self._tasks:
                sequence.pidfd.close()
            raise
        return task.future

    def _take(self, task: _Task) -> None:
        if self._closing:
            raise RuntimeError("the Reaper is closed")
        try:
            self._tasks.add(task)
            self._begin_if_due(task, monotonic())
            self._wake()
        except BaseException as error:
            # A handler's comes at any moment, and may be an OSError as well.
            if isinstance(error, OSError) and task.sequence.signal is None:
                if task in self._tasks:
                    self._retire(task)
            else:
                self._wake()  # the watcher goes on with the kill
            raise

    def close(self, wait: bool) -> None:
        if self.pid != os.getpid():
            # No thread of it is in this process, and none will ever give up the lock.
            for task in self._tasks:
                task.sequence.pidfd.close()
            self._close_channels()
            return
        ended = locked(self._lock, partial(self._end, wait))
        if wait:
            for thread in ended:
                thread.join()

    def _end(self, wait: bool) -> set[Thread]:
        """Have the threads end; return those that have."""
        threads = set(self._threads)
        self._closing = True
        self._wake()
        # A callback of one of the threads cannot wait for them.
        while current_thread() not in threads and wait and self._is_unfinished():
            self._changed.wait(_PATIENCE)
        if not self._threads:
            self._close_channels()
        return threads - self._threads

    def _start_thread(
        self, run: Callable[[], None], nice: int | None, cpus: set[int] | None
    ) -> None:
        ready: SimpleQueue[Exception | None] = SimpleQueue()

        def begin() -> None:
            try:
                _schedule(nice, cpus)
            except Exception as error:  # raised again below
                ready.put(error)
            else:
                ready.put(None)
                run()
            finally:
                self._leave()

        # A daemon, so that no release that is blocked holds up the interpreter's exit.
        thread = Thread(target=begin, name="mrelease", daemon=True)
        locked(self._lock, partial(self._add, thread))
        if error := ready.get():
            raise error

    def _add(self, thread: Thread) -> None:
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self._threads.discard(thread)
            raise

    def _leave(self) -> None:
        with self._lock:
            self._threads.discard(current_thread())
            if self._closing and not self._threads:
                # Left by a worker that could not read its pipe.
                for task in [*self._tasks]:
                    self._retire(task)
                self._close_channels()
                atexit.unregister(self._leave_nothing_undone)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                task = self._next_queued()
                if task is None:
                    if self._is_over():
                        return
                    self._idle += 1
            if task:
                self._do(task, task.sequence.release)
                continue
            pidfd, sent, errno = kill_and_release_next(self._pipe)
            with self._lock:
                self._idle -= 1
                if pidfd < 0:
                    self._looks.pop()
                task = self._handed.pop(pidfd, None)
            if task:
                self._do(task, partial(task.sequence.end, bool(sent), errno))

    def _next_queued(self) -> _Task | None:
        if not self._queue:
            return None
        task = self._queue.popleft()
        task.queued = False
        task.running = True
        return task

    def _do(self, task: _Task, act: Callable[[], None]) -> None:
        sequence = task.sequence
        result: KillResult | Exception | None = None
        try:
            act()
            if not sequence.pending:
                result = sequence.result()
        except Exception as error:
            result = error
        with self._lock:
            task.running = False
            is_first = not task.settled and result is not None
            task.settled = task.settled or is_first
            if task.is_over() or isinstance(result, Exception):
                self._retire(task)
            self._wake()
        if is_first:
            _tell(task.future, result)

    def _watch(self) -> None:
        while True:
            with self._lock:
                # Of those that are blocked beyond their deadlines the workers see.
                tasks = [t for t in self._tasks if not (t.settled and t.running)]
                fds = [task.sequence.pidfd.fileno() for task in tasks]
                if self._is_over():
                    for _ in range(self._idle):
                        uninterrupted(self._steps_of_a_look())
                    return
                until = min((task.due() for task in tasks), default=INFINITY)
                wakeup = self._wakeup
                self._watching = True
            try:
                exited = _poll(fds, wakeup, until - monotonic())
            except OSError:
                # More than RLIMIT_NOFILE, which has been lowered: one by one.
                sleep(_PATIENCE)
                exited = None
            settled: list[tuple[_Task, KillResult | Exception | None]] = []
            with self._lock:
                self._watching = False
                for fd, task in zip(fds, tasks, strict=True):
                    if task not in self._tasks:
                        continue  # retired by a worker meanwhile
                    was_settled = task.settled
                    result = self._look(task, None if exited is None else fd in exited)
                    if task.settled and not was_settled:
                        settled.append((task, result))
                self._changed.notify_all()
            for task, result in settled:
                _tell(task.future, result)

    def _look(self, task: _Task, exited: bool | None) -> KillResult | Exception | None:
        """Do what is due with a task; return the result if that settles it."""
        try:
            if exited is None:
                exited = task.sequence.pidfd.exited
            return self._go_on(task, exited)
        except Exception as error:  # of this task alone
            task.settled = True
            if not task.running:
                self._retire(task)
            return error

    def _go_on(self, task: _Task, exited: bool) -> KillResult | None:
        sequence = task.sequence
        result = None
        now = monotonic()
        if task.cancelled:
            task.settled = True
        elif not task.settled and (exited or now >= sequence.deadline):
            if task.running and not exited:
                self._make_sure(sequence)
            result = sequence.result()
            task.settled = True
        if task.running:
            return result
        # What is still due comes, whether or not anybody waits for it.
        if exited or task.is_over():
            self._retire(task)
        elif not task.queued:
            self._begin_if_due(task, now)
        return result

    def _make_sure(self, sequence: Sequence) -> None:
        """Send SIGKILL to one that a worker may be just about to send it to."""
        try:
            sequence.pidfd.send_signal(SIGKILL)
            sequence.signal = SIGKILL
        except ProcessLookupError:
            pass  # gone

    def _begin_if_due(self, task: _Task, now: float) -> None:
        """Hand a task to the workers; if none is free, kill here, without a release."""
        sequence = task.sequence
        if sequence.due > now:
            return
        if not sequence.to_kill:
            self._enqueue(task)
        elif not self._hand_over(task):
            sequence.send()
            sequence.hurry()
            if sequence.due <= monotonic():
                self._enqueue(task)

    def _enqueue(self, task: _Task) -> None:
        steps: list[Callable[[], object]] = [
            partial(setattr, task, "queued", True),
            partial(self._queue.append, task),
        ]
        # No more words than workers: the pipe never fills up.
        if self._free() > len(self._looks):
            steps += self._steps_of_a_look()
        uninterrupted(steps)

    def _steps_of_a_look(self) -> list[Callable[[], object]]:
        return [
            partial(os.write, self._inlet, _LOOK),
            partial(self._looks.append, None),
        ]

    def _hand_over(self, task: _Task) -> bool:
        """Have a worker kill and release without the GIL, if one is free."""
        sequence = task.sequence
        pidfd = sequence.pidfd.fileno()
        order = _ORDER.pack(pidfd, sequence.pidfd.pid if sequence.options.boost else 0)
        # Two kills of one Pidfd would have the same number.
        if sequence.options.settle or self._exiting or pidfd in self._handed:
            return False
        if self._free() <= max(len(self._looks), len(self._queue)):
            return False
        sequence.begin()
        # What is in the pipe is known to be, or its pidfd might be closed meanwhile.
        written: list[int] = []
        steps: list[Callable[[], object]] = [
            partial(setitem, self._handed, pidfd, task),
            partial(setattr, task, "running", True),
            partial(written.extend, map(os.write, (self._inlet,), (order,))),
        ]
        try:
            uninterrupted(steps)
        except BaseException:
            if not written:
                self._handed.pop(pidfd, None)
                task.running = False
                sequence.undo()
            raise
        # A handler may have given the same worker something else to do in between.
        if self._free() < len(self._looks):
            with suppress(PermissionError):  # which the worker will tell of
                self._make_sure(sequence)
        return True

    def _free(self) -> int:
        """How many workers wait, and have been handed nothing."""
        return self._idle - len(self._handed)

    def _retire(self, task: _Task) -> None:
        if task.queued:
            self._queue.remove(task)
        self._tasks.remove(task)
        try:
            task.sequence.pidfd.close()
        except OSError:  # closed behind its back, as its future says
            pass

    def _is_over(self) -> bool:
        return self._closing and all(task.is_over() for task in self._tasks)

    def _is_unfinished(self) -> bool:
        """Whether close() has a result or a thread to wait for."""
        if any(not task.settled for task in self._tasks):
            return True
        now = monotonic()
        blocked = any(
            task.running and (task.cancelled or now >= task.sequence.deadline)
            for task in self._tasks
        )
        return bool(self._threads) and not blocked

    def _look_if_cancelled(self, task: _Task, future: Future[KillResult]) -> None:
        if future.cancelled() and self.pid == os.getpid():
            locked(self._lock, partial(self._cancel, task))

    def _cancel(self, task: _Task) -> None:
        task.cancelled = True
        self._wake()

    def _wake(self) -> None:
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)
            self._watching = False
        self._changed.notify_all()

    def _close_channels(self) -> None:
        fds = (self._wakeup, self._pipe, self._inlet)
        self._wakeup = self._pipe = self._inlet = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _leave_nothing_undone(self) -> None:
        """At the interpreter's exit."""
        if self.pid != os.getpid():
            return
        locked(self._lock, self._send_unsent)
        # Before Python 3.14 a thread that is in Python as the interpreter ends may use
        # memory that has been freed (CPython's issue 124878): with musl's malloc() it
        # crashes. One that is blocked does not hold up the exit for long.
        until = monotonic() + _PATIENCE
        while not locked(self._lock, self._is_at_rest) and monotonic() < until:
            sleep(0.001)

    def _is_at_rest(self) -> bool:
        """Whether every thread waits, outside of Python, and is to go on waiting."""
        told = self._handed or self._looks
        return self._watching and not told and self._idle == len(self._threads) - 1

    def _send_unsent(self) -> None:
        """No kill is lost with the threads."""
        now = monotonic()
        self._exiting = True
        for task in self._tasks:
            sequence = task.sequence
            if task.running or (sequence.to_kill and sequence.due <= now):
                try:
                    self._make_sure(sequence)
                except OSError:  # nobody is there to tell
                    continue


def _schedule(nice: int | None, cpus: set[int] | None) -> None:
    """Give the calling thread a priority and CPUs."""
    if nice is not None:
        os.setpriority(os.PRIO_PROCESS, get_native_id(), nice)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)


def _poll(fds: Iterable[int], wakeup: int, timeout: float) -> set[int]:
    """Wait until one of these is readable or is woken up; return the readable ones."""
    poller = poll()
    poller.register(wakeup, POLLIN)
    for fd in fds:
        poller.register(fd, POLLIN)
    readable = {fd for fd, _ in poller.poll(milliseconds(timeout))}
    if wakeup in readable:
        os.eventfd_read(wakeup)
    return readable


def _tell(future: Future[KillResult], result: KillResult | Exception | None) -> None:
    """Give a future its result, unless it has been cancelled."""
    try:
        if not future.set_running_or_notify_cancel() or result is None:
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except BaseException:
        # Of a callback, such as SystemExit. It ends neither this thread nor the kills
        # that the thread has still to look after.
        args = threading.ExceptHookArgs((*exc_info(), current_thread()))
        threading.excepthook(args)
