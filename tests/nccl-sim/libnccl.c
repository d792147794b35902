// SPDX-License-Identifier: Apache-2.0
// Stands in for libnccl.so.2, for tests on machines without a GPU. Exports have the C ABI of NCCL's header; a collective only
// enqueues, and a thread per communicator is the device: it waits until the devices of all ranks have come to the n-th collective,
// then sleeps for the transfer. Ranks are processes or threads that meet in shared memory (`sim.h`). The object behind a
// communicator has the fields that are read from outside where a true one has them, and the functions inside of NCCL that take part
// in an init or a call exist under their mangled names in `.symtab`, as real calls. A stream is the communicator's own pointer.
//
// What differs from NCCL on purpose: sends, receives and signals end without their peer, a non-blocking communicator blocks in nothing but
// its init, and the object of an aborted communicator is never freed, as its stream may still be waited for.
//
// The environment says: SIM_NCCL_VERSION the version (22705), SIM_HOST the name of this host, SIM_TRANSFER_US (200), SIM_ALLOC_US
// (2000), SIM_TRANSPORT_US (5000), SIM_ENQUEUE_US (0, in each call) microseconds to sleep, SIM_COLLECTOR that somebody else unlinks
// the shared memory. -DSIM_VERSION=22304 and
// -DSIM_VERSION_TEXT='"2.23.4+cuda12.6"' build another version, -DSIM_LATER_NAMES one with the names of 2.32 (else of 2.27), -DSIM_RCCL
// one that is RCCL: what it says of itself, its names of all-to-all, operations that call themselves once more or each other, and none that comes
// through ncclEnqueueCheck.
#define _GNU_SOURCE
#include "sim.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SIM_VERSION
#define SIM_VERSION 22705
#endif
#ifndef SIM_VERSION_TEXT
#define SIM_VERSION_TEXT "2.27.5+cuda12.9"
#endif

