"""The ``align`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.checkpoints import save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import align_pair, data_for, load_pair, training_part
from isthmus.cli._texts import alignment_text, larger_hint, told_groups
from isthmus.errors import DataError, OutputError
from isthmus.refinement import refine as refine_on_the_path
from isthmus.states import state_of

__all__ = ["align"]


def align(
    a: options.CheckpointA,
    b: options.CheckpointB,
    out: Annotated[Path, typer.Option(help="The alignment file (.safetensors) to write.")],
    model: options.OptionalModel = None,
    method: options.OptionalMethod = None,
    symmetry: options.SymmetryChoice = None,
    data: options.OptionalData = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    limit: options.ExampleLimit = 10_000,
    batch_size: options.BatchSize = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Then learn the factors, rotations and maps that the network leaves free, so that the path's training "
            "loss is small; needs data with labels.",
        ),
    ] = False,
    refine_steps: Annotated[int | None, typer.Option(min=1, help="Steps of --refine. Default 500.")] = None,
    refine_seconds: Annotated[
        float | None, typer.Option(help="Seconds of --refine, instead of or beside steps.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Loss of --refine: as for `isthmus line`. Default cross-entropy.")
    ] = None,
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
    matched_by = options.symmetry_of(symmetry)
    if in_folders:
        folders.check_output(apply, max_shard_size)
    wanted = options.output_names(outputs)
    budget = _budget(refine, refine_steps, refine_seconds, loss, data, in_folders)
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
                symmetry=matched_by,
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
                symmetry=matched_by,
                seed=seed,
                tell=tell,
            )
            if budget is not None:
                assert batches is not None, "_budget refuses"
                alignment = refine_on_the_path(
                    pair.a, pair.b, alignment, batches, outputs=wanted, seed=seed, on_stage=tell, **budget
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
        "symmetry": symmetry,
        "kinds": alignment.kinds,
        "groups": told_groups(alignment),
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
    if alignment.symmetry == "permutations" and not refine:  # what refinement learnt is used already
        hint = larger_hint([group.acts.words for group in alignment.spec.groups.values()])
        told += f"\n{hint}" if hint else ""
    console.emit(value, json, told + folders.unused(written))


def _budget(
    refine: bool,
    steps: int | None,
    seconds: float | None,
    loss: str | None,
    data: str | None,
    in_folders: bool,
) -> dict[str, Any] | None:
    """Return the options of a refinement; None where none is wanted.

    Raises:
        DataError: options of a refinement without one, no data, or model folders.
    """
    if not refine:
        if (steps, seconds, loss) != (None, None, None):
            raise DataError(
                "--refine-steps, --refine-seconds and --loss belong to --refine, which was not given."
            )
        return None
    if data is None:
        raise DataError("--refine learns on training data: give --data.")
    if in_folders:
        raise DataError(
            "--refine: model folders are aligned by permutations alone. Give --model TARGET with checkpoints of both "
            "networks, or leave --refine out."
        )
    return {"steps": steps, "seconds": seconds, "loss": loss}
