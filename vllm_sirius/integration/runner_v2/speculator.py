"""Sirius's speculator on Model Runner V2. Subclasses ``DraftModelSpeculator`` of ``vllm.v1.worker.gpu``.

One engine step: the target verifies, the statistics count what it accepted, one set of neurons is chosen, and up to
``kernel_size - 1`` one-token steps of the same modules follow, each a replay of one captured graph on a GPU. Nothing in
the step waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer, init_attn_backend
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.drafting.device_batch import DraftBatch, DraftTable
from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.integration.kv_groups import require_attention
from vllm_sirius.integration.load_target import read_target
from vllm_sirius.integration.lookahead import assert_lookahead_reserved
from vllm_sirius.integration.measure_costs import measure_costs
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.runner_v2.model_state import mix_into
from vllm_sirius.integration.runner_v2.request_state import SiriusRequestState
from vllm_sirius.integration.speculative_config import sirius_config
from vllm_sirius.integration.target import LoadedTarget, install_switch, make_draft
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.sparsity.selector import NeuronSelector


class SiriusSpeculator(DraftModelSpeculator):
    """Drafts with the target's own modules on the target's own KV pages.

    Args:
        vllm_config: The engine's config.
        device: Where the model runs.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        assert_lookahead_reserved(vllm_config)
        config = sirius_config(vllm_config.speculative_config)
        assert config is not None
        self.config = config
        self.table = DraftTable(self.max_num_reqs, device)
        self.ffns: ReducedFFNs
        self.reload: TargetReload
        self._target: LoadedTarget | None = None
        self._selector: NeuronSelector | None = None
        self._state: SiriusRequestState
        self._draft: DraftModel
        self._layer_names: set[str] = set()
        self.decode_cudagraph_manager: SpeculatorCudaGraphManager | None = None
        cached: Any = self.draft_logits  # type: ignore[has-type]
        if cached is not None:
            # One more row, for those of a batch that draft nothing.
            self.draft_logits = cached.new_zeros(self.max_num_reqs + 1, *cached.shape[1:])
        self._rows = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
        self._batch = DraftBatch(
            self.table,
            self.input_buffers.input_ids,
            self.input_buffers.positions,
            self.input_buffers.seq_lens,
            self.idx_mapping,
            self.draft_tokens,
            vllm_config.model_config,
        )

    @property
    def max_model_len(self) -> int:
        """Longest text. Read anew each time: vLLM may fit it to the KV cache after the speculator was built."""
        longest: int = self.vllm_config.model_config.max_model_len
        return longest

    @max_model_len.setter
    def max_model_len(self, longest: int) -> None:
        """Upstream's constructor keeps a copy here, which is of no use."""

    draft_max_seq_len = max_model_len

    def expect(self, target: LoadedTarget) -> None:
        """Hands over a target that a loader has read, where its weights can no longer be read afterwards."""
        self._target = target

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """The draft is the target itself; upstream's `load_model`, which calls this, is replaced as well."""
        return target_model

    def load_model(self, target_model: nn.Module) -> None:
        """Makes the target its own draft.

        Args:
            target_model: The loaded target.

        Raises:
            SiriusUnsupportedError: If it cannot be reduced.
            SiriusIntegrationError: If the draft turns out not to be reduced.
        """
        target = self._target or read_target(target_model, self.vllm_config)
        self._target = None
        self.loaded_target = target
        self.reload = target.reload
        self.model: Any = target_model
        # No layer belongs to the draft alone: the runner must treat all of them as the target's.
        self.draft_attn_layer_names: set[str] = set()
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self._layer_names = set(layers)
        self.ffns, self._selector = install_switch(target, self.vllm_config)
        longest = self.vllm_config.model_config
        self._state = SiriusRequestState(self.config, self.table, self.ffns.statistics, longest)
        mix_into(target_model, self.vllm_config, self._state)
        self._draft = make_draft(target, self.ffns, self.vllm_config, self.device)

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        """As upstream, with the target's own layers: they get metadata builders, hence graph buffers, of the draft's own."""
        require_attention(kv_cache_config)
        self.model_state = model_state
        self.kv_cache_config = kv_cache_config
        self.attn_groups, self.attn_cg_support, _ = init_attn_backend(
            kv_cache_config, self.attn_vllm_config, self.device, active_layer_names=self._layer_names
        )
        self.block_tables = block_tables
        self.target_input_buffers = target_input_buffers
        self.target_attn_groups = target_attn_groups

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """One full graph per batch size for the draft step, where the target decodes by full graphs."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.decode_cudagraph_manager = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )

    def capture(self) -> None:
        """Captures one draft step per batch size; a draft replays it, so every draft length is served."""
        assert self.decode_cudagraph_manager is not None
        self.idx_mapping.fill_(-1)
        self._batch.step.zero_()
        self.decode_cudagraph_manager.capture(
            self._draft_step,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing Sirius draft CUDA graphs",
        )
        self._batch.step.zero_()

    def measure_costs(self) -> StepCosts:
        """What passes cost, on request: this runner's drafts adapt by what whole steps take, and need no such measurement."""
        if self.ffns.statistics is not None:
            # The passes belong to no request, so nothing of them may be counted.
            self.ffns.statistics.begin_step([])
        return measure_costs(self.model, self._draft, self.vllm_config, self.device)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts for every row that emitted a token; arguments as upstream's `BaseSpeculator.propose`.

        Returns:
            ``int64 [num_reqs, kernel_size - 1]``; a row that drafted less is filled up with 0, which the rejection sampler
            knows by the request's draft length.
        """
        num_reqs = input_batch.num_reqs
        num_steps = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if not self.reload.refresh_if_stale():
            num_steps = 0
        if not dummy_run:
            self._state.check_room(input_batch, num_steps, self.block_tables)
            self._state.end_pass(input_batch, num_sampled)
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)
        positions = (input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs]).long()
        self._batch.begin(num_reqs, positions, last_sampled, num_sampled[:num_reqs] > 0)
        self._prepare_query_locations(num_reqs)
        if self._selector is not None and not dummy_run:
            statistics = self._selector.statistics
            rows = self.idx_mapping[:num_reqs]
            self._selector.select(torch.where(rows >= 0, rows, statistics.nobody))
        skip_attn = dummy_run and skip_attn_for_dummy_run
        # A profiling run measures memory, which one step shows as well as all of them.
        self._run_draft(input_batch, 1 if is_profile else num_steps, dp_sync_state, skip_attn, is_profile)
        return self.draft_tokens[:num_reqs]

    def _prepare_query_locations(self, num_reqs: int) -> None:
        """One token per row; rows that only fill a graph up get none."""
        self.input_buffers.query_start_loc.copy_(self._rows.clamp_max(num_reqs))

    def _run_draft(
        self, input_batch: Any, num_steps: int, dp_sync_state: Any, skip_attn: bool, need_eager: bool
    ) -> None:
        num_reqs = input_batch.num_reqs
        sync, num_batch_tokens = (
            self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs)
            if dp_sync_state is not None
            else (None, num_reqs)
        )
        descriptor, sync = dispatch_cg_and_sync_dp(
            self.decode_cudagraph_manager,
            num_reqs,
            num_batch_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=need_eager,
            dp_sync_state=sync,
        )
        across = sync.num_tokens_across_dp if sync is not None else None
        for step in range(num_steps):
            metadata = by_layer = None
            if not skip_attn:
                slots = self.block_tables.compute_slot_mappings(
                    self.idx_mapping[:num_reqs],
                    self.input_buffers.query_start_loc[: num_reqs + 1],
                    self.input_buffers.positions[:num_reqs],
                    descriptor.num_tokens,
                )
                by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
                metadata = self._build_uniform_attn_metadata(
                    num_reqs=num_reqs,
                    batch_desc=descriptor,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
                    step=step + 1,
                )
            if descriptor.cg_mode == CUDAGraphMode.FULL:
                assert self.decode_cudagraph_manager is not None
                self.decode_cudagraph_manager.run_fullgraph(descriptor)
            else:
                self._draft_step(num_reqs, descriptor.num_tokens, metadata, by_layer, across, descriptor.cg_mode)

    def _draft_step(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_mode: CUDAGraphMode,
        num_speculative_steps: int = 1,
    ) -> None:
        """One token of every row through the reduced target; what a captured graph holds."""
        hidden_states = self._draft.forward(
            self.input_buffers.input_ids[:num_tokens],
            self.input_buffers.positions[:num_tokens],
            attn_metadata,
            cudagraph_runtime_mode=cudagraph_mode,
            num_tokens_across_dp=num_tokens_across_dp,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        )
        token_ids = self._choose(self._draft.compute_logits(hidden_states[:num_reqs]), num_reqs)
        self._batch.advance(num_reqs, token_ids)

    def _choose(self, logits: torch.Tensor, num_reqs: int) -> torch.Tensor:
        """Picks each row's draft token, ``int64 [num_reqs]``; remembers the distribution of drawn ones for the verdict."""
        if self.draft_logits is None:
            return logits.argmax(dim=-1)
        rows = self.idx_mapping[:num_reqs]
        kept = torch.where(rows >= 0, rows, self.max_num_reqs)
        self.draft_logits[kept, self._batch.step] = logits.to(self.draft_logits.dtype)
        drawn: torch.Tensor = gumbel_sample(
            logits,
            rows.clamp_min(0),
            self.temperature,
            self.seeds,
            self.input_buffers.positions[:num_reqs],
            apply_temperature=True,
            is_drafting=True,
            use_fp64=self.use_fp64_gumbel,
        )
        return drawn
