// SPDX-License-Identifier: Apache-2.0
// A file system that stops answering: does a program that looks at a process hang where a library of that process lies on it?
//
// usage: silent MOUNTPOINT FILE NAME MODE, as root. It mounts a FUSE file system with one file, NAME, which has the content of FILE.
// A child, the victim, maps the first 64 KiB of it as code, touches the first byte, closes it and sleeps. Then it says `mapped PID`
// (the victim's), and by MODE:
//
//   well   goes on answering
//   slow   answers each OPEN and READ after 2 s, all else at once
//   deaf   reads no request any more: they stay pending
//   mute   reads requests and answers none
//
// At the end of its input, or on SIGTERM, it kills the victim, unmounts lazily and closes the device. It exits with 1 where something
// failed and with 2 on wrong usage. After SIGKILL the mount stays, but nothing hangs in it: it fails with ENOTCONN.
//
// Facts of the kernel (fs/fuse/dev.c): who waits for a request that is still pending can be killed. Once the daemon has read the
// request, not even SIGKILL ends the wait (request_wait_answer). The close of the last descriptor of /dev/fuse aborts the connection,
// which ends all waits with ECONNABORTED or, for new requests, ENOTCONN.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAPPED (64 << 10)
#define FILE_ID 2
#define DELAY_MS 2000
#define MOST_DELAYED 256

enum mode { WELL, SLOW, DEAF, MUTE, MODES };
static const char *const modes[MODES] = {"well", "slow", "deaf", "mute"};

// An OPEN or a READ that is answered later.
struct delayed {
  long due;
  struct fuse_in_header header;
  struct fuse_read_in read;
};

static int device;
static const char *name;
static char *content;
static size_t content_length;

// All wait equally long, so the first that came is the first that is due.
static struct delayed delayed[MOST_DELAYED];
static unsigned first_delayed, delayed_count;

static long now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool load(const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status)) return false;
  content = malloc(status.st_size + 1);
  while (content && content_length < (size_t)status.st_size) {
    ssize_t got = read(file, content + content_length, status.st_size - content_length);
    if (got < 0) return false;
    if (got == 0) break;
    content_length += got;
  }
  close(file);
  return content != NULL;
}

static void answer(const struct fuse_in_header *request, int error, const void *data, size_t length) {
  struct fuse_out_header header = {.len = sizeof header + length, .error = error, .unique = request->unique};
  struct iovec parts[] = {{&header, sizeof header}, {(void *)data, length}};
  // ENOENT: the one who asked was killed meanwhile.
  if (writev(device, parts, 2) < 0 && errno != ENOENT) fprintf(stderr, "answer to request %u: %m\n", request->opcode);
}

static struct fuse_attr attributes(uint64_t id) {
  struct fuse_attr root = {.ino = FUSE_ROOT_ID, .mode = S_IFDIR | 0755, .nlink = 2, .blksize = 4096};
  struct fuse_attr file = {.ino = FILE_ID,
                           .mode = S_IFREG | 0755,
                           .nlink = 1,
                           .blksize = 4096,
                           .size = content_length,
                           .blocks = (content_length + 511) / 512};
  return id == FILE_ID ? file : root;
}

static size_t entry(char *to, uint64_t id, const char *called, uint64_t next) {
  struct fuse_dirent *entry = (struct fuse_dirent *)to;
  entry->ino = id;
  entry->off = next;
  entry->namelen = strlen(called);
  entry->type = id == FILE_ID ? S_IFREG >> 12 : S_IFDIR >> 12;
  memcpy(entry->name, called, entry->namelen);
  return FUSE_DIRENT_SIZE(entry);
}

