"""The kernel of the notebooks: this interpreter, reached by nobody else."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psutil

from erlib.machine import kernel


def test_a_kernel_is_reached_by_files_and_leaves_none(tmp_path: Path) -> None:
    async def visit() -> tuple[Path, str, str]:
        manager = kernel.Kernel()
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            told = await client.execute_interactive(
                "import sys; print(sys.executable)", store_history=False, timeout=60
            )
            assert told["content"]["status"] == "ok"
            process = psutil.Process(manager.provisioner.pid)
            return Path(manager.ip).parent, str(manager.transport), process.exe()
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    with kernel.environment(tmp_path / ("long " * 30)):
        sockets, transport, program = asyncio.run(visit())
        assert sockets.is_dir()
    assert transport == "ipc"
    assert Path(program) == Path(sys.executable).resolve()
    assert not sockets.exists()
