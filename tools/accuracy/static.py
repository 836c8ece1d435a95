"""Give the symbolic sizes of a model's inputs values: what the peers and the MAC counter need."""

import onnx

Sizes = dict[str, tuple[int, ...]]


def frozen(model: onnx.ModelProto, sizes: Sizes) -> onnx.ModelProto:
    """A copy whose inputs have the given shapes; the outputs' symbolic sizes are forgotten."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
            dim.dim_value = size
    for value in copy.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    del copy.graph.value_info[:]
    return copy


def parse_sizes(texts: list[str]) -> Sizes:
    """`x:1,3,32,32` as graphprune's --input-shape takes it."""
    pairs = [text.rpartition(":") for text in texts]
    return {name: tuple(int(size) for size in sizes.split(",")) for name, _, sizes in pairs}
