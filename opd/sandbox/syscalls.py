"""System calls that a sandboxed program is refused: a small seccomp filter, in the kernel's own byte code.

Namespaces and limits do the work; the filter closes what they leave open. Numbers are from the kernel's tables
(`arch/x86/entry/syscalls/syscall_64.tbl`, `include/uapi/asm-generic/unistd.h`).
"""

from __future__ import annotations

import errno
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
_CLONE, _CLONE3, _IOCTL, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (16, 29), (41, 198), (53, 199)
_NEW_NAMESPACE = 0x7E020000  # the CLONE_NEW* flags
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # would type into a terminal

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENT_0_AT, _ARGUMENT_1_AT = 0, 4, 16, 24  # in struct seccomp_data, little-endian


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, for this machine's kind of processor.

    Raises ConfigError for a kind other than x86_64 and aarch64.
    """
    machine = machine or platform.machine()
    if machine not in ("x86_64", "aarch64"):
        raise ConfigError(f'sandbox: "bwrap" knows the system calls of x86_64 and aarch64, not those of {machine}')
    column = ("x86_64", "aarch64").index(machine)
    denied, clone = _op(_RETURN, _ERRNO | errno.EPERM), _CLONE[column]
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
    code += [_op(_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    code += _only_if(clone, _ARGUMENT_0_AT, [_op(_ANY_BIT, _NEW_NAMESPACE, 0, 1), denied])
    for call in (_SOCKET, _SOCKETPAIR):
        # No network is there anyway; but VSOCK knows no network namespaces, and others (ALG) are kernel surface.
        code += _only_if(call[column], _ARGUMENT_0_AT, [_op(_EQUAL, socket.AF_UNIX, 1, 0), denied])
    typing = [_op(_EQUAL, _TIOCSTI, 1, 0), _op(_EQUAL, _TIOCLINUX, 0, 1), denied]
    code += _only_if(_IOCTL[column], _ARGUMENT_1_AT, typing)
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _only_if(number: int, argument_at: int, rule: list[bytes]) -> list[bytes]:
    """A rule about the lower half of one argument of one call; what the rule does not refuse is allowed."""
    body = [_op(_LOAD, argument_at), *rule, _op(_RETURN, _ALLOW)]
    return [_op(_EQUAL, number, 0, len(body)), *body]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
