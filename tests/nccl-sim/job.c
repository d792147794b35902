// SPDX-License-Identifier: Apache-2.0
// A job of N ranks that call NCCL, and that knows when each of them did: `job [options]`. Each rank is a process that loads the
// library, makes communicators and runs collectives in a loop; the first process only watches, and prints the truth as lines of
// JSON. It needs the stand-in (`libnccl.c`), which writes the time at which each function was entered into shared memory.
//
//   --library PATH        what the ranks load (libnccl.so.2)
//   --ranks N             up to 128 (8); --threads: as threads of one process
//   --cgroup PATH         a cgroup that each rank moves into before it loads the library; %d in it is the rank
//   --hosts H             ranks say that they are on H hosts, in equal blocks (not with --threads)
//   --communicators M     1: the world; 2: and one by a second unique id; 3: the world, and one each of the even and the odd ranks;
//                         4: those three and one by a second unique id; 5: and one by two ids (ncclCommInitRankScalable); 6: and a
//                         split that the upper half of the ranks is not in; 7: and a shrink without the last rank; from 8: more
//   --grow N              the last N ranks are not in the first communicator; the second is that, grown by them (ncclCommGrow)
//   --init HOW            how the world is made: rank (default), config, scalable, group, all (by one thread; needs --threads)
//   --blocking 0          communicators that are made do not wait for their init; the ranks ask until it is done
//   --init-delay-rank R --init-delay-us D   this rank comes later to its first init
//   --collectives K       by each communicator (100); --forever: without an end
//   --kinds LIST          all (default), or names such as all_reduce,broadcast,send_recv; put_signal is with signal and wait_signal, and
//                         not among all; each other all_to_all is ncclAllToAllv where the library has that
//   --groups 0            no groups; else every third step is a group over communicators and every fifth one of two or three
//                         collectives of the same communicator
//   --interval-us I       each rank sleeps that long before each step (1000)
//   --straggler R --delay-us D              this rank sleeps longer before each step; with --on-signal from SIGUSR1 to SIGUSR2
//   --random-us R --seed S                  each rank sleeps up to that long before each step
//   --sync-every S        steps between waits for the streams (1)
//   --drop R --drop-at K --drop-how stop|exit|abort   this rank leaves after K collectives of each communicator: it sleeps for
//                         ever, or exits, or, with abort, sleeps while a watchdog of each rank aborts its communicators after --abort-after-ms (1000); the job
//                         says `left` once a rank has left, also where it was killed from outside
//   --end destroy|abort|exit                what the ranks do with their communicators at the end (destroy)
//   --hold SECONDS        how long they live on before; where a rank has left, how long the rest hangs (1)
//   --wait                says `ready` after the inits, and `done` after the truth, and waits for a line on its input each time
//   --forever             says `ready` and runs; on a line `mark` all ranks come to the same step and their streams are empty, the
//                         truth begins anew, it says `marked`, and they go on; on `stop` (or the end of its input) they come to the
//                         same step, it prints the truth, says `done`, and waits for one more line
//
// Lines are of type `job` (one), `communicator` and `rank` (of a communicator). A wait is the time from a rank's arrival at a
// collective until the arrival of the last of ALL ranks of the communicator, arrival being the entry into the function; the last
// arriver's is zero and counts. `histogram` are numbers of waits up to each of `bounds` (not cumulated, the last without a bound).
// `unpaired` are collectives that the rank came to and another one never did: they have no waits. `calls` and `call_seconds` are
// the caller's own, from before the call until after it; by operation they count both `ncclBcast` and `ncclBroadcast` as broadcast.
// `sequence` is what stands in the object of the communicator, by NCCL's code of the function, since its init.
#define _GNU_SOURCE
#include "sim.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOTS 16
#define COMMUNICATORS 32
#define BUCKETS 13

typedef struct {
  char internal[128];
} unique_id;
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking, cga, min_ctas, max_ctas;
  const char *net;
  int split_share, traffic_class;
  const char *name;
  int collnet, cta_policy, shrink_share, nvls_ctas;
} config;
struct sim_comm {
  uint64_t hash, sequence[SIM_SEQUENCES];
  int has_sequence;
};

static const char *const names[OPERATIONS] = {"broadcast", "reduce", "all_gather", "reduce_scatter", "all_reduce", "send_recv",
                                              "send",      "recv",   "all_to_all", "scatter",        "gather",
                                              "all_gather_v", "put_signal", "signal", "wait_signal"};

static struct {
  const char *library, *cgroup, *init, *drop_how, *end;
  int ranks, threads, hosts, communicators, grow, blocking, init_delay_rank, straggler, drop, groups, sync_every, wait, forever, on_signal;
  long collectives, init_delay, interval, delay, random, seed, drop_at, hold, abort_after;
  bool kinds[OPERATIONS];
} options = {.library = "libnccl.so.2", .init = "rank", .drop_how = "stop", .end = "destroy", .ranks = 8, .hosts = 1,
             .communicators = 1, .blocking = 1, .init_delay_rank = -1, .straggler = -1, .drop = -1, .groups = 1, .sync_every = 1,
             .collectives = 100, .interval = 1000, .seed = 1, .hold = -1, .abort_after = 1000};

