"""An alarm that needs neither gz nor torch: its models as one ONNX graph, its held-out scores as a table, and
a script that judges images by them.

The graph takes images uint8 [N, C, H, W]. It returns `score` [N, K] for K models and, for most methods, `map`
[N, H, W]. The false-alarm rate is not stored; it is an argument of the script.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import DivergedError, MissingError, UsageError, install_line
from gzcli.core.sections import Fit
from gzcli.data.readers.images import PILLOW_FORMATS, SUFFIXES
from gzcli.engine.log import Log
from gzcli.export import portable_alarm
from gzcli.judge import methods
from gzcli.judge.scores import write_csv
from gzcli.metrics.alarms.combined import AVERAGED_SCORES, MIN_STANDARDISED, Combined
from gzcli.metrics.alarms.cross import Calibrated
from gzcli.metrics.alarms.features import FINE_STRIDE, cells_of, enlargement, network
from gzcli.metrics.alarms.fitted import Fitted, Mapped
from gzcli.metrics.alarms.local import Local, one_of
from gzcli.metrics.alarms.neighbourhoods import NEIGHBOURHOOD_CELLS, PcaPatch
from gzcli.metrics.alarms.patches import KnnPatch, PatchCore
from gzcli.metrics.alarms.pca import Components, Pca, PcaLocal
from gzcli.metrics.alarms.whole import KTH_NEIGHBOUR, KnnPixels, Plain
from gzcli.metrics.pretrained import MEAN, STD, Block
from gzcli.store import files
from gzcli.store.jobs import PortableJob

GRAPH, TABLE = "alarm.onnx", "held_out.csv"  # names of the files that the script checks
OPSET = 17
# rounding errors of an eigenvalue, as a share of the largest, and of a row of length 1
NOISE, EXACT = 1e-10, 1e-5
Shape = tuple[int, int, int]


class Graph:
    """An ONNX graph to which nodes are added one by one. Values are named by numbers."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names_of: dict[int, tuple[np.ndarray, str]] = {}  # constants by identity, each written once
        self.features = ""  # outputs of the network that several models share, once they exist
        self.shared: dict[tuple[int, int], tuple[str, Shape]] = {}  # residuals, and their shape
        self.rows: dict[int, str] = {}  # rows of components by identity, if they share a basis

    def __call__(self, kind: str, *inputs: str | np.ndarray, name: str = "", **attributes: Any) -> str:
        """Adds a node. Returns the name of its first output."""
        from onnx import helper

        outputs = [name or f"v{len(self.nodes)}", *([f"v{len(self.nodes)}b"] if kind == "TopK" else [])]
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(kind, names, outputs, **attributes))
        return outputs[0]

    def constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        if id(value) not in self.names_of:
            self.names_of[id(value)] = value, f"c{len(self.constants)}"
            plain = np.asarray(value)
            plain = plain.astype(np.float32) if plain.dtype == np.float64 else plain
            self.constants.append(numpy_helper.from_array(plain, self.names_of[id(value)][1]))
        return self.names_of[id(value)][1]

    def mean(self, x: str, *axes: int, keep: bool = False) -> str:
        return self("ReduceMean", x, axes=list(axes), keepdims=int(keep))

    def pool(self, x: str, side: int, *, stride: int = 1, pad: int = 0) -> str:
        """Means over squares of the map. At an edge, only existing places count."""
        options: dict[str, Any] = {"kernel_shape": [side] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self("AveragePool", x, count_include_pad=0, ceil_mode=int(stride > 1), **options)

    def shaped(self, x: str, *sides: int) -> str:
        return self("Reshape", x, np.array(sides, np.int64))


# ---------------------------------------------------------------------------- the methods


def reduced(g: Graph, shape: Shape, factor: int) -> tuple[str, Shape]:
    """The graph of `fitted.reduced`, and the shape of its result."""
    c, h, w = shape
    x = g("Div", g("Cast", "image", to=1), np.float32(255))
    if factor == 1:
        return x, shape
    return g.pool(x, factor, stride=factor), (c, -(-h // factor), -(-w // factor))


def coordinates(g: Graph, x: str, of: Components) -> tuple[str, str]:
    """The images' coordinates in these components, and their differences from the mean."""
    flat = g("Sub", g("Flatten", x), of.mean)
    return g("Gemm", flat, rows_of(g, of), transB=1), flat


def rows_of(g: Graph, of: Components) -> str | np.ndarray:
    return g.rows.get(id(of.rows), of.rows)


def share_bases(g: Graph, models: Sequence[Fitted]) -> None:
    """Writes the components of the models as products with bases that they share, if that is much smaller.
    The runtime multiplies them once, when it loads the graph."""
    parts = [m.fitted for model in models for m in (model.members if isinstance(model, Combined) else ())]
    bases = [each.components for each in (*models, *parts) if isinstance(each, Pca | PcaLocal | KnnPixels)]
    every = {id(of.rows): of.rows for of in bases}
    for side in {rows.shape[1] for rows in every.values()}:
        group = {key: rows for key, rows in every.items() if rows.shape[1] == side}
        if len(group) > 1 and (basis := common_basis(list(group.values()))) is not None:
            g.rows |= {key: g("MatMul", rows @ basis.T, basis) for key, rows in group.items()}


def common_basis(every: Sequence[np.ndarray]) -> np.ndarray | None:
    """An orthonormal basis of the span of all these rows [k, D], if together with the rows in its coordinates
    it is less than half as large as the rows. The components of 20 folds of 70 images are combinations of
    these images. The basis is that of random mixtures of the rows (Halko et al. 2011, arXiv:0909.4061)."""
    stacked = np.concatenate(every)
    n, d = stacked.shape
    most = max(1, n * d // (2 * (n + d)))
    some = np.random.default_rng(0).normal(size=(most, n)).astype(np.float32) @ stacked
    basis = np.linalg.qr(some.T)[0].T
    inside = (stacked @ basis.T).astype(np.float64)
    values, turn = np.linalg.eigh(inside.T @ inside)
    basis = turn[:, values > NOISE * values[-1]].T.astype(np.float32) @ basis
    missing = np.linalg.norm(stacked - (stacked @ basis.T) @ basis, axis=1)
    return basis if missing.max() < EXACT else None


def residual(g: Graph, shape: Shape, factor: int, of: Components) -> tuple[str, Shape]:
    """The graph of `Components.residual` for reduced images, and its shape. Members of a method share it."""
    key = id(of.rows), factor
    if key not in g.shared:
        x, small = reduced(g, shape, factor)
        inside, flat = coordinates(g, x, of)
        g.shared[key] = g.shaped(g("Sub", flat, g("MatMul", inside, rows_of(g, of))), -1, *small), small
    return g.shared[key]


def strength(g: Graph, x: str) -> str:
    """The graph of `pca.strength` for a residual, [N, 1, h, w]."""
    return g("Sqrt", g.mean(g("Mul", x, x), 1, keep=True))


def rise(g: Graph, maps: str, of: Local) -> str:
    """The graph of `local.rise` for maps [N, 1, h, w]: [N, 1, 1, 1]."""
    share = g("Div", maps, of.level)
    return g("Sqrt", g("Add", g.mean(g("Mul", share, share), 2, 3, keep=True), np.float32(1e-12)))


def local(g: Graph, maps: str, of: Local) -> str:
    """The graph of `local.Local` for maps [N, 1, h, w]."""
    size = rise(g, maps, of)
    top = strangest(g, maps, size, of, of.scales)
    ratio = g("Div", size, of.whole[0])
    either = g("Sub", g("Max", ratio, g("Reciprocal", ratio)), np.float32(1))
    share = g("Div", either, of.whole[1])
    lacking = g("Sub", g("Mul", share, share), g("ReduceMax", top, axes=[2, 3]))
    return g("Add", top, g("Relu", lacking))


def strangest(g: Graph, maps: str, size: str, of: Local, scales: Sequence[int]) -> str:
    """As `Local.largest`."""
    maps = g("Div", maps, size) if of.relate else maps
    z, tops = g("Div", g("Sub", maps, of.mean), of.deviation), []
    for k, shift, unit in zip(of.scales, of.shift, of.unit, strict=True):
        if k in scales:
            signed, side = z if k > 0 else g("Neg", z), abs(k)
            smooth = signed if side == 1 else g.pool(signed, side, pad=side // 2)
            tops.append(g("Div", g("Sub", smooth, np.float32(shift)), np.float32(unit)))
    return g("Max", *tops) if len(tops) > 1 else tops[0]


def strong_and_faint(g: Graph, maps: str, of: Local) -> tuple[str | None, str | None]:
    """As `Local.strong_and_faint`."""
    size = rise(g, maps, of)
    strong, faint = of.signed(1), of.signed(-1)
    return (
        strangest(g, maps, size, of, strong) if strong else None,
        strangest(g, maps, g("Min", size, of.whole[0]), of, faint) if faint else None,
    )


def decisive(g: Graph, strong: str | None, faint: str | None) -> str:
    """As `local.decisive`, of maps [N, ..., h, w]."""
    if strong is None or faint is None:
        return one_of(strong, faint)
    highest = (g("ReduceMax", each, axes=[-2, -1]) for each in (faint, strong))
    return g("Where", g("Greater", *highest), g("Max", strong, faint), strong)


def pca(g: Graph, fitted: Pca, shape: Shape) -> tuple[str, str | None]:
    cells = strength(g, residual(g, shape, fitted.factor, fitted.components)[0])
    return g.mean(g("Mul", cells, cells), 2, 3), enlarged(g, cells, fitted.factor, shape)


def of_pca_local(g: Graph, fitted: PcaLocal, shape: Shape) -> str:
    return strength(g, residual(g, shape, fitted.factor, fitted.components)[0])


def of_pca_patch(g: Graph, fitted: PcaPatch, shape: Shape) -> str:
    """The graph of `neighbourhoods.Whitened`, [N, 1, h, w]."""
    x, (c, _, _) = residual(g, shape, fitted.factor, fitted.components)
    of, beyond = fitted.whitened, NEIGHBOURHOOD_CELLS // 2
    edge = np.array([0, 0, beyond, beyond] * 2, np.int64)
    y = g(
        "Conv",
        g("Pad", x, edge, mode="edge"),
        of.rows.reshape(len(of.rows), c, NEIGHBOURHOOD_CELLS, NEIGHBOURHOOD_CELLS),
    )
    return strength(g, g("Div", g("Sub", y, of.mean), of.deviation))


def of_knn_patch(g: Graph, fitted: KnnPatch, shape: Shape) -> str:
    x, sides = reduced(g, shape, fitted.cell)
    return nearest(g, x, sides, fitted)


def of_patchcore(g: Graph, fitted: PatchCore, shape: Shape) -> str:
    (h, w), rows = cells_of(shape, fitted.cell), fitted.embedding.rows
    if not g.features:
        g.features = features(g, shape, fitted.cell)
    return nearest(g, g.features, (rows.shape[1], h, w), fitted)


def features(g: Graph, shape: Shape, cell: int) -> str:
    """The graph of `features.features`."""
    (h, w), (c, height, width) = cells_of(shape, cell), shape
    x = g("Div", g("Cast", "image", to=1), np.float32(255))
    beyond = np.array([0, 0, 0, 0, 0, 0, h * cell - height, w * cell - width], np.int64)
    x = resized(g, g("Pad", x, beyond, mode="edge"), (h * cell, w * cell), (h * FINE_STRIDE, w * FINE_STRIDE))
    x = g("Div", g("Sub", x, np.float32(MEAN)), np.float32(STD))
    x = x if c == 3 else g("Concat", x, x, x, axis=1)
    finer, coarser = network()
    near = layers(g, x, finer)
    far = layers(g, near, coarser)
    near, far = (g.pool(each, 3, pad=1) for each in (near, far))
    return g("Concat", near, resized(g, far, (h // 2, w // 2), (h, w)), axis=1)


def resized(g: Graph, x: str, before: tuple[int, int], after: tuple[int, int]) -> str:
    rows, columns = (enlargement(*sides) for sides in zip(before, after, strict=True))
    return g("MatMul", g("MatMul", rows, x), np.ascontiguousarray(columns.T))


def layers(g: Graph, x: str, module: Any) -> str:
    """The layers of EfficientNet-Lite0."""
    from torch import nn

    if isinstance(module, nn.Conv2d):
        assert module.bias is not None and isinstance(module.padding, tuple)
        pad, stride = module.padding[0], module.stride[0]
        weights = [np.ascontiguousarray(each.detach().numpy()) for each in (module.weight, module.bias)]
        return g("Conv", x, *weights, strides=[stride] * 2, pads=[pad] * 4, group=module.groups)
    if isinstance(module, nn.ZeroPad2d):
        left, right, top, bottom = module.padding
        return g("Pad", x, np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
    if isinstance(module, nn.ReLU6):
        return g("Clip", x, np.float32(0), np.float32(6))
    inside = x
    for each in module.layers if isinstance(module, Block) else module:
        inside = layers(g, inside, each)
    return g("Add", x, inside) if isinstance(module, Block) and module.residual else inside


def nearest(g: Graph, x: str, sides: Shape, fitted: KnnPatch) -> str:
    """The distances [N, 1, h, w] of embedded images to the memory."""
    (c, h, w), of = sides, fitted.embedding
    before, after = of.side // 2, of.side - 1 - of.side // 2
    edge = np.array([0, 0, before, before, 0, 0, after, after], np.int64)
    kernel, shift = of.rows.reshape(len(of.rows), c, of.side, of.side), -(of.rows @ of.mean)
    projected = g("Conv", g("Pad", x, edge, mode="edge"), kernel, shift, strides=[of.stride] * 2)
    h, w, d = -(-h // of.stride), -(-w // of.stride), len(of.rows)
    flat = g.shaped(g("Transpose", projected, perm=[0, 2, 3, 1]), -1, h * w, d)
    places = np.stack(np.meshgrid(np.arange(h) / h, np.arange(w) / w, indexing="ij"), -1).reshape(1, -1, 2)
    far = (places * of.weight).astype(np.float32)
    nothing = g("Mul", g("ReduceSum", flat, np.array([2], np.int64)), np.float32(0))
    flat = g("Concat", flat, g("Add", nothing, far), axis=2)
    squares = g("ReduceSum", g("Mul", flat, flat), np.array([2], np.int64), keepdims=0)
    product = g("MatMul", flat, np.ascontiguousarray(-2 * fitted.memory.T))
    least = g("ReduceMin", g("Add", product, np.square(fitted.memory).sum(1)), axes=[2], keepdims=0)
    distance = g("Sqrt", g("Max", g("Add", squares, least), np.float32(0)))
    return g.shaped(distance, -1, 1, h, w)


def knn_pixels(g: Graph, fitted: KnnPixels, shape: Shape) -> tuple[str, str | None]:
    x, _ = reduced(g, shape, 1)
    inside, _ = coordinates(g, x, fitted.components)
    apart = g("Sub", g("Unsqueeze", inside, np.array([1], np.int64)), fitted.bank)
    squares = g("ReduceSum", g("Mul", apart, apart), np.array([2], np.int64), keepdims=0)
    k = min(KTH_NEIGHBOUR, len(fitted.bank))
    least = g("Neg", g("TopK", g("Neg", squares), np.array([k], np.int64)))
    return g("Sqrt", g("Slice", least, *(np.array([i], np.int64) for i in (k - 1, k, 1)))), None


def plain(g: Graph, fitted: Plain, shape: Shape) -> tuple[str, str | None]:
    if fitted.name != "mean":
        message = f"`{fitted.name}` cannot be exported: it cannot be computed by a graph"
        raise UsageError(message, hint="gz ood --in ./good --export ./alarm")
    return g.shaped(g.mean(g("Cast", "image", to=1), 1, 2, 3, keep=True), -1, 1), None


def mapped(g: Graph, fitted: Mapped, shape: Shape) -> tuple[str, str]:
    raw = RAW[type(fitted)](g, fitted, shape)
    shown = decisive(g, *strong_and_faint(g, raw, fitted.local))
    return largest(g, local(g, raw, fitted.local)), enlarged(g, shown, fitted.factor, shape)


def combined(g: Graph, fitted: Combined, shape: Shape) -> tuple[str, str]:
    scores: list[str] = []
    maps: dict[bool, list[str]] = {True: [], False: []}
    for member in fitted.members:
        of, (top, level) = member.fitted, member.usual
        raw = RAW[type(of)](g, of, shape)
        scores.append(standard(g, largest(g, local(g, raw, of.local)), top))
        strong, faint = strong_and_faint(g, raw, of.local)
        cells = enlarged(g, one_of(strong, faint), of.factor, shape)
        maps[strong is not None].append(g("Max", standard(g, cells, top), np.float32(MIN_STANDARDISED)))
        if member.whole:
            z = standard(g, g.shaped(g("Log", rise(g, raw, of.local)), -1, 1), level)
            scores.append(g("Abs", z) if member.whole == 2 else z)
    highest = g("TopK", g("Concat", *scores, axis=1), np.array([AVERAGED_SCORES], np.int64))
    shown = decisive(g, g("Mean", *maps[True]), next(iter(maps[False]), None))
    return g.mean(highest, 1, keep=True), shown


def standard(g: Graph, x: str, usual: np.ndarray) -> str:
    return g("Div", g("Sub", x, usual[0]), usual[1])


def largest(g: Graph, cells: str) -> str:
    return g.shaped(g("ReduceMax", cells, axes=[2, 3]), -1, 1)


def enlarged(g: Graph, cells: str, factor: int, shape: Shape) -> str:
    """The graph of `fitted.enlarged` for cells [N, 1, h, w]."""
    if factor > 1:
        scales = np.array([1, 1, factor, factor], np.float32)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        cells = g("Resize", cells, "", scales, **how)
    _, h, w = shape
    cells = g("Slice", cells, *(np.array(ends, np.int64) for ends in ([0, 0], [h, w], [2, 3])))
    return g("Squeeze", cells, np.array([1], np.int64))


RAW: dict[type[Fitted], Callable[..., str]] = {
    PcaLocal: of_pca_local,
    PcaPatch: of_pca_patch,
    KnnPatch: of_knn_patch,
    PatchCore: of_patchcore,
}
WRITERS: dict[type[Fitted], Callable[..., tuple[str, str | None]]] = {
    **dict.fromkeys(RAW, mapped),
    Combined: combined,
    Pca: pca,
    KnnPixels: knn_pixels,
    Plain: plain,
}

# ---------------------------------------------------------------------------- the files


def graph_of(models: Sequence[Fitted], shape: Shape) -> Any:
    """The models as one ONNX graph, whose map is the mean of their maps."""
    from onnx import TensorProto, checker, helper

    g = Graph()
    share_bases(g, models)
    pairs = [WRITERS[type(model)](g, model, shape) for model in models]
    g("Concat", *(score for score, _ in pairs), name="score", axis=1)
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", len(models)])]
    if maps := [each for _, each in pairs if each is not None]:
        g("Mean", *maps, name="map")
        outputs.append(helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", *shape[1:]]))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", *shape])
    graph = helper.make_graph(g.nodes, "alarm", [image], outputs, g.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    checker.check_model(model)
    return model


def write(alarm: Calibrated, shape: Shape, fit: Fit, folder: Path, facts: dict[str, Any]) -> list[str]:
    """Writes the files of an alarm on images of a shape into a folder. Returns their names.

    fit: how images of another shape are resized.
    facts: further entries of `alarm.json`, which the script does not read.
    """
    check(fit)
    files.write_atomic(folder / GRAPH, graph_of(alarm.models, shape).SerializeToString())
    table(folder, alarm.fold, alarm.held_out)
    spec = {"shape": list(shape), "fit": fit, "tails": alarm.tails, **facts}
    return script(folder, spec, len(alarm.held_out))


def run(job: PortableJob, folder: Path, device: Any, log: Log) -> dict[str, Any]:
    """Writes the alarm of a method without training to `job.out`. Returns the JSON of `gz ood --export`."""
    check("crop")
    good = methods.open_good(job, log.info)
    for note in good.notes:
        log.info(note)
    alarm = methods.alarm_of(good, job, log.info)
    facts = methods.facts(good, alarm, job)
    spec = {key: facts[key] for key in ("method", "settings", "hash", "fitted_on")}
    names = write(alarm.calibrated, good.pack.meta.shape, good.form["fit"], Path(job.out), spec)
    return facts | {"path": job.out, "files": names, "held_out": len(alarm.calibrated.held_out)}


def check(fit: Fit, *more: str) -> None:
    """Raises MissingError if a package of ONNX or one of `more` is missing, UsageError for a `fit` that the
    script does not support."""
    if missing := [name for name in ("onnx", "onnxruntime", *more) if find_spec(name) is None]:
        message = f"an exported alarm needs {', '.join(missing)}"
        raise MissingError(message, hint=install_line("gzcli[onnx]"))
    if fit not in ("crop", "stretch"):
        message = f"an exported alarm does not support `data.fit: {fit}`"
        raise UsageError(message, hint="use `data.fit: crop` or `stretch`")


def table(folder: Path, fold: np.ndarray, held_out: np.ndarray) -> None:
    """Writes the table of held-out scores. Raises DivergedError if one is not finite, because it would hide
    every foreign image."""
    if not np.isfinite(held_out).all():
        raise DivergedError("an alarm with a held-out score that is not finite cannot be exported")
    rows = ([int(k), float(score)] for k, score in zip(fold, held_out, strict=True))
    write_csv(folder / TABLE, ["fold", "score"], rows)


def script(folder: Path, spec: dict[str, Any], held_out: int) -> list[str]:
    """Writes the script and its description of an alarm whose graph and table are in the folder. Returns the
    names of all files."""
    kinds = {"formats": PILLOW_FORMATS, "suffixes": SUFFIXES}
    checks = {
        "held_out": held_out,
        "sha256": {name: files.checksum(folder / name) for name in (GRAPH, TABLE)},
    }
    files.write_json(folder / "alarm.json", spec | kinds | checks)
    shutil.copyfile(portable_alarm.__file__, folder / "judge.py")
    return [GRAPH, TABLE, "alarm.json", "judge.py"]
