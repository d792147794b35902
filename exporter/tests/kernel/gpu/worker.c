// SPDX-License-Identifier: Apache-2.0
// A process that calls CUDA: `worker DEVICE LIBRARY`. It opens the device, loads the library, says `ready`, and does a line of its
// input at a time: `FUNCTION THREADS CALLS COMPUTES SLEEPS` has each thread call that often, with microseconds of both kinds; what
// it says then is the nanoseconds that all calls took, by its own clock, those of the longest, and `done`.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>

typedef int (*function)(long, long);

struct job {
  function call;
  long calls, computes, sleeps, nanoseconds, longest;
};

static long now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void *run(void *argument) {
  struct job *job = argument;
  for (long i = 0; i < job->calls; i++) {
    long begin = now();
    job->call(job->computes, job->sleeps);
    long took = now() - begin;
    job->nanoseconds += took;
    if (took > job->longest) job->longest = took;
  }
  return NULL;
}

int main(int count, char **arguments) {
  if (count != 3 || open(arguments[1], O_RDWR) < 0) return 2;
  void *library = dlopen(arguments[2], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  puts("ready");
  fflush(stdout);
  char name[64];
  int threads;
  struct job job = {0};
  while (scanf("%63s %d %ld %ld %ld", name, &threads, &job.calls, &job.computes, &job.sleeps) == 5) {
    job.call = (function)dlsym(library, name);
    if (!job.call || threads > 64) return 2;
    pthread_t each[64];
    struct job jobs[64];
    for (int i = 0; i < threads; i++) {
      jobs[i] = job;
      pthread_create(&each[i], NULL, run, &jobs[i]);
    }
    long nanoseconds = 0, longest = 0;
    for (int i = 0; i < threads; i++) {
      pthread_join(each[i], NULL);
      nanoseconds += jobs[i].nanoseconds;
      if (jobs[i].longest > longest) longest = jobs[i].longest;
    }
    printf("%ld %ld done\n", nanoseconds, longest);
    fflush(stdout);
  }
}