static struct {
  void *library;
  int (*GetVersion)(int *), (*GetUniqueId)(unique_id *), (*CommInitRank)(void **, int, unique_id, int),
      (*CommInitRankConfig)(void **, int, unique_id, int, config *),
      (*CommInitRankScalable)(void **, int, int, int, unique_id *, config *), (*CommInitAll)(void **, int, const int *),
      (*CommSplit)(void *, int, int, void **, config *), (*CommShrink)(void *, int *, int, void **, config *, int),
      (*CommGetUniqueId)(void *, unique_id *), (*CommGrow)(void *, int, const unique_id *, int, void **, config *),
      (*CommFinalize)(void *), (*CommDestroy)(void *), (*CommAbort)(void *), (*CommGetAsyncError)(void *, int *),
      (*CommCount)(void *, int *), (*CommUserRank)(void *, int *), (*GroupStart)(void), (*GroupEnd)(void),
      (*AllReduce)(const void *, void *, size_t, int, int, void *, void *),
      (*ReduceScatter)(const void *, void *, size_t, int, int, void *, void *),
      (*AllGather)(const void *, void *, size_t, int, void *, void *),
      (*Broadcast)(const void *, void *, size_t, int, int, void *, void *), (*Bcast)(void *, size_t, int, int, void *, void *),
      (*Reduce)(const void *, void *, size_t, int, int, int, void *, void *),
      (*AlltoAll)(const void *, void *, size_t, int, void *, void *),
      (*Gather)(const void *, void *, size_t, int, int, void *, void *),
      (*Scatter)(const void *, void *, size_t, int, int, void *, void *), (*Send)(const void *, size_t, int, int, void *, void *),
      (*Recv)(void *, size_t, int, int, void *, void *),
      (*AllToAllv)(const void *, const size_t *, const size_t *, void *, const size_t *, const size_t *, int, void *, void *),
      (*PutSignal)(const void *, size_t, int, int, void *, size_t, int, int, unsigned, void *, void *),
      (*Signal)(int, int, int, unsigned, void *, void *), (*WaitSignal)(int, void *, void *, void *), (*synchronize)(void *), (*set_device)(int);
  void (*read)(void *, struct sim_comm *);
} nccl;

enum { RUNNING, READY, PAUSED, FINISHED, DROPPED, ENDED, DEAD };

struct slot {
  struct sim_comm comm;
  int rank;
  uint64_t init;  // nanoseconds in the call, and until it was done where that does not block
  struct {
    uint64_t calls, nanoseconds;
  } by[OPERATIONS];
};

struct rank_state {
  _Atomic int state;
  _Atomic uint64_t step;
  int pid, tid, slots;
  bool left;
  _Atomic uint64_t errors;
  struct slot slot[SLOTS];
};

static struct shared {
  _Atomic uint32_t go, freeze, abort;
  _Atomic uint64_t target;
  _Atomic int leave, ids_ready, all_ready, grow_ready;
  int version;
  unique_id ids[SLOTS][2];
  void *all[SIM_RANKS];
  struct rank_state rank[SIM_RANKS];
} *shared;

static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("job: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(1);
}

// A rank.

struct rank {
  int number, count;
  struct rank_state *state;
  void *comm[SLOTS];
  int made_as[SLOTS];  // the number of each among the communicators of the job
  uint64_t random;
  uint32_t seen;
};

static void wait_for_go(struct rank *rank, int state) {
  atomic_store(&rank->state->state, state);
  while (atomic_load(&shared->go) == rank->seen)
    syscall(SYS_futex, &shared->go, FUTEX_WAIT, rank->seen, &(struct timespec){1, 0}, NULL, 0);
  rank->seen++;
}

static int polled(int result, void *comm) {
  while (result == 7) {
    sim_sleep(500);
    nccl.CommGetAsyncError(comm, &result);
  }
  return result;
}

static void made(struct rank *rank, int m, int result, void *comm, uint64_t since) {
  if (result) fail("rank %d: an init says %d", rank->number, result);
  if (!comm) return;
  struct slot *slot = &rank->state->slot[rank->count];
  slot->init = sim_now() - since;
  nccl.read(comm, &slot->comm);
  nccl.CommUserRank(comm, &slot->rank);
  rank->made_as[rank->count] = m;
  rank->comm[rank->count++] = comm;
  rank->state->slots = rank->count;
}

