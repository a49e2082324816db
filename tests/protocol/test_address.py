"""One engine owns an address, and its directory is private."""

import os
from pathlib import Path

import pytest

from protocol.address import AddressLock, default_address, is_engine_running, private_directory, socket_path
from protocol.errors import ConfigError


def test_second_engine_on_an_address_is_told_who_holds_it(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    lock = AddressLock(address)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        AddressLock(address)
    lock.release()
    AddressLock(address).release()
    assert list(tmp_path.iterdir()) == []


def test_a_left_over_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    (tmp_path / "engine.lock").write_text("12345")
    assert not is_engine_running(address)
    lock = AddressLock(address)
    assert is_engine_running(address)
    assert (tmp_path / "engine.lock").read_text() == str(os.getpid())
    lock.release()
    assert not is_engine_running(address)


def test_directory_is_made_private(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700


def test_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="other users"):
        private_directory(tmp_path)


@pytest.mark.parametrize("address", ["tcp://1.2.3.4:5", "ipc://relative/path", "engine.sock", "ipc:///" + "x" * 200])
def test_an_address_that_cannot_be_bound_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--ipc"):
        socket_path(address)


def test_default_address_is_in_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_address() == f"ipc://{tmp_path}/mini-vllm/engine.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert f"mini-vllm-{os.getuid()}" in default_address()
