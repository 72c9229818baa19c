/* A process that never sleeps, once it is told to begin; ends with its parent.
 */
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

int
main(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    puts("ready");
    fflush(stdout);
    char told;
    if (read(0, &told, 1) != 1) {
        return 0;
    }
    puts("spinning");
    fflush(stdout);
    for (volatile unsigned long n = 0;; n++)
        ;
}
