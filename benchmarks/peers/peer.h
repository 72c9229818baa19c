/* What the peers share. */
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>

#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif
enum { most = 4096 }; /* processes */

/* Seconds of CLOCK_MONOTONIC. */
static inline double
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Raise the limit of descriptors as far as it goes. */
static inline void
allow_descriptors(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
}
