"""Speakers become clients, and the targets are the text one character later."""

import gzip
from pathlib import Path

import pytest
import torch

from fedsim.data.text import FILE, parse_speakers, shakespeare

PLAY = "ANN:\nabcdefg\n\nBOB:\nhi\n\nANN:\nhijklm\n"


def write(folder: Path, text: str = PLAY) -> str:
    (folder / FILE).write_text(text)
    return str(folder)


def test_windows_by_hand(tmp_path):
    # ANN says "abcdefg\nhijklm\n", 15 characters: three windows of 4 and 3 left over; BOB's 3 characters fill none
    data = shakespeare(root=write(tmp_path), sequence_length=4, test_fraction=0.34)
    letters = data.class_names
    assert letters == tuple(sorted(set(PLAY)))

    def decode(rows: torch.Tensor) -> list[str]:
        return ["".join(letters[c] for c in row) for row in rows.tolist()]

    assert decode(data.inputs) == ["abcd", "efg\n"] and decode(data.targets) == ["bcde", "fg\nh"]
    assert decode(data.test_inputs) == ["hijk"] and decode(data.test_targets) == ["ijkl"]
    assert data.groups is not None and data.groups.tolist() == [0, 0] and data.group_names == ("ANN",)
    assert data.num_classes == len(letters) and "1 dropped" in data.notes[0]


def test_the_last_windows_of_every_speaker_are_held_out(tmp_path):
    text = "\n\n".join(f"{name}:\n{name * (20 * n + 1)}" for name, n in (("A", 20), ("B", 10), ("C", 3)))
    data = shakespeare(root=write(tmp_path, text), sequence_length=20)
    assert data.groups is not None and data.groups.bincount().tolist() == [18, 9, 3]
    assert len(data.test_inputs) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stray\n\nA:\nx\n", {"A": "x\n"}),
        ("A:\n\nB:\ny", {"A": "", "B": "y\n"}),
        ("A:\nhe said:\nx\n\n\n\nmore\n", {"A": "he said:\nx\nmore\n"}),
        ("A:\r\nx\r\n", {"A": "x\n"}),
        ("", {}),
    ],
)
def test_speakers_are_read_as_blocks(text, said):
    assert parse_speakers(text) == said


def test_the_working_folders_data_is_found_and_a_path_wins(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    (tmp_path / "mine.txt").write_text("ME:\nI speak a little.\n")
    monkeypatch.chdir(tmp_path)
    assert shakespeare(sequence_length=4).group_names == ("ANN",)
    assert shakespeare(path="mine.txt", sequence_length=4).group_names == ("ME",)


def test_without_a_text_of_ones_own_there_is_the_one_that_comes_with_fedsim(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "First Citizen" in shakespeare().group_names


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, {"path": "none.txt"}, "no file none.txt, nor one with .gz; .*data.root"),
        ("no names here", {}, "no line 'NAME:'"),
        (PLAY, {"sequence_length": 80}, "no speaker has more than sequence_length=80 characters; lower it"),
        (PLAY, {"sequence_length": 0}, "sequence_length must be 1 or more, got 0"),
        (PLAY, {"test_fraction": 1.0}, "test_fraction must be"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        shakespeare(root=str(tmp_path), **arguments)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{FILE}: cannot be read as UTF-8"):
        shakespeare(root=str(tmp_path))


def test_a_gzipped_text_is_the_same_text(tmp_path):
    with gzip.open(tmp_path / (FILE + ".gz"), "wt", newline="") as file:
        file.write(PLAY.replace("\n", "\r\n"))
    zipped = shakespeare(root=str(tmp_path), sequence_length=4)
    plain = shakespeare(root=write(tmp_path), sequence_length=4)
    assert zipped.class_names == plain.class_names and torch.equal(zipped.inputs, plain.inputs)


def test_a_gzipped_text_cut_short_is_named(tmp_path):
    (tmp_path / (FILE + ".gz")).write_bytes(gzip.compress(PLAY.encode() * 100)[:-20])
    with pytest.raises(ValueError, match=f"{FILE}.gz: cannot be read as UTF-8"):
        shakespeare(root=str(tmp_path))


def test_the_customary_file_has_its_65_characters_and_256_speakers():
    data = shakespeare(root=str(Path(__file__).parents[3] / "data"))
    assert data.num_classes == 65 and data.inputs.shape == (11_524, 80) and data.test_inputs.shape == (1_171, 80)
    assert data.group_names is not None and len(data.group_names) == 256
