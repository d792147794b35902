// SPDX-License-Identifier: Apache-2.0
// The shared memory of one communicator of the stand-in libnccl: where its ranks meet, and where each writes when it arrived at
// its n-th collective. `libnccl.c` makes one such segment per communicator, named after its hash; `job.c` reads the arrivals out of
// it, which are the truth that it prints. Arrivals stand in a ring of `SIM_RING` collectives: as long as nobody collects, old ones
// are overwritten; once a collector has said that it is there, a rank that is a ring ahead of it waits.
#pragma once
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define SIM_RANKS 128
#define SIM_RING 4096
#define SIM_SEQUENCES 5

// NCCL's codes of its functions. Those from 8 on are of 2.28, those of signals of 2.29; before, a library has no such exports.
enum {
  BROADCAST,
  REDUCE,
  ALL_GATHER,
  REDUCE_SCATTER,
  ALL_REDUCE,
  SEND_RECV,
  SEND,
  RECV,
  ALL_TO_ALL,
  SCATTER,
  GATHER,
  ALL_GATHER_V,  // NCCL's own, which nobody calls
  PUT_SIGNAL,
  SIGNAL,
  WAIT_SIGNAL,
  OPERATIONS
};

static inline int sim_is_collective(int operation) {
  return operation < SEND_RECV || (operation >= ALL_TO_ALL && operation <= GATHER);
}

enum { INIT_TOTAL, INIT_BOOTSTRAP, INIT_ALLOC, INIT_TRANSPORTS, INIT_PHASES };

struct sim_rank {
  _Atomic uint64_t arrivals;  // collectives that it has called
  _Atomic uint64_t sends, receives;
  uint64_t host;
  uint64_t init[INIT_PHASES];  // nanoseconds
  int32_t color, key;
  int32_t local_rank, local_ranks;
  int32_t pid, tid;
};

struct sim_segment {
  uint32_t ranks;
  _Atomic uint32_t joined;
  _Atomic uint32_t collector;   // somebody collects the arrivals
  _Atomic uint64_t collected;   // how many collectives it has collected
  _Atomic uint32_t on_device;   // devices that have come to the collective that is next
  _Atomic uint32_t ready;       // collectives that all devices have come to
  _Atomic uint32_t at_gate, gate;
  struct sim_rank rank[SIM_RANKS];
  _Atomic uint64_t arrival[SIM_RING * SIM_RANKS];  // CLOCK_MONOTONIC in nanoseconds, 0: not yet
  uint8_t operation[SIM_RING * SIM_RANKS];
};

static inline uint64_t sim_cell(uint64_t n, int rank) { return n % SIM_RING * SIM_RANKS + rank; }

static inline void sim_name(char name[32], uint64_t hash) { snprintf(name, 32, "/nccl-sim.%016lx", (unsigned long)hash); }

static inline uint64_t sim_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static inline void sim_sleep(long microseconds) {
  if (microseconds <= 0) return;
  struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};
  nanosleep(&time, NULL);
}
