// SPDX-License-Identifier: Apache-2.0
// Calls a real NCCL where there is no GPU: with communicators that are blocks of zeros but for what the exporter reads. NCCL finds
// them corrupted and returns, which is after its probes.
//
// usage: loader LIBRARY HASH RANK RANKS SEQUENCE: where a communicator has commHash, rank, nRanks and seqNumber, or -1. Says `ready`, and
// `done` after each line: `call FUNCTION COMMUNICATOR TIMES` (two communicators, 0 and 1, which are its ranks), `number N` (seqNumber
// of both for each operation), `init` (ncclCommInitRank, which fails).
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char internal[128];
} unique_id;

static const char *const codes[] = {"ncclBroadcast", "ncclReduce", "ncclAllGather", "ncclReduceScatter", "ncclAllReduce"};

static void call(void *function, const char *name, void *comm) {
  void *send = (void *)64, *receive = (void *)128;
  if (!strcmp(name, "ncclReduce"))
    ((int (*)(void *, void *, size_t, int, int, int, void *, void *))function)(send, receive, 1, 7, 0, 0, comm, NULL);
  else if (!strcmp(name, "ncclAllGather") || !strcmp(name, "ncclAlltoAll"))
    ((int (*)(void *, void *, size_t, int, void *, void *))function)(send, receive, 1, 7, comm, NULL);
  else if (!strcmp(name, "ncclSend") || !strcmp(name, "ncclRecv"))
    ((int (*)(void *, size_t, int, int, void *, void *))function)(send, 1, 7, 0, comm, NULL);
  else if (!strcmp(name, "ncclPutSignal"))
    ((int (*)(void *, size_t, int, int, void *, size_t, int, int, unsigned, void *, void *))function)(send, 1, 7, 0, NULL, 0, 0, 0, 0, comm,
                                                                                                    NULL);
  else if (!strcmp(name, "ncclSignal"))
    ((int (*)(int, int, int, unsigned, void *, void *))function)(0, 0, 0, 0, comm, NULL);
  else if (!strcmp(name, "ncclWaitSignal"))
    ((int (*)(int, void *, void *, void *))function)(0, NULL, comm, NULL);
  else if (!strcmp(name, "ncclBcast"))
    ((int (*)(void *, size_t, int, int, void *, void *))function)(send, 1, 7, 0, comm, NULL);
  else
    ((int (*)(void *, void *, size_t, int, int, void *, void *))function)(send, receive, 1, 7, 0, comm, NULL);
}

int main(int count, char **arguments) {
  if (count != 6) return 2;
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  long at[4];
  for (int i = 0; i < 4; i++) at[i] = atol(arguments[2 + i]);
  char *comms[2];
  for (int rank = 0; rank < 2; rank++) {
    comms[rank] = calloc(1, 4 << 20);
    *(uint64_t *)comms[rank] = 0x0280028002800280;
    if (at[0] < 0) continue;
    *(uint64_t *)(comms[rank] + at[0]) = 0xabcdef0123456789;
    *(int *)(comms[rank] + at[1]) = rank;
    *(int *)(comms[rank] + at[2]) = 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  puts("ready");
  char line[128], name[64];
  int comm, times;
  while (fgets(line, sizeof line, stdin)) {
    if (sscanf(line, "call %63s %d %d", name, &comm, &times) == 3) {
      void *function = dlsym(library, name);
      for (int i = 0; function && i < times; i++) {
        call(function, name, comms[comm]);
        for (int code = 0; code < 5; code++)
          if (at[3] >= 0 && !strcmp(name, codes[code])) ((uint64_t *)(comms[comm] + at[3]))[code]++;
      }
    } else if (sscanf(line, "number %d", &times) == 1) {
      for (int i = 0; i < 10; i++)
        if (at[3] >= 0) ((uint64_t *)(comms[i / 5] + at[3]))[i % 5] = times;
    } else if (!strcmp(line, "init\n")) {
      unique_id id;
      void *made = NULL;
      ((int (*)(unique_id *))dlsym(library, "ncclGetUniqueId"))(&id);
      ((int (*)(void **, int, unique_id, int))dlsym(library, "ncclCommInitRank"))(&made, 2, id, 0);
    }
    puts("done");
  }
  return 0;
}
