/* A process with memory that sleeps: victim MIB THREADS small|huge|shared
 *
 * It says "ready" and ends with its standard input or its parent, whichever is
 * first. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

static void *
sleep_on(void *nothing)
{
    pause();
    return nothing;
}

int
main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 4) {
        return 2;
    }
    char told;
    if (read(0, &told, 1) != 1) {
        return 0;
    }
    size_t size = strtoul(argv[1], NULL, 10) << 20;
    const int huge = !strcmp(argv[3], "huge"),
              shared = !strcmp(argv[3], "shared");
    const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) {
        return perror("mmap"), 1;
    }
    /* Refused by a kernel without huge pages: then all are small. */
    madvise(memory, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t offset = 0; offset < size; offset += page) {
        memory[offset] = 1;
    }

    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 17);
    for (int n = atoi(argv[2]); n > 1; n--) {
        pthread_t thread;
        if (pthread_create(&thread, &small, sleep_on, NULL)) {
            return perror("pthread_create"), 1;
        }
    }
    puts("ready");
    fflush(stdout);
    while (read(0, &told, 1) > 0)
        ;
    return 0;
}
