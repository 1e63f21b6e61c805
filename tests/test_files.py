"""Files that mean harm: each one clear error, at once; and what is shown of them moves no cursor."""

from __future__ import annotations

import json
import os
import socket
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.errors import CheckpointError, IsthmusError, OutputError, printable
from isthmus.files import (
    atomic_path,
    identity_of,
    parse_json,
    read_json,
    read_text,
    refuse_overwriting,
    require_file,
)
from isthmus.states import check_same_architecture, state_of, widest_dtype

EVIL = "a\x1b[31mred\x1b]0;title\x07\r\nline\u202egnp.\u2066\udcff\x00\x9b[2J\u200b\u2028"


# --- What is shown -----------------------------------------------------------------------------------------


def test_only_visible_characters_are_shown() -> None:
    assert printable(EVIL) == (
        "a\\x1b[31mred\\x1b]0;title\\x07\\r\\nline\\u202egnp.\\u2066\\udcff\\x00\\x9b[2J\\u200b\\u2028"
    )
    assert printable("schöne Größe 猫 → 3·10⁹ e\u0301") == "schöne Größe 猫 → 3·10⁹ e\u0301"
    assert printable("a\nb", lines=True) == "a\nb"
    assert printable(3.5) == "3.5"
    assert printable(Path("x/y")) == "x/y"


def test_every_character_is_shown_or_escaped() -> None:
    for code in [*range(0x3000), 0xD800, 0xDFFF, 0xE000, 0xFEFF, 0xFFFF, 0xE0001, 0x10FFFF]:
        shown = printable(chr(code))
        assert shown.isprintable(), code
        assert len(shown) == 1 or shown.isascii(), code
        assert (shown == chr(code)) == (unicodedata.category(chr(code))[0] in "LMNPS" or chr(code) == " "), (
            code
        )
        shown.encode("utf-8")


def test_long_text_is_shortened_in_the_middle() -> None:
    shown = printable("a" * 10**6 + "z")
    assert shown.startswith("a" * 200 + " … 999601 characters … a")
    assert shown.endswith("z")
    assert len(shown) < 450


@pytest.mark.parametrize("kind", [IsthmusError, CheckpointError, OutputError])
def test_no_message_carries_control_characters(kind: type[IsthmusError]) -> None:
    error = kind(f"{EVIL}: bad.\nDo this.")
    assert str(error) == f"{printable(EVIL, lines=True)}: bad.\nDo this."
    assert "\x1b" not in str(error)
    assert len(str(kind("x" * 10**7))) < 21_000


def test_names_from_files_are_shown_escaped(tmp_path: Path) -> None:
    evil, good = {"w\x1b[2J": torch.ones(1)}, {"w": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"'w\\\\x1b\[2J'|'w\\x1b\[2J'") as caught:
        check_same_architecture(good, evil)
    assert "\x1b" not in str(caught.value)
    torch.save({"state_dict": good, "e\x1b[31m": {"w\u202e": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds 2 states") as caught:
        load_state(tmp_path / "x.pt")
    assert "\x1b" not in str(caught.value)
    os.mkdir(tmp_path / "f\x1b[5m\udcff")
    with pytest.raises(CheckpointError, match="no such file") as caught:
        load_state(tmp_path / "f\x1b[5m\udcff" / "x.pt")
    str(caught.value).encode("utf-8")
    assert "\x1b" not in str(caught.value)


# --- What is read ------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".json"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pipe, "is a pipe, which is not read"),
        (_socket, "is a socket, which is not read"),
        (_device, "is a device, which is not read"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (Path.touch, "is empty"),
        (lambda p: p.symlink_to("gone"), "is a link to gone, which is not there"),
        (lambda p: p.symlink_to(p.name), "cannot be read: Too many levels of symbolic links"),
        (lambda p: None, "no such file"),
    ],
)
def test_only_ordinary_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path(f"x{suffix}")
    make(path)
    for read in (read_json,) if suffix == ".json" else (load_state, load_metadata, require_file):
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_a_path_that_is_none() -> None:
    for bad in ("a\0b.pt", "x" * 5000 + ".pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_state(bad)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5 + "1" + "}" * 10**5, "[" * 65 + "]" * 65])
def test_deep_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"x\.json: cannot be read as JSON: it is nested \d+ levels deep"
    ):
        read_json(tmp_path / "x.json")


def test_brackets_in_strings_do_not_count() -> None:
    text = json.dumps({"a": "[" * 1000, "b": '"\\{"' * 100, "c": [[1]]})
    assert parse_json(text, "x")["c"] == [[1]]
    assert parse_json("[" * 60 + "]" * 60, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "holds the key 'c' twice in one object"),
        ('{"a": NaN}', "holds the number NaN, which JSON does not have"),
        ('{"a": -Infinity}', "holds the number -Infinity"),
        ("{", "cannot be read as JSON: Expecting property name"),
        ("1" * 5000, "cannot be read as JSON: Exceeds the limit"),
        ('"\\', "cannot be read as JSON"),
        ("", "cannot be read as JSON: Expecting value"),
    ],
)
def test_what_is_no_json(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, "x.json")


