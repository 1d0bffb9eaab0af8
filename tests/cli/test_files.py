"""Files that commands write: whole or not at all, whatever stands at their place."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from entrgi.files import check_distinct, check_target, replacing, write_text


def read_fifo(path: Path) -> tuple[threading.Thread, list[bytes]]:
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, received


def test_pipes_are_written_into_and_stay_pipes(tmp_path):
    fifo = tmp_path / "pipe.jsonl"
    os.mkfifo(fifo)
    check_target("--trace", fifo)
    thread, received = read_fifo(fifo)
    write_text(fifo, "text\n")
    thread.join(timeout=10)
    assert received == [b"text\n"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.jsonl"]


@pytest.mark.parametrize("name", ["null", "link"])
def test_devices_are_written_into_and_stay_devices(tmp_path, name):
    device = Path("/dev/null")
    if name == "link":
        device = tmp_path / "link"
        device.symlink_to("/dev/null")
    before = Path("/dev/null").stat()
    check_target("--trace", device)
    write_text(device, "text")
    after = Path("/dev/null").stat()
    assert stat.S_ISCHR(after.st_mode)
    assert (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)


def test_standard_output_can_be_named(tmp_path):
    code = "from pathlib import Path; from entrgi.files import write_text; write_text(Path('/dev/stdout'), 'text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "text", "")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755])
def test_modes_are_kept(tmp_path, mode):
    file = tmp_path / "a.txt"
    file.write_text("old")
    file.chmod(mode)
    write_text(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "new")
        (tmp_path / "plain.txt").write_text("x")
        assert os.umask(mask) == mask  # as it was
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_nobody_else_reads_what_is_being_written(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    file.chmod(0o600)
    with replacing(file) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_temporary_names_cannot_be_foreseen_or_shared(tmp_path):
    with replacing(tmp_path / "a.png") as first, replacing(tmp_path / "a.png") as second:
        assert first != second
        assert first.parent == second.parent == tmp_path
        assert str(os.getpid()) not in first.name
        assert first.suffix == ".png"
        first.write_text("1")
        second.write_text("2")


def test_links_at_old_temporary_names_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / f".a.{os.getpid()}.txt").symlink_to(precious)
    write_text(tmp_path / "a.txt", "new")
    assert precious.read_text() == "keep"


def test_threads_write_one_file(tmp_path):
    """Whole texts, one of them; nothing stays behind."""
    texts = [str(i) * 50_000 for i in range(8)]
    failed: list[BaseException] = []

    def work(text):
        try:
            for _ in range(5):
                write_text(tmp_path / "a.txt", text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (tmp_path / "a.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b))[1])
    write_text(tmp_path / "a.txt", "new")
    assert events == ["fsync", "replace", "fsync"]


def test_files_that_cannot_be_renamed_are_written_in_place(tmp_path, monkeypatch):
    """As one file mounted into a container is."""
    file = tmp_path / "a.txt"
    file.write_text("old and longer")

    def busy(_source, _target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    write_text(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(OSError, match="busy"):
        write_text(tmp_path / "other.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_names_of_the_greatest_length_are_written(tmp_path):
    for name in ("a" * 255, "a" * 251 + ".txt", "a." + "b" * 253):
        check_target("--trace", tmp_path / name)
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 256, "cannot be a file: File name too long|has a name too long"),
        ("é" * 128, "cannot be a file: File name too long|has a name too long"),
        ("a/" * 3000 + "x", "cannot be a file: File name too long"),
        ("a\0b", r"'.*a\\x00b' cannot be a file: .*null"),
        ("", "is a folder"),
        ("sub", "is a folder"),
        ("no/x", "no folder '.*no' to write to"),
        ("circle", "cannot be a file: .*(loop|level)"),
        ("socket", "is a socket or a disk"),
        ("file/x", "no folder|Not a directory|cannot be a file"),
    ],
)
def test_targets_that_cannot_be_written_are_named_before(tmp_path, monkeypatch, name, message):
    import socket

    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(ValueError, match=f"--trace: .*({message})"):
            check_target("--trace", tmp_path / name if name != "" else Path(name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_protected_files_and_folders(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    file.chmod(0o444)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_target("--trace", file)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    with pytest.raises(ValueError, match=r"the folder .* cannot be written to"):
        check_target("--trace", folder / "x")


def test_one_file_has_one_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("x")
    Path("soft").symlink_to("a")
    os.link("a", "hard")
    for other in ("a", "./a", "soft", "hard", str(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"--plot: '.*' is the file of --trace, too"):
            check_distinct({"--trace": Path("a"), "--json": None, "--plot": Path(other)})
    with pytest.raises(ValueError, match=r"--plot: .* is the file of --trace, too"):
        check_distinct({"--trace": Path("new"), "--plot": tmp_path / "sub" / ".." / "new"})
    check_distinct({"--trace": Path("/dev/null"), "--plot": Path("/dev/null")})
    check_distinct({"--trace": Path("a"), "--plot": Path("b")})
