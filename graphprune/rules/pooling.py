"""Operators over spatial windows and grids: batch and channels go through, positions stay."""

from __future__ import annotations

from graphprune.rules.op import Op, RefusedError, Table

table = Table()


@table.rule("AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(op: Op) -> None:
    x, y = op.input(0), op.output()
    op.tie(x[0], y[0])
    op.tie(x[1], y[1])


@table.rule("MaxPool")
def max_pool(op: Op) -> None:
    """The optional indices count through the whole tensor, so channels must not move."""
    if any(op.y[1:]):
        raise RefusedError("indices into the flattened tensor are an output")
    pool(op)


@table.rule("Resize", "Upsample")
def resize(op: Op) -> None:
    """Axes of unchanged size go through unless they are interpolated over."""
    x, y = op.input(0), op.output()
    axes = [axis % x.rank for axis in op.attr("axes") or range(x.rank)]
    crop = op.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    ratio = op.attr("keep_aspect_ratio_policy", "stretch") != "stretch"
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if len(a) == len(b) and not ((crop or ratio) and i in axes):
            op.tie(a, b)
    sizes_at = 3
    if op.type == "Resize" and op.version >= 11 and len(op.node.input) > sizes_at:
        sizes = op.list_of("sizes", sizes_at) if op.node.input[sizes_at] else None
        for i, axis in enumerate(axes if sizes else []):
            op.count_input(sizes_at, i, y[axis])


@table.rule("GridSample")
def grid_sample(op: Op) -> None:
    """The grid says where to look, for every channel alike."""
    x, grid, y = op.input(0), op.input(1), op.output()
    op.tie(x[0], y[0])
    op.tie(x[1], y[1])
    op.tie(grid[0], y[0])


@table.rule("RoiAlign", "MaxRoiPool")
def roi(op: Op) -> None:
    """One output per region of interest; channels go through."""
    op.tie(op.input(0)[1], op.output()[1])


@table.rule("Col2Im")
def columns_to_image(op: Op) -> None:
    """[N, C * block, L] columns add up to [N, C, *image]."""
    x, y = op.input(0), op.output()
    block = op.virtual(len(x[1]) // len(y[1]))
    op.tie(x[0], y[0])
    op.fold(x[1], [y[1], block])
    op.pin(block, "the places of a block")
