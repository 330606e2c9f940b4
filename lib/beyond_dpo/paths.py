"""Absolute paths of the project, so that the working directory never matters."""

import errno
import os
import shutil
from pathlib import Path


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default).expanduser().resolve()


ROOT = _folder("BEYOND_DPO_ROOT", Path(__file__).resolve().parents[2])
NOTEBOOKS = ROOT / "notebooks"
FIGURES = _folder("BEYOND_DPO_FIGURES", ROOT / "figures")
PUBLISHED = ROOT / "data" / "published"  # numbers as printed in the papers
FIXTURES = ROOT / "data" / "fixtures"  # invented rows for tests and the smoke profile
FROZEN = ROOT / "data" / "frozen"  # small measured results, committed
ARTIFACTS = _folder("BEYOND_DPO_ARTIFACTS", ROOT / "artifacts")  # everything computed, git-ignored
CACHE = _folder("BEYOND_DPO_CACHE", Path("~/.cache/beyond_dpo"))  # downloaded archives, converted models


def link(source: str | Path, target: str | Path, least: int = 0) -> None:
    """Give a file a second name, or a copy where it is smaller than `least` bytes or another file system's."""
    source = os.path.realpath(source)
    try:
        if os.path.getsize(source) < least:
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, which appears whole (and on the disk) or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
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
