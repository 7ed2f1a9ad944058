"""Sirius's part in upstream's model state. Mixes into a class of ``vllm.v1.worker.gpu.model_states``."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_sirius.integration.runner_v2.rejection_sampler import SiriusRejectionSampler
from vllm_sirius.integration.runner_v2.request_state import SiriusRequestState


class SiriusModelState(ModelState):
    """Follows the requests, announces every forward pass to the statistics, and puts Sirius's rejection sampler in place.

    Upstream reports real batches to `preprocess_state` and then all, dummies included, to `prepare_inputs`; that is how a
    dummy is told from a real one.

    Attributes:
        sirius: The state that it feeds.
    """

    sirius: SiriusRequestState
    _real_batch: Any = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """As upstream, and admits the request to Sirius."""
        super().add_request(req_index, new_req_data)
        self.sirius.add_request(req_index, new_req_data)

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        """As upstream; called for real batches alone."""
        super().preprocess_state(input_batch, *args, **kwargs)
        self._real_batch = input_batch

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """As upstream, and announces the pass."""
        if input_batch is self._real_batch:
            self.sirius.begin_pass(input_batch)
        else:
            self.sirius.begin_dummy_pass()
        self._real_batch = None
        return super().prepare_inputs(input_batch, req_states)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """The plain sampler as it is, and Sirius's rejection sampler."""
        speculative_config = self.vllm_config.speculative_config
        return sampler, SiriusRejectionSampler(sampler, speculative_config, self.device, self.sirius.table)


def mix_into(model: nn.Module, vllm_config: Any, sirius: SiriusRequestState) -> None:
    """Makes the runner build a model state with Sirius in it, through the model's own seam `get_model_state_cls`.

    Args:
        model: The target.
        vllm_config: The engine's config.
        sirius: The state to feed.
    """
    upstream = resolve_model_state_cls(vllm_config, model)
    mixed = type(f"Sirius{upstream.__name__}", (SiriusModelState, upstream), {"sirius": sirius})
    seam: Any = model
    seam.get_model_state_cls = lambda: mixed
