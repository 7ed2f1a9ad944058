"""A target whose weights are on a disk. Drives the loading of one: which layers, from where, into which file.

The first start reads the checkpoint, layer by layer, and writes the file; every later one reads the file alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_sirius.draft.copies import DraftCopies
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import DraftPlan
from vllm_sirius.integration.offload_budget import weight_budget
from vllm_sirius.integration.target_linears import use_panels, use_streamed
from vllm_sirius.integration.weight_readers import PackedReader, ShowsWeight
from vllm_sirius.offload import folder as offload_folder
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.plan import GB, plan_memory
from vllm_sirius.offload.stream import WeightStream
from vllm_sirius.offload.weight_file import WeightFile, WeightFileWriter, padded
from vllm_sirius.target.streamed import StreamedMatrix, StreamedTarget
from vllm_sirius.weights import low_bit, low_bit_panels, panels
from vllm_sirius.weights.panels import Panels, panels_shape

logger = init_logger("vllm.sirius")

RATE = "SIRIUS_OFFLOAD_GB_PER_SECOND"
"""Environment variable: GB/s that reading must not exceed, so that measurements can be repeated on any disk."""


class OffloadedTarget:
    """Where the weights of one target come from and go to.

    Args:
        vllm_config: The engine's config.
        model: The model, before its weights are loaded.
        plan: What drafts copy.
        reader: Reads the model's weights. Layers that it packs have been told so.
        copies: The draft's copies.

    Raises:
        SiriusUnsupportedError: If the model's weights cannot be offloaded.
        OffloadError: If the budget is too small, or there is no folder for the file.
    """

    def __init__(
        self, vllm_config: Any, model: nn.Module, plan: DraftPlan, reader: PackedReader, copies: DraftCopies
    ) -> None:
        self._config, self._plan, self._copies = plan.config, plan, copies
        self._model_config = vllm_config.model_config
        self._load_config = vllm_config.load_config
        self._groups = _streamable(model, plan, reader)
        sizes = [sum(padded(_panel_bytes(layer)) for layer in group.values()) for group in self._groups]
        kept = _all_bytes(model) - sum(_panel_bytes(layer) for group in self._groups for layer in group.values())
        kept += _head_bytes(plan)
        budget = weight_budget(vllm_config, self._config.offload_budget_gb)
        self.memory = plan_memory(sizes, plan.copied_bytes, kept, self._config.offload_buffers, budget)
        logger.info("Sirius: %s", self.memory)
        self.streamed = StreamedTarget(list(self._matrices()))
        self._numbers = {name: number for number, name in enumerate(self._streamed_names())}
        self._folder = offload_folder.offload_folder(self._config.offload_path)
        offload_folder.prepare(self._folder)
        self.path = offload_folder.file_of(self._folder, self._model_config.model, str(self._model_config.revision))
        self._writer: WeightFileWriter | None = None
        self._made_of: dict[str, Any] = {}
        self._open = ExitStack()
        self._progress: Any = None
        self.restored = False
        for group in self._groups:
            for name, layer in group.items():
                reader.want_panels(layer, self._pack_into_file(name))

    def load(self, loader: Any, model: nn.Module, load: Callable[[], None]) -> None:
        """Loads the weights: from the file if there is one of this checkpoint, otherwise from the checkpoint.

        Args:
            loader: Upstream's loader.
            model: The model.
            load: Loads the checkpoint.

        Raises:
            OffloadError: If the file cannot be built or read.
            SiriusUnsupportedError: If the loader reads no files.
        """
        files = _checkpoint_files(loader, self._model_config, self._load_config)
        self._made_of = {
            "checkpoint": offload_folder.identify(files),
            "layout": _layout(),
            "model": [type(model).__name__, str(self._model_config.dtype), self._config.draft_weights],
        }
        with ExitStack() as on_error:
            self._open.enter_context(offload_folder.building(self.path))
            on_error.callback(self._open.close)
            file = self._known_file()
            if file is not None:
                self._restore(file, model)
            else:
                self._build(model, load)
            on_error.pop_all()

    def finish(self) -> StreamedTarget:
        """After everything was loaded and copied: completes the file if it is new, and opens the stream.

        Returns:
            The layers that are streamed.

        Raises:
            OffloadError: If the disk refuses.
        """
        if self._writer is not None:
            for name, tensor in self._copies.stored(self._linears).items():
                self._write(name, tensor)
            self._writer.finish(self._made_of)
            self._writer = None
            self._progress.close()
            logger.info("Sirius: wrote %s (%.2f GB)", self.path, self.path.stat().st_size / GB)
        file = WeightFile(self.path)
        handle = offload_folder.hold(self.path)
        self._open.close()  # others may build now
        self._open.callback(os.close, handle)
        if self.memory.streamed:
            rate = float(os.environ.get(RATE, "0"))
            groups = [file.group(number) for number in self.memory.streamed]
            stream = WeightStream(self.path, groups, self._config.offload_buffers, bytes_per_second=rate * GB)
            self.streamed.open(stream)
            how = "past the page cache" if stream.direct else "through the page cache, which its file system demands"
            bound = f", at most {rate:g} GB/s ({RATE})" if rate else ""
            logger.info("Sirius: streams the target's weights from %s %s%s", self.path, how, bound)
        return self.streamed

    @property
    def _linears(self) -> list[nn.Module]:
        return [linear.module for linear in self._plan.linears]

    def _matrices(self) -> Iterator[StreamedMatrix]:
        for place, number in enumerate(self.memory.streamed):
            start = 0
            for layer in self._groups[number].values():
                num_outputs, width = layer.weight.shape
                yield StreamedMatrix(place, start, panels_shape(num_outputs, width), num_outputs)
                start += padded(_panel_bytes(layer))

    def _streamed_names(self) -> Iterator[str]:
        for number in self.memory.streamed:
            yield from self._groups[number]

    def _pack_into_file(self, name: str) -> Callable[[Any], None]:
        def pack(layer: Any) -> None:
            packed = Panels.pack(layer.weight.data)
            self._write(name, packed.weights)
            self._use(name, layer, packed)

        return pack

    def _use(self, name: str, layer: Any, packed: Panels | None) -> None:
        number = self._numbers.get(name)
        if number is not None:
            use_streamed(layer, self.streamed, number)
        else:
            use_panels(layer, packed=packed)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        assert self._writer is not None, "weights of an offloaded target are loaded once"
        self._writer.write(name, tensor)
        self._progress.update(tensor.nbytes)

    def _known_file(self) -> WeightFile | None:
        if not self.path.exists():
            return None
        try:
            file = WeightFile(self.path)
        except OffloadError as error:
            logger.warning("Sirius: %s: it is built anew", error)
            return None
        if file.made_of != self._made_of or file.groups != [list(group) for group in self._groups]:
            logger.info("Sirius: %s was made of another checkpoint or by another release: it is built anew", self.path)
            return None
        return file

    def _build(self, model: nn.Module, load: Callable[[], None]) -> None:
        groups = [{name: _panel_bytes(layer) for name, layer in group.items()} for group in self._groups]
        others = self.memory.copies + self.memory.kept
        self._writer = WeightFileWriter(self.path, groups, others + (1 << 20))
        self._open.callback(self._writer.close)
        total = sum(map(sum, (group.values() for group in groups))) + others
        self._progress = tqdm(total=total, unit="B", unit_scale=True, desc=f"Sirius: writing {self.path.name}")
        load()
        for group in self._groups:
            for layer in group.values():
                method: ShowsWeight = layer.quant_method
                if not method.packed_early:
                    method.pack_early(layer)
        for name, tensor in _others(model):
            self._write(name, tensor)

    def _restore(self, file: WeightFile, model: nn.Module) -> None:
        self.restored = True
        self._copies.restore(self._linears)
        for name, tensor in self._copies.stored(self._linears).items():
            file.read(name, tensor)
        for group in self._groups:
            for name, layer in group.items():
                packed = None
                if name not in self._numbers:
                    packed = Panels.empty(*layer.weight.shape)
                    file.read(name, packed.weights)
                method: ShowsWeight = layer.quant_method
                self._use(name, layer, packed)
                method.packed_early = True
        for name, tensor in _others(model):
            file.read(name, tensor)
        logger.info("Sirius: read %s, and no checkpoint", self.path)


def _streamable(model: nn.Module, plan: DraftPlan, reader: PackedReader) -> list[dict[str, Any]]:
    """Layers that drafts have copies of, by name, in the order of a pass: one group for each of the decoder's layers."""
    copied = {id(layer) for ffn in plan.ffns for layer in (ffn.gate_up, ffn.down)}
    copied |= {id(linear.module) for linear in plan.linears}
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    groups: dict[str, dict[str, Any]] = {}
    module: Any
    for name, module in model.named_modules():
        if id(module) not in copied or not reader.wants_panels(module):
            continue
        if uses[id(module.weight)] == 1 and not getattr(module, "_cpu_skip_gemm_dispatch", False):
            found = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(found[0] if found else name, {})[name] = module
    if not groups:
        raise SiriusUnsupportedError(
            "offload='disk': no layer of this model can be streamed, because drafts read all of them as the target does: use "
            "offload='none'."
        )
    return list(groups.values())


