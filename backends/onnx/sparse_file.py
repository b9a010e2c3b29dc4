"""Float weights of an ONNX file that are mostly zeros, stored as sparse initialisers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphwright.backends.onnx.writing import write_failure
from graphwright.ir.errors import ExportError

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
# Small ones save nothing worth having.
_LEAST = 1024
_INDEX_BYTES = 8


def store_sparse(path: Path) -> tuple[str, ...]:
    """Store float initialisers of a file as sparse ones where that takes fewer bytes; gives their names.

    ONNX indexes every value with 8 bytes, so of float32 weights more than two thirds must be zeros. What the file
    computes is the same (``-0.0`` becomes ``0.0``).

    Raises:
        ExportError: the weights lie beside the file, or it cannot be written.
    """
    model = onnx.load(os.fspath(path), load_external_data=False)
    graph, names = model.graph, list[str]()
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in graph.initializer):
        raise ExportError(
            "sparse initialisers are stored in the file itself, and its weights lie beside it",
            where=path.name,
            hint="leave external_data out, or sparse",
        )
    for each in list(graph.initializer):
        if each.data_type not in _FLOATS:
            continue
        dense = numpy_helper.to_array(each)
        places = np.flatnonzero(dense)
        if dense.size < _LEAST or len(places) * (dense.itemsize + _INDEX_BYTES) >= dense.nbytes:
            continue
        values = numpy_helper.from_array(dense.reshape(-1)[places], each.name)
        indices = numpy_helper.from_array(places.astype(np.int64), f"{each.name}_indices")
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(dense.shape)))
        graph.initializer.remove(each)
        names.append(each.name)
    if names:
        try:
            onnx.save(model, os.fspath(path))
        except OSError as error:
            raise write_failure(path, error) from error
    return tuple(names)