// Communicator number `m` of the options, or what this rank has of it.
static void make(struct rank *rank, int m) {
  int ranks = options.ranks, number = rank->number;
  config config = {sizeof config, 0xcafebeef, shared->version, options.blocking, INT_MIN, INT_MIN, INT_MIN, NULL, INT_MIN,
                   INT_MIN,       NULL,       INT_MIN,         INT_MIN,          INT_MIN, INT_MIN};
  const char *how = "config";
  void *comm = NULL;
  uint64_t since = sim_now();
  int result;
  if (m == 0) {
    how = options.blocking ? options.init : "config";
    ranks -= options.grow;
    if (number >= ranks) return;
  } else if (options.grow && m == 1) {
    void *parent = rank->count ? rank->comm[0] : NULL;
    if (parent && number == 0) {
      nccl.CommGetUniqueId(parent, &shared->ids[m][0]);
      atomic_store(&shared->grow_ready, 1);
    }
    while (!atomic_load(&shared->grow_ready)) sim_sleep(500);
    result = parent ? nccl.CommGrow(parent, ranks, NULL, -1, &comm, options.blocking ? NULL : &config)
                    : nccl.CommGrow(NULL, ranks, &shared->ids[m][0], number, &comm, &config);
    result = polled(result, comm);
    return made(rank, m, result, comm, since);
  } else if (options.communicators >= 3 && m == 1) {
    result = nccl.CommSplit(rank->comm[0], number % 2, ranks - number, &comm, options.blocking ? NULL : &config);
    result = polled(result, rank->comm[0]);  // until then a child is NULL
    return made(rank, m, result, comm, since);
  } else if (options.communicators >= 3 && m == 2) {
    return;  // the other half of that split
  } else if (m == 4) {
    how = "scalable";
  } else if (m == 5) {
    result = nccl.CommSplit(rank->comm[0], number < (ranks + 1) / 2 ? 7 : -1, number, &comm, NULL);
    result = polled(result, rank->comm[0]);  // until then a child is NULL
    return made(rank, m, result, comm, since);
  } else if (m == 6) {
    int last = ranks - 1;
    if (number == last || ranks == 1) return;
    result = nccl.CommShrink(rank->comm[0], &last, 1, &comm, NULL, 0);
    result = polled(result, rank->comm[0]);  // until then a child is NULL
    return made(rank, m, result, comm, since);
  }
  if (!strcmp(how, "all")) {
    if (number == 0) {
      int devices[SIM_RANKS];
      for (int i = 0; i < ranks; i++) devices[i] = i;
      result = nccl.CommInitAll(shared->all, ranks, devices);
      if (result) fail("ncclCommInitAll says %d", result);
      atomic_store(&shared->all_ready, 1);
    }
    while (!atomic_load(&shared->all_ready)) sim_sleep(500);
    return made(rank, m, 0, shared->all[number], since);
  }
  if (!strcmp(how, "scalable")) {
    result = nccl.CommInitRankScalable(&comm, ranks, number, 2, shared->ids[m], &config);
  } else if (!strcmp(how, "config")) {
    result = nccl.CommInitRankConfig(&comm, ranks, shared->ids[m][0], number, &config);
  } else if (!strcmp(how, "group")) {
    nccl.GroupStart();
    nccl.CommInitRank(&comm, ranks, shared->ids[m][0], number);
    result = nccl.GroupEnd();
  } else {
    result = nccl.CommInitRank(&comm, ranks, shared->ids[m][0], number);
  }
  result = polled(result, comm);
  made(rank, m, result, comm, since);
}

static uint64_t next_random(struct rank *rank) {
  rank->random ^= rank->random << 13;
  rank->random ^= rank->random >> 7;
  return rank->random ^= rank->random << 17;
}

// Whether it went well.
static bool call(struct rank *rank, int slot, int operation, bool other_name, int peer) {
  static char buffer[64];
  void *comm = rank->comm[slot];
  int result = 0;
  size_t count = 1 << 20;
  uint64_t begin = sim_now();
  switch (operation) {
    case BROADCAST:
      if (other_name) result = nccl.Bcast(buffer, count, 7, 0, comm, comm);
      else result = nccl.Broadcast(buffer, buffer, count, 7, 0, comm, comm);
      break;
    case REDUCE: result = nccl.Reduce(buffer, buffer, count, 7, 0, 0, comm, comm); break;
    case ALL_GATHER: result = nccl.AllGather(buffer, buffer, count, 7, comm, comm); break;
    case REDUCE_SCATTER: result = nccl.ReduceScatter(buffer, buffer, count, 7, 0, comm, comm); break;
    case ALL_REDUCE: result = nccl.AllReduce(buffer, buffer, count, 7, 0, comm, comm); break;
    case ALL_TO_ALL:
      if (nccl.AllToAllv && rank->state->slot[slot].by[operation].calls % 2)
        result = nccl.AllToAllv(buffer, &count, &count, buffer, &count, &count, 7, comm, comm);
      else result = nccl.AlltoAll(buffer, buffer, count, 7, comm, comm);
      break;
    case SCATTER: result = nccl.Scatter(buffer, buffer, count, 7, 0, comm, comm); break;
    case GATHER: result = nccl.Gather(buffer, buffer, count, 7, 0, comm, comm); break;
    case SEND: result = nccl.Send(buffer, count, 7, peer, comm, comm); break;
    case RECV: result = nccl.Recv(buffer, count, 7, peer, comm, comm); break;
    case PUT_SIGNAL: result = nccl.PutSignal(buffer, count, 7, peer, NULL, 0, 0, 0, 0, comm, comm); break;
    case SIGNAL: result = nccl.Signal(peer, 0, 0, 0, comm, comm); break;
    case WAIT_SIGNAL: result = nccl.WaitSignal(0, NULL, comm, comm); break;
  }
  uint64_t took = sim_now() - begin;
  struct slot *of = &rank->state->slot[slot];
  of->by[operation].calls++;
  of->by[operation].nanoseconds += took;
  if (result) rank->state->errors++;
  return !result;
}

