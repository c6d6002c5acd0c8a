"""What a process gives up before it runs a program that nobody has read. No import of hapo; Linux alone.

Three means of the kernel, each without root and each for good: a filter of system calls (seccomp) that leaves one
process, one thread, no network, no signal to others, and files open for reading alone; Landlock, which says which
files these are; limits of time, memory and file size (setrlimit). Privileges that the process has go too.

The filter names what is allowed and refuses all else, so that a system call of a later kernel is refused as well.
Hooks and import filters inside Python are no boundary (ctypes goes past them), and none is used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable
from dataclasses import dataclass

CALLS = """
read 0 63, pread64 17 67, readv 19 65, write 1 64, pwrite64 18 68, writev 20 66, lseek 8 62, close 3 57,
fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, getdents64 217 61, dup 32 23, dup2 33 -,
dup3 292 24, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, mmap 9 222, munmap 11 215, mprotect 10 226,
mremap 25 216, madvise 28 233, brk 12 214, mbind 237 235, get_mempolicy 239 236, membarrier 324 283, futex 202 98,
sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, set_robust_list 273 99, rseq 334 293,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, getrandom 318 278, getpid 39 172, getppid 110 173,
gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, uname 63 160, sysinfo 99 179,
exit 60 93, exit_group 231 94
"""
"""System calls that are allowed whatever their arguments: name, number on x86-64, number on ARM64."""

OPEN, OPENAT, IOCTL, FCNTL, PRLIMIT, TGKILL = (2, None), (257, 56), (16, 29), (72, 25), (302, 261), (234, 131)
"""Those that are allowed with some arguments."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of the numbers, and how seccomp calls it."""

WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | (getattr(os, "O_TMPFILE", 0) & ~getattr(os, "O_DIRECTORY", 0))
"""Flags of open: with none of them a file is opened for reading and stays as it is."""

ASKS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""What may be asked of an open file by ioctl: is it a terminal, of which size, how much is there to read, and
whether it stays open in a new program. Others change flags of files that are open for reading alone."""

DESCRIPTORS = (0, 1, 2, 3, 1030)
"""What fcntl may do: copies of descriptors, their flags. Not: send signals, lock, lease."""

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, on every machine."""

EVERY_ACCESS = (1 << 13) - 1
"""Landlock's rights of its first version: execute, write, read, list, remove, make. Those of later versions
(rename between folders, truncate, ioctl of devices) need no rule: the filter refuses the calls."""

READ_FILE, READ_DIR = 1 << 2, 1 << 3

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
LIBC.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int
    """Of one core."""
    memory: int
    """Address space, bytes."""
    output: int
    """Size of any file that it writes, bytes."""


def lacking(*, landlock: bool = True) -> str | None:
    """Why a process cannot be confined on this machine; None where it can."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return f"{platform.system()} on {platform.machine()} has no filter of system calls that is known here"
    if LIBC.prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        return "this kernel has no seccomp"
    if landlock and LIBC.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(1)) < 1:
        return f"this kernel has no Landlock ({os.strerror(ctypes.get_errno())})"
    return None


def confine(limits: Limits, readable: Iterable[str] | None) -> None:
    """Give up for good all that a program does not need; the process must have one thread.

    Args:
        limits: of time, memory and file size.
        readable: files and folders with all that is in them; nothing else can be read. None: no such limit.

    Raises:
        OSError: the kernel refuses; then nothing must be run.
    """
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes with its parent
    _limit(limits)
    _drop_privileges()
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if readable is not None:
        _restrict_files(readable)
    code = ctypes.create_string_buffer(program := _filter())
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    _prctl(22, 2, ctypes.addressof(head))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _limit(limits: Limits) -> None:
    for which, most in (
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_FSIZE, limits.output),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (least, least))


def _drop_privileges() -> None:
    """Those of root, as which one is in many containers."""
    head, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(LIBC.capset(ctypes.c_char_p(head), ctypes.c_char_p(none)), "capset")


def _restrict_files(readable: Iterable[str]) -> None:
    rules = _syscall(CREATE_RULESET, struct.pack("Q", EVERY_ACCESS), 8, 0)
    for path in readable:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        _syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    _syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


def _filter() -> bytes:
    """The filter, a program for the kernel: eight bytes an instruction (code, jump if so, if not, constant)."""
    column, architecture = MACHINES[platform.machine()]
    load, test, mask, give = 0x20, 0x15, 0x54, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, ALU|AND|K, RET|K
    allow, end, refuse, readonly = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.EROFS

    def do(code: int, constant: int, so: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, so, otherwise, constant)

    def argument(n: int) -> bytes:
        """The low half, which is all of an int."""
        return do(load, 16 + 8 * n)

    def one_of(constants: Iterable[int]) -> bytes:
        return b"".join(do(test, constant, 0, 1) + do(give, allow) for constant in constants)

    numbers = [call.split()[1:][column] for call in CALLS.replace("\n", " ").split(",")]
    program = do(load, 4) + do(test, architecture, 1, 0) + do(give, end)  # calls of another architecture
    program += do(load, 0) + one_of(int(number) for number in numbers if number != "-")
    reading = do(mask, WRITING) + one_of([0]) + do(give, readonly)
    for call, body in (
        (OPEN, argument(1) + reading),
        (OPENAT, argument(2) + reading),
        (IOCTL, argument(1) + one_of(ASKS)),
        (FCNTL, argument(1) + one_of(DESCRIPTORS)),
        (PRLIMIT, argument(2) + do(test, 0, 0, 3) + do(load, 16 + 8 * 2 + 4) + one_of([0])),  # asks, sets none
        (TGKILL, argument(0) + one_of([os.getpid()])),  # a signal to itself: abort()
    ):
        if (number := call[column]) is not None:
            body += do(give, refuse)
            program += do(test, number, 0, len(body) // 8) + body
    return program + do(give, refuse)


def _prctl(option: int, *arguments: int) -> None:
    _check(LIBC.prctl(option, *arguments, *[0] * (4 - len(arguments))), f"prctl {option}")


def _syscall(number: int, *arguments: int | bytes) -> int:
    given = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    return _check(LIBC.syscall(ctypes.c_long(number), *given), f"system call {number}")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
