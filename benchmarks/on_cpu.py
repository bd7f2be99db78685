"""A server on a TensorRT-LLM repository without GPUs: something else has to stand where its engine would."""

from pathlib import Path

from erlib.config import Flow
from erlib.dgx.repository import Launch, RepositoryServer
from erlib.machine.runfolder import RunFolder
from erlib.serving import wheel


class ServerOnCpu(RepositoryServer):
    """Started as the wheel ``nvidia-pytriton`` has it, which has no TensorRT-LLM backend."""

    def __init__(
        self, label: str, repository: Path, port: int, work_dir: Path, flow: Flow = "engine", host: str = "127.0.0.1"
    ):
        super().__init__(label, repository, port, work_dir, gpus=(), flow=flow, host=host)

    @property
    def launch(self) -> Launch:
        root = wheel.installed()
        self._run_folder = self._run_folder or RunFolder()
        command = [
            str(root / "bin" / "tritonserver"),
            *self.options(self.shm_prefix),
            f"--backend-directory={wheel.backend_directory(root, self._run_folder.path)}",
            "--exit-timeout-secs=2",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
        ]
        return Launch(command, wheel.environment())
