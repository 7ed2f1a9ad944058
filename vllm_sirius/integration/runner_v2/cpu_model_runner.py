"""Model Runner V2 on CPU. Subclasses ``vllm.v1.worker.cpu.model_runner.CPUModelRunner``."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_sirius.integration.load_target import load_target


class SiriusCPUModelRunnerV2(CPUModelRunner):
    """Upstream's runner, except that the target's FFN rows are read before vLLM packs the weights."""

    speculator: Any

    def load_model(self, load_dummy_weights: bool = False, *args: Any, **kwargs: Any) -> None:
        """As upstream, with a target that Sirius has loaded."""
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        with self.jit_warmup_registry.activate():
            target = load_target(self.vllm_config)
        self.speculator.expect(target)
        super().load_model(load_dummy_weights, *args, model=target.model, **kwargs)

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        """As upstream, and the draft's copies are made again."""
        with self.speculator.reload.loading(is_checkpoint_format):
            super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)
