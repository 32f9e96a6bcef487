/* Loaded before the C library (LD_PRELOAD), it takes from every file system what FAT, network
   drives and mounted object stores lack: links, locks, permissions, flushing of folders. They
   answer with the error number in LACKING. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int lacking(void) {
  errno = atoi(getenv("LACKING"));
  return -1;
}

int symlink(const char *target, const char *path) { return lacking(); }
int symlinkat(const char *target, int folder, const char *path) { return lacking(); }
int link(const char *path, const char *other) { return lacking(); }
int linkat(int a, const char *path, int b, const char *other, int flags) { return lacking(); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return lacking(); }
int flock(int file, int operation) { return lacking(); }
int chmod(const char *path, mode_t mode) { return lacking(); }
int fchmod(int file, mode_t mode) { return lacking(); }

/* NFS: somebody still reads a file of the folder. */
int rmdir(const char *path) {
  errno = ENOTEMPTY;
  return -1;
}

int fsync(int file) {
  struct stat status;
  if (fstat(file, &status) == 0 && S_ISDIR(status.st_mode)) return lacking();
  return syscall(SYS_fsync, file);
}
