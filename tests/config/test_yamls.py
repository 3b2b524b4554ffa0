"""YAML is read as people expect it, and never runs code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstill.config import yamls
from dstill.errors import DstillError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1e4", 1e4), ("-2E+3", -2000.0), (".5", 0.5), ("1.", 1.0), ("100.0", 100.0), ("-3.5e-2", -0.035)],
)
def test_numbers_with_an_exponent_or_a_point_are_floats(text: str, value: float) -> None:
    parsed = yamls.parse(text, "here")
    assert isinstance(parsed, float)
    assert parsed == value


def test_a_whole_number_stays_a_whole_number() -> None:
    assert yamls.parse("5000", "here") == 5000
    assert isinstance(yamls.parse("5000", "here"), int)


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "Off", "ON", "Yes", "n", "y", "True", "FALSE"])
def test_off_on_yes_and_no_are_words(word: str) -> None:
    assert yamls.parse(f"key: {word}", "here") == {"key": word}


def test_true_and_false_are_booleans() -> None:
    assert yamls.parse("[true, false]", "here") == [True, False]


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tkey: 1", "'open", "@a"])
def test_malformed_yaml_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(DstillError, match=r"(?s)my\.yaml is not valid YAML.*line \d"):
        yamls.parse(text, "my.yaml")


def test_a_date_that_does_not_exist_is_refused_by_a_sentence() -> None:
    with pytest.raises(DstillError, match="not valid YAML"):
        yamls.parse("note: 2024-13-45", "my.yaml")


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/apply:pathlib.Path.touch", "python/name:os.system"]
)
def test_python_tags_are_refused_and_nothing_runs(tag: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    argument = f"touch {marker}" if tag.endswith("system") else str(marker)
    with pytest.raises(DstillError, match="python/"):
        yamls.parse(f"key: !!{tag} ['{argument}']", "my.yaml")
    assert not marker.exists()


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(DstillError, match="must hold keys and values, it holds list"):
        yamls.read_mapping(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DstillError, match="cannot be read"):
        yamls.read_mapping(path)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(
            st.sampled_from(
                ["off", "on", "yes", "1e5", "5e8", "-1.e-3", ".5", "true", "null", "012", "2024-01-01", "~", "1:30"]
            ),
            st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-(10**9), 10**9),
            st.booleans(),
            st.text(st.characters(min_codepoint=32, max_codepoint=0x3BF, exclude_categories=["Cc"]), max_size=12),
        ),
        max_size=5,
    )
)
def test_what_is_dumped_is_read_back_with_its_types(values: dict[str, object]) -> None:
    read = yamls.parse(yamls.dump(values), "here")
    assert read == values
    assert [type(value) for value in read.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize("text", ["12:00:00", "1:00:00", "2:30", "0017"])
def test_a_time_is_a_word(text: str) -> None:
    assert yamls.parse(text, "here") == text
    assert yamls.parse(yamls.dump({"time": text}), "here") == {"time": text}


def test_whole_numbers_are_whole() -> None:
    assert [yamls.parse(text, "here") for text in ("0", "-3", "+12", "1_000")] == [0, -3, 12, 1000]
