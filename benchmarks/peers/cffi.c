/* The calls through cffi in API mode; the errno is the caller's to read. */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif

static int
open_pidfd(int pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

static int
release(int pidfd)
{
    return (int)syscall(SYS_process_mrelease, pidfd, 0);
}

/* The errno of the release; -1 if the signal could not be sent. */
static int
kill_release(int pidfd)
{
    if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0)) {
        return -1;
    }
    return release(pidfd) ? errno : 0;
}