def _panel_bytes(layer: Any) -> int:
    panels_, pairs, outputs, two = panels_shape(*layer.weight.shape)
    return panels_ * pairs * outputs * two * torch.bfloat16.itemsize


def _all_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _head_bytes(plan: DraftPlan) -> int:
    """A head that an embedding shares is packed beside its plain weight."""
    head: Any = plan.parts.head
    if head is None or isinstance(getattr(head, "quant_method", None), ShowsWeight):
        return 0
    return int(head.weight.numel() * head.weight.element_size())


def _others(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What else a checkpoint holds: of layers that are packed already, the bias; of all others, everything."""
    packed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), ShowsWeight) and method.packed_early
    }
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if id(parameters.get(name, tensor)) not in packed:
            yield f"model.{name}", tensor


def _checkpoint_files(loader: Any, model_config: Any, load_config: Any) -> list[Path]:
    if type(loader) is not DefaultModelLoader or load_config.load_format == "dummy":
        raise SiriusUnsupportedError(
            f"load_format={load_config.load_format!r} with offload='disk': its loader {type(loader).__name__} reads no files "
            "that could be told from changed ones: use load_format 'auto' or 'safetensors', or offload='none'."
        )
    _, files, _, _ = loader._prepare_weights(model_config.model, None, model_config.revision, True, None)
    return [Path(file) for file in files]


def _layout() -> str:
    """Changes whenever the code does that makes panels and copies."""
    digest = hashlib.sha256()
    for module in (low_bit, low_bit_panels, panels):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]
