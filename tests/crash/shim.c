/* Make one writing system call below one folder fail, or die there. Built and preloaded by shim.py.
 *
 * Every wrapper asks `verdict` and then calls the libc function of the same name. Calls are counted from 1 since
 * `crash_arm`; only calls on paths (or descriptors of paths) below the folder count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 1, KILL, SHORT, FULL };      /* crash_arm's mode, numbered as in shim.py */
enum { NAMES, GROWS, WRITES };             /* kinds of calls: a full disk refuses the last two */
enum { PASS, REFUSE, HALF, TORN };         /* verdicts; the last two of calls that write */
enum { KEPT = 1 << 16 };

static char root[PATH_MAX];
static size_t root_length;
static long target;
static int mode, code;
static atomic_long seen;
static struct { const char *call; char path[232]; } calls[KEPT];

void crash_arm(const char *folder, long at, int how, int error) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    target = at, mode = how, code = error;
    atomic_store(&seen, 0);
}
long crash_count(void) { return atomic_load(&seen); }
const char *crash_call(long n) { return n < 1 || n > KEPT ? "" : calls[n - 1].call; }
const char *crash_path(long n) { return n < 1 || n > KEPT ? "" : calls[n - 1].path; }

/* The path of a descriptor, or of a name relative to one, in `place`; is it below the folder? */
static int below(int fd, const char *path, char *place) {
    char link[64];
    ssize_t length = 0;
    if (!path || path[0] != '/') {
        if (fd == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        length = readlink(link, place, PATH_MAX - 1);
        if (length < 0) return 0;
        if (path) place[length++] = '/';
    }
    snprintf(place + length, PATH_MAX - length, "%s", path ? path : "");
    return !strncmp(place, root, root_length) && (place[root_length] == '/' || !place[root_length]);
}

static int verdict(const char *call, int kind, int fd, const char *path) {
    char place[PATH_MAX];
    int before = errno;
    if (!root_length) return PASS;
    int counts = below(fd, path, place);
    errno = before;
    if (!counts) return PASS;
    long n = atomic_fetch_add(&seen, 1) + 1;
    if (n <= KEPT) {
        calls[n - 1].call = call;
        snprintf(calls[n - 1].path, sizeof calls->path, "%.230s", place[root_length] ? place + root_length + 1 : ".");
    }
    if (!target || n < target || (n > target && mode != FULL)) return PASS;
    if (mode == KILL && kind == WRITES) return TORN;
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == SHORT) return kind == WRITES ? HALF : PASS;
    if (mode == FULL && kind == NAMES) return PASS;
    errno = mode == FULL ? ENOSPC : code;
    return REFUSE;
}

