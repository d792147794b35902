// SPDX-License-Identifier: Apache-2.0
// Calls the profiler plugin as NCCL 2.28 does (profiler_v5.h), with made-up times of a GPU.
//
// usage: plugin LIBRARY RANKS COLLECTIVES: RANKS communicators of one number, as the ranks of one node have them. All ranks end a
// collective together after 400 to 1400 µs; rank r takes r * 1000 µs less than the first, so the last one is waited for. Says `ready`
// and on a line: `run` runs the collectives and says `done`; `hang` starts one more on each rank but the last, says `done`; `lose`
// starts one that never ends and one that does; `end` closes and exits.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct table {
  const char *name;
  int (*init)(void **, uint64_t, int *, const char *, int, int, int, void *);
  int (*start)(void *, void **, void *);
  int (*stop)(void *);
  int (*record)(void *, int, void *);
  int (*finalize)(void *);
};

struct descriptor {
  uint64_t kind;
  void *parent;
  int rank;
  union {
    struct {
      uint64_t sequence;
      const char *function;
      const void *send;
      void *receive;
      size_t count;
      int root;
      const char *type;
      uint8_t channels, warps;
      const char *algorithm, *protocol;
      void *group;
    } collective;
    struct {
      uint8_t channel;
      uint64_t time;
    } channel;
  };
};

enum { COLLECTIVE = 2, CHANNEL = 64, STOP = 22, CHANNELS = 4, MOST = 64 };

static struct table *table;
static void *contexts[MOST];

static void *begin(int rank, uint64_t sequence, const char *function) {
  void *handle = NULL;
  struct descriptor event = {.kind = COLLECTIVE, .rank = rank};
  event.collective.sequence = sequence;
  event.collective.function = function;
  event.collective.type = "ncclFloat32";
  event.collective.channels = CHANNELS;
  event.collective.algorithm = "RING";
  event.collective.protocol = "SIMPLE";
  table->start(contexts[rank], &handle, &event);
  return handle;
}

static void end(int rank, void *collective, uint64_t duration) {
  // A clock of each GPU's own.
  uint64_t from = 1790000000000000000ull + rank * 12345678;
  for (int channel = 0; channel < CHANNELS; channel++) {
    void *handle = NULL;
    struct descriptor event = {.kind = CHANNEL, .parent = collective, .rank = rank};
    event.channel.channel = channel;
    event.channel.time = from + channel * 10;
    table->start(contexts[rank], &handle, &event);
    uint64_t until = from + duration - (CHANNELS - 1 - channel) * 10;
    table->record(handle, STOP, &until);
    table->stop(handle);
  }
}

int main(int count, char **arguments) {
  if (count != 4) return 2;
  void *library = dlopen(arguments[1], RTLD_NOW);
  table = library ? dlsym(library, "ncclProfiler_v5") : NULL;
  if (!table) return fprintf(stderr, "%s\n", dlerror()), 1;
  int ranks = atoi(arguments[2]), collectives = atoi(arguments[3]), mask = 0;
  for (int rank = 0; rank < ranks; rank++)
    table->init(&contexts[rank], 0xfeedc0de, &mask, "world", 1, ranks, rank, NULL);
  setvbuf(stdout, NULL, _IOLBF, 0);
  puts("ready");
  static const char *const functions[] = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast"};
  uint64_t sequence[4] = {0};
  char line[64];
  while (fgets(line, sizeof line, stdin)) {
    if (!strcmp(line, "run\n")) {
      for (int i = 0; i < collectives; i++) {
        uint64_t first = 400000 + 1000 * (i % 1000) + 1000000 * (uint64_t)ranks;
        void *started[MOST];
        for (int rank = 0; rank < ranks; rank++) started[rank] = begin(rank, sequence[i % 4], functions[i % 4]);
        for (int rank = ranks - 1; rank >= 0; rank--) end(rank, started[rank], first - rank * 1000000ull);
        sequence[i % 4]++;
      }
    } else if (!strcmp(line, "hang\n")) {
      for (int rank = 0; rank < ranks - 1; rank++) begin(rank, sequence[0], functions[0]);
    } else if (!strcmp(line, "lose\n")) {
      begin(0, sequence[0], functions[0]);
      end(0, begin(0, sequence[0] + 1, functions[0]), 500000);
    } else {
      break;
    }
    puts("done");
  }
  for (int rank = 0; rank < ranks; rank++) table->finalize(contexts[rank]);
  return 0;
}