static void answer_well(const struct fuse_in_header *request, const void *body) {
  const struct fuse_read_in *asked = body;
  switch (request->opcode) {
  case FUSE_INIT: {
    // Without readahead a touched page is the only one that is read and cached.
    struct fuse_init_out init = {.major = FUSE_KERNEL_VERSION,
                                 .minor = FUSE_KERNEL_MINOR_VERSION,
                                 .max_readahead = 0,
                                 .flags = FUSE_PARALLEL_DIROPS,
                                 .max_write = 4096,
                                 .time_gran = 1};
    return answer(request, 0, &init, sizeof init);
  }
  case FUSE_LOOKUP: {
    if (request->nodeid != FUSE_ROOT_ID || strcmp(body, name)) return answer(request, -ENOENT, NULL, 0);
    // A validity of zero, so that the kernel asks again at each look.
    struct fuse_entry_out found = {.nodeid = FILE_ID, .attr = attributes(FILE_ID)};
    return answer(request, 0, &found, sizeof found);
  }
  case FUSE_GETATTR: {
    struct fuse_attr_out out = {.attr = attributes(request->nodeid)};
    return answer(request, 0, &out, sizeof out);
  }
  case FUSE_OPEN:
  case FUSE_OPENDIR: {
    struct fuse_open_out out = {0};
    return answer(request, 0, &out, sizeof out);
  }
  case FUSE_READ: {
    size_t from = asked->offset < content_length ? asked->offset : content_length;
    size_t length = asked->size < content_length - from ? asked->size : content_length - from;
    return answer(request, 0, content + from, length);
  }
  case FUSE_READDIR: {
    char all[1024] __attribute__((aligned(8))) = {0};
    size_t length = 0;
    if (asked->offset == 0) {
      length += entry(all, FUSE_ROOT_ID, ".", 1);
      length += entry(all + length, FUSE_ROOT_ID, "..", 2);
      length += entry(all + length, FILE_ID, name, 3);
    }
    return answer(request, 0, all, length <= asked->size ? length : 0);
  }
  case FUSE_STATFS: {
    struct fuse_statfs_out out = {.st = {.bsize = 4096, .frsize = 4096, .namelen = 255, .files = 1}};
    return answer(request, 0, &out, sizeof out);
  }
  case FUSE_FLUSH:
  case FUSE_RELEASE:
  case FUSE_RELEASEDIR:
    return answer(request, 0, NULL, 0);
  case FUSE_FORGET:
  case FUSE_BATCH_FORGET:
  case FUSE_INTERRUPT:
    return; // these have no answer
  default:
    return answer(request, -ENOSYS, NULL, 0);
  }
}

// False once the file system is unmounted.
static bool serve(enum mode mode) {
  static char buffer[64 << 10] __attribute__((aligned(8)));
  ssize_t got = read(device, buffer, sizeof buffer);
  // ENOENT: the one who asked was killed while the request was read.
  if (got < 0) return errno == EAGAIN || errno == EINTR || errno == ENOENT;
  if (mode == MUTE) return true;
  const struct fuse_in_header *request = (void *)buffer;
  const void *body = request + 1;
  if (mode == SLOW && (request->opcode == FUSE_OPEN || request->opcode == FUSE_READ)) {
    struct delayed *later = &delayed[(first_delayed + delayed_count++) % MOST_DELAYED];
    later->due = now_ms() + DELAY_MS;
    later->header = *request;
    if (request->opcode == FUSE_READ) memcpy(&later->read, body, sizeof later->read);
    return true;
  }
  answer_well(request, body);
  return true;
}

static void victim(int go, int done, const char *path) {
  char byte;
  // The daemon's end of the pipe closes with the daemon.
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) || read(go, &byte, 1) != 1) _exit(1);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    fprintf(stderr, "open %s: %m\n", path);
    _exit(1);
  }
  volatile char *mapped = mmap(NULL, MAPPED, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
  if (mapped == MAP_FAILED) {
    fprintf(stderr, "mmap %s: %m\n", path);
    _exit(1);
  }
  byte = mapped[0];
  close(file);
  if (write(done, &byte, 1) != 1) _exit(1);
  for (;;) pause();
}