#define REAL(name) ({ static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
#define SIMPLE(type, bad, name, kind, fd, path, parameters, arguments) \
    type name parameters { return verdict(#name, kind, fd, path) ? (bad) : REAL(name) arguments; }
/* A call that moves `size` bytes: half of them where the verdict is HALF, and death after that where it is TORN. */
#define MOVES(name, fd, size, parameters, whole, half) \
    ssize_t name parameters { \
        int found = verdict(#name, WRITES, fd, NULL); \
        if (found == REFUSE) return -1; \
        if (found == PASS || (found == HALF && (size) < 2)) return REAL(name) whole; \
        ssize_t moved = (size) / 2 ? REAL(name) half : 0; \
        if (found == TORN) kill(getpid(), SIGKILL); \
        return moved; \
    }

/* -- names --------------------------------------------------------------------------------------------------------- */
SIMPLE(int, -1, rename, NAMES, AT_FDCWD, new, (const char *old, const char *new), (old, new))
SIMPLE(int, -1, renameat, NAMES, to, new, (int from, const char *old, int to, const char *new), (from, old, to, new))
SIMPLE(int, -1, renameat2, NAMES, to, new, (int from, const char *old, int to, const char *new, unsigned flags),
       (from, old, to, new, flags))
SIMPLE(int, -1, unlink, NAMES, AT_FDCWD, path, (const char *path), (path))
SIMPLE(int, -1, unlinkat, NAMES, fd, path, (int fd, const char *path, int flags), (fd, path, flags))
SIMPLE(int, -1, remove, NAMES, AT_FDCWD, path, (const char *path), (path))
SIMPLE(int, -1, rmdir, NAMES, AT_FDCWD, path, (const char *path), (path))
SIMPLE(int, -1, chmod, NAMES, AT_FDCWD, path, (const char *path, mode_t bits), (path, bits))
SIMPLE(int, -1, fchmod, NAMES, fd, NULL, (int fd, mode_t bits), (fd, bits))
SIMPLE(int, -1, fchmodat, NAMES, fd, path, (int fd, const char *path, mode_t bits, int flags), (fd, path, bits, flags))
SIMPLE(int, -1, chown, NAMES, AT_FDCWD, path, (const char *path, uid_t user, gid_t group), (path, user, group))
SIMPLE(int, -1, lchown, NAMES, AT_FDCWD, path, (const char *path, uid_t user, gid_t group), (path, user, group))
SIMPLE(int, -1, fchown, NAMES, fd, NULL, (int fd, uid_t user, gid_t group), (fd, user, group))
SIMPLE(int, -1, fchownat, NAMES, fd, path, (int fd, const char *path, uid_t user, gid_t group, int flags),
       (fd, path, user, group, flags))
SIMPLE(int, -1, utimensat, NAMES, fd, path, (int fd, const char *path, const struct timespec times[2], int flags),
       (fd, path, times, flags))
SIMPLE(int, -1, futimens, NAMES, fd, NULL, (int fd, const struct timespec times[2]), (fd, times))
SIMPLE(int, -1, utimes, NAMES, AT_FDCWD, path, (const char *path, const struct timeval times[2]), (path, times))
SIMPLE(int, -1, mkdir, GROWS, AT_FDCWD, path, (const char *path, mode_t bits), (path, bits))
SIMPLE(int, -1, mkdirat, GROWS, fd, path, (int fd, const char *path, mode_t bits), (fd, path, bits))
SIMPLE(int, -1, link, GROWS, AT_FDCWD, new, (const char *old, const char *new), (old, new))
SIMPLE(int, -1, linkat, GROWS, to, new, (int from, const char *old, int to, const char *new, int flags),
       (from, old, to, new, flags))
SIMPLE(int, -1, symlink, GROWS, AT_FDCWD, new, (const char *old, const char *new), (old, new))
SIMPLE(int, -1, symlinkat, GROWS, to, new, (const char *old, int to, const char *new), (old, to, new))

/* -- opening, where it may write ----------------------------------------------------------------------------------- */
#define MAY_WRITE(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define OPENS(name, fd, parameters, bits_too, plain) \
    int name parameters { \
        mode_t bits = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; va_start(rest, flags); bits = va_arg(rest, mode_t); va_end(rest); \
        } \
        if (MAY_WRITE(flags) && verdict(#name, GROWS, fd, path)) return -1; \
        return bits ? REAL(name) bits_too : REAL(name) plain; \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, bits), (path, flags, 0))
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, bits), (path, flags, 0))
OPENS(openat, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, bits), (fd, path, flags, 0))
OPENS(openat64, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, bits), (fd, path, flags, 0))
SIMPLE(int, -1, creat, GROWS, AT_FDCWD, path, (const char *path, mode_t bits), (path, bits))
SIMPLE(int, -1, creat64, GROWS, AT_FDCWD, path, (const char *path, mode_t bits), (path, bits))
#define STREAM(name) \
    FILE *name(const char *restrict path, const char *restrict how) { \
        return strpbrk(how, "wa+") && verdict(#name, GROWS, AT_FDCWD, path) ? NULL : REAL(name)(path, how); \
    }
STREAM(fopen)
STREAM(fopen64)

/* -- content ------------------------------------------------------------------------------------------------------- */
MOVES(write, fd, size, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
MOVES(pwrite, fd, size, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
MOVES(pwrite64, fd, size, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
      (fd, data, size / 2, at))
MOVES(writev, fd, (size_t)count, (int fd, const struct iovec *parts, int count), (fd, parts, count),
      (fd, parts, count / 2))
MOVES(pwritev, fd, (size_t)count, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at),
      (fd, parts, count / 2, at))
MOVES(sendfile, to, size, (int to, int from, off_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2))
MOVES(sendfile64, to, size, (int to, int from, off64_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2))
MOVES(copy_file_range, to, size, (int from, off64_t *in, int to, off64_t *out, size_t size, unsigned flags),
      (from, in, to, out, size, flags), (from, in, to, out, size / 2, flags))
SIMPLE(int, -1, fsync, GROWS, fd, NULL, (int fd), (fd))
SIMPLE(int, -1, fdatasync, GROWS, fd, NULL, (int fd), (fd))
SIMPLE(int, -1, ftruncate, GROWS, fd, NULL, (int fd, off_t size), (fd, size))
SIMPLE(int, -1, ftruncate64, GROWS, fd, NULL, (int fd, off64_t size), (fd, size))
SIMPLE(int, -1, truncate, GROWS, AT_FDCWD, path, (const char *path, off_t size), (path, size))
SIMPLE(int, -1, fallocate, GROWS, fd, NULL, (int fd, int how, off_t from, off_t size), (fd, how, from, size))
SIMPLE(int, -1, fallocate64, GROWS, fd, NULL, (int fd, int how, off64_t from, off64_t size), (fd, how, from, size))
SIMPLE(int, errno, posix_fallocate, GROWS, fd, NULL, (int fd, off_t from, off_t size), (fd, from, size))
SIMPLE(int, errno, posix_fallocate64, GROWS, fd, NULL, (int fd, off64_t from, off64_t size), (fd, from, size))

/* By the system call: the loader maps memory before dlsym can be used. */
#define MAPS(name) \
    void *name(void *hint, size_t size, int may, int flags, int fd, off_t at) { \
        int shared = fd >= 0 && (may & PROT_WRITE) && (flags & MAP_SHARED); \
        if (shared && verdict(#name, GROWS, fd, NULL)) return MAP_FAILED; \
        return (void *)syscall(SYS_mmap, hint, size, may, flags, fd, at); \
    }
MAPS(mmap)
MAPS(mmap64)
