// SPDX-License-Identifier: MIT
/*
 * mrelease._mrelease: the system calls that kill a process and free its
 * memory, made directly, and with the GIL released round all that can sleep.
 *
 * glibc wraps the pidfd calls only since 2.36 and musl not at all, hence
 * syscall(2).  setup.py picks the ABI: the Limited API of 3.11, or the
 * interpreter's own on free-threaded builds.  The module has no state and no
 * types, and nothing static changes once it is loaded, so any number of
 * threads and interpreters may use it at once.
 */

#include <Python.h>

#include <dirent.h>       // opendir(), readdir()
#include <errno.h>        // EINTR, EAGAIN
#include <fcntl.h>        // O_NONBLOCK, O_EXCL
#include <limits.h>       // INT_MAX, UINT_MAX
#include <poll.h>         // poll()
#include <sched.h>        // sched_getcpu(), sched_setaffinity(), CPU_*
#include <signal.h>       // SIGKILL
#include <stdlib.h>       // realloc(), free()
#include <sys/mman.h>     // MCL_*
#include <sys/syscall.h>  // __NR_*
#include <unistd.h>       // syscall(), close(), read(), readlink()

// ==== System call numbers ==================================================

// Older kernel headers lack them.  Only architectures whose numbers are known
// are served: a guess would call something else.
#ifndef __NR_process_mrelease
#if defined(__alpha__)
#define MRELEASE_NR_BASE 110
#elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_ABI32
#define MRELEASE_NR_BASE 4000
#elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_ABI64
#define MRELEASE_NR_BASE 5000
#elif defined(__mips__) && _MIPS_SIM == _MIPS_SIM_NABI32
#define MRELEASE_NR_BASE 6000
#elif defined(__x86_64__) && defined(__ILP32__)
#define MRELEASE_NR_BASE 0x40000000  // x32
#elif defined(__x86_64__) || defined(__i386__) || defined(__aarch64__)        \
    || defined(__arm__) || defined(__powerpc__) || defined(__s390__)          \
    || defined(__riscv) || defined(__loongarch__) || defined(__sparc__)       \
    || defined(__m68k__) || defined(__hppa__) || defined(__sh__)
#define MRELEASE_NR_BASE 0
#else
#error "mrelease: the number of process_mrelease is not known for this CPU"
#endif
#define __NR_process_mrelease (MRELEASE_NR_BASE + 448)
#ifndef __NR_pidfd_open
#define __NR_pidfd_open (MRELEASE_NR_BASE + 434)
#endif
#ifndef __NR_pidfd_send_signal
#define __NR_pidfd_send_signal (MRELEASE_NR_BASE + 424)
#endif
#endif

// ==== Arguments and errors =================================================

/* Check how many positional arguments came, in CPython's words.
   Return 0, or -1 with TypeError set. */
static int
check_nargs(const char *function, Py_ssize_t nargs, Py_ssize_t min,
            Py_ssize_t max)
{
    if (nargs >= min && nargs <= max) {
        return 0;
    }
    Py_ssize_t bound = nargs < min ? min : max;
    const char *which = "";
    if (min != max) {
        which = nargs < min ? "at least " : "at most ";
    }
    PyErr_Format(PyExc_TypeError, "%s expected %s%zd argument%s, got %zd",
                 function, which, bound, bound == 1 ? "" : "s", nargs);
    return -1;
}

/* Convert an int, or what has __index__, that lies between min and max.
   Return 0, or -1 with TypeError or OverflowError set. */
static int
convert(PyObject *arg, const char *name, long long min, long long max,
        long *result)
{
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(arg, &overflow);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow || value < min || value > max) {
        PyErr_Format(PyExc_OverflowError, "%s must be between %lld and %lld",
                     name, min, max);
        return -1;
    }
    // An unsigned int above LONG_MAX keeps its bits where long has 32 of them.
    *result = (long)value;
    return 0;
}