static bool collective(struct rank *rank, int slot, uint64_t n) {
  static const int kinds[] = {ALL_REDUCE, ALL_GATHER, BROADCAST, REDUCE_SCATTER, ALL_REDUCE, REDUCE,
                              ALL_TO_ALL, BROADCAST,  GATHER,    ALL_REDUCE,     SCATTER};
  int count = sizeof kinds / sizeof *kinds, i = n % count;
  while (!options.kinds[kinds[i]]) i = (i + 1) % count;
  return call(rank, slot, kinds[i], i == 7, 0);
}

static volatile sig_atomic_t is_late;

static void become(int signal) {
  is_late = signal == SIGUSR1;
}

static void pause_before(struct rank *rank) {
  bool late = rank->number == options.straggler && (!options.on_signal || is_late);
  sim_sleep(options.interval + (late ? options.delay : 0));
  if (options.random) sim_sleep(next_random(rank) % (options.random + 1));
}

static bool synchronize(struct rank *rank) {
  bool well = true;
  for (int slot = 0; slot < rank->count; slot++) well &= !nccl.synchronize(rank->comm[slot]);
  return well;
}

static void note(struct rank *rank) {
  for (int slot = 0; slot < rank->count; slot++) nccl.read(rank->comm[slot], &rank->state->slot[slot].comm);
}

static bool some_collective(void) {
  for (int i = 0; i < OPERATIONS; i++)
    if (sim_is_collective(i) && options.kinds[i]) return true;
  return false;
}

// How many collectives of each communicator step number `step` has: the same in all ranks.
static uint64_t of_step(uint64_t step, uint64_t done) {
  uint64_t count = options.groups && step % 5 == 4 ? 2 + step % 2 : 1;
  uint64_t left = options.forever ? ~0ull : options.collectives - done;
  if (options.drop >= 0 && done < options.drop_at && options.drop_at - done < left) left = options.drop_at - done;
  return count < left ? count : left;
}

// One step. False once a communicator has been aborted.
static bool step(struct rank *rank, uint64_t number, uint64_t done, uint64_t count) {
  bool well = true, over_all = options.groups && number % 3 == 2;
  if (options.kinds[SEND_RECV] && (number % 4 == 1 || !some_collective())) {
    int ranks = options.ranks;
    nccl.GroupStart();
    well &= call(rank, 0, SEND, false, (rank->number + 1) % ranks);
    well &= call(rank, 0, RECV, false, (rank->number + ranks - 1) % ranks);
    nccl.GroupEnd();
  }
  if (options.kinds[PUT_SIGNAL]) {
    int next = (rank->number + 1) % options.ranks;
    well &= call(rank, 0, PUT_SIGNAL, false, next) && call(rank, 0, WAIT_SIGNAL, false, 0);
    if (number % 2) well &= call(rank, 0, SIGNAL, false, next);
  }
  if (!some_collective()) return pause_before(rank), well;
  if (over_all) {
    pause_before(rank);
    nccl.GroupStart();
  }
  for (int slot = 0; slot < rank->count; slot++) {
    if (!over_all) pause_before(rank);
    if (count > 1) nccl.GroupStart();
    for (uint64_t i = 0; i < count; i++) well &= collective(rank, slot, done + i + rank->made_as[slot]);
    if (count > 1) nccl.GroupEnd();
  }
  if (over_all) nccl.GroupEnd();
  return well;
}

// Aborts the communicators of its rank once it is told to.
static void *watchdog(void *argument) {
  struct rank *rank = argument;
  while (!atomic_load(&shared->abort))
    syscall(SYS_futex, &shared->abort, FUTEX_WAIT, 0, &(struct timespec){1, 0}, NULL, 0);
  for (int slot = 0; slot < rank->count; slot++) nccl.CommAbort(rank->comm[slot]);
  return NULL;
}

static void load(void) {
  if (nccl.library) return;
  nccl.library = dlopen(options.library, RTLD_NOW);
  if (!nccl.library) fail("%s", dlerror());
#define LOAD(field, symbol) \
  if (!(nccl.field = (__typeof__(nccl.field))dlsym(nccl.library, symbol))) fail("no %s", symbol)
#define NCCL(name) LOAD(name, "nccl" #name)
  NCCL(GetVersion); NCCL(GetUniqueId); NCCL(CommInitRank); NCCL(CommInitRankConfig); NCCL(CommInitRankScalable);
  NCCL(CommInitAll); NCCL(CommSplit); NCCL(CommShrink); NCCL(CommFinalize); NCCL(CommDestroy); NCCL(CommAbort);
  NCCL(CommGetAsyncError); NCCL(CommCount); NCCL(CommUserRank); NCCL(GroupStart); NCCL(GroupEnd); NCCL(AllReduce);
  NCCL(ReduceScatter); NCCL(AllGather); NCCL(Broadcast); NCCL(Bcast); NCCL(Reduce); NCCL(Gather);
  NCCL(Scatter); NCCL(Send); NCCL(Recv); NCCL(CommGetUniqueId); NCCL(CommGrow); NCCL(PutSignal); NCCL(Signal); NCCL(WaitSignal);
  // RCCL's.
  nccl.AllToAllv = (__typeof__(nccl.AllToAllv))dlsym(nccl.library, "ncclAllToAllv");
  LOAD(AlltoAll, nccl.AllToAllv ? "ncclAllToAll" : "ncclAlltoAll");
  LOAD(synchronize, "cudaStreamSynchronize");
  LOAD(set_device, "cudaSetDevice");
  LOAD(read, "sim_read");
}

