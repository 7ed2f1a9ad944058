"""Sirius on Model Runner V1. Subclasses ``vllm.v1.worker.cpu_model_runner.CPUModelRunner``."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.integration.kv_groups import require_attention
from vllm_sirius.integration.load_target import load_target
from vllm_sirius.integration.measure_costs import measure_costs
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.runner_v1.attention import is_repeatable, make_repeatable
from vllm_sirius.integration.runner_v1.draft_forward import DraftForward
from vllm_sirius.integration.runner_v1.proposer import SiriusProposer, VerifiedStep
from vllm_sirius.integration.runner_v1.rejection_sampler import SiriusRejectionSampler
from vllm_sirius.integration.runner_v1.seeded_draws import place_generators
from vllm_sirius.integration.speculative_config import METHOD, resolved_config, sirius_config
from vllm_sirius.integration.target import make_draft
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.target.stream_report import StreamReport


class SiriusCPUModelRunner(CPUModelRunner):
    """Upstream's CPU runner whose drafter is the target itself.

    The step is upstream's; three of its seams carry Sirius: `_update_states` (which requests run, and which rows of the
    coming forward pass belong to whom), the rejection sampler, and `propose_draft_token_ids`.
    """

    drafter: SiriusProposer
    draft_model: DraftModel
    rejection_sampler: Any  # of upstream's class until the constructor is done
    _reload: TargetReload

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        config = sirius_config(vllm_config.speculative_config)
        assert config is not None
        self.sirius = config
        self._costs: StepCosts | None = None
        self.stream_report: StreamReport | None = None
        with _AsCustomClass(vllm_config.speculative_config):
            super().__init__(vllm_config, device)
        self.rejection_sampler = SiriusRejectionSampler(self.rejection_sampler, vllm_config.speculative_config)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Loads the target and makes it its own drafter; upstream's version would load it without the FFN check."""
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        target = load_target(self.vllm_config)
        self.model = target.model
        self.loaded_target = target
        if target.streamed_groups:
            assert target.streamed is not None
            self.stream_report = StreamReport(target.streamed)
        self._reload = target.reload
        self.drafter.attach(target)
        self.draft_model = make_draft(target, self.drafter.ffns, self.vllm_config, torch.device("cpu"))

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        """As upstream, and the draft's copies are made again."""
        with self._reload.loading(is_checkpoint_format):
            super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """As upstream, if the draft can write all of it."""
        require_attention(kv_cache_config)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    def _update_states(self, scheduler_output: Any) -> Any:
        corrections = super()._update_states(scheduler_output)
        req_ids = self.input_batch.req_ids
        self.drafter.begin_pass(scheduler_output, self.requests, req_ids)
        self.rejection_sampler.begin_pass(self.drafter.requests.thresholds(req_ids))
        place_generators(self.input_batch.generators, req_ids, self.requests)
        return corrections

    def initialize_metadata_builders(self, kv_cache_config: Any, kernel_block_sizes: list[int]) -> None:
        """As upstream; then, where all else is repeatable, attention no longer depends on what a token shares its pass with."""
        super().initialize_metadata_builders(kv_cache_config, kernel_block_sizes)
        if is_repeatable(resolved_config(self.vllm_config.speculative_config)):
            make_repeatable(self.attn_groups)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, which winds generators back where a sample is thrown away, in a way that generators of a CPU lack.

        Ours are put in place before each step (`seeded_draws`), so upstream is shown none.
        """
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Always: a request near the longest text drafts less, instead of stopping the drafts of the whole batch."""
        return common_attn_metadata is not None

    @torch.inference_mode()
    def propose_draft_token_ids(self, scheduler_output: Any, sampled_token_ids: Any, *unused: Any) -> list[list[int]]:
        """Drafts for every request that emitted tokens in this step.

        Args:
            scheduler_output: The step.
            sampled_token_ids: Tokens emitted per row; an empty list for a row still in prefill.
            unused: The rest of upstream's arguments; the last but one is the target's attention metadata.

        Returns:
            Draft tokens per row.
        """
        if self.stream_report is not None:
            self.stream_report.emitted(sum(map(len, sampled_token_ids)))
        common_attn_metadata = unused[-2]
        batch = self.input_batch
        step = VerifiedStep(
            batch.req_ids,
            sampled_token_ids,
            batch.num_tokens_no_spec,
            batch.token_ids_cpu,
            scheduler_output.num_spec_tokens_to_schedule,
        )
        return self.drafter.propose(step, DraftForward(self, common_attn_metadata, self.draft_model))

    def measure_costs(self) -> StepCosts:
        """What passes cost on this machine: measured at the first call, then followed while the engine runs."""
        if self._costs is None:
            self._costs = measure_costs(self.model, self.draft_model, self.vllm_config, torch.device("cpu"))
            self.drafter.adapt(self._costs)
        return self._costs


class _AsCustomClass:
    """Upstream's constructor knows a closed list of methods; for its time ours is ``custom_class``."""

    def __init__(self, speculative_config: Any) -> None:
        self._config = speculative_config

    def __enter__(self) -> None:
        self._config.method = "custom_class"
        self._config.model = f"{SiriusProposer.__module__}.{SiriusProposer.__qualname__}"

    def __exit__(self, *exc_info: object) -> None:
        self._config.method = self._config.model = METHOD
