"""The CPU worker with Sirius's model runners. Attaches to ``vllm.v1.worker.cpu_worker``."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.worker import cpu_worker

from vllm_sirius.integration import native
from vllm_sirius.integration.hook_engine import install
from vllm_sirius.integration.installed_hooks import worker_hooks
from vllm_sirius.integration.lookahead import assert_lookahead_reserved
from vllm_sirius.integration.measure_costs import announce, costs_of_worker
from vllm_sirius.integration.speculative_config import resolved_config


class SiriusCPUWorker(cpu_worker.CPUWorker):
    """Upstream's CPU worker, except for the class of its model runner and what that one measures."""

    def init_device(self) -> None:
        """Builds the runner. Upstream names its class by a module global, which is swapped for the call alone."""
        assert_lookahead_reserved(self.vllm_config)
        module, runner = self._runner_of_sirius()
        upstream = module.CPUModelRunner
        module.CPUModelRunner = runner
        try:
            super().init_device()
        finally:
            module.CPUModelRunner = upstream

    def compile_or_warm_up_model(self) -> Any:
        """As upstream; then measures the costs that adaptive lengths and prompt lookup are judged by."""
        times = super().compile_or_warm_up_model()
        config = resolved_config(self.vllm_config.speculative_config)
        if (config.adaptive or config.prompt_lookup_tokens) and not self.use_v2_model_runner:
            started = time.perf_counter()
            costs = self.model_runner.measure_costs()
            announce(costs, config, self.model_runner.draft_model.predicted_cost, time.perf_counter() - started)
        return times

    def sirius_costs(self) -> dict[str, dict[str, float]]:
        """Measured costs, for `LLM.collective_rpc`: ``draft_seconds`` by rows and ``target_seconds`` by tokens."""
        return costs_of_worker(self)

    def sirius_offload(self) -> dict[str, float]:
        """What was streamed so far, for `LLM.collective_rpc`; empty where nothing is. See `StreamReport.as_dict`."""
        report = getattr(self.model_runner, "stream_report", None)
        return {} if report is None else report.as_dict()

    def _runner_of_sirius(self) -> tuple[Any, type]:
        """The module whose global names the runner, and the class to put there."""
        if self.use_v2_model_runner:
            from vllm.v1.worker.cpu import model_runner

            from vllm_sirius.integration.runner_v2.cpu_model_runner import SiriusCPUModelRunnerV2

            return model_runner, SiriusCPUModelRunnerV2
        from vllm_sirius.integration.runner_v1.model_runner import SiriusCPUModelRunner

        if not native.is_registered():
            install(worker_hooks())
        return cpu_worker, SiriusCPUModelRunner
