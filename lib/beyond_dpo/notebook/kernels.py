"""The kernels that notebooks are executed in: fresh ones of this very interpreter."""

import contextlib
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager


class OwnKernelManager(AsyncKernelManager):
    """Start kernels of this interpreter, whatever kernels are installed on this machine."""

    def __init__(self, **options):
        super().__init__(**options, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def options(log: Path) -> list[str]:
    """Return the arguments of a kernel whose library logs to the file `log`."""
    logs = f"__import__('logging').basicConfig(filename={str(log)!r}, level='INFO', force=True)"
    return [
        f"--IPKernelApp.exec_lines={logs}",
        # no warning at each start that the loopback is not encrypted, and no traceback of a kernel
        # that is ended in the middle of a cell
        "--IPKernelApp.log_level=CRITICAL",
        "--HistoryManager.hist_file=:memory:",  # no trace in the user's history
        "--InteractiveShell.colors=nocolor",  # of tracebacks, which go to logs
    ]


def end_children() -> None:
    """End all processes below this one: first in words, those that stay by force."""
    import psutil

    for way in ("terminate", "kill"):
        left = psutil.Process().children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.Error):
                getattr(process, way)()
        psutil.wait_procs(left, timeout=3)
