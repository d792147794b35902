// SPDX-License-Identifier: Apache-2.0
// A process that maps hostile things: what does a program that looks at the mappings of processes make of them, and at which cost?
//
//   attack mappings FOLDER COUNT LENGTH   COUNT mappings of one page of one small file, whose path below FOLDER has about LENGTH bytes:
//                                         folders in folders, then libnccl.so.2. Every second one is code. Says `made N` first: they
//                                         stay below vm.max_map_count
//   attack files FOLDER COUNT SOURCE      COUNT copies of SOURCE, libnccl.so.0 and so on, each with its number as 8 more bytes
//   attack links FOLDER COUNT SOURCE      one copy of SOURCE with COUNT names, libnccl.so.0 and so on, mapped by each of them
//   attack one FILE                       FILE
//   attack moved FILE TARGET              FILE, whose path is a symbolic link to TARGET (absolute) thereafter
//   attack fifo FILE                      FILE, whose path is a FIFO thereafter
//   attack job FOLDER COUNT               not hostile: COUNT processes that have each file of FOLDER mapped twice, once as code, as PyTorch's
//                                         data loaders have theirs
//   attack churn FOLDER SOURCE            a new copy of SOURCE, libnccl.so.N, each 300 ms, for ever; the one before is unmapped and
//                                         removed
//
// It maps the first page, as code. It makes FOLDER where there is none, and leaves its files there. It says `ready` once all is mapped
// (churn: the first one), and exits at the end of its input. It exits with 1 where something failed, and with 2 on wrong usage.
//
// Facts of the kernel: it dies with the thread that started it (PR_SET_PDEATHSIG), not only with the process of that thread. A mapping
// keeps its file after the removal of the path; /proc/PID/maps then has the path with ` (deleted)`. The kernel merges neighbours of
// the same file only where their rights are the same and their offsets follow each other. A process with vm.max_map_count mappings
// gets ENOMEM for more, also from malloc.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096
#define PART 200
#define LONGEST 4000
#define SPARE 100 // mappings that the process may need for itself
#define CHURN_MS 300

static void fail(const char *tried, const char *what) {
  fprintf(stderr, "%s %s: %m\n", tried, what);
  exit(1);
}

static int usage(void) {
  fprintf(stderr, "usage: attack mappings FOLDER COUNT LENGTH | files FOLDER COUNT SOURCE | links FOLDER COUNT SOURCE | one FILE | "
                  "moved FILE TARGET | fifo FILE | job FOLDER COUNT | churn FOLDER SOURCE\n");
  return 2;
}

static long number(const char *text) {
  char *end;
  errno = 0;
  long number = strtol(text, &end, 10);
  if (errno || end == text || *end || number < 1 || number > INT_MAX) exit(usage());
  return number;
}

static void make_folder(const char *folder) {
  if (mkdir(folder, 0755) && errno != EEXIST) fail("mkdir", folder);
}

static char *named(const char *folder, long i) {
  char *path;
  if (asprintf(&path, "%s/libnccl.so.%ld", folder, i) < 0) fail("asprintf", folder);
  return path;
}

static void *map(const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) fail("open", path);
  void *mapped = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
  if (mapped == MAP_FAILED) fail("mmap", path);
  close(file);
  return mapped;
}

static void copy(const char *source, const char *path, const void *more, size_t more_length) {
  int from = open(source, O_RDONLY | O_CLOEXEC);
  if (from < 0) fail("open", source);
  int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
  if (to < 0) fail("create", path);
  // Some file systems have no copy_file_range, and none has it from every other one.
  ssize_t copied;
  do {
    copied = copy_file_range(from, NULL, to, NULL, 1 << 30, 0);
    if (copied < 0) copied = sendfile(to, from, NULL, 1 << 30);
  } while (copied > 0);
  if (copied < 0) fail("copy to", path);
  if (more_length && write(to, more, more_length) != (ssize_t)more_length) fail("write", path);
  close(from);
  close(to);
}

// True at the end of the input, or false after so many milliseconds (-1: never).
static int ended(int milliseconds) {
  struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
  char thrown_away[256];
  for (;;) {
    int polled = poll(&input, 1, milliseconds);
    if (polled == 0) return 0;
    if (polled > 0 && read(STDIN_FILENO, thrown_away, sizeof thrown_away) <= 0) return 1;
  }
}

static void ready(void) {
  puts("ready");
  fflush(stdout);
}

static long most_mappings(void) {
  const char *path = "/proc/sys/vm/max_map_count";
  FILE *file = fopen(path, "r");
  long most;
  if (!file || fscanf(file, "%ld", &most) != 1) fail("read", path);
  fclose(file);
  return most > SPARE ? most - SPARE : 0;
}

