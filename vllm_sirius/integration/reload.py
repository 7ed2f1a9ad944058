"""Weights that are loaded again into a running engine. Attaches to ``vllm.model_executor.model_loader.reload``.

Upstream overwrites a model's weights in place, layer by layer, and processes each layer anew; whoever derived something from
the old weights has to make it again. All ways that bring weights in the format of a checkpoint call the model's
``load_weights``, which is therefore watched on this one model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from vllm_sirius.errors import SiriusUnsupportedError

logger = logging.getLogger("vllm.sirius")


class Copies(Protocol):
    """Copies of weights that can be made only while a layer is loaded, because it is packed afterwards."""

    def begin(self) -> None:
        """Before weights are loaded again."""

    def drop(self) -> None:
        """Gives the memory back: no draft reads the copies."""


class TargetReload:
    """Makes what was derived from a target's weights again when they change.

    Args:
        model: The target, loaded.
        remake: Makes everything again, in place, once weights were loaded.
        copies: Copies that are made while weights load, or ``None`` where the weights stay plain.
        version: Tells by another number that plain weights were overwritten without ``load_weights``.
        fixed: The option that keeps other weights from being loaded, or nothing.

    Attributes:
        usable: Whether drafts can be made of the weights that were loaded last.
    """

    def __init__(
        self,
        model: nn.Module,
        remake: Callable[[], None],
        copies: Copies | None = None,
        version: Callable[[], int] = lambda: 0,
        fixed: str = "",
    ) -> None:
        self._remake = remake
        self._copies = copies
        self._version = version
        self._fixed = fixed
        self._seen_version: int | None = None
        self._loading = False
        self._stale = False
        self.usable = True
        self._after: list[Callable[[], None]] = []
        self._watch(model)

    def drop_copies(self) -> None:
        """Gives the memory of the copies back."""
        if self._copies is not None:
            self._copies.drop()

    def call_after(self, forget: Callable[[], None]) -> None:
        """Registers what else must forget the old weights.

        Args:
            forget: Called each time that everything was made again.
        """
        self._after.append(forget)

    @contextmanager
    def loading(self, is_checkpoint_format: bool) -> Iterator[None]:
        """Around upstream's ``reload_weights``.

        Args:
            is_checkpoint_format: What upstream is told.

        Raises:
            SiriusUnsupportedError: If the copies could not be made again; nothing is loaded then. After loading, if a weight
                is not finite.
        """
        if self._fixed:
            raise SiriusUnsupportedError(
                f"reload_weights with {self._fixed}: the target's weights are read from a file while the engine runs, and it "
                "cannot be replaced meanwhile: start a new engine, which builds a new file."
            )
        if self._copies is not None and not is_checkpoint_format:
            raise SiriusUnsupportedError(
                "reload_weights(is_checkpoint_format=False): vLLM keeps weights packed on CPU, and the draft's copies are made "
                "of plain ones: reload with is_checkpoint_format=True, or start a new engine."
            )
        if self._copies is not None:
            self._copies.begin()
        self._loading = True
        try:
            yield
        finally:
            self._loading = False
        self.refresh()

    def refresh_if_stale(self) -> bool:
        """Makes everything again if weights were loaded in another way than by `loading`.

        It is called within a step, where an error would end the engine and all its requests. So weights that nothing can be
        made of are an error in the log, once for each time that such weights are loaded.

        Returns:
            Whether drafts can be made: not from such weights until better ones are loaded, in whichever way.
        """
        version = self._version()
        if self._seen_version is None:
            self._seen_version = version
        if self._stale or version != self._seen_version:
            try:
                self.refresh()
            except SiriusUnsupportedError as error:
                logger.error(
                    "Sirius: nothing is drafted from now on, until other weights are loaded into this engine: %s", error
                )
        return self.usable

    def refresh(self) -> None:
        """Makes everything again.

        Raises:
            SiriusUnsupportedError: If a weight is not finite.
        """
        self._stale, self._seen_version = False, self._version()
        self.usable = False
        try:
            self._remake()
            self.usable = True
        finally:
            for forget in self._after:
                forget()

    def _watch(self, model: Any) -> None:
        load_weights = model.load_weights

        @functools.wraps(load_weights)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._copies is not None and not self._loading:
                raise SiriusUnsupportedError(
                    "the model's load_weights was called in a running engine: on CPU the draft reads copies, which follow "
                    "new weights only through reload_weights; call collective_rpc('reload_weights', ...) or start a new engine."
                )
            self._stale = True
            return load_weights(*args, **kwargs)

        model.load_weights = watched
