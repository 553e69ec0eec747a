/* Adds a delay to every read of the files under SLOW_DISK, as a network disk would: LD_PRELOAD=slow_disk.so.
   The kernel's page cache does not spare the delay. SLOW_DISK_US: microseconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static void delay(int fd) {
  const char *folder = getenv("SLOW_DISK"), *us = getenv("SLOW_DISK_US");
  char link[64], path[4096];
  if (!folder || !us) return;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n > 0 && !strncmp(path, folder, strlen(folder))) usleep((useconds_t)atoi(us));
}

ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
  static ssize_t (*real)(int, void *, size_t, off64_t);
  if (!real) real = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
  delay(fd);
  return real(fd, to, size, at);
}

ssize_t pread(int fd, void *to, size_t size, off_t at) { return pread64(fd, to, size, at); }

ssize_t read(int fd, void *to, size_t size) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
  delay(fd);
  return real(fd, to, size);
}
