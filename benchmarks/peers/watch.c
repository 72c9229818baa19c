/* Watches memory come back: watch FILE BEFORE SIZE LIMIT PID...
 *
 * FILE is a memory cgroup's figure, or /proc/meminfo, of which AnonPages is
 * read. It says when all but 5 % of SIZE bytes above BEFORE was back, and when
 * the last process had exited, in seconds of CLOCK_MONOTONIC, -1 for what had
 * not happened LIMIT seconds after it was told to begin, and how many bytes
 * were held at the end. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "peer.h"

static long long
held(int file, long long before)
{
    static char text[8192];
    ssize_t length = pread(file, text, sizeof text - 1, 0);
    if (length <= 0) {
        perror("pread");
        exit(1);
    }
    text[length] = 0;
    const char *line = strstr(text, "AnonPages:");
    return (line ? atoll(line + 10) * 1024 : atoll(text)) - before;
}

int
main(int argc, char **argv)
{
    static struct pollfd left[most];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    allow_descriptors();
    int count = argc - 5;
    if (count < 1 || count > most) {
        return 2;
    }
    const int file = open(argv[1], O_RDONLY);
    if (file < 0) {
        return perror(argv[1]), 1;
    }
    const long long before = atoll(argv[2]), size = atoll(argv[3]);
    for (int i = 0; i < count; i++) {
        left[i].fd = (int)syscall(SYS_pidfd_open, atoi(argv[i + 5]), 0);
        left[i].events = POLLIN;
        if (left[i].fd < 0) {
            return perror("pidfd_open"), 1;
        }
    }
    printf("ready %lld\n", held(file, before));
    fflush(stdout);
    const double start = now();
    double back = -1, exited = -1, time = start;
    long long last = size;
    while (time - start < atof(argv[4])) {
        last = held(file, before);
        time = now();
        if (back < 0 && last <= size / 20) {
            back = time;
        }
        poll(left, (nfds_t)count, 0);
        for (int i = count - 1; i >= 0; i--) {
            if (left[i].revents) {
                close(left[i].fd);
                left[i] = left[--count];
            }
        }
        if (!count && exited < 0) {
            exited = now();
        }
        if (exited >= 0 && back >= 0) {
            break;
        }
        /* Often at first, to see tenths of milliseconds, then seldom. */
        const struct timespec pause = {0, time - start < 1 ? 200000 : 5000000};
        nanosleep(&pause, NULL);
    }
    printf("%.9f %.9f %lld\n", back, exited, last);
    return 0;
}
