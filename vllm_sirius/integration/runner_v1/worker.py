"""The CPU worker with Sirius's model runner. Attaches to ``vllm.v1.worker.cpu_worker``."""

from __future__ import annotations

from vllm.v1.worker import cpu_worker

from vllm_sirius.integration.hook_engine import install
from vllm_sirius.integration.installed_hooks import worker_hooks
from vllm_sirius.integration.lookahead import assert_lookahead_reserved
from vllm_sirius.integration.runner_v1.model_runner import SiriusCPUModelRunner


class SiriusCPUWorker(cpu_worker.CPUWorker):
    """Upstream's CPU worker, except for the class of its model runner."""

    def init_device(self) -> None:
        """Builds the runner. Upstream names its class by a module global, which is swapped for the call alone."""
        assert_lookahead_reserved(self.vllm_config)
        install(worker_hooks())
        upstream = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SiriusCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = upstream