// Until the end of the input, a signal, or a failure.
static bool run(int signals, int done, pid_t child, enum mode mode) {
  bool mapped = false;
  for (;;) {
    enum mode now = mapped ? mode : WELL;
    while (delayed_count && delayed[first_delayed].due <= now_ms()) {
      answer_well(&delayed[first_delayed].header, &delayed[first_delayed].read);
      first_delayed = (first_delayed + 1) % MOST_DELAYED;
      delayed_count--;
    }
    bool reads = now != DEAF && delayed_count < MOST_DELAYED;
    int timeout = -1;
    if (delayed_count) {
      long left = delayed[first_delayed].due - now_ms();
      timeout = left > 0 ? left : 0;
    }
    struct pollfd polled[] = {{.fd = STDIN_FILENO, .events = POLLIN},
                              {.fd = signals, .events = POLLIN},
                              {.fd = mapped ? -1 : done, .events = POLLIN},
                              {.fd = reads ? device : -1, .events = POLLIN}};
    if (poll(polled, 4, timeout) < 0 && errno != EINTR) return perror("poll"), false;
    char thrown_away[256];
    if (polled[0].revents && read(STDIN_FILENO, thrown_away, sizeof thrown_away) <= 0) return true;
    if (polled[1].revents) return true;
    if (polled[2].revents) {
      if (read(done, thrown_away, 1) != 1) return fprintf(stderr, "the victim did not map the file\n"), false;
      mapped = true;
      printf("mapped %d\n", child);
      fflush(stdout);
      continue;
    }
    if (polled[3].revents && !serve(now)) return fprintf(stderr, "the file system was unmounted\n"), false;
  }
}

int main(int count, char **arguments) {
  enum mode mode = 0;
  while (count == 5 && mode < MODES && strcmp(arguments[4], modes[mode])) mode++;
  if (count != 5 || mode == MODES || !*arguments[3] || strlen(arguments[3]) > 255 || strchr(arguments[3], '/'))
    return fprintf(stderr, "usage: silent MOUNTPOINT FILE NAME well|slow|deaf|mute\n"), 2;
  const char *mountpoint = arguments[1];
  name = arguments[3];
  if (!load(arguments[2])) return fprintf(stderr, "read %s: %m\n", arguments[2]), 1;
  char *path, options[128];
  int go[2], done[2];
  if (asprintf(&path, "%s/%s", mountpoint, name) < 0 || pipe2(go, O_CLOEXEC) || pipe2(done, O_CLOEXEC)) return perror("pipe"), 1;

  // The victim comes first, so that it has no descriptor of the device, which would keep the connection alive.
  pid_t child = fork();
  if (child < 0) return perror("fork"), 1;
  if (child == 0) {
    close(go[1]);
    close(done[0]);
    close(STDIN_FILENO);
    close(STDOUT_FILENO);
    victim(go[0], done[1], path);
  }
  close(go[0]);
  close(done[1]);

  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  sigaddset(&ends, SIGHUP);
  sigprocmask(SIG_BLOCK, &ends, NULL);
  signal(SIGPIPE, SIG_IGN);
  int signals = signalfd(-1, &ends, SFD_CLOEXEC);
  bool well = false, mounted = false;
  device = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
  snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
  if (signals < 0)
    perror("signalfd");
  else if (device < 0)
    perror("open /dev/fuse");
  else if (mount("silent", mountpoint, "fuse", MS_RDONLY | MS_NOSUID | MS_NODEV, options))
    fprintf(stderr, "mount %s: %m\n", mountpoint);
  else
    mounted = true;
  if (mounted && write(go[1], "", 1) == 1) well = run(signals, done[0], child, mode);

  // The victim may hang in a request until the device is closed, so it is waited for after that.
  kill(child, SIGKILL);
  if (mounted && umount2(mountpoint, MNT_DETACH) && errno != EINVAL) {
    fprintf(stderr, "umount %s: %m\n", mountpoint);
    well = false;
  }
  if (device >= 0) close(device);
  waitpid(child, NULL, 0);
  return well ? 0 : 1;
}
