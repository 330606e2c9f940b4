"""Files that appear whole, and are on the disk before anything else relies on them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def link_file(source: str | Path, target: str | Path, least: int = 0) -> None:
    """Give a file a second name, or make a copy of it.

    It is copied if it is smaller than `least` bytes, or where its file system can give no second
    name. A target that is there is replaced as a whole, never written into: it may be another
    file's second name. Doing it once more changes nothing, so that an attempt that was interrupted
    can be repeated.
    """
    source = Path(os.path.realpath(source))
    target = Path(target)
    if target.exists() and not target.is_symlink() and target.samefile(source):
        return
    with _partial(target) as partial:
        small = source.stat().st_size < least
        if small or not _try_link(source, partial):
            shutil.copyfile(source, partial)
            sync(partial)


def _try_link(source: Path, target: Path) -> bool:
    """Try to give a file a second name; return whether its file system can."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, which appears whole (and on the disk) or not at all."""
    if isinstance(content, str):
        content = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path) as partial:
        partial.write_bytes(content)
        sync(partial)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write beside `path`; once it is written, it takes its place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # an earlier process with the same number may have left it
    try:
        yield partial
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot do it for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def share_weights(folder: Path) -> None:
    """Give a folder's *.safetensors the mode of any new file there, as the umask says.

    The library itself writes them for their owner alone (0600), whatever the umask.
    """
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
