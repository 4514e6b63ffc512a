/* Counts what a process does to the files under one folder, and hurts it at one of these operations.

   Loaded before libc (LD_PRELOAD), so that torch's and safetensors' writes count like Python's. `hurt_arm` names the
   folder, the operation (from 1; 0: none) and the harm; the process that calls it is counted, not its children. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEFORE, HALF, AFTER, FULL }; /* killed before it, in the middle of what it writes, after it; the disk is full */

static char root[4096];
static long wanted;
static int harm;
static pid_t owner;
static atomic_long seen;

void hurt_arm(const char *folder, long at, int how) {
    snprintf(root, sizeof root, "%s", folder);
    wanted = at, harm = how, owner = getpid(), seen = 0;
}

long hurt_count(void) { return seen; }

static void die(void) { kill(getpid(), SIGKILL); }

static int below(const char *path) {
    size_t n = strlen(root);
    return n && owner == getpid() && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int inside_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int inside(int folder, const char *path) {
    return path && (path[0] == '/' ? below(path) : folder == AT_FDCWD ? 0 : inside_fd(folder));
}

/* Counts one operation. True: the disk is full, and the caller fails with ENOSPC. */
static int counted(int takes_room) {
    long now = ++seen;
    if (!wanted) return 0;
    if (harm == FULL) return now >= wanted && takes_room;
    if (now == wanted && harm == BEFORE) die();
    return 0;
}

static void after(void) {
    if (wanted && seen == wanted && (harm == AFTER || harm == HALF)) die();
}

static int halved(void) { return wanted && seen == wanted && harm == HALF; }

static void *found(void **known, const char *name) {
    if (!*known) *known = dlsym(RTLD_NEXT, name);
    return *known;
}

#define REAL(name) ((__typeof__(&name))found(&real_##name, #name))
#define KNOWN(name) static void *real_##name
#define FAIL(error) do { errno = error; return -1; } while (0)
#define MUTATING(cond, room, call) \
    do { \
        int in = (cond); \
        if (in && counted(room)) FAIL(ENOSPC); \
        int result = (call), saved_errno = errno; \
        if (in) after(); \
        errno = saved_errno; \
        return result; \
    } while (0)

#define OPENS(name) \
    KNOWN(name); \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        MUTATING((flags & (O_CREAT | O_TRUNC)) && inside(AT_FDCWD, path), flags & O_CREAT, REAL(name)(path, flags, mode)); \
    }
#define OPENS_AT(name) \
    KNOWN(name); \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        MUTATING((flags & (O_CREAT | O_TRUNC)) && inside(folder, path), flags & O_CREAT, \
                 REAL(name)(folder, path, flags, mode)); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define FOPENS(name) \
    KNOWN(name); \
    FILE *name(const char *restrict path, const char *restrict mode) { \
        int in = strpbrk(mode, "wa+") && inside(AT_FDCWD, path); \
        if (in && counted(1)) { errno = ENOSPC; return NULL; } \
        FILE *result = REAL(name)(path, mode); \
        if (in) after(); \
        return result; \
    }
FOPENS(fopen)
FOPENS(fopen64)

#define WRITES(name, parameters, arguments, halves) \
    KNOWN(name); \
    ssize_t name parameters { \
        int in = inside_fd(fd); \
        if (in && counted(1)) FAIL(ENOSPC); \
        if (in && halved()) { (void)!REAL(name) halves; die(); } \
        ssize_t result = REAL(name) arguments; \
        int saved_errno = errno; \
        if (in) after(); \
        errno = saved_errno; \
        return result; \
    }
WRITES(write, (int fd, const void *data, size_t n), (fd, data, n), (fd, data, n / 2))
WRITES(pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), (fd, data, n / 2, at))
WRITES(pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at), (fd, data, n / 2, at))
WRITES(writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), (fd, parts, n / 2))

KNOWN(fsync);
int fsync(int fd) { MUTATING(inside_fd(fd), 0, REAL(fsync)(fd)); }
KNOWN(fdatasync);
int fdatasync(int fd) { MUTATING(inside_fd(fd), 0, REAL(fdatasync)(fd)); }
KNOWN(ftruncate);
int ftruncate(int fd, off_t n) { MUTATING(inside_fd(fd), 0, REAL(ftruncate)(fd, n)); }
KNOWN(ftruncate64);
int ftruncate64(int fd, off64_t n) { MUTATING(inside_fd(fd), 0, REAL(ftruncate64)(fd, n)); }
KNOWN(rename);
int rename(const char *from, const char *to) { MUTATING(inside(AT_FDCWD, to), 0, REAL(rename)(from, to)); }
KNOWN(renameat);
int renameat(int a, const char *from, int b, const char *to) { MUTATING(inside(b, to), 0, REAL(renameat)(a, from, b, to)); }
KNOWN(unlink);
int unlink(const char *path) { MUTATING(inside(AT_FDCWD, path), 0, REAL(unlink)(path)); }
KNOWN(unlinkat);
int unlinkat(int folder, const char *path, int flags) {
    MUTATING(inside(folder, path), 0, REAL(unlinkat)(folder, path, flags));
}
KNOWN(rmdir);
int rmdir(const char *path) { MUTATING(inside(AT_FDCWD, path), 0, REAL(rmdir)(path)); }
KNOWN(mkdir);
int mkdir(const char *path, mode_t mode) { MUTATING(inside(AT_FDCWD, path), 1, REAL(mkdir)(path, mode)); }
KNOWN(mkdirat);
int mkdirat(int folder, const char *path, mode_t mode) {
    MUTATING(inside(folder, path), 1, REAL(mkdirat)(folder, path, mode));
}
