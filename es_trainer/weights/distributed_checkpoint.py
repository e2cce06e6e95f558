"""
Checkpoints of what processes have parts of, by `torch.distributed.checkpoint`.

Every tensor is saved in the boxes that the processes' parts are made of, each once. Whoever loads it asks for boxes of
its own, so that the parts may be others than those that were saved.
"""

import contextlib
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from .boxes import chunks
from .part import Part


class Slice(NamedTuple):
    """
    What a process has of a tensor.

    Args:
        part ([`Part`]):
            Which of its numbers they are.
        values (`torch.Tensor`):
            The numbers, flat. They are saved from here, and loaded into it.
    """

    part: Part
    values: torch.Tensor


def save(slices: Mapping[str, Slice], folder: Path, together: bool) -> None:
    """
    Args:
        slices (`Mapping[str, Slice]`):
            What this process has of each tensor, by the tensor's key.
        folder (`Path`):
            Where to write. It must not have another checkpoint.
        together (`bool`):
            Whether all processes call this, each with its slices. Of boxes that several have, the first writes.
    """
    with _without_a_warning(), _errors_as_they_are():
        dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=_SavePlanner(slices), no_dist=not together)


def load(slices: Mapping[str, Slice], reader: dcp.StorageReader) -> None:
    """
    Fill slices, each process by itself.

    Args:
        slices (`Mapping[str, Slice]`):
            What this process has of each tensor, by the tensor's key. Its values are written.
        reader (`StorageReader`):
            Where they are read.

    Raises:
        `LookupError`: If numbers are missing; its arguments are the key and the problem.
    """
    planner = _LoadPlanner(slices)
    planner.set_up_planner({}, reader.read_metadata())
    planner.create_local_plan()  # what it raises comes as it is
    with _without_a_warning(), _errors_as_they_are():
        dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)


# What the description of a checkpoint is made of. Torch pickles it, and a pickle that names more could run anything.
_NAMES_OF_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES_OF_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of one")
        return super().find_class(module, name)


class Files(dcp.FileSystemReader):
    """
    Reads the files that `save` wrote, and runs no code that stands in them.

    Args:
        path (`Path`):
            Their folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            `ValueError`: If the file is no description of a checkpoint.
        """
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(file.open("rb")).load()
        except Exception as error:  # bytes that are no pickle can raise anything
            raise ValueError(
                f"{file} is not the description of a checkpoint ({type(error).__name__}: {error}). It was damaged, or "
                "made by someone who wants to run code here: resume from another checkpoint."
            ) from error
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """
        Raises:
            `ValueError`: If the files do not have what their description says.
        """
        try:
            return super().read_data(plan, planner)
        except Exception as error:  # bytes that are no tensors can raise anything
            raise ValueError(
                f"The tensors in {self.path} cannot be read ({type(error).__name__}). They were damaged, or made by "
                "someone who wants to run code here: resume from another checkpoint."
            ) from error


class StateDicts(dcp.StorageReader):
    """
    Reads from memory.

    Args:
        tensors (`Mapping[str, Sequence[Slice]]`):
            The slices of each tensor, by its key.
    """

    def __init__(self, tensors: Mapping[str, Sequence[Slice]]):
        self._boxes: dict[str, dict[torch.Size, torch.Tensor]] = {}
        self._metadata = {}
        for key, slices in tensors.items():
            first = slices[0]
            boxes = {torch.Size(offsets): box for slice in slices for offsets, box in chunks(*slice)}
            self._boxes[key] = boxes
            self._metadata[key] = TensorStorageMetadata(
                TensorProperties.create_from_tensor(first.values),
                first.part.shape,
                [ChunkStorageMetadata(offsets, box.shape) for offsets, box in boxes.items()],
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(self._metadata)

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            box = self._boxes[item.storage_index.fqn][item.storage_index.offset]
            target = planner.resolve_tensor(item)
            target.copy_(_narrowed(box, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        """There is nothing to forget."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class _Boxes:
    """The boxes of slices, by the index that plans have of them."""

    def __init__(self, slices: Mapping[str, Slice]):
        self.shapes = {key: slice.part.shape for key, slice in slices.items()}
        self.boxes = {
            key: {torch.Size(offsets): box for offsets, box in chunks(*slice)} for key, slice in slices.items()
        }

    def __iter__(self) -> Iterator[tuple[str, torch.Size, torch.Tensor]]:
        for key, boxes in self.boxes.items():
            for offsets, box in boxes.items():
                yield key, offsets, box

    def __getitem__(self, index: MetadataIndex) -> torch.Tensor:
        return self.boxes[index.fqn][index.offset]


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, slices: Mapping[str, Slice]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)
        self._boxes = _Boxes(slices)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._write_item(*entry) for entry in self._boxes])
        return self.plan

    def _write_item(self, key: str, offsets: torch.Size, box: torch.Tensor) -> WriteItem:
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, box.shape),
            TensorProperties.create_from_tensor(box),
            self._boxes.shapes[key],
        )
        return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._boxes[index]


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, slices: Mapping[str, Slice]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = _Boxes(slices)

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, boxes in self._boxes.boxes.items():
            if not boxes:
                continue
            saved = self.metadata.state_dict_metadata.get(key)
            if saved is None:
                raise LookupError(key, "it does not hold")
            if saved.size != self._boxes.shapes[key]:
                raise LookupError(key, f"in another shape, {list(saved.size)}, it holds")
            wanted = [ChunkStorageMetadata(offsets, box.shape) for offsets, box in boxes.items()]
            found = create_read_items_for_chunk_list(key, saved, wanted)
            missing = sum(box.numel() for box in boxes.values()) - sum(math.prod(item.lengths) for item in found)
            if missing:
                raise LookupError(key, f"it lacks {missing} of the numbers of")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._boxes[index]


def _narrowed(box: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    return box[tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))]


@contextlib.contextmanager
def _without_a_warning() -> Iterator[None]:
    """Inside, nothing warns of a process that saves or loads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Inside, an error is what it is, in place of one that wraps it and is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from error
