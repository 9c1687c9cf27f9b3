import os
import stat
import threading

import pytest

from atoll.fleet.files import PUBLIC, write_atomic


def test_a_file_is_private_whatever_the_umask(tmp_path) -> None:
    before = os.umask(0)
    try:
        write_atomic(tmp_path / "a" / "key", b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "key").stat().st_mode) == 0o600
    write_atomic(tmp_path / "cert", b"two", PUBLIC)
    assert stat.S_IMODE((tmp_path / "cert").stat().st_mode) & 0o044


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_a_part(tmp_path) -> None:
    path = tmp_path / "file"
    whole = [bytes([value]) * 100_000 for value in range(2)]
    write_atomic(path, whole[0])
    done = threading.Event()

    def turn() -> None:
        for number in range(40):
            write_atomic(path, whole[number % 2])
        done.set()

    writer = threading.Thread(target=turn)
    writer.start()
    while not done.is_set():
        assert path.read_bytes() in whole
    writer.join()
