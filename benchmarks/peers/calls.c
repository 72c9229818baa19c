/* What the bare system calls cost: calls PID LOOPS
 *
 * PID is a dying process that cannot go on, so that every call succeeds. It
 * says the nanoseconds of one process_mrelease, of one kill and
 * process_mrelease, of one pidfd_open, without the close. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif
enum { batch = 256 };

static int failed;

static double
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

int
main(int argc, char **argv)
{
    if (argc != 3) {
        return 2;
    }
    const int pid = atoi(argv[1]);
    const int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    const int loops = (atoi(argv[2]) + batch - 1) / batch * batch;
    double start = now();
    for (int i = 0; i < loops; i++) {
        failed |= syscall(SYS_process_mrelease, pidfd, 0) != 0;
    }
    const double release = (now() - start) / loops;
    start = now();
    for (int i = 0; i < loops; i++) {
        failed |= syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) != 0;
        failed |= syscall(SYS_process_mrelease, pidfd, 0) != 0;
    }
    const double both = (now() - start) / loops;
    double opening = 0;
    for (int i = 0; i < loops; i += batch) {
        int fds[batch];
        start = now();
        for (int j = 0; j < batch; j++) {
            failed |= (fds[j] = (int)syscall(SYS_pidfd_open, pid, 0)) < 0;
        }
        opening += now() - start;
        for (int j = 0; j < batch; j++) {
            close(fds[j]);
        }
    }
    printf("%.3f %.3f %.3f\n", release, both, opening / loops);
    return failed;
}
