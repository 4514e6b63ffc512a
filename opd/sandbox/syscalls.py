"""Seccomp filters in the kernel's own byte code: the system calls that a sandboxed program is refused.

Namespaces and limits do the work; the filter closes what they leave open. Numbers are from the kernel's tables
(`arch/x86/entry/syscalls/syscall_64.tbl`, `include/uapi/asm-generic/unistd.h`).
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct

from opd.errors import ConfigError

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_*

_NUMBERS = {  # name: (x86_64, aarch64)
    # memory that no process's size shows, so that no limit would count it
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "io_uring_setup": (425, 425),
    # other processes of the sandbox, its first one above all
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # new namespaces, in which a program would have capabilities again
    "unshare": (272, 97),
    "setns": (308, 268),
    # parts of the kernel that have no business here
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
_LOCKED = {  # what a process that only computes has no use for; None: this kind of processor has no such call
    # programs and processes
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    # the network, and sockets of this machine that stand in the file system
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # files: to make, change, move or remove any
    "creat": (85, None),
    "openat2": (437, 437),  # its flags stand in memory
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # other processes: their lives, their memory, their files, their share of the processor
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgctl": (71, 187),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    # the machine, for a process of root's
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "fanotify_init": (300, 262),
    "iopl": (172, None),
    "ioperm": (173, None),
}
_OPEN, _OPENAT, _PRLIMIT = (2, None), (257, 56), (302, 261)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_THREAD = 0x10000  # CLONE_THREAD
_CLONE, _CLONE3, _IOCTL, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (16, 29), (41, 198), (53, 199)
_NEW_NAMESPACE = 0x7E020000  # the CLONE_NEW* flags
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # would type into a terminal

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT = 0, 4  # in struct seccomp_data, little-endian
_ARGUMENT_0_AT, _ARGUMENT_1_AT, _ARGUMENT_2_AT = 16, 24, 32


def seccomp_filter(machine: str | None = None) -> bytes:
    """Build the filter as an array of `struct sock_filter`, for this machine's kind of processor.

    Raises ConfigError for a kind other than x86_64 and aarch64.
    """
    column = _column(machine or platform.machine())
    return b"".join([*_refused_calls(column), *_refused_arguments(column), _op(_RETURN, _ALLOW)])


def locked_filter(machine: str | None = None) -> bytes:
    """Build the filter, as `seccomp_filter` does, for a process that only reads and computes.

    It may start threads, but no program and no process, open no socket, open files for reading alone, and reach no
    other process. It keeps what it has open already. Raises as `seccomp_filter` does.
    """
    column = _column(machine or platform.machine())
    denied = _op(_RETURN, _ERRNO | errno.EPERM)
    code = _refused_calls(column)
    for numbers in _LOCKED.values():
        if (number := numbers[column]) is not None:
            code += [_op(_EQUAL, number, 0, 1), denied]
    threads = [_op(_ANY_BIT, _NEW_NAMESPACE, 0, 1), denied, _op(_ANY_BIT, _THREAD, 1, 0), denied]
    code += _only_if(_CLONE[column], _ARGUMENT_0_AT, threads)
    for call, flags_at in ((_OPEN, _ARGUMENT_1_AT), (_OPENAT, _ARGUMENT_2_AT)):
        if (number := call[column]) is not None:
            code += _only_if(number, flags_at, [_op(_ANY_BIT, _WRITES, 0, 1), denied])
    code += _only_if(_PRLIMIT[column], _ARGUMENT_0_AT, [_op(_EQUAL, 0, 1, 0), denied])  # 0: its own limits
    return b"".join([*code, *_refused_arguments(column), _op(_RETURN, _ALLOW)])


def _column(machine: str) -> int:
    """The index of this machine's number among the two of a call."""
    if machine not in ("x86_64", "aarch64"):
        raise ConfigError(f'sandbox: "bwrap" knows the system calls of x86_64 and aarch64, not those of {machine}')
    return ("x86_64", "aarch64").index(machine)


def _refused_calls(column: int) -> list[bytes]:
    """Begin a filter: refuse calls of another kind of processor, and calls that are refused to everybody."""
    denied = _op(_RETURN, _ERRNO | errno.EPERM)
    code = [
        _op(_LOAD, _ARCH_AT),
        _op(_EQUAL, (_X86_64, _AARCH64)[column], 1, 0),
        _op(_RETURN, _KILL),  # 32-bit calls go by other numbers
        _op(_LOAD, _NUMBER_AT),
        *(_op(_AT_LEAST, 0x40000000, 0, 1), denied),  # as do those of x32
    ]
    for numbers in _NUMBERS.values():
        code += [_op(_EQUAL, numbers[column], 0, 1), denied]
    # The flags of clone3 stand in memory, where no filter can read them; without it, glibc uses clone.
    return [*code, _op(_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]


def _refused_arguments(column: int) -> list[bytes]:
    """Refuse some arguments of otherwise allowed calls."""
    denied = _op(_RETURN, _ERRNO | errno.EPERM)
    code = _only_if(_CLONE[column], _ARGUMENT_0_AT, [_op(_ANY_BIT, _NEW_NAMESPACE, 0, 1), denied])
    for call in (_SOCKET, _SOCKETPAIR):
        # No network is there anyway; but VSOCK knows no network namespaces, and others (ALG) are kernel surface.
        code += _only_if(call[column], _ARGUMENT_0_AT, [_op(_EQUAL, socket.AF_UNIX, 1, 0), denied])
    typing = [_op(_EQUAL, _TIOCSTI, 1, 0), _op(_EQUAL, _TIOCLINUX, 0, 1), denied]
    return code + _only_if(_IOCTL[column], _ARGUMENT_1_AT, typing)


def _only_if(number: int, argument_at: int, rule: list[bytes]) -> list[bytes]:
    """Make a rule about the lower half of one argument of one call; what it does not refuse is allowed."""
    body = [_op(_LOAD, argument_at), *rule, _op(_RETURN, _ALLOW)]
    return [_op(_EQUAL, number, 0, len(body)), *body]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
