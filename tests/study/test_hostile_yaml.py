"""Study files that mean harm, or were saved by another program: one clear error, soon, and little memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, tiny

from isthmus.errors import ModelError
from isthmus.study import (
    NetworkConfig,
    StudyError,
    load_dataset,
    make_plan,
    network_for,
    read_study,
    run_study,
)
from isthmus.study._yaml import MOST_BYTES, read_yaml
from isthmus.training._memory import check_fits, memory_of

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
MAPPINGS = "a0: &a0 {x: 1, y: 1}\n" + "".join(
    f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 20,000 values, aliases written out"),
        (MAPPINGS, "more than 20,000 values, aliases written out"),
        ("seeds: [" + "1, " * 30_000 + "1]", "more than 20,000 values"),
        ("a: &a [1, *a]", r"line 1: \*a stands inside what it stands for"),
        ("a: &a\n  b: &b [*a]", r"line 2: \*a stands inside"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("{a: " * 100_000, "nested more than 20 deep"),
        ("- " * 100_000 + "x", "nested more than 20 deep"),
        ("x" * (MOST_BYTES + 1), "at most 1,048,576 characters, found 1,048,577"),
        ("a: 2024-01-01", "line 1: expected text, numbers.* found a date; put it in quotes"),
        ("a: 2024-13-45", "found a date"),
        ("b: 1\na: !!timestamp x", "line 2: .*found a date"),
        ("a: !!int abc", "line 1: 'abc' cannot be read as int"),
        ("a: !!float abc", "'abc' cannot be read as float"),
        ("a: !!bool abc", "'abc' cannot be read as bool"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "found the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a: !mine x", "found the tag '!mine'"),
        ("a: !!set {b}", "found the tag 'tag:yaml.org,2002:set'"),
        ("a: !!binary aGk=", "found binary data"),
        ("b: &b {c: 1}\na: {<<: *b}", r"line 2: .*found a merge key \(<<\); write the fields out"),
        ("a: !!str [1]", "found the tag 'tag:yaml.org,2002:str'"),
        ("? [a, b]\n: c", "line 1: expected the name of a field, found a list or mapping"),
        ("a: " + "9" * 5000, "9999…' cannot be read as int"),
        ("a: " + "9" * 30, "expected a number of less than 64 bits"),
        ("a: -9223372036854775809", "expected a number of less than 64 bits"),
        ("a: .nan", "expected a finite number, found .nan"),
        ("a: [-.inf]", "expected a finite number, found -.inf"),
        ("a: 1:30", "1:30: expected a number without colons"),
        ("a:\n\t- b", "line 2: not valid YAML: found character '\\\\t'"),
        ("a: 1\nb: \x00", "line 2: not valid YAML: the character U\\+0000 is not allowed"),
        ("a: 1\n---\nb: 1", "another document"),
        ("a: *nowhere", "undefined alias"),
        ("a: 'open", "unexpected end of stream"),
        ("1: a\n'1': b", "line 2: '1' occurs twice"),
        ("%YAML 3.0\n---\na: 1", "incompatible YAML document"),
    ],
)
def test_each_is_one_error_soon(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(StudyError, match=message) as caught:
        read_yaml(text, "mine.yaml")
    assert time.process_time() - start < 5
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")


@pytest.mark.parametrize("text", [BOMB, MAPPINGS, "[" * 50_000], ids=["lists", "mappings", "depth"])
def test_bombs_take_little_memory(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StudyError):
            read_yaml(text, "mine.yaml")
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_what_is_allowed_is_read_as_before() -> None:
    text = 'a: &a [1, 2.5, yes, ~, "2024-01-01"]\nb: *a\nc: {d: 1.0e-3, "1": x}\n'
    values, lines = read_yaml(text, "mine.yaml")
    assert values == {"a": (one := [1, 2.5, True, None, "2024-01-01"]), "b": one, "c": {"d": 1e-3, "1": "x"}}
    assert (lines["b",], lines["b", 1], lines["c", "d"]) == (2, 1, 3)
    assert read_yaml("x: " + "[" * 19 + "]" * 19, "mine.yaml")[0]["x"] is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TINY.encode("utf-16"), "expected UTF-8 text, found UTF-16. Save it as UTF-8"),
        (TINY.encode("utf-16-be"), "U\\+0000 is not allowed"),
        (b"name: tiny\ndescription: gr\xfc\xdfe\n", "line 2: expected UTF-8 text, found the byte 0xfc"),
        (b"\xff" * 10, "expected UTF-8 text"),
        (b"#" * (MOST_BYTES + 1), "at most 1,048,576 bytes, found more"),
        (b"", "expected fields such as name"),
    ],
)
def test_files_in_other_encodings(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(StudyError, match=message):
        read_study(tmp_path / "mine.yaml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + TINY.encode())
    assert read_study(tmp_path / "mine.yaml").text == TINY


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(TINY)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StudyError, match=r"cannot be read: Permission denied\. Give a readable YAML file"):
        read_study(tmp_path / "mine.yaml")


TWENTY = str(list(range(2, 22)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seeds: 4": "seeds: 1000000000"},
            "2 variants of 1,000,000,000 seeds and 500,000,000 pairs make at least",
        ),
        ({"seeds: 4": "seeds: 200\npairs: all"}, "of 200 seeds and 19,900 pairs make at least 39,934 units"),
        (
            {
                "statistics: 200, train: 200": f"statistics: {TWENTY}, train: {TWENTY}, test: {TWENTY}",
                "width: 12, depth: 2": f"width: {TWENTY}, depth: {TWENTY}",
                "[0.01, 0.1], epochs: 2": f"{TWENTY}, epochs: {TWENTY}",
            },
            "1,280,000,000 variants of 4 seeds .*more than max_units: 10,000. Sweep fewer values, take fewer seeds, or",
        ),
    ],
)
def test_units_are_counted_before_they_are_made(changes: dict[str, str], message: str) -> None:
    text = TINY
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    start = time.process_time()
    with pytest.raises(StudyError, match=message):
        tiny(text)
    with pytest.raises(StudyError, match="name: is missing"):
        tiny(text.replace("name: tiny", "title: tiny"))
    assert time.process_time() - start < 5


def test_the_limit_on_units_can_be_raised_and_lowered() -> None:
    wide = TINY.replace("seeds: 4", "seeds: 6000")
    with pytest.raises(StudyError, match="make at least 10,000 units of work, more than max_units: 9,999"):
        tiny(wide + "max_units: 9_999\n")
    assert len(tiny(wide + "max_units: 10_000\n").all_seeds) == 6000
    # Nothing of a unit's content: the same study with another limit has the same addresses.
    plans = [make_plan(tiny(TINY + extra), None) for extra in ("", "max_units: 100\n")]
    assert plans[0] == plans[1]


def test_faults_of_a_long_sweep_do_not_fill_the_screen() -> None:
    with pytest.raises(StudyError) as caught:
        tiny(TINY.replace("[0.01, 0.1]", str([-i for i in range(1, 60)])))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "… and 39 more."
    with pytest.raises(StudyError) as caught:
        tiny(TINY.replace("family: mlp", f"family: {'x' * 5000}"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 2", "epochs: yes", "training.epochs: expected a number or text, found True"),
        ("seeds: 4", "seeds: true", "seeds: expected a number or text, found True"),
        ("width: 12", "width: on", "network.width: expected a number or text"),
        (
            "depth: 2",
            "depth: 1000000000",
            "network.depth: expected less than or equal to 1000, found 1000000000",
        ),
        ("dimension: false", "dimension: 7", "measure.dimension: expected a valid boolean"),
    ],
)
def test_values_that_are_none_of_a_study(old: str, new: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        tiny(TINY.replace(old, new))


def test_settings_of_a_network_are_plain_and_finite() -> None:
    assert NetworkConfig(settings={"bias": True}).settings == {"bias": True}
    for bad in (float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="finite numbers"):
            NetworkConfig(settings={"bias": bad})


# --- Networks larger than the machine ----------------------------------------------------------------------


def test_networks_that_do_not_fit_are_told_before_they_are_built() -> None:
    digits = load_dataset("digits")
    cases = [
        (
            "mlp",
            {"width": 10**6},
            r"width 1e\+06, depth 3 takes 2,000,077,000,010 float32 numbers, 7,450.9 GiB, and",
        ),
        ("mlp", {"width": 10**12}, "cannot be built: Storage size calculation overflowed"),
        ("mlp", {"width": 1e300}, "Check its settings"),
        ("mlp", {"width": float("nan")}, "expected a number of units, found nan"),
        ("mlp", {"depth": 10**9}, "depth: expected 0 to 1000 hidden layers, found 1000000000"),
        ("vgg16", {"width": 1e4}, "takes .* float32 numbers"),
        ("resnet20", {"width": 1e9}, "cannot be built"),
        ("densenet", {"width": float("inf")}, "cannot be built"),
    ]
    start = time.process_time()
    for family, settings, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            network_for(family, digits, **settings)
        assert "\n" not in str(caught.value)
    assert time.process_time() - start < 20


def test_memory_is_known_or_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr("isthmus.training._memory._LIMITS", (tmp_path / "none", tmp_path / "absent"))
    there = memory_of("cpu")
    assert there is None or there > 2**28
    assert memory_of("meta") is None
    check_fits(10**15, "On a device that does not tell, this", device="meta")
    if there is not None:
        monkeypatch.setattr("isthmus.training._memory._LIMITS", (tmp_path / "limit",))
        assert memory_of("cpu") == 2**20
        check_fits(2**17, "This", copies=2)
        with pytest.raises(
            ModelError, match=r"This takes 3 × 131,072 float32 numbers, 0.0 GiB, and the device cpu"
        ):
            check_fits(2**17, "This", copies=3)


def test_a_study_that_cannot_be_trained_here_is_refused_before_it_begins(tmp_path: Path) -> None:
    study = tiny(TINY.replace("width: 12", "width: [12, 1000000]"))
    assert make_plan(study, None).units  # a plan is made from shapes alone
    with pytest.raises(
        ModelError,
        match=r"Training mlp 1e\+06 × 2 on digits, 2 epochs, 3 networks at a time, takes 9 × 1,000,076,",
    ):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
