"""What `epigram check --execute` puts in front of a foreign script: this file becomes its `sitecustomize`.

Hooks of Python's own audit refuse connections, other programs, and, while an artifact is scored, files that scoring has
no business with; each refusal is a line in a file. Native code does not ask these hooks: it is kept from the same files
by the kernel, where Linux has Landlock, without a line. Only the standard library is at hand.
"""

import os
import struct
import sys
from typing import Any

LOG = "EPIGRAM_GUARD_LOG"
"""Environment variable: the file that refusals are written to."""

READABLE = "EPIGRAM_GUARD_READABLE"
"""Environment variable: places that may be read, apart from those of Python and of the system; without it all may."""

_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
_NATIVE = ("system", "popen", "execv", "execve", "execvp", "posix_spawn", "fork", "open", "fopen", "socket", "connect")
_HARMLESS = ("uname", "nvidia-smi", "ldconfig", "lscpu", "gcc", "cc", "c++", "g++", "ld", "objdump")
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls of Landlock, the same on all machines
_READ_FILE = 1 << 2
_NO_NEW_PRIVILEGES = 38
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/opt/rocm")


def install() -> None:
    """Refuse from here on, in this process and in Python processes that it starts."""
    log, readable = os.environ[LOG], os.environ.get(READABLE)
    places = None if readable is None else _places(readable.split(os.pathsep))
    if places is not None:
        _confine(places)
    writing = [False]  # the refusal itself opens a file

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if writing[0] or (words := _refused(event, arguments, places)) is None:
            return
        writing[0] = True
        try:
            with open(log, "a", encoding="utf-8", errors="replace") as file:
                file.write(" ".join(words.split()) + "\n")
        finally:
            writing[0] = False
        raise PermissionError(f"refused while a record is checked: {words}")

    sys.addaudithook(hook)
    _guard_fork_exec(hook)


def _refused(event: str, arguments: tuple[Any, ...], places: list[str] | None) -> str | None:
    """Kind and words of what is refused, None for what is not."""
    if event in _NETWORK:
        return f"network {event} {arguments[1:]!r}"
    if event in _PROGRAMS or event == "fork_exec":
        command = _command(event, arguments)
        return None if _is_known(command, places is not None) else f"process {event} {' '.join(command)[:200]}"
    if event == "ctypes.dlsym" and str(arguments[1]) in _NATIVE:
        return f"process {event} {arguments[1]}"
    if event == "open" and places is not None and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not any(path == place or path.startswith(place.rstrip("/") + "/") for place in places):
            return f"data {path}"
    return None


def can_confine() -> bool:
    """Whether this system has Landlock."""
    return sys.platform == "linux" and _system_call(_CREATE, None, 0, 1) > 0


def _system_call(number: int, *arguments: Any) -> int:
    import ctypes

    return ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)


def _confine(places: list[str]) -> None:
    """Let the kernel refuse to read files elsewhere, for this process and its children; nothing where it cannot.

    By Landlock (linux/landlock.h): a set of rules that handles reading, a rule for each place, and an end to gaining
    privileges, without which no rules are taken.
    """
    if not can_confine():
        return
    import ctypes

    rules = _system_call(_CREATE, struct.pack("<Q", _READ_FILE), 8, 0)
    for place in filter(os.path.exists, places):
        handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        _system_call(_ADD, rules, 1, struct.pack("<Qi", _READ_FILE, handle), 0)
        os.close(handle)
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _system_call(_RESTRICT, rules, 0)
    os.close(rules)


def _places(named: list[str]) -> list[str]:
    """Where a script may read while it scores: Python, its libraries, the system, and what is named."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    places = [*named, *python, *_SYSTEM, *sys.path, *libraries]
    return sorted({os.path.realpath(place) for place in filter(None, places)})


def _command(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Words of a command, the program that is really started first."""
    if event in ("os.system", "pty.spawn", "os.startfile"):
        words = arguments[0] if isinstance(arguments[0], list | tuple) else arguments[:1]
        return [_text(word) for word in words]
    if event == "os.spawn":
        arguments = arguments[1:]
    return [_text(arguments[0]), *(_text(word) for word in list(arguments[1])[1:])]


def _text(word: Any) -> str:
    return os.fsdecode(word) if isinstance(word, str | bytes | os.PathLike) else str(word)


def _is_known(command: list[str], scoring: bool) -> bool:
    """Programs that tell of the machine or compile kernels, and, when a run is scored at its end, the script itself."""
    program = os.path.basename(command[0]) if command else ""
    if os.path.realpath(command[0] if command else "") == os.path.realpath(sys.executable):
        return not scoring and len(command) > 1 and os.path.realpath(command[1]) == os.path.realpath(sys.argv[0])
    if program == "git":
        words = command[3:] if command[1:2] == ["-C"] else command[1:]
        return words[:1] in (["ls-files"], ["rev-parse"], ["status"])
    return program in _HARMLESS


def _guard_fork_exec(hook: Any) -> None:
    """Python starts programs by a function that tells the audit nothing."""
    import _posixsubprocess

    start = _posixsubprocess.fork_exec

    def fork_exec(*arguments: Any) -> Any:
        hook("fork_exec", (arguments[1][0], arguments[0]))  # the first place where the program may lie, and the words
        return start(*arguments)

    _posixsubprocess.fork_exec = fork_exec
