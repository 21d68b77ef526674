"""Few files stay open, whatever is read, and threads do not disturb each other."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxkd.data.target_readers import Readers, array_record

FILES, RECORDS = 6, 50


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    paths = [folder / f"{number}.array_record" for number in range(FILES)]
    for number, path in enumerate(paths):
        writer = array_record().ArrayRecordWriter(str(path), "group_size:1")
        for i in range(RECORDS):
            writer.write(f"{number}:{i}".encode())
        writer.close()
    return paths


def open_files(paths):
    """How often this process has the files open."""
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("needs /proc")
    found = []
    for link in links.iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:
            continue  # that of this listing
    return sum(found.count(str(path)) for path in paths)


def test_records_come_in_the_order_asked_for(paths):
    readers = Readers()
    assert readers.read(paths[2], [3, 0, 3]) == [b"2:3", b"2:0", b"2:3"]
    readers.close()


def test_few_files_stay_open_and_the_last_used_ones(paths):
    readers = Readers(limit=2)
    for number in (0, 1, 2, 1, 3, 4, 1):
        assert readers.read(paths[number], [7]) == [f"{number}:7".encode()]
        assert len(readers) <= 2 and open_files(paths) == len(readers)
    assert open_files([paths[1], paths[4]]) == 2
    readers.close()
    assert open_files(paths) == 0
    assert readers.read(paths[0], [1]) == [b"0:1"]
    readers.close()


def test_threads_read_together_while_files_are_closed(paths):
    readers = Readers(limit=1)

    def read(i):
        number = i % FILES
        found = readers.read(paths[number], [i % RECORDS, 0])
        if i % 40 == 0:
            readers.close()
        return found == [f"{number}:{i % RECORDS}".encode(), f"{number}:0".encode()]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(600)))
    assert open_files(paths) <= 1
    readers.close()
    assert open_files(paths) == 0


def test_a_file_that_is_read_is_closed_when_it_was_read(paths, monkeypatch):
    readers = Readers(limit=1)
    held = readers._take(paths[0])
    readers.read(paths[1], [0])
    readers.close()
    assert open_files(paths) == 1
    assert held.reader.read([0]) == [b"0:0"]
    readers._give_back(held)
    assert open_files(paths) == 0


def test_what_cannot_be_opened_says_why(tmp_path):
    readers = Readers()
    with pytest.raises(FileNotFoundError):
        readers.read(tmp_path / "none", [0])
    with pytest.raises(IsADirectoryError):
        readers.read(tmp_path, [0])
    assert len(readers) == 0


def test_what_failed_is_opened_anew(tmp_path, paths):
    path = tmp_path / "file"
    path.write_bytes(b"no records" * 10000)
    readers = Readers()
    with pytest.raises((RuntimeError, IndexError)):
        readers.read(path, [0])
    assert len(readers) == 0 and open_files([path]) == 0
    path.write_bytes(paths[1].read_bytes())
    assert readers.read(path, [4]) == [b"1:4"]
    readers.close()


def test_no_file_at_all_is_no_limit():
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        Readers(limit=0)
