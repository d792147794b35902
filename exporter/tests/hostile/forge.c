// SPDX-License-Identifier: Apache-2.0
// A process that tells what no NCCL does, through the functions that the exporter probes in the profiler plugin: what can it do to the figures
// of others? It loads its own library with them, libnccl-forge.so in its folder, which is this file with -DLIBRARY.
//
//   forge job COMMUNICATOR RANKS    not hostile: RANKS ranks of a communicator. On each line `run N` of its input it runs N collectives, in
//                                   each of which all ranks wait 1000 us for the last one, and says `done`
//   forge storm SECONDS             opens ranks of communicators at random and closes them, as fast as it can
//   forge communicators COUNT       COUNT communicators with a rank each, and a collective
//   forge ranks SECONDS             one communicator with ranks at random, each with a collective
//   forge pending                   two ranks of one communicator; the first starts and finishes 100 000 collectives in which the second is
//                                   never seen, and starts 100 000 that never end
//   forge reopen SECONDS            opens one rank of one communicator again and again, by two threads, and closes none
//   forge join COMMUNICATOR SECONDS says that it is two ranks of it, one of which comes ten seconds late each time
//
// It says `ready` once its library is mapped. All but `job` begin at the first line of their input, and say `done` at the end. It exits
// at the end of its input; with 1 where something failed, and with 2 on wrong usage. Communicators are hexadecimal.
#include <stdint.h>

struct told {
  uint64_t communicator, sequence, duration;
  uint32_t rank, ranks, operation, outcome;
};

enum { ALL_REDUCE = 4 };

#ifdef LIBRARY
#define EXPORT(name)                                                                                                                     \
  __attribute__((visibility("default"), noinline)) void name(const struct told *told) { __asm__ volatile("" : : "r"(told) : "memory"); }
EXPORT(nccl_profiler_opened)
EXPORT(nccl_profiler_started)
EXPORT(nccl_profiler_finished)
EXPORT(nccl_profiler_closed)
#else
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void (*opened)(const struct told *), (*started)(const struct told *), (*finished)(const struct told *),
    (*closed)(const struct told *);

static void *load(void *library, const char *name) {
  void *symbol = dlsym(library, name);
  if (!symbol) {
    fprintf(stderr, "no %s: %s\n", name, dlerror());
    exit(1);
  }
  return symbol;
}

static uint64_t any(void) {
  static uint64_t x = 88172645463325252ull;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec + at.tv_nsec / 1e9;
}

static struct told of(uint64_t communicator, uint32_t rank, uint32_t ranks) {
  return (struct told){.communicator = communicator, .rank = rank, .ranks = ranks, .operation = ALL_REDUCE};
}

static void collective(struct told told, uint64_t sequence, uint64_t microseconds) {
  told.sequence = sequence;
  started(&told);
  told.duration = microseconds * 1000;
  finished(&told);
}

static void *reopen(void *seconds) {
  for (double end = now() + *(double *)seconds; now() < end;)
    for (uint64_t i = 0; i < 1000; i++) {
      struct told told = of(0x5a3e, 0, 2);
      opened(&told);
      if (i % 100 == 0)
        collective(told, i, 1000);
    }
  return NULL;
}

static void ready(void) {
  puts("ready");
  fflush(stdout);
}

int main(int count, char **arguments) {
  char *slash = strrchr(arguments[0], '/'), path[4096];
  snprintf(path, sizeof path, "%.*s/libnccl-forge.so", slash ? (int)(slash - arguments[0]) : 1, slash ? arguments[0] : ".");
  void *library = dlopen(path, RTLD_NOW);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  opened = load(library, "nccl_profiler_opened");
  started = load(library, "nccl_profiler_started");
  finished = load(library, "nccl_profiler_finished");
  closed = load(library, "nccl_profiler_closed");
  const char *mode = count > 1 ? arguments[1] : "";
  char line[64];
  if (!strcmp(mode, "job") && count == 4) {
    uint64_t communicator = strtoull(arguments[2], NULL, 16), sequence = 0;
    uint32_t ranks = atoi(arguments[3]);
    // Before its first `run`, so that it is known whoever comes when.
    ready();
    for (int begun = 0; fgets(line, sizeof line, stdin); begun = 1) {
      for (uint32_t rank = 0; !begun && rank < ranks; rank++) {
        struct told told = of(communicator, rank, ranks);
        opened(&told);
      }
      for (int i = atoi(line + 4); i > 0; i--, sequence++)
        for (uint32_t rank = 0; rank < ranks; rank++)
          collective(of(communicator, rank, ranks), sequence, rank == ranks - 1 ? 100 : 1100);
      puts("done");
      fflush(stdout);
    }
    return 0;
  }
  // Until the exporter has probed what this has mapped.
  ready();
  if (!fgets(line, sizeof line, stdin))
    return 0;
  if (!strcmp(mode, "storm") && count == 3) {
    for (double end = now() + atof(arguments[2]); now() < end;)
      for (int i = 0; i < 1000; i++) {
        struct told told = of(any() % 100000, any() % 4096, 4096);
        opened(&told);
        if (i % 2)
          collective(told, 0, 1000);
        closed(&told);
      }
  } else if (!strcmp(mode, "communicators") && count == 3) {
    for (int i = atoi(arguments[2]); i > 0; i--) {
      struct told told = of(0xc0000000 + i, 0, 1);
      opened(&told);
      collective(told, 0, 1000);
    }
  } else if (!strcmp(mode, "ranks") && count == 3) {
    for (double end = now() + atof(arguments[2]); now() < end;) {
      struct told told = of(0x4a4a, (uint32_t)any(), UINT32_MAX);
      opened(&told);
      collective(told, 0, 1000);
      closed(&told);
    }
  } else if (!strcmp(mode, "pending") && count == 2) {
    for (uint32_t rank = 0; rank < 2; rank++) {
      struct told told = of(0xbe4d, rank, 2);
      opened(&told);
    }
    for (uint64_t sequence = 0; sequence < 100000; sequence++)
      collective(of(0xbe4d, 0, 2), sequence, 1000);
    for (uint64_t sequence = 100000; sequence < 200000; sequence++) {
      struct told told = of(0xbe4d, 0, 2);
      told.sequence = sequence;
      started(&told);
    }
  } else if (!strcmp(mode, "reopen") && count == 3) {
    double seconds = atof(arguments[2]);
    pthread_t other;
    if (pthread_create(&other, NULL, reopen, &seconds))
      return 1;
    reopen(&seconds);
    pthread_join(other, NULL);
  } else if (!strcmp(mode, "join") && count == 4) {
    uint64_t communicator = strtoull(arguments[2], NULL, 16);
    for (uint32_t rank = 0; rank < 2; rank++) {
      struct told told = of(communicator, rank, 2);
      opened(&told);
    }
    double end = now() + atof(arguments[3]);
    for (uint64_t sequence = 0; now() < end; sequence++)
      for (uint32_t rank = 0; rank < 2; rank++)
        collective(of(communicator, rank, 2), sequence, rank ? 1 : 10000000);
  } else {
    fprintf(stderr, "usage: forge job COMMUNICATOR RANKS | storm SECONDS | communicators COUNT | ranks SECONDS | pending | reopen SECONDS | join COMMUNICATOR SECONDS\n");
    return 2;
  }
  puts("done");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin))
    ;
  return 0;
}
#endif