static int
convert_int(PyObject *arg, const char *name, long *result)
{
    return convert(arg, name, INT_MIN, INT_MAX, result);
}

static int
convert_flags(PyObject *arg, long *result)
{
    return convert(arg, "flags", 0, UINT_MAX, result);
}

/* Make a system call with the GIL released, again after EINTR (PEP 475).
   Return its result, or -1 with an exception set: OSError with the call's
   errno, or what a signal handler raised. */
static long
call(long number, long arg1, long arg2, long arg3, long arg4)
{
    long result;
    int error;
    int raised = 0;

    do {
        Py_BEGIN_ALLOW_THREADS
        result = syscall(number, arg1, arg2, arg3, arg4);
        // Taking the GIL back may change errno.
        error = errno;
        Py_END_ALLOW_THREADS
    } while (result < 0 && error == EINTR && !(raised = PyErr_CheckSignals()));
    if (result < 0 && !raised) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return result;
}

/* As call(), with the GIL held, for a call that never sleeps: among busy
   threads it takes milliseconds to get the GIL back. */
static long
call_at_once(long number, long arg1, long arg2, long arg3, long arg4)
{
    long result;

    do {
        result = syscall(number, arg1, arg2, arg3, arg4);
        if (result < 0 && errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
    } while (result < 0 && PyErr_CheckSignals() == 0);
    return result;
}

// ==== pidfd_open(2) ========================================================

PyDoc_STRVAR(mrelease_pidfd_open_doc,
"pidfd_open($module, pid, flags=0, /)\n"
"--\n"
"\n"
"Return a file descriptor that refers to the process with this pid.\n"
"\n"
"It is close-on-exec and polls readable when the process has exited.  No\n"
"permission is needed, and a zombie can be opened.  flags: 0, or\n"
"PIDFD_NONBLOCK (Linux 5.10) and PIDFD_THREAD (6.9).\n"
"\n"
"Raises ProcessLookupError if there is no such process, and OSError with\n"
"EINVAL (ENOENT on newer kernels) if pid is the id of a thread that does\n"
"not lead its process.  Linux 5.3.  Thread-safe.  See pidfd_open(2).");

static PyObject *
mrelease_pidfd_open(PyObject *Py_UNUSED(module), PyObject *const *args,
                    Py_ssize_t nargs)
{
    long pid;
    long flags = 0;

    if (check_nargs("pidfd_open", nargs, 1, 2) < 0
        || convert_int(args[0], "pid", &pid) < 0
        || (nargs > 1 && convert_flags(args[1], &flags) < 0)) {
        return NULL;
    }
    long pidfd = call(__NR_pidfd_open, pid, flags, 0, 0);
    if (pidfd < 0) {
        return NULL;
    }
    PyObject *result = PyLong_FromLong(pidfd);
    if (result == NULL) {
        close((int)pidfd);  // nobody else knows of it
    }
    return result;
}

// ==== pidfd_send_signal(2) =================================================

PyDoc_STRVAR(mrelease_pidfd_send_signal_doc,
"pidfd_send_signal($module, pidfd, signal, flags=0, /)\n"
"--\n"
"\n"
"Send a signal to the process that pidfd refers to, as os.kill() would.\n"
"\n"
"Signal 0 only checks that it exists and may be signalled, as a zombie\n"
"can be.  flags: 0, or since Linux 6.9 one of the PIDFD_SIGNAL_ values.\n"
"\n"
"Raises ProcessLookupError if the process has been reaped,\n"
"PermissionError if the caller may not signal it, and OSError with EINVAL\n"
"if signal is none, EBADF if pidfd is neither a pidfd nor an open /proc/PID\n"
"directory.  Linux 5.1.  Thread-safe.  See pidfd_send_signal(2).");

static PyObject *
mrelease_pidfd_send_signal(PyObject *Py_UNUSED(module), PyObject *const *args,
                           Py_ssize_t nargs)
{
    long pidfd;
    long signal;
    long flags = 0;

    if (check_nargs("pidfd_send_signal", nargs, 2, 3) < 0
        || convert_int(args[0], "pidfd", &pidfd) < 0
        || convert_int(args[1], "signal", &signal) < 0
        || (nargs > 2 && convert_flags(args[2], &flags) < 0)) {
        return NULL;
    }
    // The third argument is a siginfo_t pointer: none.
    if (call_at_once(__NR_pidfd_send_signal, pidfd, signal, 0, flags) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

// ==== process_mrelease(2) ==================================================

PyDoc_STRVAR(mrelease_process_mrelease_doc,
"process_mrelease($module, pidfd, flags=0, /)\n"
"--\n"
"\n"
"Free the private memory of a dying process, in the caller's context.\n"
"\n"
"Returns when the memory is back, which takes the longer the more it is,\n"
"on the caller's CPU and at its priority; and without a bound while the\n"
"process is stuck holding its mmap lock.  Shared memory stays until the\n"
"exit.  flags must be 0: the kernel defines none.\n"
"\n"
"Raises ProcessLookupError (ESRCH) if the process has let go of its\n"
"memory, which may still be on its way back, and OSError with EINVAL if\n"
"it is not dying, writes a core dump or shares its memory with a living\n"
"process, EAGAIN if a device driver kept a part, EBADF if pidfd is no\n"
"pidfd, ENOSYS where the call is missing.  No permission is needed.\n"
"Linux 5.15.  Thread-safe.  See process_mrelease(2).");

static PyObject *
mrelease_process_mrelease(PyObject *Py_UNUSED(module), PyObject *const *args,
                          Py_ssize_t nargs)
{
    long pidfd;
    long flags = 0;

    if (check_nargs("process_mrelease", nargs, 1, 2) < 0
        || convert_int(args[0], "pidfd", &pidfd) < 0
        || (nargs > 1 && convert_flags(args[1], &flags) < 0)) {
        return NULL;
    }
    if (call(__NR_process_mrelease, pidfd, flags, 0, 0) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

// ==== SIGKILL and process_mrelease in one ==================================

PyDoc_STRVAR(mrelease_kill_and_release_doc,
"kill_and_release($module, pidfd, /)\n"
"--\n"
"\n"
"Send SIGKILL and call process_mrelease() with nothing between them.\n"
"\n"
"A gap of microseconds lets the woken process start its own, slower exit\n"
"first.  Returns 0 or the errno of the release; the signal was sent in\n"
"either case.  It does not check whom it kills: the caller or pid 1, too.\n"
"\n"
"A /proc/PID directory can be killed, but not released: EBADF.\n"
"\n"
"Raises as pidfd_send_signal() if the signal could not be sent; then\n"
"nothing was released.  An exception from a signal handler passes through\n"
"as well.  Linux 5.15 for the release.  Thread-safe.");

/* Send SIGKILL, unless *sent says that it was, then release.  Needs no GIL.
   Return 0, or the errno: of the signal while *sent is 0, of the release when
   it is 1. */
static int
kill_and_release(long pidfd, int *sent)
{
    if (!*sent) {
        if (syscall(__NR_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) < 0) {
            return errno;
        }
        *sent = 1;
    }
    return syscall(__NR_process_mrelease, pidfd, 0) < 0 ? errno : 0;
}

// Also as a Reaper writes it to a pipe.
struct request {
    int pidfd;  // there negative: nothing, only wake up
    int pid;    // whose threads to bar from this CPU, 0 for none
};

// A thread that was barred from a CPU.
struct barred {
    int tid;
    cpu_set_t before;
};

/* List a process's threads.  Needs no GIL.
   Return a list to free(), of *count; NULL where they cannot be read, or where
   /proc is another pid namespace's, told by this process's own pid. */
static struct barred *
list_threads(int pid, size_t *count)
{
    char path[32];
    char self[16] = "";
    struct barred *threads = NULL;

    *count = 0;
    (void)PyOS_snprintf(path, sizeof path, "/proc/%d/task", pid);
    if (readlink("/proc/self", self, sizeof self - 1) < 0
        || PyOS_strtol(self, NULL, 10) != getpid()) {
        return NULL;
    }
    DIR *folder = opendir(path);
    if (folder == NULL) {
        return NULL;
    }
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        // Not strtol(), with newer headers a symbol of glibc 2.38; both need
        // no GIL.
        int tid = (int)PyOS_strtol(entry->d_name, NULL, 10);
        if (tid <= 0) {
            continue;  // . and ..
        }
        if (*count % 64 == 0) {
            void *more = realloc(threads, (*count + 64) * sizeof *threads);
            if (more == NULL) {
                break;
            }
            threads = more;
        }
        threads[(*count)++].tid = tid;
    }
    (void)closedir(folder);
    return threads;
}

/* Whether a process has exited: then it may be reaped at any moment, and the
   ids of its threads given to others.  True for a number that is not open. */
static int
has_exited(int pidfd)
{
    struct pollfd exit = {.fd = pidfd, .events = POLLIN};
    int found;

    do {
        found = poll(&exit, 1, 0);
    } while (found < 0 && errno == EINTR);
    return found != 0;
}

/* Bar a process's threads from this CPU, as far as the kernel allows it.
   Needs no GIL.
   Return a list to free(), of *count, for unbar(). */
static struct barred *
bar(const struct request *request, size_t *count)
{
    size_t found;
    struct barred *threads = list_threads(request->pid, &found);
    int cpu = sched_getcpu();  // late: the thread may move until it is used

    *count = 0;
    // Looked at after they were listed, so that only a reuse of their ids
    // within the next microseconds could be mistaken.
    if (cpu < 0 || has_exited(request->pidfd)) {
        found = 0;
    }
    for (size_t i = 0; i < found; i++) {
        struct barred one = {.tid = threads[i].tid};
        // With more than CPU_SETSIZE CPUs EINVAL, and it is left alone.
        if (sched_getaffinity(one.tid, sizeof one.before, &one.before) < 0
            || !CPU_ISSET(cpu, &one.before)) {
            continue;
        }
        cpu_set_t others = one.before;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) == 0) {
            for (int other = 0; other < CPU_SETSIZE; other++) {
                CPU_SET(other, &others);
            }
            CPU_CLR(cpu, &others);
        }
        if (sched_setaffinity(one.tid, sizeof others, &others) == 0) {
            threads[(*count)++] = one;
        }
    }
    return threads;
}

/* Let back and free those that were barred, as long as the process is not
   dying.  Needs no GIL. */
static void
unbar(const struct request *request, struct barred *threads, size_t count,
      int sent, int error)
{
    // Whoever was killed and has shown no memory may be a kernel thread, which
    // lives on.  The ids of a dying process's other threads may be another's.
    int is_dying = sent && (error == 0 || error == EAGAIN);
    if (count > 0 && !is_dying && !has_exited(request->pidfd)) {
        for (size_t i = 0; i < count; i++) {
            if (!sent || threads[i].tid == request->pid) {
                (void)sched_setaffinity(threads[i].tid,
                                        sizeof threads[i].before,
                                        &threads[i].before);
            }
        }
    }
    free(threads);
}

/* Do what a request asks for.  Needs no GIL.
   Return as kill_and_release(); after EINTR it may be called again. */
static int
attempt(const struct request *request, int *sent)
{
    size_t count = 0;
    struct barred *threads = NULL;

    // Once the signal has been sent it is too late to bar anybody.
    if (request->pid && !*sent) {
        threads = bar(request, &count);
    }
    int error = kill_and_release(request->pidfd, sent);
    unbar(request, threads, count, *sent, error);
    return error;
}

/* Do what a request asks for, with the GIL released, again after EINTR
   (PEP 475); a signal that was sent is not sent again.
   Return the errno of the release, or NULL with an exception set. */
static PyObject *
carry_out(const struct request *request)
{
    int sent = 0;
    int error;

    do {
        Py_BEGIN_ALLOW_THREADS
        error = attempt(request, &sent);
        Py_END_ALLOW_THREADS
        if (error == EINTR && PyErr_CheckSignals() < 0) {
            return NULL;
        }
    } while (error == EINTR);
    if (!sent) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromLong(error);
}

static PyObject *
mrelease_kill_and_release(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long pidfd;

    if (convert_int(arg, "pidfd", &pidfd) < 0) {
        return NULL;
    }
    const struct request request = {.pidfd = (int)pidfd};
    return carry_out(&request);
}

PyDoc_STRVAR(mrelease_bar_kill_and_release_doc,
"bar_kill_and_release($module, pidfd, pid, /)\n"
"--\n"
"\n"
"Call kill_and_release() with the process barred from the caller's CPU.\n"
"\n"
"A victim that wakes up on this CPU would start its own exit before the\n"
"release does.  So every thread of it is told to run elsewhere, as far as\n"
"the caller may; they get back the CPUs they had if the signal was not\n"
"sent.  pid: that of the process, or 0 to bar nothing.\n"
"\n"
"Returns and raises as kill_and_release().  Thread-safe.");

static PyObject *
mrelease_bar_kill_and_release(PyObject *Py_UNUSED(module),
                              PyObject *const *args, Py_ssize_t nargs)
{
    long pidfd;
    long pid;

    if (check_nargs("bar_kill_and_release", nargs, 2, 2) < 0
        || convert_int(args[0], "pidfd", &pidfd) < 0
        || convert_int(args[1], "pid", &pid) < 0) {
        return NULL;
    }
    const struct request request = {.pidfd = (int)pidfd, .pid = (int)pid};
    return carry_out(&request);
}

// ==== The same for the next one from a pipe ================================

PyDoc_STRVAR(mrelease_kill_and_release_next_doc,
"kill_and_release_next($module, pipe, /)\n"
"--\n"
"\n"
"Wait for a request to come through a pipe, then bar_kill_and_release().\n"
"\n"
"A thread that waits here kills as soon as it is told to, however busy\n"
"other threads keep the GIL: it is taken back when all is done.  A request\n"
"is two ints in the machine's own format, the arguments; a negative pidfd\n"
"only wakes it up.\n"
"\n"
"Returns (pidfd, sent, errno): whether SIGKILL was sent, and the errno of\n"
"the release, or that of the signal if it was not; pidfd is negative if\n"
"nothing was asked for, or the pipe has ended.  Raises OSError if the pipe\n"
"cannot be read, and what a signal handler raises before a request comes.\n"
"Linux 5.15 for the release.  Thread-safe.");

static PyObject *
mrelease_kill_and_release_next(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long pipe;
    struct request request = {.pidfd = -1};
    int sent = 0;
    int error;
    ssize_t length;

    if (convert_int(arg, "pipe", &pipe) < 0) {
        return NULL;
    }
    do {
        Py_BEGIN_ALLOW_THREADS
        error = 0;
        length = read((int)pipe, &request, sizeof request);
        if (length < 0) {
            error = errno;
        }
        else if (length == sizeof request && request.pidfd >= 0) {
            do {
                error = attempt(&request, &sent);
            } while (error == EINTR);
        }
        Py_END_ALLOW_THREADS
        if (length < 0 && error == EINTR && PyErr_CheckSignals() < 0) {
            return NULL;
        }
    } while (length < 0 && error == EINTR);
    if (length < 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (length != sizeof request) {
        request.pidfd = -1;  // the pipe's end, or half a request before it
    }
    return Py_BuildValue("iii", request.pidfd, sent, error);
}

// ==== The caller: getcpu(3), mlockall(2) ===================================

PyDoc_STRVAR(mrelease_getcpu_doc,
"getcpu($module, /)\n"
"--\n"
"\n"
"Return the number of the CPU that the calling thread runs on.\n"
"\n"
"It may have moved when the answer is used.  Thread-safe.  See getcpu(3).");

static PyObject *
mrelease_getcpu(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    // Usually the vDSO answers; giving up the GIL might move the thread.
    int cpu = sched_getcpu();
    return cpu < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(cpu);
}

PyDoc_STRVAR(mrelease_mlockall_doc,
"mlockall($module, flags, /)\n"
"--\n"
"\n"
"Lock the calling process's memory into RAM.\n"
"\n"
"flags: MCL_CURRENT, MCL_FUTURE and, since Linux 4.4, MCL_ONFAULT.\n"
"Raises PermissionError without CAP_IPC_LOCK and with RLIMIT_MEMLOCK 0,\n"
"and OSError with ENOMEM if that limit is too low.  Thread-safe.  See\n"
"mlockall(2).");

static PyObject *
mrelease_mlockall(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long flags;

    if (convert_int(arg, "flags", &flags) < 0
        || call(__NR_mlockall, flags, 0, 0, 0) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

// ==== The module ===========================================================

PyDoc_STRVAR(module_doc,
"The system calls that kill a process and free its memory.");

#define FASTCALL(function) (PyCFunction)(void (*)(void))(function)

static PyMethodDef methods[] = {
    {"pidfd_open", FASTCALL(mrelease_pidfd_open), METH_FASTCALL,
     mrelease_pidfd_open_doc},
    {"pidfd_send_signal", FASTCALL(mrelease_pidfd_send_signal), METH_FASTCALL,
     mrelease_pidfd_send_signal_doc},
    {"process_mrelease", FASTCALL(mrelease_process_mrelease), METH_FASTCALL,
     mrelease_process_mrelease_doc},
    {"kill_and_release", mrelease_kill_and_release, METH_O,
     mrelease_kill_and_release_doc},
    {"bar_kill_and_release", FASTCALL(mrelease_bar_kill_and_release),
     METH_FASTCALL, mrelease_bar_kill_and_release_doc},
    {"kill_and_release_next", mrelease_kill_and_release_next, METH_O,
     mrelease_kill_and_release_next_doc},
    {"getcpu", mrelease_getcpu, METH_NOARGS, mrelease_getcpu_doc},
    {"mlockall", mrelease_mlockall, METH_O, mrelease_mlockall_doc},
    {NULL, NULL, 0, NULL},
};

static int
add_constants(PyObject *module)
{
    // The kernel defines the PIDFD_ flags by these open(2) flags, whose values
    // differ between architectures.
    if (PyModule_AddIntConstant(module, "PIDFD_NONBLOCK", O_NONBLOCK) < 0
        || PyModule_AddIntConstant(module, "PIDFD_THREAD", O_EXCL) < 0
        || PyModule_AddIntMacro(module, MCL_CURRENT) < 0
        || PyModule_AddIntMacro(module, MCL_FUTURE) < 0
        || PyModule_AddIntMacro(module, MCL_ONFAULT) < 0) {
        return -1;
    }
    return 0;
}

// 3.12 and later want this for subinterpreters with a GIL of their own.  The
// Limited API of 3.11 hides the value, and before 3.15 the name as well.
#ifndef Py_MOD_PER_INTERPRETER_GIL_SUPPORTED
#undef Py_mod_multiple_interpreters
#define Py_mod_multiple_interpreters 3
#define Py_MOD_PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#endif

static PyModuleDef_Slot slots[] = {
    // First, because 3.11 has to be kept from seeing it: PyInit__mrelease().
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#ifdef Py_MOD_GIL_NOT_USED
    // Without it a free-threaded interpreter would turn its GIL on.
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {Py_mod_exec, (void *)add_constants},
    {0, NULL},
};

static PyModuleDef module_def = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "mrelease._mrelease",
    .m_doc = module_doc,
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__mrelease(void)
{
    // Python 3.11 refuses slots that it does not know.
    if (Py_Version < 0x030c0000) {
        module_def.m_slots = slots + 1;
    }
    return PyModuleDef_Init(&module_def);
}
