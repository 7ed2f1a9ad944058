"""A target whose weights are on a disk. Drives the loading of one: which layers, from where, into which file.

The first start reads the checkpoint, layer by layer, and writes the file; every later one reads the file alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from tqdm import tqdm
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_sirius.draft import copies as draft_copies
from vllm_sirius.draft.copies import DraftCopies
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration import offload_parts
from vllm_sirius.integration.draft_plan import DraftPlan
from vllm_sirius.integration.offload_budget import weight_budget
from vllm_sirius.integration.offload_parts import HeadPiece, find_parts_to_offload, others, panel_bytes
from vllm_sirius.integration.stored_embedding import look_up_in_file
from vllm_sirius.integration.target_linears import use_panels, use_streamed, use_streamed_head
from vllm_sirius.integration.weight_readers import PackedReader, ShowsWeight
from vllm_sirius.offload import folder as offload_folder
from vllm_sirius.offload import weight_file
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.plan import GB, plan_memory
from vllm_sirius.offload.stream import WeightStream
from vllm_sirius.offload.weight_file import WeightFile, WeightFileWriter, padded
from vllm_sirius.target.stored_rows import StoredRows
from vllm_sirius.target.streamed import StreamedMatrix, StreamedTarget
from vllm_sirius.version import __version__
from vllm_sirius.weights import low_bit, low_bit_panels, panels, rows
from vllm_sirius.weights.panels import OUTPUTS, Panels, panels_shape

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
        self._model, self._model_config = model, vllm_config.model_config
        self._load_config = vllm_config.load_config
        self._parts = find_parts_to_offload(model, plan, reader)
        budget = weight_budget(vllm_config, self._config.offload_budget_gb)
        sizes = self._parts.sizes(model, plan.copied_bytes)
        self.memory = plan_memory(sizes, self._config.offload_buffers, budget)
        logger.info("Sirius: %s", self.memory)
        named = list(self._matrices())
        self._numbers = {name: number for number, (name, _) in enumerate(named)}
        self.streamed = StreamedTarget([matrix for _, matrix in named])
        folder = offload_folder.offload_folder(self._config.offload_path)
        offload_folder.prepare(folder)
        self.path = offload_folder.file_of(folder, self._model_config.model, str(self._model_config.revision))
        self._writer: WeightFileWriter | None = None
        self._made_of: dict[str, Any] = {}
        self._open = ExitStack()
        self._progress: Any = None
        self.restored = False
        for group in self._parts.groups:
            for name, layer in group.items():
                reader.want_panels(layer, self._pack_into_file(name))
        if self._parts.own_head:
            reader.want_panels(self._parts.head, self._pack_head)
        if self._parts.lookup is not None:
            reader.want_panels(self._parts.lookup, self._store_rows)

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
            "releases": [vllm.__version__, __version__],
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
            self._complete()
        file = WeightFile(self.path)
        handle = offload_folder.hold(self.path)
        self._open.close()  # others may build now
        self._open.callback(os.close, handle)
        if self.restored and self._parts.pieces and not self._parts.own_head:
            self._use_head(self._stored_head(file))
        if not self.memory.rows_in_memory:
            self._look_up(file)
        if self.memory.streamed:
            self._open_stream(file)
        return self.streamed

    def abandon(self) -> None:
        """After a failure: removes a file that is not whole, and lets others build."""
        self._open.close()

    def _complete(self) -> None:
        """Writes what there is only after loading, and gives the file its name."""
        assert self._writer is not None
        for name, tensor in self._copies.stored(self._linears).items():
            self._write(name, tensor)
        if self._parts.pieces and not self._parts.own_head:
            self._pack_head(self._parts.head)
        self._writer.finish(self._made_of)
        self._writer = None
        self._progress.close()
        logger.info("Sirius: wrote %s (%.2f GB)", self.path, self.path.stat().st_size / GB)

    def _open_stream(self, file: WeightFile) -> None:
        rate = float(os.environ.get(RATE, "0"))
        groups = [file.group(number) for number in self.memory.streamed]
        stream = WeightStream(self.path, groups, self._config.offload_buffers, bytes_per_second=rate * GB)
        self.streamed.open(stream)
        how = "past the page cache" if stream.direct else "through the page cache, which its file system demands"
        bound = f", at most {rate:g} GB/s ({RATE})" if rate else ""
        logger.info("Sirius: streams the target's weights from %s %s%s", self.path, how, bound)

    def _look_up(self, file: WeightFile) -> None:
        name, weight = f"model.{self._parts.embedding_name}", self._parts.embedding
        entry = file.entries[name]
        file.check(name)  # single rows are not checked when they are read
        num_rows, width = entry.shape
        look_up_in_file(self._model, weight, StoredRows(self.path, entry.offset, num_rows, width, weight.dtype))

    @property
    def _linears(self) -> list[nn.Module]:
        return [linear.module for linear in self._plan.linears]

    def _matrices(self) -> Iterator[tuple[str, StreamedMatrix]]:
        """Names and places of all streamed matrices, in the order of the file."""
        layers = self.memory.streamed[: self.memory.num_streamed_layers]
        for place, number in enumerate(layers):
            start = 0
            for name, layer in self._parts.groups[number].items():
                num_outputs, width = layer.weight.shape
                yield name, StreamedMatrix(place, start, panels_shape(num_outputs, width), num_outputs)
                start += padded(panel_bytes(layer))
        if not self.memory.head_in_memory:
            width = self._parts.head.weight.shape[1]
            for place, piece in enumerate(self._parts.pieces, start=len(layers)):
                num_outputs = piece.end - piece.start
                yield piece.name, StreamedMatrix(place, 0, panels_shape(num_outputs, width), num_outputs)

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

    def _store_rows(self, layer: Any) -> None:
        self._write(f"model.{self._parts.embedding_name}", layer.weight.data)
        if not self.memory.rows_in_memory:
            layer.weight.data = layer.weight.data.new_empty(0)

    def _pack_head(self, head: Any) -> None:
        weight = head.weight.data
        packed = Panels.empty(*weight.shape) if self.memory.head_in_memory else None
        for piece in self._parts.pieces:
            panels = Panels.pack(weight[piece.start : piece.end]).weights
            self._write(piece.name, panels)
            if packed is not None:
                _panels_of(packed, piece).copy_(panels)
        self._use_head(packed)

    def _use_head(self, packed: Panels | None) -> None:
        head, own = self._parts.head, self._parts.own_head
        if self.memory.head_in_memory:
            use_panels(head, keep_weight=not own, packed=packed)
            return
        use_streamed_head(head, self.streamed, [self._numbers[piece.name] for piece in self._parts.pieces])
        if own:
            head.weight = nn.Parameter(head.weight.data.new_empty(0), requires_grad=False)

    def _stored_head(self, file: WeightFile) -> Panels | None:
        if not self.memory.head_in_memory:
            return None
        packed = Panels.empty(*self._parts.head.weight.shape)
        for piece in self._parts.pieces:
            file.read(piece.name, _panels_of(packed, piece))
        return packed

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        assert self._writer is not None, "weights of an offloaded target are loaded once"
        self._writer.write(name, tensor)
        self._progress.update(tensor.nbytes)

    @property
    def _groups(self) -> list[dict[str, int]]:
        """Names and bytes of the panels of each group of the file."""
        parts = self._parts
        layers = [{name: panel_bytes(layer) for name, layer in group.items()} for group in parts.groups]
        return [*layers, *({piece.name: parts.piece_bytes(piece)} for piece in parts.pieces)]

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
        sizes = self.memory.sizes
        rest = sizes.copies + sizes.kept + sizes.rows
        self._writer = WeightFileWriter(self.path, self._groups, rest + (1 << 20))
        self._open.callback(self._writer.close)
        total = sum(map(sum, (group.values() for group in self._groups))) + rest
        self._progress = tqdm(total=total, unit="B", unit_scale=True, desc=f"Sirius: writing {self.path.name}")
        load()
        for layer in self.packed_layers:
            method: ShowsWeight = layer.quant_method
            if not method.packed_early:
                method.pack_early(layer)
        stored = f"model.{self._parts.embedding_name}" if self._parts.lookup is not None else ""
        for name, tensor in others(model, self._parts):
            if name != stored:
                self._write(name, tensor)

    def _restore(self, file: WeightFile, model: nn.Module) -> None:
        self.restored = True
        self._copies.restore(self._linears)
        for name, tensor in self._copies.stored(self._linears).items():
            file.read(name, tensor)
        for name, tensor in others(model, self._parts):
            if self.memory.rows_in_memory or name != f"model.{self._parts.embedding_name}":
                file.read(name, tensor)
        for group in self._parts.groups:
            for name, layer in group.items():
                packed = None
                if name not in self._numbers:
                    packed = Panels.empty(*layer.weight.shape)
                    file.read(name, packed.weights)
                self._use(name, layer, packed)
        if self._parts.own_head:
            self._use_head(self._stored_head(file))
        for layer in self.packed_layers:
            method: ShowsWeight = layer.quant_method
            method.packed_early = True
        logger.info("Sirius: read %s, and no checkpoint", self.path)

    @property
    def packed_layers(self) -> list[Any]:
        """All layers that are packed while they are loaded."""
        layers = [layer for group in self._parts.groups for layer in group.values()]
        if self._parts.own_head:
            layers.append(self._parts.head)
        return layers if self._parts.lookup is None else [*layers, self._parts.lookup]


def _panels_of(packed: Panels, piece: HeadPiece) -> torch.Tensor:
    return packed.weights[piece.start // OUTPUTS : -(-piece.end // OUTPUTS)]


def _checkpoint_files(loader: Any, model_config: Any, load_config: Any) -> list[Path]:
    if type(loader) is not DefaultModelLoader or load_config.load_format == "dummy":
        raise SiriusUnsupportedError(
            f"load_format={load_config.load_format!r} with offload='disk': its loader {type(loader).__name__} reads no files "
            "that could be told from changed ones: use load_format 'auto' or 'safetensors', or offload='none'."
        )
    _, files, _, _ = loader._prepare_weights(model_config.model, None, model_config.revision, True, None)
    return [Path(file) for file in files]


def _layout() -> str:
    """Changes whenever the code does that makes panels and copies, or that says which of them are in a file."""
    digest = hashlib.sha256()
    for module in (low_bit, low_bit_panels, panels, rows, offload_parts, draft_copies, weight_file):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]
