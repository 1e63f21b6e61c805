"""The ``align`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.checkpoints import save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import align_pair, data_for, load_pair, training_part
from isthmus.cli._texts import alignment_text
from isthmus.errors import OutputError
from isthmus.states import state_of

__all__ = ["align"]


def align(
    a: options.CheckpointA,
    b: options.CheckpointB,
    out: Annotated[Path, typer.Option(help="The alignment file (.safetensors) to write.")],
    model: options.OptionalModel = None,
    method: options.OptionalMethod = None,
    symmetry: options.SymmetryChoice = "permutations",
    data: options.OptionalData = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    limit: options.ExampleLimit = 10_000,
    batch_size: options.BatchSize = None,
    apply: Annotated[
        Path | None, typer.Option(help="Also write B relabelled, as a checkpoint or model folder.")
    ] = None,
    max_shard_size: options.MaxShardSize = "5GB",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Find the relabelling of B that brings it close to A, and write it to a file."""
    console.refuse_inputs({"--out": out, "--apply": apply}, (a, b))
    if out.suffix.lower() != ".safetensors":
        raise OutputError(
            f"--out {out}: an alignment is written as .safetensors. Give such a name; a checkpoint of B relabelled is "
            "what --apply writes."
        )
    in_folders = folders.are_folders(a, b, model)
    if in_folders:
        folders.check_output(apply, max_shard_size)
    wanted = options.output_names(outputs)
    written, notes = None, ()
    with (
        console.staged_files(out, None if in_folders else apply) as staged,
        console.progress() as bar,
    ):
        tell = console.stages(bar)
        tell("reading networks and data", 0, 4)
        found = data_for(data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise, bar=bar)
        batches = training_part(found)
        if in_folders:
            first, second = folders.open_pair(a, b, trust_remote_code, batches)
            alignment = folders.align_folders(
                first,
                second,
                method=method,
                batches=batches,
                outputs=wanted,
                symmetry=options.symmetry_of(symmetry),
                seed=seed,
                tell=tell,
            )
            alignment.save(staged[0])
            if apply is not None:
                written = folders.relabel_folder(alignment, second, apply, max_shard_size, bar)
        else:
            pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
            alignment = align_pair(
                pair,
                found,
                method=method,
                batches=batches,
                shapes=shape,
                outputs=wanted,
                symmetry=options.symmetry_of(symmetry),
                seed=seed,
                tell=tell,
            )
            alignment.save(staged[0])
            if apply is not None:
                save_state(staged[1], pair.as_stored(alignment.apply(state_of(pair.b)), 1))
            notes = pair.notes
            console.note(notes)
    value = {
        "method": alignment.method,
        "status": alignment.status,
        "moved": alignment.moved,
        "kinds": alignment.kinds,
        "costs": {g: list(c) for g, c in alignment.costs.items()},
        "sweeps": list(alignment.sweeps),
        "notes": [*notes, *alignment.notes],
        "pinned_summary": alignment.spec.pinned_summary(),
        "fraction_moved": alignment.spec.fraction_moved,
        "verification_error": alignment.verification_error,
        "out": str(out),
        "unused": [] if written is None else list(written.unknown),
    }
    told = f"{alignment_text(alignment, verbose)}\nWritten to {out}"
    told += f", B relabelled to {apply}" if apply else ""
    console.emit(value, json, told + folders.unused(written))