static void mappings(const char *folder, long count, long length) {
  make_folder(folder);
  char absolute[PATH_MAX], part[PART + 1];
  if (!realpath(folder, absolute)) fail("realpath", folder);
  if (strlen(absolute) + 1 + length >= LONGEST) {
    errno = ENAMETOOLONG;
    fail("make a path below", folder);
  }
  int at = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (at < 0) fail("open", folder);
  const char *name = "libnccl.so.2";
  long left = length - strlen(name);
  while (left > 1) {
    long bytes = left - 1 < PART ? left - 1 : PART;
    memset(part, 'd', bytes);
    part[bytes] = 0;
    left -= bytes + 1;
    if (mkdirat(at, part, 0755) && errno != EEXIST) fail("mkdir", part);
    int below = openat(at, part, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (below < 0) fail("open", part);
    close(at);
    at = below;
  }
  int file = openat(at, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
  if (file < 0) fail("create", name);
  if (write(file, "hostile\n", 8) != 8) fail("write", name);
  long most = most_mappings(), made = 0;
  for (; made < count && made < most; made++) {
    int rights = made % 2 ? PROT_READ : PROT_READ | PROT_EXEC;
    if (mmap(NULL, PAGE, rights, MAP_PRIVATE, file, 0) == MAP_FAILED) fail("mmap", name);
  }
  close(file);
  printf("made %ld\n", made);
}

static void files(const char *folder, long count, const char *source) {
  make_folder(folder);
  for (uint64_t i = 0; i < (uint64_t)count; i++) {
    char *path = named(folder, i);
    copy(source, path, &i, sizeof i);
    map(path);
    free(path);
  }
}

static void links(const char *folder, long count, const char *source) {
  make_folder(folder);
  char *first = named(folder, 0);
  copy(source, first, NULL, 0);
  map(first);
  for (long i = 1; i < count; i++) {
    char *path = named(folder, i);
    if (link(first, path)) fail("link", path);
    map(path);
    free(path);
  }
  free(first);
}

static void moved(const char *file, const char *target) {
  map(file);
  if (unlink(file)) fail("unlink", file);
  if (symlink(target, file)) fail("symlink", file);
}

static void fifo(const char *file) {
  map(file);
  if (unlink(file)) fail("unlink", file);
  if (mkfifo(file, 0644)) fail("mkfifo", file);
}

static void job(const char *folder, long count) {
  DIR *files = opendir(folder);
  if (!files) fail("open", folder);
  for (struct dirent *entry; (entry = readdir(files));) {
    if (entry->d_type != DT_REG) continue;
    int file = openat(dirfd(files), entry->d_name, O_RDONLY | O_CLOEXEC);
    if (file < 0) fail("open", entry->d_name);
    for (int rights = PROT_READ; rights; rights = rights & PROT_EXEC ? 0 : PROT_READ | PROT_EXEC)
      if (mmap(NULL, PAGE, rights, MAP_PRIVATE, file, 0) == MAP_FAILED) fail("mmap", entry->d_name);
    close(file);
  }
  closedir(files);
  for (long i = 1; i < count; i++) {
    pid_t child = fork();
    if (child < 0) fail("fork", folder);
    if (child) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
  }
}

static void churn(const char *folder, const char *source) {
  make_folder(folder);
  char *before = NULL;
  void *before_mapped = NULL;
  for (long i = 0;; i++) {
    char *path = named(folder, i);
    copy(source, path, NULL, 0);
    void *mapped = map(path);
    if (!before) ready();
    if (ended(CHURN_MS)) return;
    if (before) {
      munmap(before_mapped, PAGE);
      if (unlink(before)) fail("unlink", before);
      free(before);
    }
    before = path;
    before_mapped = mapped;
  }
}

int main(int count, char **arguments) {
  if (count < 3) return usage();
  const char *what = arguments[1], *path = arguments[2];
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (!strcmp(what, "mappings") && count == 5)
    mappings(path, number(arguments[3]), number(arguments[4]));
  else if (!strcmp(what, "files") && count == 5)
    files(path, number(arguments[3]), arguments[4]);
  else if (!strcmp(what, "links") && count == 5)
    links(path, number(arguments[3]), arguments[4]);
  else if (!strcmp(what, "one") && count == 3)
    map(path);
  else if (!strcmp(what, "moved") && count == 4 && arguments[3][0] == '/')
    moved(path, arguments[3]);
  else if (!strcmp(what, "fifo") && count == 3)
    fifo(path);
  else if (!strcmp(what, "job") && count == 4)
    job(path, number(arguments[3]));
  else if (!strcmp(what, "churn") && count == 4)
    return churn(path, arguments[3]), 0;
  else
    return usage();
  ready();
  ended(-1);
  return 0;
}
