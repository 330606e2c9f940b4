"""The kernel that the notebooks of one run share, and with it the processes that live as long as a
kernel does.
"""

import contextlib
import os
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

# no warning at each start that the loopback is not encrypted, no traceback of a kernel that is
# ended in the middle of a cell; no trace in the user's history
QUIET = ["--IPKernelApp.log_level=CRITICAL", "--HistoryManager.hist_file=:memory:"]


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels are installed on this machine; papermill takes
    it as `km`.
    """

    def __init__(self):
        super().__init__(
            kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
        )
        self.clients = []
        self.answers = False  # one that still starts tells an interrupt in many lines

    def client(self, **options):
        self.clients.append(super().client(**options))  # papermill leaves its own open
        return self.clients[-1]

    def prepare(self, folder: Path, log: Path) -> None:
        """Start it, or empty the names that another notebook left; it works in `folder` and logs to
        `log`.

        It gets this process's BEYOND_DPO_ variables. Raises RuntimeError if it cannot.
        """
        told = {name: value for name, value in os.environ.items() if name.startswith("BEYOND_DPO_")}
        code = (
            f"get_ipython().reset(); import logging, os; os.environ |= {told}; "
            f"os.chdir({str(folder)!r}); "
        )
        code += (
            f"logging.basicConfig(filename={str(log)!r}, level='INFO', force=True); del logging, os"
        )
        if (answer := run_sync(self._answer)(code))["status"] != "ok":
            raise RuntimeError(f"the kernel cannot be prepared: {answer}")

    async def _answer(self, code: str) -> dict:
        if not self.has_kernel:
            await self.start_kernel(extra_arguments=QUIET)
        client = self.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=120)
            self.answers = True
            return (await client.execute(code, silent=True, reply=True, timeout=60))["content"]
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        while self.clients:
            self.clients.pop().stop_channels()

    def end(self) -> None:
        """End it, which closes what it opened, and then all processes that are left below this
        one.
        """
        import psutil

        self._hang_up()
        if self.has_kernel:
            run_sync(self.shutdown_kernel)(now=not self.answers)
        for how in ("terminate", "kill"):
            left = psutil.Process().children(recursive=True)
            for process in left:
                with contextlib.suppress(psutil.Error):
                    getattr(process, how)()
            psutil.wait_procs(left, timeout=3)
