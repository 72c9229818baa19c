/* What earlyoom does when it has decided: killer lock|nolock PID...
 *
 * pidfd_open ahead, then, told to by a line, kill and process_mrelease of one
 * after the other. It says for each when it was about to send SIGKILL
 * (CLOCK_MONOTONIC), when the release returned, and its errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "peer.h"

int
main(int argc, char **argv)
{
    static int pidfds[most], answers[most];
    static double sent[most], returned[most];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    allow_descriptors();
    const int count = argc - 2;
    if (count < 1 || count > most) {
        return 2;
    }
    if (!strcmp(argv[1], "lock") && mlockall(MCL_CURRENT | MCL_FUTURE)) {
        return perror("mlockall"), 1;
    }
    for (int i = 0; i < count; i++) {
        if ((pidfds[i] = (int)syscall(SYS_pidfd_open, atoi(argv[i + 2]), 0))
            < 0) {
            return perror("pidfd_open"), 1;
        }
    }
    puts("ready");
    fflush(stdout);
    char told;
    if (read(0, &told, 1) != 1) {
        return 1;
    }
    for (int i = 0; i < count; i++) {
        sent[i] = now();
        kill(atoi(argv[i + 2]), SIGKILL);
        answers[i] = syscall(SYS_process_mrelease, pidfds[i], 0) ? errno : 0;
        returned[i] = now();
    }
    for (int i = 0; i < count; i++) {
        printf("%.9f %.9f %d\n", sent[i], returned[i], answers[i]);
    }
    fflush(stdout);
    read(0, &told, 1); /* so that somebody can look at it first */
    return 0;
}