static void join_cgroup(int rank) {
  char path[4096];
  const char *at = strstr(options.cgroup, "%d");
  if (at) snprintf(path, sizeof path, "%.*s%d%s/cgroup.procs", (int)(at - options.cgroup), options.cgroup, rank, at + 2);
  else snprintf(path, sizeof path, "%s/cgroup.procs", options.cgroup);
  int file = open(path, O_WRONLY);
  if (file < 0 || dprintf(file, "%d\n", getpid()) < 0) fail("%s: %m", path);
  close(file);
}

static void *run(void *argument) {
  struct rank *rank = argument;
  struct rank_state *state = rank->state;
  int number = rank->number;
  state->pid = getpid();
  state->tid = syscall(SYS_gettid);
  rank->random = (options.seed * 0x9e3779b97f4a7c15ull) ^ (number + 1) * 0xd1342543de82ef95ull;
  nccl.set_device(number);
  if (number == 0) {
    nccl.GetVersion(&shared->version);
    for (int m = 0; m < SLOTS; m++) nccl.GetUniqueId(&shared->ids[m][0]), nccl.GetUniqueId(&shared->ids[m][1]);
    atomic_store(&shared->ids_ready, 1);
  }
  while (!atomic_load(&shared->ids_ready)) sim_sleep(500);
  if (number == options.init_delay_rank) sim_sleep(options.init_delay);
  for (int m = 0; m < options.communicators; m++) make(rank, m);
  pthread_t aborts;
  bool drops = options.drop >= 0, watched = drops && !strcmp(options.drop_how, "abort");
  if (watched && pthread_create(&aborts, NULL, watchdog, rank)) fail("no thread");
  wait_for_go(rank, READY);

  uint64_t done = 0;
  bool well = true;
  for (uint64_t i = 0; well; i++) {
    atomic_store(&state->step, i);
    while (atomic_load(&shared->freeze)) sim_sleep(500);
    if (i == atomic_load(&shared->target)) {
      synchronize(rank);
      note(rank);
      wait_for_go(rank, PAUSED);
      if (atomic_load(&shared->leave)) break;
    }
    if (!options.forever && done >= options.collectives) break;
    if (number == options.drop && done >= options.drop_at) {
      state->left = true;
      atomic_store(&state->state, DROPPED);
      if (!strcmp(options.drop_how, "exit")) {
        if (options.threads) pthread_exit(NULL);
        _exit(0);
      }
      while (!watched) pause();
      pthread_join(aborts, NULL);
      goto end;
    }
    uint64_t count = of_step(i, done);
    well = step(rank, i, done, count);
    done += count;
    note(rank);
    if ((i + 1) % options.sync_every == 0) well &= synchronize(rank);
  }
  if (well) well = synchronize(rank);
  note(rank);
end:
  wait_for_go(rank, FINISHED);
  for (int slot = rank->count; slot-- && !watched;) {
    if (!strcmp(options.end, "destroy")) {
      nccl.CommFinalize(rank->comm[slot]);
      nccl.CommDestroy(rank->comm[slot]);
    } else if (!strcmp(options.end, "abort")) {
      nccl.CommAbort(rank->comm[slot]);
    }
  }
  atomic_store(&state->state, ENDED);
  return NULL;
}

static struct rank new_rank(int number) { return (struct rank){.number = number, .state = &shared->rank[number]}; }

static void child(int first, int count) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  int null = open("/dev/null", O_RDWR);
  dup2(null, 0);
  dup2(null, 1);
  if (options.cgroup) join_cgroup(first);
  if (options.hosts > 1) {
    char host[32];
    snprintf(host, sizeof host, "host-%d", first * options.hosts / options.ranks);
    setenv("SIM_HOST", host, 1);
  }
  load();
  struct rank ranks[SIM_RANKS];
  pthread_t threads[SIM_RANKS];
  for (int i = 0; i < count; i++) {
    ranks[i] = new_rank(first + i);
    if (count == 1) run(&ranks[i]);
    else if (pthread_create(&threads[i], NULL, run, &ranks[i])) fail("no thread");
  }
  for (int i = 0; i < count && count > 1; i++) pthread_join(threads[i], NULL);
  _exit(0);
}

// The first process.

struct communicator {
  uint64_t hash, collected, mismatched, skew, longest;
  struct sim_segment *segment;
  struct {
    struct {
      uint64_t count, wait, last;
    } by[OPERATIONS];
    uint64_t histogram[BUCKETS], sends, receives;
  } rank[SIM_RANKS];
};
static struct communicator *communicators;
static int count_of_communicators;

static uint64_t bound(int bucket) { return 4000ull << 2 * bucket; }