#if defined(__has_attribute) && __has_attribute(noipa)
#define ALONE __attribute__((noipa))
#else
#define ALONE __attribute__((noinline))
#endif
// The function as `pncclX`, and `ncclX` as a weak name of the same place.
#define API(name, ...)                                                                                       \
  __attribute__((visibility("default"))) int p##name(__VA_ARGS__);                                           \
  extern __typeof__(p##name) name __attribute__((weak, alias("p" #name), visibility("default")));            \
  ALONE int p##name(__VA_ARGS__)
#define INSIDE __attribute__((visibility("hidden"), used)) ALONE

#ifdef SIM_RCCL
#define BEFORE_VERSION "RCCL version : "
#else
#define BEFORE_VERSION "NCCL version "
#endif
__attribute__((used)) static const char version_text[] = BEFORE_VERSION SIM_VERSION_TEXT;

enum { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
#define MAGIC 0x0280028002800280ull
#define COMM_BYTES (2 << 20)
#define COMM_OWN (COMM_BYTES - 65536)  // where this stand-in has its own fields, past those of any version
#define QUEUE 1024                     // a full queue makes the caller wait, as a full stream does

typedef struct {
  char internal[128];
} ncclUniqueId;
typedef struct ncclComm *ncclComm_t;
typedef void *stream_t;

typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char *netName;
  int splitShare, trafficClass;
  const char *commName;
  int collnetEnable, CTAPolicy, shrinkShare, nvlsCTAs;
} ncclConfig_t;

struct ncclInfo {
  int coll;
  const char *opName;
  const void *sendbuff;
  void *recvbuff;
  size_t count;
  int datatype, op, root;
  ncclComm_t comm;
  stream_t stream;
  int chunkSteps, sliceSteps;
  uint64_t arrival;  // the stand-in's own
};
_Static_assert(offsetof(struct ncclInfo, count) == 32 && offsetof(struct ncclInfo, comm) == 56, "as in NCCL");
_Static_assert(offsetof(struct ncclInfo, chunkSteps) == 72, "as in NCCL");

// Where the fields of a communicator are, by version: from DWARF of the libraries.
struct row {
  int version, hash, rank, ranks, device, local_rank, local_ranks, sequence;
};
static const struct row rows[] = {
    {21803, 9168, 9176, 9180, 9184, 9356, 9360, 0},
    {21805, 9168, 9176, 9180, 9184, 9356, 9360, 0},
    {22105, 13528, 13536, 13540, 13544, 13716, 13720, 0},
    {22304, 246944, 246952, 246956, 246960, 247140, 247144, 252568},
    {22403, 246944, 246952, 246956, 246960, 247140, 247144, 252536},
    {22602, 492720, 492728, 492732, 492736, 492916, 492920, 501008},
    {22705, 1066160, 1066168, 1066172, 1066176, 1066356, 1066360, 1074512},
    {22809, 1066184, 1066192, 1066196, 1066200, 1066380, 1066384, 1075728},
    {22907, 1181392, 1181400, 1181404, 1181408, 1181588, 1181592, 1191544},
    {23007, 1181416, 1181424, 1181428, 1181432, 1181612, 1181616, 1191576},
    {23203, 1181408, 1181416, 1181420, 1181424, 1181616, 1181620, 1193800},
};
static const struct row unknown = {0, 1400000, 1400008, 1400012, 1400016, 1400196, 1400200, 0};

struct own {
  struct sim_segment *segment;
  struct sim_rank *me;
  const struct row *row;
  int rank, ranks, device, blocking;
  uint64_t hash;
  unsigned children;
  _Atomic int state;  // of the init: IN_PROGRESS, SUCCESS or an error
  _Atomic int aborted, stop;
  pthread_t gpu, init;
  bool gpu_runs;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  uint64_t enqueued, done;
  uint8_t queue[QUEUE];
};

struct ncclAsyncJob {
  ncclComm_t comm, parent, *newcomm;
  int ids, ranks, rank, color, key;
  bool shrinks, grows;
  ncclUniqueId id;
  int excluded[SIM_RANKS], excluded_count;
  int result;
  pthread_t thread;
  struct ncclAsyncJob *next;
};

static __thread int device;
static __thread int depth;
static __thread struct ncclAsyncJob *pending_jobs;
static __thread struct pending {
  ncclComm_t comm;
  int operation;
} *pending;
static __thread int pending_count, pending_room;

static long from_environment(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

// What the environment says when the library is loaded.
static struct {
  int version;
  long transfer, alloc, transports, enqueue;
  const struct row *row;
} settings;

__attribute__((constructor)) static void set(void) {
  settings.version = from_environment("SIM_NCCL_VERSION", SIM_VERSION);
  settings.transfer = from_environment("SIM_TRANSFER_US", 200);
  settings.alloc = from_environment("SIM_ALLOC_US", 2000);
  settings.transports = from_environment("SIM_TRANSPORT_US", 5000);
  settings.enqueue = from_environment("SIM_ENQUEUE_US", 0);
  settings.row = &unknown;
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    if (rows[i].version == settings.version) settings.row = &rows[i];
}

static bool has_magic(void) { return settings.version >= 22100; }

static struct own *of(ncclComm_t comm) { return (struct own *)((char *)comm + COMM_OWN); }

static void put(ncclComm_t comm, int offset, int value) { memcpy((char *)comm + offset, &value, sizeof value); }

static bool valid(ncclComm_t comm) { return comm && (!has_magic() || *(uint64_t *)comm == MAGIC); }

// As NCCL does: `char` is what the compiler of the platform says.
static uint64_t hash_of(const char *bytes, int count) {
  uint64_t hash = 5381;
  for (int i = 0; i < count; i++) hash = ((hash << 5) + hash) ^ bytes[i];
  return hash;
}

static uint64_t mix(uint64_t a, uint64_t b) {
  a = (a ^ b) * 0x9e3779b97f4a7c15ull;
  return a ^ a >> 29;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t while_it_is) {
  struct timespec time = {0, 100000000};
  syscall(SYS_futex, word, FUTEX_WAIT, while_it_is, &time, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

// Waits until all ranks of the communicator are here.
static int gate(struct own *own) {
  struct sim_segment *segment = own->segment;
  uint32_t now = atomic_load(&segment->gate);
  if (atomic_fetch_add(&segment->at_gate, 1) + 1 == segment->ranks) {
    atomic_store(&segment->at_gate, 0);
    atomic_store(&segment->gate, now + 1);
    futex_wake(&segment->gate);
  }
  while (atomic_load(&segment->gate) == now) {
    if (own->aborted) return SYSTEM_ERROR;
    futex_wait(&segment->gate, now);
  }
  return SUCCESS;
}

// The device: takes the operations of a communicator in their order.
static void *gpu(void *argument) {
  struct own *own = argument;
  struct sim_segment *segment = own->segment;
  uint32_t collectives = 0;
  for (;;) {
    pthread_mutex_lock(&own->lock);
    while (own->done == own->enqueued && !own->stop && !own->aborted) pthread_cond_wait(&own->changed, &own->lock);
    bool leave = own->aborted || own->done == own->enqueued;
    int operation = own->queue[own->done % QUEUE];
    pthread_mutex_unlock(&own->lock);
    if (leave) return NULL;
    if (sim_is_collective(operation)) {
      uint32_t mine = collectives++;
      if (atomic_fetch_add(&segment->on_device, 1) + 1 == segment->ranks) {
        atomic_store(&segment->on_device, 0);
        atomic_store(&segment->ready, mine + 1);
        futex_wake(&segment->ready);
      }
      for (uint32_t now; (now = atomic_load(&segment->ready)) == mine;) {
        if (own->aborted) return NULL;
        futex_wait(&segment->ready, now);
      }
    }
    sim_sleep(settings.transfer);
    pthread_mutex_lock(&own->lock);
    own->done++;
    pthread_cond_broadcast(&own->changed);
    pthread_mutex_unlock(&own->lock);
  }
}

static int meet(ncclComm_t comm) {
  struct own *own = of(comm);
  char name[32], host[256] = "";
  sim_name(name, own->hash);
  int file = shm_open(name, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(struct sim_segment))) return SYSTEM_ERROR;
  struct sim_segment *segment = mmap(NULL, sizeof *segment, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (segment == MAP_FAILED) return SYSTEM_ERROR;
  own->segment = segment;
  own->me = &segment->rank[own->rank];
  const char *said = getenv("SIM_HOST");
  if (said && *said) snprintf(host, sizeof host, "%s", said);
  else gethostname(host, sizeof host - 1);
  own->me->host = hash_of(host, strlen(host));
  own->me->pid = getpid();
  own->me->tid = syscall(SYS_gettid);
  segment->ranks = own->ranks;
  uint32_t joined = atomic_fetch_add(&segment->joined, 1) + 1;
  if (joined == segment->ranks) {
    if (!getenv("SIM_COLLECTOR")) shm_unlink(name);
    futex_wake(&segment->joined);
  }
  while ((joined = atomic_load(&segment->joined)) < segment->ranks) {
    if (own->aborted) return SYSTEM_ERROR;
    futex_wait(&segment->joined, joined);
  }
  return SUCCESS;
}

#ifdef SIM_LATER_NAMES
INSIDE int bootstrap_init(int count, void *handles, ncclComm_t comm, ncclComm_t parent) __asm__("_Z13bootstrapInitiPvP8ncclCommS1_");
#else
INSIDE int bootstrap_init(int count, void *handles, ncclComm_t comm, ncclComm_t parent) __asm__("_Z13bootstrapInitiPvP8ncclComm");
#endif
INSIDE int transports(ncclComm_t comm, ncclComm_t parent, uint64_t *timers) __asm__("_ZL18initTransportsRankP8ncclCommS0_Pm");
INSIDE int bootstrap_split(uint64_t magic, ncclComm_t comm, ncclComm_t parent, int color, int key, int *parent_ranks) __asm__(
    "_Z14bootstrapSplitmP8ncclCommS0_iiPi");
INSIDE int comm_alloc(ncclComm_t comm, ncclComm_t parent, int ranks, int rank) __asm__("_ZL9commAllocP8ncclCommS0_ii");
INSIDE int init_rank(struct ncclAsyncJob *job) __asm__("_ZL20ncclCommInitRankFuncP12ncclAsyncJob");
INSIDE int enqueue_check(struct ncclInfo *info) __asm__("_Z16ncclEnqueueCheckP8ncclInfo");

int bootstrap_init(int count, void *handles, ncclComm_t comm, ncclComm_t parent) {
  (void)count, (void)handles, (void)parent;
  return meet(comm);
}

int bootstrap_split(uint64_t magic, ncclComm_t comm, ncclComm_t parent, int color, int key, int *parent_ranks) {
  (void)magic, (void)parent, (void)color, (void)key, (void)parent_ranks;
  return meet(comm);
}

int comm_alloc(ncclComm_t comm, ncclComm_t parent, int ranks, int rank) {
  struct own *own = of(comm);
  own->ranks = ranks;
  own->rank = rank;
  if (parent) own->device = of(parent)->device;
  put(comm, own->row->rank, rank);
  put(comm, own->row->ranks, ranks);
  put(comm, own->row->device, own->device);
  sim_sleep(settings.alloc);
  return SUCCESS;
}

int transports(ncclComm_t comm, ncclComm_t parent, uint64_t *timers) {
  (void)parent, (void)timers;
  struct own *own = of(comm);
  int local_rank = 0, local_ranks = 0;
  for (int rank = 0; rank < own->ranks; rank++) {
    if (own->segment->rank[rank].host != own->me->host) continue;
    if (rank < own->rank) local_rank++;
    local_ranks++;
  }
  put(comm, own->row->local_rank, own->me->local_rank = local_rank);
  put(comm, own->row->local_ranks, own->me->local_ranks = local_ranks);
  sim_sleep(settings.transports);
  return SUCCESS;
}

// The place of this rank in a communicator that is made from another one. False: in none.
static int from_parent(struct ncclAsyncJob *job, uint64_t *hash) {
  struct own *parent = of(job->parent);
  *hash = mix(mix(parent->hash, 0x53504c4954ull), ++parent->children);
  job->rank = job->ranks = 0;
  if (job->shrinks) {
    *hash = mix(*hash, 1ull << 40);
    for (int rank = 0; rank < parent->ranks; rank++) {
      bool excluded = false;
      for (int i = 0; i < job->excluded_count; i++) excluded |= job->excluded[i] == rank;
      if (excluded) continue;
      if (rank < parent->rank) job->rank++;
      job->ranks++;
    }
    return SUCCESS;
  }
  *hash = mix(*hash, (uint32_t)job->color);
  parent->me->color = job->color;
  parent->me->key = job->key;
  if (gate(parent)) return SYSTEM_ERROR;
  for (int rank = 0; rank < parent->ranks; rank++) {
    struct sim_rank *other = &parent->segment->rank[rank];
    if (other->color != job->color) continue;
    if (other->key < job->key || (other->key == job->key && rank < parent->rank)) job->rank++;
    job->ranks++;
  }
  return gate(parent);
}

int init_rank(struct ncclAsyncJob *job) {
  uint64_t begin = sim_now(), hash, took[INIT_PHASES] = {0};
  ncclComm_t comm = job->comm;
  int result = SUCCESS;
  if (job->grows) {
    memcpy(&hash, job->id.internal, sizeof hash);
    hash = mix(hash, job->ranks);
  } else if (job->parent) {
    result = from_parent(job, &hash);
    if (!comm) goto end;
  } else {
    hash = hash_of(job->id.internal, sizeof job->id);
  }
  struct own *own = of(comm);
  uint64_t from = sim_now();
  // What grows takes nothing over from its parent.
  ncclComm_t parent = job->grows ? NULL : job->parent;
  own->hash = hash;
  memcpy((char *)comm + own->row->hash, &hash, sizeof hash);
  if (!result) result = comm_alloc(comm, parent, job->ranks, job->rank);
  took[INIT_ALLOC] = sim_now() - from;
  from = sim_now();
  if (!result && parent) result = bootstrap_split(hash, comm, parent, job->color, job->key, NULL);
  else if (!result) result = bootstrap_init(job->ids, &job->id, comm, job->parent);
  took[INIT_BOOTSTRAP] = sim_now() - from;
  from = sim_now();
  if (!result) result = transports(comm, job->parent, took);
  took[INIT_TRANSPORTS] = sim_now() - from;
  if (!result) {
    own->gpu_runs = !pthread_create(&own->gpu, NULL, gpu, own);
    if (!own->gpu_runs) result = SYSTEM_ERROR;
    took[INIT_TOTAL] = sim_now() - begin;
    memcpy(own->me->init, took, sizeof took);
  }
  own->state = result;
end:
  if (job->parent) {
    if (job->newcomm && !result) *job->newcomm = comm;
    of(job->parent)->state = SUCCESS;
  }
  return job->result = result;
}

static void *in_thread(void *argument) {
  init_rank(argument);
  return NULL;
}

static void *in_background(void *argument) {
  init_rank(argument);
  free(argument);
  return NULL;
}

// Runs what a group has gathered: inits each in a thread of its own, all at once.
static int run_jobs(struct ncclAsyncJob *jobs) {
  int result = SUCCESS;
  for (struct ncclAsyncJob *job = jobs, *next; job; job = next) {
    next = job->next;
    struct own *first = of(job->comm ? job->comm : job->parent);
    if (!first->blocking) {
      pthread_t thread;
      if (job->parent) of(job->parent)->state = IN_PROGRESS;
      if (pthread_create(&thread, NULL, in_background, job)) return SYSTEM_ERROR;
      pthread_detach(thread);
      result = IN_PROGRESS;
    } else if (pthread_create(&job->thread, NULL, in_thread, job)) {
      return SYSTEM_ERROR;
    }
  }
  if (result == IN_PROGRESS) return result;
  for (struct ncclAsyncJob *job = jobs, *next; job; job = next) {
    next = job->next;
    pthread_join(job->thread, NULL);
    if (job->result) result = job->result;
    free(job);
  }
  return result;
}

static int launch_job(struct ncclAsyncJob *job, bool inline_) {
  if (depth) {
    struct ncclAsyncJob **last = &pending_jobs;
    while (*last) last = &(*last)->next;
    *last = job;
    return SUCCESS;
  }
  if (!inline_) return run_jobs(job);
  int result = init_rank(job);
  free(job);
  return result;
}

static ncclComm_t new_comm(int blocking) {
  ncclComm_t comm = calloc(1, COMM_BYTES);
  if (!comm) return NULL;
  if (has_magic()) *(uint64_t *)comm = MAGIC;
  struct own *own = of(comm);
  own->row = settings.row;
  own->device = device;
  own->blocking = blocking;
  own->state = IN_PROGRESS;
  pthread_mutex_init(&own->lock, NULL);
  pthread_cond_init(&own->changed, NULL);
  return comm;
}

static int init(ncclComm_t *newcomm, int ranks, int ids, const ncclUniqueId *id, int rank, int blocking, bool inline_) {
  if (!newcomm || ranks < 1 || ranks > SIM_RANKS || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
  struct ncclAsyncJob *job = calloc(1, sizeof *job);
  job->comm = *newcomm = new_comm(blocking);
  job->ids = ids;
  job->id = *id;
  job->ranks = ranks;
  job->rank = rank;
  return launch_job(job, inline_);
}

static int blocks(const ncclConfig_t *config, int otherwise) {
  if (!config || config->magic != 0xcafebeef || config->blocking == INT_MIN) return otherwise;
  return config->blocking != 0;
}

API(ncclGetVersion, int *number) {
  if (!number) return INVALID_ARGUMENT;
  *number = settings.version;
  return SUCCESS;
}

API(ncclGetUniqueId, ncclUniqueId *id) {
  memset(id, 0, sizeof *id);
  int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  // What a true one has: eight random bytes, and the address of the root.
  bool read_ = file >= 0 && read(file, id->internal, 8) == 8;
  if (file >= 0) close(file);
  id->internal[8] = 2;
  int pid = getpid();
  memcpy(id->internal + 10, &pid, sizeof pid);
  return read_ ? SUCCESS : SYSTEM_ERROR;
}

API(ncclGroupStart, void) {
  depth++;
  return SUCCESS;
}

// Gives an operation to the device, and counts it where NCCL does.
static int launch(ncclComm_t comm, int operation) {
  struct own *own = of(comm);
  pthread_mutex_lock(&own->lock);
  while (own->enqueued - own->done >= QUEUE && !own->aborted) pthread_cond_wait(&own->changed, &own->lock);
  if (!own->aborted) {
    own->queue[own->enqueued++ % QUEUE] = operation;
    if (own->row->sequence && operation < SIM_SEQUENCES) {
      uint64_t sequence, *at = (uint64_t *)((char *)comm + own->row->sequence) + operation;
      memcpy(&sequence, at, sizeof sequence);
      sequence++;
      memcpy(at, &sequence, sizeof sequence);
    }
    pthread_cond_broadcast(&own->changed);
  }
  pthread_mutex_unlock(&own->lock);
  return own->aborted ? INVALID_USAGE : SUCCESS;
}

API(ncclGroupEnd, void) {
  if (!depth) return INVALID_USAGE;
  if (--depth) return SUCCESS;
  struct ncclAsyncJob *jobs = pending_jobs;
  pending_jobs = NULL;
  int result = jobs ? run_jobs(jobs) : SUCCESS;
  for (int i = 0; i < pending_count; i++) {
    int one = launch(pending[i].comm, pending[i].operation);
    if (one) result = one;
  }
  pending_count = 0;
  return result;
}

API(ncclCommInitRank, ncclComm_t *newcomm, int ranks, ncclUniqueId id, int rank) {
  return init(newcomm, ranks, 1, &id, rank, 1, true);
}

API(ncclCommInitRankConfig, ncclComm_t *newcomm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
  return init(newcomm, ranks, 1, &id, rank, blocks(config, 1), false);
}

API(ncclCommInitRankScalable, ncclComm_t *newcomm, int ranks, int rank, int count, ncclUniqueId *ids, ncclConfig_t *config) {
  if (count < 1 || !ids) return INVALID_ARGUMENT;
  return init(newcomm, ranks, count, ids, rank, blocks(config, 1), false);
}

API(ncclCommInitAll, ncclComm_t *comms, int devices, const int *list) {
  ncclUniqueId id;
  int result = pncclGetUniqueId(&id), before = device;
  pncclGroupStart();
  for (int i = 0; i < devices && !result; i++) {
    device = list ? list[i] : i;
    result = init(&comms[i], devices, 1, &id, i, 1, false);
  }
  device = before;
  int end = pncclGroupEnd();
  return result ? result : end;
}

static int child(ncclComm_t parent, ncclComm_t *newcomm, struct ncclAsyncJob like, ncclConfig_t *config) {
  if (!valid(parent) || !newcomm || of(parent)->aborted) return INVALID_ARGUMENT;
  struct ncclAsyncJob *job = malloc(sizeof *job);
  *job = like;
  job->parent = parent;
  job->newcomm = newcomm;
  *newcomm = NULL;
  if (job->shrinks || job->color != -1) job->comm = new_comm(blocks(config, of(parent)->blocking));
  return launch_job(job, false);
}

API(ncclCommSplit, ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config) {
  if (color < -1) return INVALID_ARGUMENT;
  return child(comm, newcomm, (struct ncclAsyncJob){.color = color, .key = key}, config);
}

API(ncclCommShrink, ncclComm_t comm, int *exclude, int count, ncclComm_t *newcomm, ncclConfig_t *config, int flags) {
  (void)flags;
  struct ncclAsyncJob job = {.shrinks = true, .excluded_count = count};
  if (count < 1 || count >= SIM_RANKS) return INVALID_ARGUMENT;
  memcpy(job.excluded, exclude, count * sizeof *exclude);
  return child(comm, newcomm, job, config);
}

// What the communicator that grows next from this one will be told by, whatever it will have of ranks.
static void grown(struct own *own, unsigned children, ncclUniqueId *id) {
  uint64_t magic = mix(mix(own->hash, 0x47524f57ull), children);
  memset(id, 0, sizeof *id);
  memcpy(id->internal, &magic, sizeof magic);
}

// By one rank of the communicator, for the new ones.
API(ncclCommGetUniqueId, ncclComm_t comm, ncclUniqueId *id) {
  if (!valid(comm) || !id) return INVALID_ARGUMENT;
  grown(of(comm), of(comm)->children + 1, id);
  return SUCCESS;
}

// Old ranks have a communicator, no id and the rank -1; new ones an id and a rank.
API(ncclCommGrow, ncclComm_t comm, int ranks, const ncclUniqueId *id, int rank, ncclComm_t *newcomm, ncclConfig_t *config) {
  if (!newcomm || (comm ? !valid(comm) || rank != -1 || ranks <= of(comm)->ranks : !id || rank < 0 || rank >= ranks))
    return INVALID_ARGUMENT;
  struct ncclAsyncJob *job = calloc(1, sizeof *job);
  *job = (struct ncclAsyncJob){.grows = true, .ids = 1, .ranks = ranks, .rank = rank, .parent = comm, .newcomm = newcomm};
  job->comm = *newcomm = new_comm(blocks(config, comm ? of(comm)->blocking : 1));
  if (comm) {
    job->rank = of(comm)->rank;
    grown(of(comm), ++of(comm)->children, &job->id);
    of(job->comm)->device = of(comm)->device;
  } else {
    job->id = *id;
  }
  return launch_job(job, false);
}

static int drain(struct own *own) {
  pthread_mutex_lock(&own->lock);
  while (own->done < own->enqueued && !own->aborted) pthread_cond_wait(&own->changed, &own->lock);
  pthread_mutex_unlock(&own->lock);
  return own->aborted;
}

API(ncclCommFinalize, ncclComm_t comm) {
  if (!valid(comm)) return INVALID_ARGUMENT;
  return drain(of(comm)) ? INVALID_USAGE : SUCCESS;
}

static void halt(struct own *own) {
  pthread_mutex_lock(&own->lock);
  own->stop = 1;
  pthread_cond_broadcast(&own->changed);
  pthread_mutex_unlock(&own->lock);
  if (own->segment) {
    futex_wake(&own->segment->ready);
    futex_wake(&own->segment->joined);
    futex_wake(&own->segment->gate);
  }
  if (own->gpu_runs) pthread_join(own->gpu, NULL);
  own->gpu_runs = false;
}

API(ncclCommDestroy, ncclComm_t comm) {
  if (!comm) return SUCCESS;
  if (!valid(comm)) return INVALID_ARGUMENT;
  struct own *own = of(comm);
  if (own->aborted) return INVALID_USAGE;
  drain(own);
  halt(own);
  if (own->segment) munmap(own->segment, sizeof *own->segment);
  memset(comm, 0, sizeof(uint64_t));
  free(comm);
  return SUCCESS;
}

API(ncclCommAbort, ncclComm_t comm) {
  if (!comm) return SUCCESS;
  if (!valid(comm)) return INVALID_ARGUMENT;
  of(comm)->aborted = 1;
  halt(of(comm));
  return SUCCESS;
}

API(ncclCommGetAsyncError, ncclComm_t comm, int *error) {
  if (!valid(comm) || !error) return INVALID_ARGUMENT;
  *error = of(comm)->state;
  return SUCCESS;
}

API(ncclCommCount, const ncclComm_t comm, int *count) {
  if (!valid(comm) || !count) return INVALID_ARGUMENT;
  *count = of(comm)->ranks;
  return SUCCESS;
}

API(ncclCommUserRank, const ncclComm_t comm, int *rank) {
  if (!valid(comm) || !rank) return INVALID_ARGUMENT;
  *rank = of(comm)->rank;
  return SUCCESS;
}

API(ncclCommCuDevice, const ncclComm_t comm, int *number) {
  if (!valid(comm) || !number) return INVALID_ARGUMENT;
  *number = of(comm)->device;
  return SUCCESS;
}

static int enqueue(struct ncclInfo *info) {
  ncclComm_t comm = info->comm;
  if (!valid(comm)) return INVALID_ARGUMENT;
  struct own *own = of(comm);
  if (own->aborted || own->state) return own->state == IN_PROGRESS ? INVALID_USAGE : INVALID_ARGUMENT;
  struct sim_segment *segment = own->segment;
  struct sim_rank *me = own->me;
  if (info->coll == SEND) {
    me->sends++;
  } else if (info->coll == RECV) {
    me->receives++;
  } else if (sim_is_collective(info->coll)) {
    uint64_t n = me->arrivals;
    while (segment->collector && n - segment->collected >= SIM_RING && !own->aborted) sim_sleep(200);
    segment->operation[sim_cell(n, own->rank)] = info->coll;
    atomic_store(&segment->arrival[sim_cell(n, own->rank)], info->arrival);
    atomic_store(&me->arrivals, n + 1);
  }
  sim_sleep(settings.enqueue);
  if (!depth) return launch(comm, info->coll);
  if (pending_count == pending_room) pending = realloc(pending, (pending_room += 64) * sizeof *pending);
  pending[pending_count++] = (struct pending){comm, info->coll};
  return SUCCESS;
}

int enqueue_check(struct ncclInfo *info) { return enqueue(info); }

// RCCL calls itself once more for what MSCCL has no algorithm for.
#ifdef SIM_RCCL
static __thread bool falls_back;
#define FALL_BACK(again)                                                                                             \
  if (!falls_back) {                                                                                                 \
    falls_back = true;                                                                                               \
    int result = again;                                                                                              \
    falls_back = false;                                                                                              \
    return result;                                                                                                   \
  }
#define ENQUEUE_CHECK enqueue
#else
#define FALL_BACK(again)
#define ENQUEUE_CHECK enqueue_check
#endif
#define ENQUEUE(code, name, send, receive, op, root)                                                                 \
  uint64_t arrival = sim_now();                                                                                      \
  struct ncclInfo info = {code, name, send, receive, count, type, op, root, comm, stream, 1, 1, arrival};            \
  return ENQUEUE_CHECK(&info)

API(ncclAllReduce, const void *send, void *receive, size_t count, int type, int op, ncclComm_t comm, stream_t stream) {
  FALL_BACK(pncclAllReduce(send, receive, count, type, op, comm, stream));
  ENQUEUE(ALL_REDUCE, "AllReduce", send, receive, op, 0);
}

API(ncclReduceScatter, const void *send, void *receive, size_t count, int type, int op, ncclComm_t comm, stream_t stream) {
  ENQUEUE(REDUCE_SCATTER, "ReduceScatter", send, receive, op, 0);
}

API(ncclAllGather, const void *send, void *receive, size_t count, int type, ncclComm_t comm, stream_t stream) {
  ENQUEUE(ALL_GATHER, "AllGather", send, receive, 0, 0);
}

API(ncclBroadcast, const void *send, void *receive, size_t count, int type, int root, ncclComm_t comm, stream_t stream) {
  ENQUEUE(BROADCAST, "Broadcast", send, receive, 0, root);
}

// In NCCL too it only calls the other, so that a probe on each sees the call twice.
API(ncclBcast, void *buffer, size_t count, int type, int root, ncclComm_t comm, stream_t stream) {
  return pncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

API(ncclReduce, const void *send, void *receive, size_t count, int type, int op, int root, ncclComm_t comm, stream_t stream) {
  ENQUEUE(REDUCE, "Reduce", send, receive, op, root);
}

#ifdef SIM_RCCL
API(ncclAllToAll, const void *send, void *receive, size_t count, int type, ncclComm_t comm, stream_t stream) {
  ENQUEUE(ALL_TO_ALL, "AllToAll", send, receive, 0, 0);
}

API(ncclAllToAllv, const void *send, const size_t *counts, const size_t *places, void *receive, const size_t *receive_counts,
    const size_t *receive_places, int type, ncclComm_t comm, stream_t stream) {
  (void)places, (void)receive_counts, (void)receive_places;
  size_t count = counts[0];
  FALL_BACK(pncclAllToAll(send, receive, count, type, comm, stream));
  ENQUEUE(ALL_TO_ALL, "AllToAllv", send, receive, 0, 0);
}

API(mscclLoadAlgo, const char *path, int *handle, int rank) {
  (void)path, (void)handle, (void)rank;
  return SYSTEM_ERROR;
}
#else
API(ncclAlltoAll, const void *send, void *receive, size_t count, int type, ncclComm_t comm, stream_t stream) {
  ENQUEUE(ALL_TO_ALL, "AlltoAll", send, receive, 0, 0);
}
#endif

API(ncclGather, const void *send, void *receive, size_t count, int type, int root, ncclComm_t comm, stream_t stream) {
  ENQUEUE(GATHER, "Gather", send, receive, 0, root);
}

API(ncclScatter, const void *send, void *receive, size_t count, int type, int root, ncclComm_t comm, stream_t stream) {
  ENQUEUE(SCATTER, "Scatter", send, receive, 0, root);
}

API(ncclSend, const void *send, size_t count, int type, int peer, ncclComm_t comm, stream_t stream) {
  FALL_BACK(pncclSend(send, count, type, peer, comm, stream));
  ENQUEUE(SEND, "Send", NULL, (void *)send, 0, peer);
}

API(ncclRecv, void *receive, size_t count, int type, int peer, ncclComm_t comm, stream_t stream) {
  ENQUEUE(RECV, "Recv", NULL, receive, 0, peer);
}

API(ncclPutSignal, const void *send, size_t count, int type, int peer, void *window, size_t place, int signal, int context,
    unsigned flags, ncclComm_t comm, stream_t stream) {
  (void)window, (void)place, (void)signal, (void)context, (void)flags;
  ENQUEUE(PUT_SIGNAL, "PutSignal", send, NULL, 0, peer);
}

API(ncclSignal, int peer, int signal, int context, unsigned flags, ncclComm_t comm, stream_t stream) {
  (void)signal, (void)context, (void)flags;
  int type = 0;
  size_t count = 0;
  ENQUEUE(SIGNAL, "Signal", NULL, NULL, 0, peer);
}

API(ncclWaitSignal, int descriptions, void *description, ncclComm_t comm, stream_t stream) {
  (void)descriptions, (void)description;
  int type = 0;
  size_t count = 0;
  ENQUEUE(WAIT_SIGNAL, "WaitSignal", NULL, NULL, 0, 0);
}

// Of the CUDA runtime: 999 is cudaErrorUnknown.
__attribute__((visibility("default"))) int cudaStreamSynchronize(stream_t stream) {
  if (!stream) return 400;
  return drain(of(stream)) ? 999 : 0;
}

__attribute__((visibility("default"))) int cudaSetDevice(int number) {
  device = number;
  return 0;
}

// For the job: what stands in the object of a communicator, and whether it has sequence numbers.
struct sim_comm {
  uint64_t hash, sequence[SIM_SEQUENCES];
  int has_sequence;
};
__attribute__((visibility("default"))) void sim_read(ncclComm_t comm, struct sim_comm *to) {
  const struct row *row = of(comm)->row;
  memset(to, 0, sizeof *to);
  memcpy(&to->hash, (char *)comm + row->hash, sizeof to->hash);
  to->has_sequence = row->sequence != 0;
  if (row->sequence) memcpy(to->sequence, (char *)comm + row->sequence, sizeof to->sequence);
}
