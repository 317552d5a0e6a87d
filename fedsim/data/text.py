"""Plays as a federation: one client per speaker, whose task is the next character.

The split by speaker is McMahan, Moore, Ramage, Hampson, y Arcas. Communication-Efficient Learning of Deep Networks
from Decentralized Data. arXiv:1602.05629, section 3. Departures: windows do not overlap and every position of a
window is a target, so one pass over a client's data reads each character once.

Letters: n windows, T characters in a window, V characters in the vocabulary.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from fedsim.data.checks import check_fraction, check_least
from fedsim.data.dataset import Dataset

FILE = "tinyshakespeare.txt"
_WAY_OUT = (
    f"put a text of speaker blocks ('NAME:', then lines, then an empty line) there as {FILE}, or name its folder in "
    f"data.root or the file in task.dataset.path; the customary one is "
    f"https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def shakespeare(
    *, path: str | None = None, root: str | None = None, sequence_length: int = 80, test_fraction: float = 0.1
) -> Dataset:
    """Shakespeare's plays, one client per speaker, next-character task.

    Args:
        path: the text, gzipped if its name ends in .gz; by default tinyshakespeare.txt, or the same with .gz, in
            `root`, then in ./data, else the one that comes with fedsim.
        root: the folder of the configuration's `data.root`.
        sequence_length: T.
        test_fraction: the share of each speaker's windows, the last ones, that is held out (rounded down).

    Returns:
        inputs [n, T] int64 and targets [n, T], the same text one character later. Speakers whose words do not fill
        one window are dropped; the notes say how many.

    Raises:
        ValueError: if there is no such text, or nobody in it speaks long enough.
    """
    check_least("shakespeare: ", 1, sequence_length=sequence_length)
    check_fraction("shakespeare: test_fraction", test_fraction)
    file = _find(path, root)
    text = _read(file)
    speeches = parse_speakers(text)
    if not speeches:
        raise ValueError(f"{file}: no line 'NAME:' at the head of a block; {_WAY_OUT}")
    vocabulary = "".join(sorted(set(text)))
    code = {character: i for i, character in enumerate(vocabulary)}
    windows = {
        name: (len(words) - 1) // sequence_length for name, words in speeches.items() if len(words) > sequence_length
    }
    if not windows:
        raise ValueError(f"{file}: no speaker has more than sequence_length={sequence_length} characters; lower it")
    train, test = [], []
    for name, count in windows.items():
        words = np.fromiter((code[c] for c in speeches[name][: count * sequence_length + 1]), np.int64)
        pairs = np.stack([words[:-1].reshape(count, -1), words[1:].reshape(count, -1)])
        kept = count - int(count * test_fraction)
        train.append(pairs[:, :kept])
        test.append(pairs[:, kept:])
    x, y = torch.from_numpy(np.concatenate(train, axis=1)).unbind(0)
    x_test, y_test = torch.from_numpy(np.concatenate(test, axis=1)).unbind(0)
    groups = torch.repeat_interleave(torch.arange(len(train)), torch.tensor([part.shape[1] for part in train]))
    return Dataset(
        inputs=x,
        targets=y,
        test_inputs=x_test,
        test_targets=y_test,
        num_classes=len(vocabulary),
        groups=groups,
        group_names=tuple(windows),
        class_names=tuple(vocabulary),
        notes=(
            f"{file.name}: {len(windows)} speakers; {len(speeches) - len(windows)} dropped, who say no more than "
            f"{sequence_length} characters",
        ),
    ).check(str(file))


def parse_speakers(text: str) -> dict[str, str]:
    """All that each speaker says, in the order of first appearance.

    A block starts after an empty line with a line that ends in a colon; text under no name is left out.

    >>> parse_speakers("ANN:\\nHi.\\n\\nBOB:\\nNo:\\nyes.\\n\\nANN:\\nBye.\\n")
    {'ANN': 'Hi.\\nBye.\\n', 'BOB': 'No:\\nyes.\\n'}
    """
    said: dict[str, list[str]] = {}
    name, after_gap = None, True
    for line in text.splitlines():
        if after_gap and line.endswith(":"):
            name = line[:-1].strip()
            said.setdefault(name, [])
        elif line and name is not None:
            said[name].append(line + "\n")
        after_gap = not line
    return {name: "".join(lines) for name, lines in said.items()}


def read_plays(root: str | None = None) -> str:
    """The text of `shakespeare`, from `root` or ./data.

    Raises:
        ValueError: if it is not there.
    """
    return _read(_find(None, root))


def _find(path: str | None, root: str | None) -> Path:
    folders = (root, "data", Path(__file__).parent)
    plain = [Path(path)] if path is not None else [Path(folder) / FILE for folder in folders if folder]
    candidates = [file.with_name(name) for file in plain for name in (file.name, file.name + ".gz")]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ValueError(f"shakespeare: no file {' or '.join(map(str, plain))}, nor one with .gz; {_WAY_OUT}")
    return found


def _read(file: Path) -> str:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as f:
            return f.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error}); {_WAY_OUT}") from None
