"""The user's own .npz and Parquet files, whole and per client, good and bad."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.data.files import npz, parquet

X, Y = np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_an_npz_with_everything(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y, client=["u", "v"] * 3, x_test=X[:1], y_test=Y[:1])
    data = npz(path="a.npz", root=str(tmp_path))
    assert data.inputs.tolist() == X.tolist() and data.targets.tolist() == Y.tolist()
    assert data.groups is not None and data.groups.tolist() == [0, 1] * 3 and data.group_names == ("u", "v")
    assert data.test_inputs.tolist() == [[0.0, 1.0]] and data.num_classes == 3


def test_an_npz_with_x_and_y_alone_gives_up_a_share(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=X, y=Y)
    data = npz(path=str(tmp_path / "a.npz"), test_fraction=0.5)
    assert len(data.inputs) + len(data.test_inputs) == 6 and data.groups is None
    assert len(npz(path=str(tmp_path / "a.npz"), test_fraction=0).inputs) == 6


def test_a_folder_is_one_client_per_file(tmp_path):
    np.savez(tmp_path / "bob.npz", x=X[:4], y=Y[:4])
    np.savez(tmp_path / "ann.npz", x=X[4:], y=Y[4:])
    np.savez(tmp_path / "test.npz", x=X[:1], y=Y[:1])
    data = npz(path=str(tmp_path))
    assert data.group_names == ("ann", "bob") and data.groups is not None
    assert data.inputs[data.groups == 1].tolist() == X[:4].tolist()
    assert data.test_inputs.tolist() == X[:1].tolist()


def test_pixels_of_a_folder_are_scaled_once(tmp_path):
    for name in ("a", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.full((2, 3), 255, dtype=np.uint8), y=[0, 1])
    data = npz(path=str(tmp_path), images=True)
    assert data.inputs.unique().tolist() == [1.0] == data.test_inputs.unique().tolist()
    assert data.notes == ("Pixels were divided by 255.",)
    plain = npz(path=str(tmp_path))
    assert plain.inputs.unique().tolist() == [255.0] == plain.test_inputs.unique().tolist()
    assert "`images: true` divides" in plain.notes[0]


def save(path: Path, **arrays: object) -> None:
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no file or folder .*a.npz; correct the path, or name the folder it lies in as data.root"),
        (lambda p: p.write_bytes(b"PK nothing"), "a.npz: not an .npz archive, or cut short"),
        (lambda p: save(p, x=X), "a.npz: no key 'y', it has x; save with"),
        (lambda p: save(p), "no key 'x', it has none"),
        (lambda p: save(p, x=X, y=Y[:5]), "a.npz: 6 inputs but 5 labels"),
        (lambda p: save(p, x=np.where(X == 3, np.nan, X), y=Y), "a.npz: .* row . holds NaN"),
        (lambda p: save(p, x=X, y=-Y), "label of row . is -"),
        (lambda p: save(p, x=X, y=Y, client=[0, 1]), "one client key for each of 6 rows"),
        (lambda p: save(p, x=X, y=Y, x_test=X), "x_test and y_test must be there together"),
        (lambda p: save(p, x=X, y=Y, x_test=X[:, :1], y_test=Y), "they must agree"),
        (lambda p: save(p, x=np.array([None] * 6), y=Y), "cannot be read as .npz .*without objects"),
        (lambda p: p.mkdir(), r"no \*.npz files in this folder"),
    ],
)
def test_a_bad_npz_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=message) as caught:
        npz(path=str(tmp_path / "a.npz"))
    assert "\n" not in str(caught.value)


def test_an_npz_cut_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=X, y=Y)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cut short"):
        npz(path=str(path))
    broken = bytearray(raw)
    broken[150:160] = b"\xff" * 10  # within x: the archive's own checksum catches it
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        npz(path=str(path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": X[:, :1], "y": Y},
            r"b.npz: rows are float32\[1\] -> int64\[\], but a.npz has float32\[2\] -> int64\[\]; every",
        ),
        ({"x": X, "y": Y[:2]}, "b.npz: 6 inputs but 2 labels"),
        ({"x": X.astype(int), "y": Y}, r"rows are int64\[2\]"),
    ],
)
def test_a_bad_client_file_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        npz(path=str(tmp_path))


def test_a_parquet_table_of_columns(tmp_path):
    write(tmp_path / "a.parquet", age=[1, 2, 3, 4], height=[0.5, 1, 1.5, 2], label=[0, 1, 0, 1], client=list("xyxy"))
    data = parquet(path=str(tmp_path / "a.parquet"), test_fraction=0)
    assert data.inputs.tolist() == [[1, 0.5], [2, 1], [3, 1.5], [4, 2]] and data.group_names == ("x", "y")


def test_a_parquet_list_column_with_a_shape_and_a_test_file(tmp_path):
    lists = pa.array([[1.0, 2, 3, 4], [5.0, 6, 7, 8]], pa.list_(pa.float32()))
    write(tmp_path / "a.parquet", pixels=lists, kind=[1, 0], who=[7, 9])
    write(tmp_path / "t.parquet", pixels=lists, kind=[1, 0])
    data = parquet(
        path="a.parquet",
        root=str(tmp_path),
        features="pixels",
        label="kind",
        client="who",
        shape=(1, 2, 2),
        test_path="t.parquet",
    )
    assert data.inputs.tolist() == [[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]] and data.targets.tolist() == [1, 0]
    assert data.group_names == ("7", "9") and data.test_inputs.shape == (2, 1, 2, 2)


def test_list_columns_keep_their_kind(tmp_path):
    for kind, images, first in ((pa.uint8(), True, 1 / 255), (pa.uint8(), False, 1), (pa.int32(), False, 1)):
        column = pa.array([[1, 2], [3, 4]], pa.list_(kind, 2))
        path = write(tmp_path / "a.parquet", f=column, label=[0, 1])
        data = parquet(path=str(path), features="f", test_fraction=0, images=images)
        assert float(data.inputs[0, 0]) == pytest.approx(first)
        assert data.inputs.is_floating_point() == (kind != pa.int32())


def test_a_parquet_folder_is_one_client_per_file(tmp_path):
    write(tmp_path / "a.parquet", f=[1.0, 2.0], label=[0, 1])
    write(tmp_path / "b.parquet", f=[3.0], label=[0])
    write(tmp_path / "test.parquet", f=[9.0], label=[1])
    data = parquet(path=str(tmp_path))
    assert data.inputs[:, 0].tolist() == [1, 2, 3] and data.groups is not None and data.groups.tolist() == [0, 0, 1]
    assert data.test_inputs.tolist() == [[9.0]]


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"f": [1.0]}, {}, "no column 'label', it has f; name one of these"),
        ({"f": [1.0], "label": [0]}, {"features": "g"}, "no column 'g', it has f, label; name one of these"),
        ({"label": [0]}, {}, "no column is left for features"),
        (
            {"f": [1.0, None], "label": [0, 1]},
            {},
            "column 'f' has 1 missing values, the first in row 1; fill or drop them",
        ),
        ({"f": [1.0, 2.0], "label": [0, None]}, {}, "column 'label' has 1 missing"),
        ({"f": ["a"], "label": [0]}, {}, "column 'f' holds .*, not numbers"),
        ({"f": [1.0], "label": ["cat"]}, {}, "labels: expected integer classes or numbers"),
        ({"f": [1.0], "label": [0]}, {"features": "f"}, "expected a list of numbers per row, got double"),
        ({"f": [[1.0], [1.0, 2.0]], "label": [0, 1]}, {"features": "f"}, "lists have 1 to 2 entries"),
        ({"f": [[1.0, None]], "label": [0]}, {"features": "f"}, "1 missing values in the lists"),
        ({"f": [[1.0, 2.0]], "label": [0]}, {"features": "f", "shape": (3,)}, r"2 numbers per row do not fill .*\[3\]"),
        ({"f": pa.array([], pa.float32()), "label": pa.array([], pa.int64())}, {}, "is empty"),
        ({"f": pa.array([], pa.list_(pa.float32())), "label": pa.array([], pa.int64())}, {"features": "f"}, "is empty"),
        ({"f": [1.0], "label": [0], "client": [None]}, {}, "client"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path, columns, arguments, message):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=message) as caught:
        parquet(path=str(path), test_fraction=0, **arguments)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="a.parquet: cannot be read as Parquet"):
        parquet(path=str(tmp_path / "a.parquet"))
