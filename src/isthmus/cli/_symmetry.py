"""The ``symmetry`` command."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.cli._pair import example_for, example_of_shapes
from isthmus.cli._target import load_target
from isthmus.cli._texts import spec_text
from isthmus.files import atomic_path
from isthmus.symmetry import SymmetrySpec, Verification

__all__ = ["symmetry"]


def symmetry(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="`package.module:factory` (a module, or module and example inputs), or a model folder.",
        ),
    ],
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    save: Annotated[Path | None, typer.Option(help="Write the spec as JSON.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Show which units of a network can be relabelled, what is pinned and why, and verify it by running."""
    wanted = options.output_names(outputs)
    spec, result = _found(target, shape, wanted, trust_remote_code, seed)
    if save is not None:
        with atomic_path(save) as temporary:
            temporary.write_text(spec.to_json(), encoding="utf-8")
    value = {
        **json_module.loads(spec.to_json()),
        "fraction_moved": spec.fraction_moved,
        "pinned_summary": spec.pinned_summary(),
        "notes": list(spec.notes),
        "verification": {
            "passed": result.passed,
            "max_relative_error": result.max_relative_error,
            "tolerance": result.tolerance,
            "draws": result.draws,
            "elements": result.elements,
            "guilty": list(result.guilty),
        },
    }
    console.emit(value, json, f"{spec_text(spec, verbose)}\n\n{result}")
    result.require()


def _found(
    target: str, shape: list[str] | None, wanted: Any, trust_remote_code: bool, seed: int
) -> tuple[SymmetrySpec, Verification]:
    """Discover and verify, with progress."""
    from isthmus import pretrained
    from isthmus.symmetry import discover, verify

    with console.progress() as bar:
        tell = console.stages(bar)
        tell("building the network", 0, 3)
        if Path(target).is_dir():  # what else lies there is named when it is opened
            given = example_of_shapes(shape) if shape else None
            opened = pretrained.open_model(target, trust_remote_code=trust_remote_code, example=given)
            tell("discovering symmetries", 1, 3)
            ones, zeros = opened.constants()
            spec = opened.discover(wanted, ones=ones, zeros=zeros)
            tell("verifying by running", 2, 3)
            return spec, pretrained.verify(spec, opened, seed=seed)
        found = load_target(target)
        example = example_for(found, {}, shape)
        tell("discovering symmetries", 1, 3)
        spec = discover(found.model, example.args, example.kwargs, outputs=wanted)
        tell("verifying by running", 2, 3)
        generator = torch.Generator().manual_seed(seed)
        result = verify(spec, found.model, example.args, example.kwargs, outputs=wanted, generator=generator)
        return spec, result