def test_json_as_it_should_be(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xa9"]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, "é"]}
    assert parse_json('{"a": Infinity}', "x", allow_infinite=True) == {"a": float("inf")}


def test_large_and_foreign_texts(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(
        CheckpointError, match=r"has 1,000,000,000,000 bytes; of a file at most 33,554,432 are read"
    ):
        read_json(tmp_path / "huge.json")
    (tmp_path / "utf16.json").write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(CheckpointError, match=r"cannot be read as text in UTF-8: byte 0 is 0xff"):
        read_text(tmp_path / "utf16.json")


def test_a_file_is_recognised_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("one")
    before = identity_of(path)
    assert identity_of(path) == before
    (tmp_path / "y").write_text("two")
    os.utime(tmp_path / "y", ns=(before.changed, before.changed))
    os.replace(tmp_path / "y", path)
    assert identity_of(path) != before
    before = identity_of(path)
    path.write_text("six")
    os.utime(path, ns=(before.changed + 1, before.changed + 1))
    assert identity_of(path) != before


# --- What is written ---------------------------------------------------------------------------------------


def test_an_input_is_not_written_onto(tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    for path in (a, b):
        save_state(path, {"w": torch.ones(2)})
    (tmp_path / "link.pt").symlink_to(b)
    os.link(b, tmp_path / "hard.pt")
    (tmp_path / "sub").mkdir()
    for out in (b, tmp_path / "link.pt", tmp_path / "hard.pt", tmp_path / "sub" / ".." / "b.pt"):
        with pytest.raises(
            OutputError, match=r"it is the input .*b\.pt, which would be lost.*nothing was changed"
        ):
            save_state(out, {"w": torch.zeros(2)}, inputs=[a, b])
    assert torch.equal(load_state(b)["w"], torch.ones(2))
    save_state(tmp_path / "c.pt", {"w": torch.zeros(2)}, inputs=[a, b])


def test_a_folder_of_inputs_is_not_written_into(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "w.safetensors").write_text("x")
    with pytest.raises(OutputError, match=r"it is a file of the input .*source"):
        refuse_overwriting(source / "w.safetensors", [source])
    with pytest.raises(OutputError, match=r"it is the input .*source"):
        refuse_overwriting(source, [source], folder=True)
    with pytest.raises(OutputError, match=r"it is inside the input .*source"):
        refuse_overwriting(source / "new" / "deep", [source], folder=True)
    refuse_overwriting(source / "new.safetensors", [source])
    refuse_overwriting(tmp_path / "source-2", [source], folder=True)
    refuse_overwriting(tmp_path / "new", [tmp_path / "gone"])
    with pytest.raises(OutputError, match="it is the input"):
        refuse_overwriting(tmp_path / "gone", [tmp_path / "sub" / ".." / "gone"])


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(OutputError, match=r"it is a pipe, which a file would replace"):
        save_state(tmp_path / "pipe.pt", {"w": torch.ones(1)})
    with pytest.raises(OutputError, match=r"/dev/null: it is a device"):  # noqa: SIM117
        with atomic_path("/dev/null"):
            raise AssertionError("not reached")


# --- Versions of modules -----------------------------------------------------------------------------------


def test_a_state_keeps_the_versions_of_its_modules() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    versions = model.state_dict()._metadata  # type: ignore[attr-defined]
    assert versions["0"] == {"version": 2}
    assert state_of(model)._metadata == versions  # type: ignore[attr-defined]
    assert state_of(state_of(model))._metadata == versions  # type: ignore[attr-defined]
    assert not hasattr(state_of(dict(model.state_dict())), "_metadata")


def test_versions_that_are_none_are_passed_over(tmp_path: Path) -> None:
    for odd in (3, {3: {"version": 1}, "a": 4, "b": {"version": 2, "other": torch.ones(2), "more": [1]}}):
        state = OrderedDict(w=torch.ones(1))
        state._metadata = odd  # type: ignore[attr-defined]
        torch.save(state, tmp_path / "x.pt")
        found = load_state(tmp_path / "x.pt")
        save_state(tmp_path / "x.safetensors", found)
        again = getattr(load_state(tmp_path / "x.safetensors"), "_metadata", {})
        assert again == ({} if odd == 3 else {"b": {"version": 2}})


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([], torch.float32),
        ([torch.int64, torch.bool], torch.float32),
        ([torch.bfloat16, torch.int64], torch.bfloat16),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float8_e4m3fn, torch.bfloat16], torch.float32),
        ([torch.float8_e5m2, torch.float64], torch.float64),
    ],
)
def test_the_width_that_loses_nothing(dtypes: list[torch.dtype], widest: torch.dtype) -> None:
    assert widest_dtype({str(k): torch.ones(1).to(d) for k, d in enumerate(dtypes)}) == widest
