"""The ``theory`` commands: bounds, rates and certificates as tables, JSON and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from isthmus.checkpoints import load_state
from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.errors import DataError
from isthmus.files import atomic_path

__all__ = ["theory"]

theory = typer.Typer(
    no_args_is_help=True,
    help="The theorems, run: how wide, how fast, in what dimension, and what is proven of two given networks.",
)

Out = Annotated[
    Path | None, typer.Option(help="Folder for the figure (PNG and SVG) and the JSON; none by default.")
]
DrawSeed = Annotated[int, typer.Option(min=0, help="Of everything random.")]


@theory.command()
def width(
    inputs: Annotated[int, typer.Option(min=1, help="Input dimension m₀.")] = 784,
    depth: Annotated[int, typer.Option(min=1, max=20, help="Hidden layers.")] = 1,
    eps: Annotated[
        float, typer.Option(help="Error allowed at the output, root mean square, for outputs of order 1.")
    ] = 0.1,
    delta: Annotated[
        float | None, typer.Option(help="Probability of failure allowed; without, the error is a mean.")
    ] = None,
    proxy: Annotated[
        float | None,
        typer.Option(help="Also a first layer of sub-Gaussian weights with this variance proxy."),
    ] = None,
    signal: Annotated[
        int | None, typer.Option(min=1, help="Also a first layer whose weights have so many signal axes.")
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of the other axes, for --signal.")
    ] = 0.1,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """How wide a network must be, a priori: sufficient, necessary, and Entezari et al. (base-10 logarithms)."""
    from isthmus.theory import width_record

    record = width_record(inputs, depth, eps, delta=delta, proxy=proxy, signal=signal, noise=noise)
    _deliver(record, "width", out, json, _width_table)


@theory.command()
def rate(
    law: Annotated[
        str, typer.Option(help="`gaussian`, `uniform` or `low-dim` (signal axes and noise).")
    ] = "gaussian",
    dimension: Annotated[int, typer.Option(min=1, help="Axes of a neuron.")] = 5,
    signal: Annotated[int, typer.Option(min=1, help="Signal axes, for `low-dim`.")] = 3,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of the other axes, for `low-dim`.")
    ] = 0.1,
    sizes: Annotated[str, typer.Option(help="Neurons in each sample, rising.")] = "32,64,128,256,512",
    replicates: Annotated[int, typer.Option(min=1, help="Pairs per size.")] = 10,
    seed: DrawSeed = 0,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """How fast two samples of neurons approach each other: measured, and between the proven bounds."""
    from isthmus.theory import Law, rate_record

    known: tuple[Any, ...] = get_args(Law)
    if law not in known:
        raise DataError(f"--law {law}: expected one of {', '.join(known)}.")
    grid = _whole_numbers("--sizes", sizes)
    folder = None if out is None else console.usable_folder(out)
    with console.progress() as bar:
        console.stages(bar)("drawing and matching samples", 0, 1)
        chosen: Any = law
        record = rate_record(chosen, dimension, grid, replicates, signal=signal, noise=noise, seed=seed)
    _deliver(record, "rate", folder, json, _rate_table)


@theory.command()
def dimension(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .safetensors, .pt or .pth.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="`package.module:factory` that builds the network; its hidden layers are found by tracing. Without "
            "it every matrix or kernel of the checkpoint counts as a layer.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Example inputs, where the TARGET gives none.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data set.")] = None,
    replicates: Annotated[int, typer.Option(min=1, help="Random splits per size.")] = 10,
    largest: Annotated[int, typer.Option(min=4, help="Largest part of a layer.")] = 512,
    seed: DrawSeed = 0,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """What dimension the neurons of each layer fill (rows of incoming weights, split into disjoint parts)."""
    from isthmus.theory import dimension_record

    folder = None if out is None else console.usable_folder(out)
    state = load_state(checkpoint)
    if model is None:
        layers = {k: v.flatten(1) for k, v in state.items() if v.ndim >= 2 and v.is_floating_point()}
    else:
        layers = _hidden_layers(checkpoint, model, data, data_dir)
    with console.progress() as bar:
        console.stages(bar)("matching parts of layers", 0, 1)
        record = dimension_record(layers, replicates=replicates, largest=largest, seed=seed)
    _deliver(record, "dimension", folder, json, _dimension_table)


@theory.command()
def certify(
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint of A.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of B.")],
    model: Annotated[
        str,
        typer.Option("--model", metavar="TARGET", help="`package.module:factory` that builds the network."),
    ],
    data: Annotated[
        str, typer.Option(help="`digits`, `mnist`, … or `package.module:function` returning batches.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Part of the data to certify on; `test` where there is one.")
    ] = None,
    segments: Annotated[str, typer.Option(help="Numbers of segments to try; more is tighter.")] = "1,4,16",
    target: Annotated[
        float | None,
        typer.Option(
            help="Then cut the loose segments until bound / measured error is at most this, above 1."
        ),
    ] = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    loss: Annotated[str, typer.Option(help="`cross_entropy` or `mse`.")] = "cross_entropy",
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    limit: options.ExampleLimit = 1000,
    batch_size: options.BatchSize = None,
    seed: DrawSeed = 0,
    out: Out = None,
    json: options.Json = False,
    align: Annotated[str | None, typer.Option(metavar="METHOD", hidden=True)] = None,
) -> None:
    """Prove how far the line between A and B is from linear, and how high its barrier, on given data."""
    from isthmus.cli._pair import data_for, load_pair
    from isthmus.cli._relabel import Relabel
    from isthmus.theory import certify as prove

    relabel = Relabel(alignment, align if method is None else method, shape, None, seed)
    counts = sorted(set(_whole_numbers("--segments", segments)))
    folder = None if out is None else console.usable_folder(out)
    pair = load_pair(a, b, model)
    certificates = []
    with console.progress() as bar:
        tell = console.stages(bar)
        steps = len(counts) + 1 + (target is not None)
        tell("reading data", 0, steps)
        found = data_for(data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise, bar=bar)
        chosen = split or ("test" if "test" in found else next(iter(found)))
        if chosen not in found:
            raise DataError(f"--split {chosen}: {data} has {', '.join(found)}.")
        relabelling = relabel.of(pair, found)
        moved = pair.b if relabelling is None else relabelling.apply(pair.b)
        for k, count in enumerate(counts):
            tell(f"certifying with {count} segments", k + 1, steps)
            certificates.append(prove(pair.a, moved, found[chosen], segments=count, loss=loss))
        if target is not None:
            tell(f"cutting segments for a ratio of {target:g}", steps - 1, steps)
            certificates.append(
                prove(pair.a, moved, found[chosen], segments=counts[-1], loss=loss, target=target)
            )
    record = {
        "kind": "certificate",
        "data": data,
        "split": chosen,
        "loss": loss,
        "alignment": relabel.name,
        "certificates": [c.to_dict() for c in certificates],
    }
    _deliver(record, "certificate", folder, json, _certificate_table)


@theory.command()
def meanfield(
    inputs: Annotated[int, typer.Option(min=2, help="Inputs d; a neuron has d + 2 parameters.")] = 2,
    widths: Annotated[str, typer.Option(help="Numbers of neurons N, rising.")] = "32,64,128,256",
    seeds: Annotated[int, typer.Option(min=1, help="Pairs per width.")] = 4,
    horizon: Annotated[float, typer.Option(help="Training time T.")] = 5.0,
    step: Annotated[float, typer.Option(help="SGD step ε.")] = 0.05,
    ridge: Annotated[float, typer.Option(min=0.0, help="Weight decay λ.")] = 0.0,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature τ of the noise; 0 is noiseless.")
    ] = 0.0,
    coupling: Annotated[
        str, typer.Option(help="`independent` (the theorem's case), `same_data` or `same_init`.")
    ] = "independent",
    floor_steps: Annotated[
        str, typer.Option(help="Steps compared at the largest N; empty for none.")
    ] = "0.2,0.05,0.01",
    errors: Annotated[
        str, typer.Option(help="Errors for which the least N is sought; empty for none.")
    ] = "0.04,0.02",
    delta: Annotated[float, typer.Option(min=0.0, help="Share of pairs allowed to miss the error.")] = 0.34,
    reference_width: Annotated[int, typer.Option(min=2, help="Neurons of the wide network.")] = 2048,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """Theorem 3.1 as an experiment: mean-field networks of N neurons, matched, error and W₂² against N."""
    from isthmus.theory import MeanFieldSettings, SharedDraws, mean_field_record

    known: tuple[Any, ...] = get_args(SharedDraws)
    if coupling not in known:
        raise DataError(f"--coupling {coupling}: expected one of {', '.join(known)}.")
    chosen: Any = coupling
    settings = MeanFieldSettings(
        inputs=inputs, horizon=horizon, step=step, ridge=ridge, temperature=temperature
    )
    wanted = _whole_numbers("--widths", widths)
    steps, goals = _numbers("--floor-steps", floor_steps), _numbers("--errors", errors)
    folder = None if out is None else console.usable_folder(out)
    with console.progress() as bar:
        console.stages(bar)("training mean-field networks", 0, 1)
        record = mean_field_record(
            settings,
            wanted,
            seeds,
            steps=steps,
            errors=goals,
            delta=delta,
            reference_width=reference_width,
            coupling=chosen,
        )
    _deliver(record, "meanfield", folder, json, _mean_field_table)


@theory.command()
def dropout(
    inputs: Annotated[int, typer.Option(min=1, help="Inputs of the random networks.")] = 8,
    widths: Annotated[str, typer.Option(help="Hidden units, rising.")] = "32,64,128,256,512",
    seeds: Annotated[int, typer.Option(min=1, help="Pairs per width.")] = 6,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """Dropout stability against the error on the line over width, for random networks of one hidden layer."""
    from isthmus.theory import dropout_record

    wanted = _whole_numbers("--widths", widths)
    folder = None if out is None else console.usable_folder(out)
    with console.progress() as bar:
        console.stages(bar)("matching random networks", 0, 1)
        record = dropout_record(inputs, wanted, seeds)
    _deliver(record, "dropout", folder, json, _dropout_table)


def _hidden_layers(checkpoint: Path, model: str, data: str | None, data_dir: Path | None) -> dict[str, Any]:
    """Return the incoming weights of every group of units that may change places, one unit a row."""
    from isthmus.cli._pair import data_for, example_for, load_pair
    from isthmus.states import state_of
    from isthmus.symmetry import discover

    pair = load_pair(checkpoint, checkpoint, model)
    with console.progress() as bar:
        example = example_for(pair.target, data_for(data, data_dir, batch_size=4, limit=4, bar=bar))
    spec = discover(pair.a, example.args, example.kwargs)
    state = state_of(pair.a)
    layers: dict[str, Any] = {}
    for group in spec.groups.values():
        for slot in group.slots:
            if slot.axis == 0 and state[slot.tensor].ndim >= 2:
                order = slot.index.positions().flatten()
                layers[slot.tensor] = state[slot.tensor].index_select(0, order).reshape(group.size, -1)
    if not layers:
        raise DataError(f"{checkpoint}: no layer whose units may change places was found in {model}.")
    return layers


def _deliver(record: dict[str, Any], kind: str, out: Path | None, json: bool, table: Any) -> None:
    """Print a record, and write it with its figure where a folder was asked for."""
    if out is not None:
        from isthmus.report import draw_theory

        folder = console.usable_folder(out)
        picture = draw_theory(kind, record)
        console.write_json(folder / f"{kind}.json", record)
        for suffix, content in (("png", picture.png), ("svg", picture.svg)):
            with atomic_path(folder / f"{kind}.{suffix}") as temporary:
                temporary.write_bytes(content)
    console.emit(record, json, table(record))
    if out is not None and not json:
        console.tell(f"Written to {out}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise DataError(f"{option} {text}: expected numbers such as 0.1,0.02.") from error


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise DataError(f"{option} {text}: expected whole numbers such as 32,64,128.") from error
    if not found or min(found) < 1:
        raise DataError(f"{option} {text!r}: expected at least one whole number, each 1 or more.")
    return found


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _width_table(record: Mapping[str, Any]) -> Table:
    rows = [
        [f"hidden layer {k}, effective width", layer["fixed_t"]["text"], layer["sup_t"]["text"]]
        for k, layer in enumerate(record["layers"], start=1)
    ]
    for name, found in (
        ("sub-Gaussian weights", record["sub_gaussian"]),
        ("weights of low dimension", record["low_dimension"]),
    ):
        if found is not None:
            widths = (f"10^{found[kind]:.2f}" for kind in ("fixed_t", "sup_t"))
            rows.append([f"sufficient for {name}, first layer", *widths])
    rows.append(["necessary for the matching, first layer", f"10^{record['necessary']:.2f}", ""])
    if record["entezari"] is not None:
        rows.append(["Entezari et al. 2022, constant unknown", f"10^{record['entezari']:.2f}", ""])
    title = (
        f"{record['input_dimension']} inputs, {record['depth']} hidden layers, error {record['epsilon']:g}"
    ) + ("" if record["delta"] is None else f" with probability {1 - record['delta']:g}")
    caption = "Sufficient: proven for Gaussian weights at initialisation. Real widths are multiples of effective ones."
    return _table(title, ["", "sufficient, each t", "sufficient, every t at once"], rows, caption)


def _rate_table(record: Mapping[str, Any]) -> Table:
    nearest = record["nearest"] or [None] * len(record["sizes"])
    columns = ("sizes", "lower", "means", "errors", "upper")
    rows = [
        [str(m), _number(low), _number(near), _number(mean), _number(error, 2), _number(up)]
        for m, low, mean, error, up, near in zip(*(record[c] for c in columns), nearest, strict=True)
    ]
    fit = record["fit"]
    caption = (
        ""
        if fit is None
        else (
            f"slope {fit['slope']:.3f}, dimension {_number(fit['dim_asymptotic'], 3)} (−2/slope), "
            f"{_number(fit['dim_calibrated'], 3)} (calibrated)"
        )
    )
    heads = ["neurons m", "volume, lower", "nearest, lower", "measured W₂²", "± error", "upper"]
    return _table(
        f"Squared distance of two samples, {record['law']}, {record['dimension']} axes", heads, rows, caption
    )


def _dimension_table(record: Mapping[str, Any]) -> Table:
    rows = [
        [
            layer["name"],
            str(layer["rows"]),
            str(layer["features"]),
            *(_number(layer["fit"] and layer["fit"][key], 3) for key in ("dim_asymptotic", "dim_calibrated")),
            *(_number(layer[key], 3) for key in ("approximate", "approximate_centred", "stable_rank")),
        ]
        for layer in record["layers"]
    ]
    heads = ["layer", "neurons", "inputs", "−2/slope", "calibrated", "approximate", "centred", "stable rank"]
    caption = (
        f"Skipped (too few or equal neurons): {', '.join(record['skipped'])}" if record["skipped"] else ""
    )
    return _table("Dimensions of the clouds of neurons", heads, rows, caption)


def _certificate_table(record: Mapping[str, Any]) -> Table:
    rows = [
        [
            str(c["segments"]),
            *(
                _number(c[key])
                for key in ("lmc_error", "lmc_error_measured", "ratio", "barrier", "barrier_measured")
            ),
            "–" if c["accuracy_floor"] is None else f"{c['accuracy_floor']:.2%}",
        ]
        for c in record["certificates"]
    ]
    heads = ["segments", "error ≤", "error ≥", "ratio", "barrier ≤", "barrier ≥", "accuracy on the path ≥"]
    return _table(
        f"Proven on {record['data']} {record['split']}", heads, rows, record["certificates"][-1]["scope"]
    )


def _mean_field_table(record: Mapping[str, Any]) -> Table:
    columns = ("sup_error", "w2", "bound", "unmatched")
    rows = [
        [str(n), *(_number(sum(record[c][k]) / record["seeds"]) for c in columns)]
        for k, n in enumerate(record["widths"])
    ]
    parts = [
        f"slopes: error {_number(record['slopes']['sup_error'], 3)}, W₂² {_number(record['slopes']['w2'], 3)}"
    ]
    parts += [f"step {f['step']:g}: two runs / two samples = {f['ratio']:.2f}" for f in record["floor"]]
    for b in record["n_min"]:
        wide = "more than tried" if b["enough"] is None else f"{b['fails']} < N ≤ {b['enough']}"
        parts.append(f"error {b['error']:g}: {wide}")
    heads = ["N", "error, matched", "W₂²", "proven bound", "error, unmatched"]
    noise = f", temperature {record['temperature']:g}" if record["temperature"] else ""
    kind = "" if record["coupling"] == "independent" else f", {record['coupling'].replace('_', ' ')}"
    return _table(f"Mean-field pairs, {record['inputs']} inputs{noise}{kind}", heads, rows, "; ".join(parts))


def _dropout_table(record: Mapping[str, Any]) -> Table:
    columns = ("line", "half", "bernoulli", "matched", "w2")
    rows = [[str(m), *(_number(record[c][k]) for c in columns)] for k, m in enumerate(record["widths"])]
    rows.append(["slope", *(_number(record["slopes"][c], 3) for c in columns)])
    heads = ["hidden units", "line", "random half", "Bernoulli", "matched half", "W₂²"]
    return _table(f"Random networks, {record['inputs']} inputs: change of the output", heads, rows)