// Takes what all ranks have arrived at out of the ring.
static void collect(void) {
  for (int c = 0; c < count_of_communicators; c++) {
    struct communicator *comm = &communicators[c];
    struct sim_segment *segment = comm->segment;
    int ranks = segment->ranks;
    for (;; comm->collected++) {
      uint64_t n = comm->collected, least = ~0ull, most = 0;
      int last = 0, complete = 0;
      for (; complete < ranks && atomic_load(&segment->rank[complete].arrivals) > n; complete++) {
        uint64_t at = atomic_load(&segment->arrival[sim_cell(n, complete)]);
        if (at < least) least = at;
        if (at > most) most = at, last = complete;
      }
      if (complete < ranks) break;
      for (int rank = 0; rank < ranks; rank++) {
        int operation = segment->operation[sim_cell(n, rank)], bucket = 0;
        uint64_t wait = most - atomic_load(&segment->arrival[sim_cell(n, rank)]);
        if (operation != segment->operation[sim_cell(n, 0)]) comm->mismatched++;
        while (bucket < BUCKETS - 1 && wait > bound(bucket)) bucket++;
        comm->rank[rank].by[operation].count++;
        comm->rank[rank].by[operation].wait += wait;
        comm->rank[rank].by[operation].last += rank == last;
        comm->rank[rank].histogram[bucket]++;
      }
      comm->skew += most - least;
      if (most - least > comm->longest) comm->longest = most - least;
    }
    atomic_store(&segment->collected, comm->collected);
  }
}

