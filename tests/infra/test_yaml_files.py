"""YAML is read strictly: each key once, bounded work, text as it is written."""

from pathlib import Path

import pytest

from infra.yaml_files import Plain, YamlFileError, read_yaml, read_yaml_text


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_bytes(text.encode("utf-8"))
    return file


def mistake(folder: Path, text: str) -> str:
    file = write(folder, text)
    with pytest.raises(YamlFileError) as caught:
        read_yaml(file)
    return str(caught.value).replace(str(file), "run.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3 a: is in line 1 already"),
        ("o:\n  x: 1\n  y: 2\n  x: 1\n", "run.yaml:4 x: is in line 2 already"),
        ("s:\n- a: 1\n  'a': 2\n", "run.yaml:3 a: is in line 2 already"),
        ("{a: 1, a: 1}", "run.yaml:1 a: is in line 1 already"),
        ("on: 1\n'on': 2\n", "run.yaml:2 on: is in line 1 already"),
    ],
)
def test_a_key_given_twice_is_an_error_with_both_lines(
    tmp_path: Path, text: str, told: str
) -> None:
    assert mistake(tmp_path, text) == told


def test_text_stays_as_it_is_written(tmp_path: Path) -> None:
    text = "a: 010\nb: no\nc: 1:30\nd: 2024-13-45\ne: '1'\nf: !!str 7\ng: ~\nh:\ni: 0x1F\n"
    values, _ = read_yaml(write(tmp_path, text))
    assert values == {
        "a": "010",
        "b": "no",
        "c": "1:30",
        "d": "2024-13-45",
        "e": "1",
        "f": "7",
        "g": "~",
        "h": "",
        "i": "0x1F",
    }
    assert [key for key, value in values.items() if not isinstance(value, Plain)] == ["e", "f"]


def test_lines_are_known_for_keys_and_items(tmp_path: Path) -> None:
    file = write(tmp_path, "a:\n  b: 1\n\nc:\n- {d: 2}\n- 3\n")
    assert read_yaml(file).lines == {"a": 1, "a.b": 2, "c": 4, "c.0": 5, "c.0.d": 5, "c.1": 6}


@pytest.mark.parametrize("text", ["a:\n\tb: 1\n", "a:\n  b: 1\n\tc: 2\n"])
def test_a_tab_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    number = text[: text.index("\t")].count("\n") + 1
    assert mistake(tmp_path, text).endswith(
        f":{number} is indented with a tab, which YAML does not allow: use spaces"
    )


def test_anchors_and_merges_are_what_yaml_says(tmp_path: Path) -> None:
    text = (
        "first: &first {x: 1, y: 1}\n"
        "second: &second {y: 2, z: 2}\n"
        "both:\n"
        "  z: 3\n"
        "  <<: [*first, *second]\n"
        "same: *first\n"
    )
    values, lines = read_yaml(write(tmp_path, text))
    assert values["both"] == {"x": "1", "y": "1", "z": "3"}
    assert values["same"] == {"x": "1", "y": "1"}
    assert (lines["both.x"], lines["both.z"], lines["same.y"]) == (1, 4, 1)


def test_a_merged_section_that_is_overridden_leaves_no_lines(tmp_path: Path) -> None:
    text = "a: &a {o: {x: 1}}\nb:\n  <<: *a\n  o: {y: 2}\n"
    values, lines = read_yaml(write(tmp_path, text))
    assert values["b"] == {"o": {"y": "2"}}
    assert "b.o.x" not in lines


def bomb(*, merge: bool) -> str:
    """Each of 30 sections stands for two of the one before it."""
    pair = "<<: [*a{0}, *a{0}]" if merge else "x: *a{0}, y: *a{0}"
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{{pair.format(n - 1)}}}" for n in range(1, 31)]
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_stand_for_billions_are_refused(tmp_path: Path, merge: bool) -> None:
    assert "stands for more than 100000 values, aliases written out" in mistake(
        tmp_path, bomb(merge=merge)
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [*a]", "run.yaml:1 has an alias of itself within"),
        ("a: &a\n  <<: *a\n", "run.yaml:1 has an alias of itself within"),
        ("a: " + "[" * 3000 + "]" * 3000, "run.yaml:1 is nested more than 50 levels deep"),
        ("a: " + "{b: " * 3000 + "}" * 3000, "run.yaml:1 is nested more than 50 levels deep"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)),
            "run.yaml:1 is nested more than 50 levels deep by its aliases",
        ),
        ("a: 1\n<<: 3\n", "run.yaml:2 <<: needs a section, or a list of sections"),
        ("a: *b\n", "run.yaml:1 found undefined alias 'b'"),
        ("? [a]\n: 1\n", "run.yaml:1 has a list or a section where a key should be"),
        ("a: !!python/name:os.system\n", "run.yaml:1 has the tag !!python/name:os.system, which"),
        ("a: !env HOME\n", "run.yaml:1 has the tag !env, which a config can't have"),
        ("a: !!set {b}\n", "run.yaml:1 has the tag !!set, which a config can't have"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2 expected a single document in the stream"),
        ("a: [1\nb: 2\n", "run.yaml:2 while parsing a flow sequence"),
        ("a: \0\n", "run.yaml: unacceptable character"),
    ],
)
def test_what_is_no_config_is_refused_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    assert mistake(tmp_path, text).startswith(told)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    assert mistake(tmp_path, "#" * (2**20 + 1)) == "run.yaml: is larger than 1 MiB; is it a config?"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(YamlFileError, match="Is a directory"):
        read_yaml(tmp_path)


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes("name: größe\r\nseed: 1\r\n".encode(encoding))
        assert read_yaml(file).values == {"name": "größe", "seed": "1"}


def test_json_is_read_with_what_it_escapes() -> None:
    assert read_yaml_text('{"a": "\\ud83d\\ude00 \\u00fc"}') == {"a": "\U0001f600 ü"}


def test_a_comment_without_a_space_is_kept_beside_the_text(tmp_path: Path) -> None:
    values, _ = read_yaml(write(tmp_path, "a: set #2\nb: set # two\nc: 'set' #2\nd: set#2\n"))
    assert values == {"a": "set", "b": "set", "c": "set", "d": "set#2"}
    assert [getattr(value, "comment", "") for value in values.values()] == [" #2", "", "", ""]
