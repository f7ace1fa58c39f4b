"""What the Linux kernel offers to confine a process without root: namespaces, Landlock and seccomp, by system call.

This file runs inside the sandbox's own interpreter, so it imports the standard library only. Sources: the manual pages
unshare(2), pivot_root(2), landlock(7) and seccomp(2), and the kernel's headers for the constants.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)

# prctl
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 22, 38
# unshare and clone: mount, cgroup, UTS, IPC, user, PID and network namespace
_NEW_MOUNT, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_ALL_NEW = 0x7E020000
# mount
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXECUTION = 1, 2, 4, 8
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_DETACH, _AT_RECURSIVE = 2, 0x8000
# The same on every architecture, as numbers from 424 on are.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    """`syscall(2)`; every integer is passed as 64 bits."""
    return _LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))


def die_with_parent(signal: int) -> None:
    """Asks the kernel to send `signal` to this process when the thread that started it ends."""
    _checked(_LIBC.prctl(_SET_DEATH_SIGNAL, ctypes.c_ulong(signal), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def enter_namespaces(as_root: bool, inner_id: int) -> None:
    """New mount, PID, network, IPC and UTS namespaces; without root inside a new user namespace.

    Args:
      inner_id: user and group id inside a new user namespace.

    Raises:
      OSError: the machine does not allow it.
    """
    flags = _NEW_MOUNT | _NEW_PID | _NEW_NETWORK | _NEW_IPC | _NEW_UTS
    if as_root:
        _checked(_LIBC.unshare(flags), "unshare")
    else:
        user, group = os.geteuid(), os.getegid()
        _checked(_LIBC.unshare(flags | _NEW_USER), "unshare of a user namespace")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{inner_id} {user} 1"),
            ("gid_map", f"{inner_id} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    # Nothing mounted from here on shows outside.
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [os.fsencode(text) if text is not None else None for text in (source, target, kind, options)]
    result = _LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _checked(result, f"mount of {target}")


def change_root(
    mount_point: str,
    readable: Iterable[str],
    hidden: Iterable[str],
    devices: Iterable[str],
    work: str,
    work_options: str,
) -> None:
    """A new root with nothing but `readable` and `devices`, at their own paths and read-only, and an empty `work`.

    Args:
      mount_point: an existing folder; it stays as it is outside.
      hidden: folders inside of `readable` that are to be empty.
      work: path of the folder that can be written, which lives in memory.
      work_options: mount options of its tmpfs: size, number of files, owner.

    Raises:
      OSError: a mount is refused.
    """
    _mount("tmpfs", mount_point, "tmpfs", _NO_SUID | _NO_DEVICES, "mode=755,size=1m,nr_inodes=4096")
    for path in [*readable, *devices]:
        target = mount_point + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(path, target, None, _BIND | (_RECURSIVE if os.path.isdir(path) else 0))
    for path in hidden:
        _mount("tmpfs", mount_point + path, "tmpfs", _NO_SUID | _NO_DEVICES, "mode=755,size=4k,nr_inodes=1")
    os.makedirs(mount_point + work)
    # struct mount_attr: set, clear, propagation, user namespace. Existing flags stay, some of which may not be changed.
    attributes = struct.pack("=QQQQ", _READ_ONLY | _NO_SUID, 0, 0, 0)
    result = _syscall(_MOUNT_SETATTR, -100, os.fsencode(mount_point), _AT_RECURSIVE, attributes, len(attributes))
    _checked(result, "mount_setattr")
    _mount("tmpfs", mount_point + work, "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXECUTION, work_options)
    os.chdir(mount_point)
    # The old root is put under the new one at the same place, and taken away from there: see pivot_root(2).
    _checked(_LIBC.syscall(ctypes.c_long(_pivot_root_number()), b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", _DETACH), "umount of the old root")
    os.chdir(work)


def _pivot_root_number() -> int:
    return 155 if platform.machine() == "x86_64" else 41  # 41 on every architecture with the generic table


def drop_privileges() -> None:
    """Gives up all capabilities for good, and keeps other processes of the user from looking into this one."""
    _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    header = struct.pack("=Ii", 0x20080522, 0)
    _checked(_LIBC.capset(header, bytes(24)), "capset")
    _checked(_LIBC.prctl(_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


_READ_FILE, _READ_FOLDER, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_EXECUTE, _MAKE_CHARACTER_DEVICE, _MAKE_SOCKET, _MAKE_BLOCK_DEVICE = 1 << 0, 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _DEVICE_CONTROL = 1 << 14, 1 << 15


def restrict_files(readable: Iterable[str], devices: Iterable[str], work: str) -> None:
    """Landlock: this process and its children may read `readable`, read and write `devices`, and do as they like in
    `work`, except to execute and to make devices or sockets. Where the kernel knows how (6.7 and 6.12), neither TCP nor
    signals to processes outside either.

    Raises:
      OSError: no Landlock, or one before version 3 (Linux 6.2), which does not see that a file is truncated.
    """
    version = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    _checked(version, "landlock_create_ruleset")
    if version < 3:
        raise OSError(errno.ENOSYS, f"Landlock has version {version}; 3 (Linux 6.2) is the first that holds truncation")
    files = (1 << 15) - 1 | (_DEVICE_CONTROL if version >= 5 else 0)
    attributes = struct.pack("=Q", files)
    if version >= 4:
        attributes += struct.pack("=Q", 3)
    if version >= 6:
        attributes += struct.pack("=Q", 3)
    rules = _checked(_syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    own = files & ~(_EXECUTE | _MAKE_CHARACTER_DEVICE | _MAKE_SOCKET | _MAKE_BLOCK_DEVICE)
    grants = [(path, _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)) for path in readable]
    grants += [(path, _READ_FILE | _WRITE_FILE | _TRUNCATE) for path in devices]
    for path, access in [*grants, (work, own)]:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, folder)
        _checked(_syscall(_LANDLOCK_ADD, rules, 1, rule, 0), f"landlock_add_rule for {path}")
        os.close(folder)
    _checked(_syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


# System calls of x86_64 that no program in the sandbox needs: new programs, sockets, other processes, mounts, keys, the
# clock and the machine, memory that no limit counts, and parts of the kernel with a record of holes.
# fmt: off
_REFUSED = {
    "execve": 59, "execveat": 322, "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288,
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_send_signal": 424,
    "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440, "setpriority": 141, "sched_setparam": 142,
    "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314, "ioprio_set": 251,
    "migrate_pages": 256, "move_pages": 279, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166,
    "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "mount_setattr": 442, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "mknod": 133, "mknodat": 259, "fanotify_init": 300, "quotactl": 179, "quotactl_fd": 443, "add_key": 248,
    "request_key": 249, "keyctl": 250, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159,
    "clock_adjtime": 305, "reboot": 169, "swapon": 167, "swapoff": 168, "sethostname": 170, "setdomainname": 171,
    "iopl": 172, "ioperm": 173, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "kexec_file_load": 320, "acct": 163, "syslog": 103, "personality": 135, "modify_ldt": 154, "vhangup": 153,
    "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "io_setup": 206, "vmsplice": 278,
}
# Without namespaces the process sees its user's other processes and files, so these go too. Landlock does not hold
# changes of a file's owner, mode, times and attributes.
_REFUSED_IN_THE_OPEN = {
    "tkill": 200, "setsid": 112, "setpgid": 109, "chmod": 90, "fchmod": 91, "fchmodat": 268,
    "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "utime": 132, "utimes": 235,
    "futimesat": 261, "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
    "lremovexattr": 198, "fremovexattr": 199,
}
# fmt: on
_KILL, _SOCKETPAIR, _CLONE, _PRCTL, _FCNTL, _IOCTL, _PRLIMIT, _CLONE3 = 62, 53, 56, 157, 72, 16, 302, 435
_FORK, _VFORK, _TGKILL, _SIGQUEUEINFO, _TGSIGQUEUEINFO = 57, 58, 234, 129, 297
_LAST_KNOWN = 456  # later system calls are as if the kernel did not have them
_CLONE_THREAD = 0x00010000
_X86_64 = 0xC000003E
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
# Classic BPF: load a word of struct seccomp_data, jump, return.
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06


def seccomp_filter(own_process: int, in_namespaces: bool, may_fork: bool) -> bytes:
    """The filter as an array of struct sock_filter (8 bytes each), for x86_64.

    Args:
      own_process: without namespaces, the only process that may be sent a signal.
      may_fork: false refuses child processes and leaves threads.
    """

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)

    refuse = instruction(_RETURN, _ERRNO | errno.EPERM)
    allow = instruction(_RETURN, _ALLOW)

    def call(number: int, body: Sequence[bytes]) -> list[bytes]:
        """`body`, which must return, for one system call."""
        return [instruction(_JUMP_EQUAL, number, 0, len(body)), *body]

    def argument(index: int) -> bytes:
        return instruction(_LOAD, 16 + 8 * index)  # the lower half: the kernel reads no more of these arguments

    def unless_equal(index: int, values: Sequence[int]) -> list[bytes]:
        """Refuses a call whose argument is none of `values`."""
        tests = [instruction(_JUMP_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
        return [argument(index), *tests, refuse, allow]

    def if_equal(index: int, values: Sequence[int]) -> list[bytes]:
        tests = [instruction(_JUMP_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
        return [argument(index), *tests, allow, refuse]

    def clone_body() -> list[bytes]:
        body = [argument(0), instruction(_JUMP_ANY_BIT, _ALL_NEW, 0, 1), refuse]
        if not may_fork:
            body += [instruction(_JUMP_ANY_BIT, _CLONE_THREAD, 1, 0), refuse]
        return [*body, allow]

    program = [
        instruction(_LOAD, 4),
        instruction(_JUMP_EQUAL, _X86_64, 1, 0),
        instruction(_RETURN, _KILL_PROCESS),  # the 32-bit entry, whose numbers mean other calls
        instruction(_LOAD, 0),
        *[instruction(_JUMP_GREATER, _LAST_KNOWN, 0, 1), instruction(_RETURN, _ERRNO | errno.ENOSYS)],
        *call(_CLONE3, [instruction(_RETURN, _ERRNO | errno.ENOSYS)]),  # its flags lie in memory; libc falls back
        *call(_CLONE, clone_body()),
        *call(_SOCKETPAIR, unless_equal(0, [1])),  # AF_UNIX, which event loops use
        *call(_PRLIMIT, unless_equal(0, [0, own_process])),
    ]
    numbers = list(_REFUSED.values())
    if not may_fork:
        numbers += [_FORK, _VFORK]
    if not in_namespaces:
        numbers += _REFUSED_IN_THE_OPEN.values()
        for number in (_KILL, _TGKILL, _SIGQUEUEINFO, _TGSIGQUEUEINFO):
            program += call(number, unless_equal(0, [own_process]))
        # A file can be told to send a signal to its owner: F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP.
        program += call(_FCNTL, if_equal(1, [8, 10, 15])) + call(_IOCTL, if_equal(1, [0x8901, 0x8902]))
        program += call(_PRCTL, if_equal(0, [_SET_DEATH_SIGNAL]))
    for number in numbers:
        program += call(number, [refuse])
    return b"".join([*program, allow])


def restrict_system_calls(in_namespaces: bool, may_fork: bool) -> None:
    """Seccomp: refuses what no program in the sandbox needs, from here on and in all children.

    Raises:
      OSError: the kernel has no seccomp filters, or this is no x86_64.
    """
    if platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"the seccomp filter is written for x86_64, not for {platform.machine()}")
    filters = seccomp_filter(os.getpid(), in_namespaces, may_fork)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("@HP", len(filters) // 8, ctypes.addressof(buffer))
    _checked(_LIBC.prctl(_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "prctl(PR_SET_SECCOMP)")