static void find(uint64_t hash) {
  for (int c = 0; c < count_of_communicators; c++)
    if (communicators[c].hash == hash) return;
  if (count_of_communicators == COMMUNICATORS) fail("too many communicators");
  struct communicator *comm = &communicators[count_of_communicators++];
  char name[32];
  sim_name(name, hash);
  int file = shm_open(name, O_RDWR, 0);
  if (file < 0) fail("%s: %m", name);
  shm_unlink(name);
  comm->hash = hash;
  comm->segment = mmap(NULL, sizeof *comm->segment, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (comm->segment == MAP_FAILED) fail("%s: %m", name);
  close(file);
  atomic_store(&comm->segment->collector, 1);
}

// Forgets what was until now. All ranks are at the same step.
static void reset(void) {
  collect();
  for (int c = 0; c < count_of_communicators; c++) {
    struct communicator *comm = &communicators[c];
    comm->mismatched = comm->skew = comm->longest = 0;
    memset(comm->rank, 0, sizeof comm->rank);
    for (int rank = 0; rank < comm->segment->ranks; rank++) {
      comm->rank[rank].sends = comm->segment->rank[rank].sends;
      comm->rank[rank].receives = comm->segment->rank[rank].receives;
    }
  }
  for (int rank = 0; rank < options.ranks; rank++)
    for (int slot = 0; slot < SLOTS; slot++) memset(shared->rank[rank].slot[slot].by, 0, sizeof shared->rank[rank].slot[slot].by);
}

static double seconds(uint64_t nanoseconds) { return nanoseconds / 1e9; }

static void print_rank(struct communicator *comm, int rank) {
  struct sim_rank *there = &comm->segment->rank[rank];
  struct slot *slot = NULL;
  int of = -1;
  for (int r = 0; r < options.ranks && !slot; r++)
    for (int s = 0; s < shared->rank[r].slots && !slot; s++)
      if (shared->rank[r].slot[s].comm.hash == comm->hash && shared->rank[r].slot[s].rank == rank)
        slot = &shared->rank[r].slot[s], of = r;
  if (!slot) return;
  uint64_t count = 0, wait = 0, last = 0;
  for (int i = 0; i < OPERATIONS; i++) {
    count += comm->rank[rank].by[i].count;
    wait += comm->rank[rank].by[i].wait;
    last += comm->rank[rank].by[i].last;
  }
  printf("{\"type\":\"rank\",\"communicator\":\"%016lx\",\"rank\":%d,\"nranks\":%u,\"local_rank\":%d,\"local_ranks\":%d,"
         "\"job_rank\":%d,\"pid\":%d,\"tid\":%d,\"collectives\":%lu,\"wait_seconds\":%.9f,\"last_arrivals\":%lu,\"unpaired\":%lu,",
         comm->hash, rank, comm->segment->ranks, there->local_rank, there->local_ranks, of, shared->rank[of].pid,
         shared->rank[of].tid, count, seconds(wait), last, there->arrivals - comm->collected);
  printf("\"sends\":%lu,\"receives\":%lu,\"histogram\":[", there->sends - comm->rank[rank].sends,
         there->receives - comm->rank[rank].receives);
  for (int i = 0; i < BUCKETS; i++) printf("%s%lu", i ? "," : "", comm->rank[rank].histogram[i]);
  printf("],\"by_operation\":{");
  bool first = true;
  for (int i = 0; i < OPERATIONS; i++) {
    if (!slot->by[i].calls && !comm->rank[rank].by[i].count) continue;
    printf("%s\"%s\":{\"calls\":%lu,\"call_seconds\":%.9f,\"collectives\":%lu,\"wait_seconds\":%.9f,\"last_arrivals\":%lu}",
           first ? "" : ",", names[i], slot->by[i].calls, seconds(slot->by[i].nanoseconds), comm->rank[rank].by[i].count,
           seconds(comm->rank[rank].by[i].wait), comm->rank[rank].by[i].last);
    first = false;
  }
  printf("},\"init\":{\"call_seconds\":%.9f,\"total_seconds\":%.9f,\"bootstrap_seconds\":%.9f,\"alloc_seconds\":%.9f,"
         "\"transports_seconds\":%.9f},\"sequence\":",
         seconds(slot->init), seconds(there->init[INIT_TOTAL]), seconds(there->init[INIT_BOOTSTRAP]),
         seconds(there->init[INIT_ALLOC]), seconds(there->init[INIT_TRANSPORTS]));
  if (!slot->comm.has_sequence) printf("null}\n");
  for (int i = 0; i < SIM_SEQUENCES && slot->comm.has_sequence; i++)
    printf("%s%lu%s", i ? "," : "[", slot->comm.sequence[i], i == SIM_SEQUENCES - 1 ? "]}\n" : "");
}

static void print_truth(void) {
  collect();
  uint64_t errors = 0, left = 0;
  for (int rank = 0; rank < options.ranks; rank++) {
    errors += shared->rank[rank].errors;
    left += shared->rank[rank].left || shared->rank[rank].state == DEAD;
  }
  printf("{\"type\":\"job\",\"version\":%d,\"ranks\":%d,\"communicators\":%d,\"ranks_left\":%lu,\"errors\":%lu,\"bounds\":[",
         shared->version, options.ranks, count_of_communicators, left, errors);
  for (int i = 0; i < BUCKETS - 1; i++) printf("%s%.6f", i ? "," : "", seconds(bound(i)));
  printf("]}\n");
  for (int c = 0; c < count_of_communicators; c++) {
    struct communicator *comm = &communicators[c];
    uint64_t count = 0;
    for (int i = 0; i < OPERATIONS; i++) count += comm->rank[0].by[i].count;
    printf("{\"type\":\"communicator\",\"communicator\":\"%016lx\",\"nranks\":%u,\"collectives\":%lu,\"skew_seconds\":%.9f,"
           "\"longest_skew_seconds\":%.9f,\"mismatched\":%lu}\n",
           comm->hash, comm->segment->ranks, count, seconds(comm->skew), seconds(comm->longest), comm->mismatched);
    for (int rank = 0; rank < comm->segment->ranks; rank++) print_rank(comm, rank);
  }
  fflush(stdout);
}

static void say(const char *what) {
  puts(what);
  fflush(stdout);
}

static pid_t children[SIM_RANKS];

static void tick(void) {
  for (pid_t pid; (pid = waitpid(-1, NULL, WNOHANG)) > 0;)
    for (int rank = 0; rank < options.ranks; rank++) {
      struct rank_state *state = &shared->rank[rank];
      if (children[options.threads ? 0 : rank] == pid && state->state != DROPPED && state->state != ENDED) state->state = DEAD;
    }
  collect();
  sim_sleep(2000);
}

// Whether any rank has left, and whether all others are there.
static bool all_at(int wanted, bool *left) {
  bool all = true;
  *left = false;
  for (int rank = 0; rank < options.ranks; rank++) {
    int state = shared->rank[rank].state;
    if (state == DROPPED || state == DEAD) *left = true;
    else if (state != wanted) all = false;
  }
  return all;
}

static void wake(_Atomic uint32_t *word) {
  atomic_fetch_add(word, 1);
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void kill_all(void) {
  for (int i = 0; i < options.ranks; i++)
    if (children[i]) kill(children[i], SIGKILL);
  while (wait(NULL) > 0) continue;
}

// A line of the input, while the job runs. Empty at its end; NULL if there is none yet and it does not wait.
static const char *line(bool waits) {
  static char buffer[256];
  static size_t used, taken;
  memmove(buffer, buffer + taken, used -= taken);
  taken = 0;
  for (;;) {
    char *end = memchr(buffer, '\n', used);
    if (end) {
      *end = 0;
      taken = end - buffer + 1;
      return buffer;
    }
    struct pollfd input = {0, POLLIN, 0};
    if (poll(&input, 1, 0) > 0) {
      ssize_t got = read(0, buffer + used, sizeof buffer - used);
      if (got <= 0) return "";
      used += got;
    } else if (!waits) {
      return NULL;
    } else {
      tick();
    }
  }
}

// Brings all ranks to the same step, where they wait. A rank that has not seen `freeze` at its step is at most one further when
// it does, so none is past the step that is chosen. False if a rank has left.
static bool rendezvous(void) {
  atomic_store(&shared->freeze, 1);
  uint64_t most = 0;
  for (int rank = 0; rank < options.ranks; rank++) {
    uint64_t step = atomic_load(&shared->rank[rank].step);
    if (step > most) most = step;
  }
  atomic_store(&shared->target, most + 2);
  atomic_store(&shared->freeze, 0);
  bool left;
  while (!all_at(PAUSED, &left)) {
    if (left) return false;
    tick();
  }
  return !left;
}

static long number(const char *option, const char *value) {
  char *end;
  long number = value ? strtol(value, &end, 10) : 0;
  if (!value || !*value || *end || number < 0) fail("%s wants a number", option);
  return number;
}

static void parse(int count, char **arguments) {
  const char *kinds = "all";
  for (int i = 1; i < count; i++) {
    const char *name = arguments[i], *value = i + 1 < count ? arguments[i + 1] : NULL;
    bool takes = true;
#define TEXT(option, field) else if (!strcmp(name, option)) field = value
#define NUMBER(option, field) else if (!strcmp(name, option)) options.field = number(name, value)
#define FLAG(option, field) else if (!strcmp(name, option)) options.field = 1, takes = false
    if (0) continue;
    TEXT("--library", options.library);
    TEXT("--cgroup", options.cgroup);
    TEXT("--init", options.init);
    TEXT("--kinds", kinds);
    TEXT("--drop-how", options.drop_how);
    TEXT("--end", options.end);
    NUMBER("--ranks", ranks);
    NUMBER("--hosts", hosts);
    NUMBER("--communicators", communicators);
    NUMBER("--grow", grow);
    NUMBER("--blocking", blocking);
    NUMBER("--init-delay-rank", init_delay_rank);
    NUMBER("--init-delay-us", init_delay);
    NUMBER("--collectives", collectives);
    NUMBER("--groups", groups);
    NUMBER("--interval-us", interval);
    NUMBER("--straggler", straggler);
    NUMBER("--delay-us", delay);
    NUMBER("--random-us", random);
    NUMBER("--seed", seed);
    NUMBER("--sync-every", sync_every);
    NUMBER("--drop", drop);
    NUMBER("--drop-at", drop_at);
    NUMBER("--abort-after-ms", abort_after);
    NUMBER("--hold", hold);
    FLAG("--threads", threads);
    FLAG("--on-signal", on_signal);
    FLAG("--wait", wait);
    FLAG("--forever", forever);
    else fail("%s is no option", name);
    if (takes && !value) fail("%s wants a value", name);
    i += takes;
  }
  if (options.ranks < 1 || options.ranks > SIM_RANKS) fail("--ranks is 1 to %d", SIM_RANKS);
  if (options.communicators < 1 || options.communicators > SLOTS) fail("--communicators is 1 to %d", SLOTS);
  if (options.sync_every < 1 || options.sync_every > 500) fail("--sync-every is 1 to 500");
  if (!strcmp(options.init, "all") && !options.threads) fail("--init all needs --threads");
  if (options.grow && (options.grow >= options.ranks || options.communicators != 2)) fail("--grow needs an old rank and --communicators 2");
  bool any = false;
  for (int i = 0; i < OPERATIONS; i++) {
    size_t length = strlen(names[i]);
    options.kinds[i] = !strcmp(kinds, "all") && (sim_is_collective(i) || i == SEND_RECV);
    for (const char *at = kinds; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
      if (!strncmp(at, names[i], length) && (!at[length] || at[length] == ',')) options.kinds[i] = i != SEND && i != RECV;
    any |= options.kinds[i];
  }
  if (!any) fail("--kinds names none");
}

int main(int count, char **arguments) {
  parse(count, arguments);
  signal(SIGUSR1, become);
  signal(SIGUSR2, become);
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  communicators = calloc(COMMUNICATORS, sizeof *communicators);
  if (shared == MAP_FAILED || !communicators) fail("no memory");
  atomic_store(&shared->target, ~0ull);
  setenv("SIM_COLLECTOR", "1", 1);
  for (int rank = 0; rank < (options.threads ? 1 : options.ranks); rank++) {
    children[rank] = fork();
    if (children[rank] < 0) fail("fork: %m");
    if (!children[rank]) child(rank, options.threads ? options.ranks : 1);
  }
  bool left, hangs = false;
  while (!all_at(READY, &left)) {
    if (left) return kill_all(), fprintf(stderr, "job: a rank ended before it was ready\n"), 1;
    tick();
  }
  for (int rank = 0; rank < options.ranks; rank++)
    for (int slot = 0; slot < shared->rank[rank].slots; slot++) find(shared->rank[rank].slot[slot].comm.hash);
  if (options.wait || options.forever) say("ready");
  if (options.wait) line(true);
  wake(&shared->go);

  uint64_t since = 0;
  while (!all_at(FINISHED, &left)) {
    tick();
    if (left && !since) {
      since = sim_now();
      say("left");
    }
    if (left && !strcmp(options.drop_how, "abort")) {
      if (!shared->abort && sim_now() - since > options.abort_after * 1000000ull) wake(&shared->abort);
    } else if (left && !options.forever && sim_now() - since > (options.hold < 0 ? 1 : options.hold) * 1000000000ull) {
      hangs = true;
      break;
    }
    const char *said = options.forever ? line(false) : NULL;
    if (!said) continue;
    bool stops = !*said || !strcmp(said, "stop");
    if (stops) atomic_store(&shared->leave, 1);
    if (!rendezvous()) {
      hangs = true;
      break;
    }
    if (!stops) reset();
    atomic_store(&shared->target, ~0ull);
    for (int rank = 0; rank < options.ranks; rank++) atomic_store(&shared->rank[rank].state, RUNNING);
    wake(&shared->go);
    if (!stops) {
      say("marked");
      continue;
    }
    while (!all_at(FINISHED, &left)) {
      if (left) {
        hangs = true;
        break;
      }
      tick();
    }
    break;
  }
  print_truth();
  if (options.wait || options.forever) {
    say("done");
    line(true);
  }
  if (hangs) return kill_all(), 0;
  for (uint64_t from = sim_now(); options.hold > 0 && sim_now() - from < options.hold * 1000000000ull;) tick();
  wake(&shared->go);
  while (!all_at(ENDED, &left) && !left) tick();
  if (left) kill_all();
  while (wait(NULL) > 0) continue;
}
