"""Where an engine can be found: the default IPC address, the private directory behind it, and the lock on it.

A running engine owns its address by a lock file, so a socket file that a crash left behind is no obstacle and a second
engine on the same address is told so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from pathlib import Path

from protocol.errors import ConfigError

# The kernel's limit for a Unix socket path, without its terminating zero.
_MAX_SOCKET_PATH_BYTES = 107
# The longest name of a socket in an engine's own directory, with the epoch in three digits.
_LONGEST_INNER_NAME = "to-worker-999"
# A client that looks whether an engine is running holds the lock for an instant.
_LOCK_PATIENCE_S = 0.1


def default_directory() -> Path:
    """`$XDG_RUNTIME_DIR/mini-vllm`, else a directory named for the user in the temporary directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "mini-vllm"
    return Path(tempfile.gettempdir()) / f"mini-vllm-{os.getuid()}"


def default_address() -> str:
    """The address that the launcher serves on and that clients look at when neither is told another."""
    return f"ipc://{default_directory() / 'engine.sock'}"


def socket_path(address: str) -> Path:
    """The file behind an `ipc://` address.

    Raises:
        ConfigError: not an `ipc://` address with an absolute path that the kernel can bind.
    """
    if not address.startswith("ipc://") or not address[6:].startswith("/"):
        raise ConfigError(f"--ipc must be ipc:// and an absolute path, such as {default_address()}; got {address!r}")
    path = Path(address[6:])
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"--ipc path is longer than {_MAX_SOCKET_PATH_BYTES} bytes, which no socket can have: {path}")
    return path


def require_short(run_directory: Path) -> None:
    """Raises ConfigError if the sockets in this directory would have longer paths than a socket can have."""
    if len(os.fsencode(run_directory / _LONGEST_INNER_NAME)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the paths of sockets in {run_directory} are longer than {_MAX_SOCKET_PATH_BYTES} bytes; choose an "
            "address in a directory with a shorter path with --ipc"
        )


def private_directory(path: Path) -> Path:
    """Makes `path` a directory that only this user can enter, or checks that it is one.

    Raises:
        ConfigError: it belongs to someone else, others may enter it, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot create the directory {path} for sockets: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise ConfigError(f"{path} is not a directory of this user; choose another address with --ipc")
    if info.st_mode & 0o077:
        raise ConfigError(
            f"{path} can be entered by other users; choose an address in a directory of your own (mode 0700) with --ipc"
        )
    return path


def is_engine_running(address: str) -> bool:
    """Whether some process holds the lock of the address. A socket file alone may be what a crash left behind."""
    try:
        descriptor = os.open(socket_path(address).with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def engine_pid(address: str) -> int | None:
    """The process that owns the address, an engine's launcher, or None if no engine is running there."""
    if not is_engine_running(address):
        return None
    # Written right after the lock was taken: an owner that has only just taken it is not there yet.
    with contextlib.suppress(OSError, ValueError):
        return int(socket_path(address).with_suffix(".lock").read_text())
    return None


class AddressLock:
    """Exclusive ownership of an address, held as long as the process lives or until `release`."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError if another engine holds the address."""
        self._address = address
        self._path = socket_path(address).with_suffix(".lock")
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # An owner that stops unlinks its file: a descriptor opened just before that would lock a file nobody sees.
        while not self._is_current():
            os.close(self._fd)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())

    def _is_current(self) -> bool:
        """Locks the open file and tells whether the path still leads to it."""
        if not self._try_lock():
            owner = os.read(self._fd, 32).decode(errors="replace").strip()
            os.close(self._fd)
            raise ConfigError(
                f"another engine (process {owner or 'unknown'}) is running on {self._address}; "
                "stop it, or choose another address with --ipc"
            )
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _try_lock(self) -> bool:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)

    def release(self) -> None:
        # Unlinked while still locked: whoever opens the path from now on makes a new file.
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
