"""The numbers of a record: arrays of floats as one vector, which links compress and attacks replace.

Arrays of other types (a count of batches, say) stay as they are. Letters: P entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedsim.params import Layout

NUMPY = "numpy.ndarray"  # how arrays are serialised
FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Floats:
    """The arrays of floats in a record's one ArrayRecord.

    Args:
        record: the whole.
        name: of its ArrayRecord.
        layout: names and shapes of the arrays of floats.
        types: theirs, by name.
        value: [P], of the widest of these types.
    """

    record: RecordDict
    name: str
    layout: Layout
    types: Mapping[str, torch.dtype]
    value: Tensor

    @classmethod
    def of(cls, record: RecordDict) -> Floats | None:
        """None for a record without arrays.

        Raises:
            ValueError: if there are several ArrayRecords, or none of the arrays is one of floats.
        """
        if not record.array_records:
            return None
        if len(record.array_records) > 1:
            raise ValueError(
                f"a message holds {len(record.array_records)} ArrayRecords ({', '.join(record.array_records)}), and "
                "which of them is the model can't be known; leave it out for this app"
            )
        ((name, arrays),) = record.array_records.items()
        found = {key: array.numpy() for key, array in arrays.items() if array.stype == NUMPY}
        floats = {key: torch.from_numpy(value) for key, value in found.items() if value.dtype.name in FLOATS}
        if not floats:
            kinds = ", ".join(sorted({value.dtype.name for value in found.values()})) or "nothing"
            raise ValueError(f"ArrayRecord {name!r} holds no array of floats ({kinds}); leave it out for this app")
        layout = Layout.of({key: tuple(value.shape) for key, value in floats.items()})
        types = {key: value.dtype for key, value in floats.items()}
        return cls(record, name, layout, types, torch.cat([value.reshape(-1) for value in floats.values()]))

    @property
    def key(self) -> str:
        """Names and shapes, by which vectors of one kind are known."""
        return ", ".join(
            f"{name} {list(shape)}" for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
        )

    def replaced(self, value: Tensor) -> RecordDict:
        """The record with other numbers [P], each array in its own type."""
        views = self.layout.views(value[None])
        return self._with(lambda key: Array(views[key][0].to(self.types[key]).numpy()).data)

    def emptied(self) -> RecordDict:
        """The record without these numbers: what travels beside them."""
        return self._with(lambda key: b"")

    def _with(self, data: Callable[[str], bytes]) -> RecordDict:
        arrays = {
            key: Array(array.dtype, array.shape, array.stype, data(key)) if key in self.types else array
            for key, array in self.record.array_records[self.name].items()
        }
        return RecordDict({**self.record, self.name: ArrayRecord(arrays)})
