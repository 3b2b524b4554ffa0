"""Folders as people have them: lists of labels, secret test images, splits that are no classes, and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.listening import Listener

from dstill.data.real import RealSet, load_real
from dstill.errors import DstillError

CLASSES = ("cat", "dog", "owl")


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def images(root: Path, names: Sequence[str]) -> Path:
    """Images of value 10, 20, … at these paths."""
    for i, name in enumerate(names, 1):
        save(root / name, 10 * i)
    return root


def classes(root: Path, splits: Sequence[str] = ("train", "test"), suffix: str = "png") -> Path:
    """Two images of each class in every split."""
    for split in splits:
        images(root / split, [f"{c}/{i}.{suffix}" for c in CLASSES for i in range(2)])
    return root


def by_value(real: RealSet) -> dict[int, str]:
    """The class of each training image, by the value of its pixels."""
    values = real.train.images[:, 0, 0, 0].tolist()
    return {value: real.class_names[c] for value, c in zip(values, real.train.labels.tolist(), strict=True)}


def notes(capsys: pytest.CaptureFixture[str], root: Path, **options: object) -> tuple[RealSet, str]:
    real = load_real(root, progress=True, **options)  # type: ignore[arg-type]
    return real, capsys.readouterr().err


FOUR = ["a.png", "b.png", "c.png", "d.png"]
WORDS = {10: "cat", 20: "dog", 30: "cat", 40: "dog"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metadata.csv", "file_name,label\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n"),
        ("metadata.csv", "\ufefffile_name;species\r\na.png;cat\r\nb.png;dog\r\nc.png;cat\r\nd.png;dog\r\n"),
        ("labels.csv", "id,breed\na,cat\nb,dog\nc,cat\nd,dog\n"),
        ("labels.tsv", "path\tclass\na.png\tcat\nb.png\tdog\nc.png\tcat\nd.png\tdog\n"),
        ("labels.csv", "a.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n"),
        ("labels.csv", "a,cat\nb,dog\nc,cat\nd,dog\n"),
        ("labels.csv", "\ufefflabel,other,image\ncat,1,a.png\ndog,2,b.png\ncat,3,c.png\ndog,4,d.png\n"),
        (
            "metadata.jsonl",
            "".join(json.dumps({"file_name": n, "label": [w]}) + "\n" for n, w in zip(FOUR, WORDS.values(), strict=True)),
        ),
    ],
    ids=["csv", "semicolons", "without suffix", "tsv", "no heading", "neither", "another order", "jsonl"],
)
def test_a_list_beside_the_images_names_their_classes(tmp_path: Path, file: str, text: str) -> None:
    images(tmp_path / "p", FOUR)
    (tmp_path / "p" / file).write_text(text, encoding="utf-8")
    real = load_real(tmp_path / "p", test_fraction=0.5)
    shown = by_value(real) | {
        int(v): real.class_names[c] for v, c in zip(real.test.images[:, 0, 0, 0], real.test.labels, strict=True)
    }
    assert shown == WORDS
    assert load_real(tmp_path / "p" / file, test_fraction=0.5).fingerprint == real.fingerprint


def test_each_split_may_have_a_list(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        images(tmp_path / split, FOUR)
        (tmp_path / split / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n")
    real = load_real(tmp_path)
    assert (real.class_names, by_value(real), len(real.test)) == (("cat", "dog"), WORDS, 4)


def test_a_list_may_have_a_column_of_splits_and_files_in_folders(tmp_path: Path) -> None:
    images(tmp_path, [f"images/{name}" for name in FOUR])
    lines = [
        "split,file_name,label",
        "train,images/a.png,x",
        "train,images/b.png,y",
        "test,images/c.png,y",
        "test,images/d.png,x",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    real = load_real(tmp_path)
    assert (by_value(real), real.test.labels.tolist()) == ({10: "x", 20: "y"}, [1, 0])


def test_lists_of_a_competition_name_the_splits_and_keep_test_labels_secret(tmp_path: Path) -> None:
    images(tmp_path, ["train/1.png", "train/2.png", "train/3.png", "train/4.png", "test/1.png", "test/2.png"])
    (tmp_path / "train.csv").write_text("id,label\n1,cat\n2,dog\n3,cat\n4,dog\n")
    (tmp_path / "test.csv").write_text("id\n1\n2\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,cat\n2,cat\n")
    with pytest.raises(DstillError, match="the labels of test are hidden"):
        load_real(tmp_path)
    real = load_real(tmp_path, test_fraction=0.5)
    assert by_value(real).items() <= WORDS.items() and len(real.train) == 2


def test_a_list_may_name_paths_from_the_folder_of_its_split(tmp_path: Path) -> None:
    images(tmp_path, [f"{split}/{part}/{name}" for split in ("train", "test") for part in "xy" for name in ("a.png", "b.png")])
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("path,label\nx/a.png,cat\nx/b.png,dog\ny/a.png,cat\ny/b.png,dog\n")
    real = load_real(tmp_path / "train.csv", test_fraction=0.5)
    assert by_value(real).items() <= WORDS.items()


def test_the_column_file_name_comes_before_another_that_names_files(tmp_path: Path) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "metadata.csv").write_text(
        "mask,file_name,label\nd.png,a.png,cat\nc.png,b.png,dog\nb.png,c.png,cat\na.png,d.png,dog\n"
    )
    assert by_value(load_real(tmp_path, test_fraction=0.5)).items() <= WORDS.items()


def test_the_zip_of_tiny_imagenet_is_read_as_it_unpacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, lines = ("n01443537", "n01629819"), []
    for name in ids:
        images(tmp_path / "train" / name / "images", [f"{name}_{i}.JPEG" for i in range(3)])
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0\t0\t1\t1")
    for i in range(4):
        save(tmp_path / f"val/images/val_{i}.JPEG", i)
        save(tmp_path / f"test/images/test_{i}.JPEG", i)
        lines.append(f"val_{i}.JPEG\t{ids[i // 2]}\t0\t0\t1\t1\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "wnids.txt").write_text("\n".join(ids))
    real, told = notes(capsys, tmp_path)
    assert (real.class_names, len(real.train), real.test.labels.tolist()) == (ids, 6, [0, 0, 1, 1])
    assert "the labels of test are hidden, so accuracies are measured on val" in told


@pytest.mark.parametrize(
    ("text", "option", "says"),
    [
        (
            "file_name,label,class\na.png,x,y\nb.png,y,x\n",
            "",
            "label and class may each be the column of classes: pass --label-column label",
        ),
        (
            "file,copy,label\na.png,a.png,x\nb.png,b.png,y\n",
            "",
            "file and copy may each be the column of images: pass --image-column file",
        ),
        ("file_name,text\na.png,one\nb.png,two\nc.png,three\n", "", "column text has another value for each image"),
        ("file_name,one,two\na.png,x,y\nb.png,x,y\n", "", "one and two may each be the column of classes"),
        (
            "file_name,label\na.png,x\nb.png\n",
            "",
            "metadata.csv cannot be read as a list of images: line 3 has not as many cells",
        ),
        ("file_name,label\na.png,x\nb.png,\nc.png,y\n", "", "1 of 3 images of .*metadata.csv .* have no label"),
        ("file_name,label\na.png,x\nb.png,y\n", "breed", "metadata.csv has no column 'breed'; known: file_name, label"),
        ("file_name,label\na.png,x\nb.png,y\ngone.png,y\nlost.png,x\n", "", "2 images .*gone.png .No such file.*lost.png"),
        ("file_name\na.png\nb.png\n", "", "no training image has a label"),
        ("file_name,label\na.png,x;y\nb.png,y;z\nc.png,z;x\n", "", "several labels each, or none .for example x;y."),
        ("file_name,label\na.png,0\nb.png,1\nc.png,-1\n", "", "1 of 3 images .* have no label .rows counted from 0: 2."),
        (
            "file_name,p,q\na.png,0,1\nb.png,1,0\n",
            "",
            r"column of 0 and 1 for each class \(p, q\).*frame\[\['p', 'q'\]\].idxmax",
        ),
    ],
)
def test_a_list_that_leaves_a_question_open_is_asked_about(tmp_path: Path, text: str, option: str, says: str) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DstillError, match=says):
        load_real(tmp_path, test_fraction=0.5, label_column=option or None)


def test_a_column_of_files_that_is_not_there_is_said(tmp_path: Path) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\n")
    with pytest.raises(DstillError, match=r"metadata.csv has no column 'file'; did you mean file_name"):
        load_real(tmp_path, test_fraction=0.5, image_column="file")


def test_a_cell_may_have_several_lines(tmp_path: Path) -> None:
    images(tmp_path, FOUR)
    rows = [f'{name},"seen\nat noon",{word}' for name, word in zip(FOUR, WORDS.values(), strict=True)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,label", *rows]))
    assert load_real(tmp_path, test_fraction=0.5).class_names == ("cat", "dog")


def test_a_column_that_is_named_is_taken(tmp_path: Path) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "metadata.csv").write_text(
        "file,copy,label,class\na.png,d.png,x,p\nb.png,c.png,y,p\nc.png,b.png,x,q\nd.png,a.png,y,q\n"
    )
    real = load_real(tmp_path, test_fraction=0.5, image_column="copy", label_column="class")
    assert real.class_names == ("p", "q")
    assert by_value(real).items() <= {40: "p", 30: "p", 20: "q", 10: "q"}.items()


def test_images_that_no_list_names_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\nc.png,x\n" + "c.png,y\n")
    assert "1 images in " in notes(capsys, tmp_path, test_fraction=0.5)[1]


def test_class_folders_come_before_a_list_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path)
    (tmp_path / "birds.csv").write_text(
        "path,label\ntrain/cat/0.png,x\ntrain/dog/0.png,y\ntest/cat/0.png,x\ntest/owl/0.png,y\n"
    )
    real, told = notes(capsys, tmp_path)
    assert real.class_names == CLASSES and "birds.csv is not read, since the folders say the classes" in told
    assert load_real(tmp_path, label_column="label", test_fraction=0.5).class_names == ("x", "y")
    with pytest.raises(DstillError, match="has class folders and no list of images: leave out --label-column"):
        load_real(classes(tmp_path / "plain"), label_column="label")


def test_folders_called_like_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images(tmp_path / split, FOUR)
    with pytest.raises(
        DstillError, match=r"train holds images without classes: expected .*<class>/<image>, or a file metadata.csv"
    ):
        load_real(tmp_path, test_fraction=0.5)
    with pytest.raises(DstillError, match="train has images, but no class folders"):
        load_real(tmp_path / "train")


def test_two_folders_called_like_splits_are_splits_beside_any_other(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        images(tmp_path / name, FOUR)
    with pytest.raises(DstillError, match="more has images that belong to no split and no class"):
        load_real(tmp_path, test_fraction=0.5)


def test_a_single_folder_of_images_says_no_classes(tmp_path: Path) -> None:
    images(tmp_path / "train", FOUR)
    with pytest.raises(DstillError, match="holds images without classes"):
        load_real(tmp_path, test_fraction=0.5)


def test_test_images_without_classes_are_passed_over(tmp_path: Path) -> None:
    classes(tmp_path, ["train"])
    images(tmp_path / "test", FOUR)
    with pytest.raises(
        DstillError, match="the labels of test are hidden, so nothing can be measured there: pass --test-fraction"
    ):
        load_real(tmp_path)
    assert len(load_real(tmp_path, test_fraction=0.5).test) == 3
    shutil.move(tmp_path / "test", tmp_path / "keep")
    images(tmp_path / "test" / "unknown", FOUR)
    shutil.rmtree(tmp_path / "keep")
    assert len(load_real(tmp_path, test_fraction=0.5).test) == 3


def test_three_splits_are_told_apart_and_one_can_be_chosen(tmp_path: Path) -> None:
    classes(tmp_path, ["train", "test"])
    images(tmp_path / "valid", ["cat/0.png"])
    assert len(load_real(tmp_path).test) == 6
    assert len(load_real(tmp_path, test_split="valid").test) == 1


def test_names_of_all_sorts_and_what_archives_leave_behind(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name, file in (("guinea pig", "0.WEBP"), ("été", "a b.BMP"), ("猫", "1.JpG"), ("x.y", "2.tif")):
            save(tmp_path / split / name / file, 50)
        save(tmp_path / split / "__MACOSX" / "cat" / "0.png", 1)
        (tmp_path / split / "猫" / "._1.jpg").write_bytes(b"junk")
        (tmp_path / split / "猫" / ".DS_Store").write_bytes(b"junk")
        (tmp_path / split / "猫" / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / "__MACOSX").mkdir()
    assert load_real(tmp_path).class_names == ("guinea pig", "x.y", "été", "猫")


def test_a_linked_image_is_read_and_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    classes(tmp_path / "real")
    (tmp_path / "real" / "train" / "cat" / "linked.png").symlink_to(tmp_path / "real" / "train" / "dog" / "0.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert len(load_real(tmp_path / "linked").train) == 7


def test_a_name_that_two_files_have_is_no_path(tmp_path: Path) -> None:
    images(tmp_path, ["all/x/a.png", "all/y/a.png", "all/x/b.png", "all/y/c.png"])
    (tmp_path / "labels.csv").write_text("file,label\na.png,x\nb.png,y\nc.png,x\n")
    with pytest.raises(DstillError, match=r"/a.png of .* cannot be read \(No such file or directory\)"):
        load_real(tmp_path, test_fraction=0.5)


def test_files_called_by_numbers_are_not_mistaken_for_classes(tmp_path: Path) -> None:
    images(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    for text in ("file,label\n0.png,0\n1.png,1\n2.png,0\n3.png,1\n", "id,label\n0,0\n1,1\n2,0\n3,1\n"):
        (tmp_path / "labels.csv").write_text(text)
        assert by_value(load_real(tmp_path, test_fraction=0.5)).items() <= {10: "0", 20: "1", 30: "0", 40: "1"}.items()


def test_a_class_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    images(tmp_path, FOUR)
    (tmp_path / "labels.csv").write_text(
        'a.png,maillot\nb.png,"maillot, tank suit"\nc.png,maillot\nd.png,"maillot, tank suit"\n'
    )
    assert load_real(tmp_path, test_fraction=0.5).class_names == ("maillot", "maillot, tank suit")


@pytest.mark.parametrize("name", ["gone.csv", "pets/gone", "gone.npz", "./gone"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    with pytest.raises(DstillError, match=r"gone.* does not exist: pass a folder of images"):
        load_real(name)


def test_no_name_at_all_is_no_source() -> None:
    with pytest.raises(DstillError, match="'' is neither a file, a folder nor a known data set"):
        load_real("")


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.mat"])
def test_a_file_for_python_says_to_read_it_there(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        DstillError, match=r"must be read in Python: pass what it holds, dstill.load_real\(\(images, labels\)\)"
    ):
        load_real(tmp_path / name)


def test_an_image_in_a_format_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "train" / "cat" / "x.heic").write_bytes(b"some picture")
    with pytest.raises(DstillError, match=r"x.heic of .* cannot be read \(convert this format, for example to PNG\)"):
        load_real(tmp_path)
    assert len(load_real(tmp_path, skip_damaged=True).train) == 6


def test_a_packed_file_says_to_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(DstillError, match=r"pets.zip is a packed file: unpack it, and pass the folder"):
        load_real(tmp_path / "pets.zip")


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_all_damaged_images_are_named_at_once_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path)
    for name in ("train/cat/1.png", "train/owl/0.png", "test/dog/1.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:45])
    with pytest.raises(DstillError) as error:
        load_real(tmp_path)
    assert all(name in str(error.value) for name in ("train/cat/1.png (", "train/owl/0.png (", "test/dog/1.png ("))
    assert str(error.value).startswith("3 images of ") and "--skip-damaged" in str(error.value)
    real, told = notes(capsys, tmp_path, skip_damaged=True)
    assert by_value(real) == {10: "cat", 30: "dog", 40: "dog", 60: "owl"}
    assert (len(real.test), real.test.labels.tolist()) == (5, [0, 0, 1, 2, 2])
    assert "left out: 3 images" in told and "4 train, 5 test images" in told


def test_of_many_damaged_images_twenty_are_named(tmp_path: Path) -> None:
    classes(tmp_path)
    for i in range(25):
        (tmp_path / "train" / "cat" / f"bad{i:02}.png").write_bytes(b"no image")
    with pytest.raises(DstillError, match=r"bad19.png \(not an image\) and 5 more: repair or remove them"):
        load_real(tmp_path)


def test_grey_images_stay_grey_beside_damaged_ones(tmp_path: Path) -> None:
    classes(tmp_path)
    for file in tmp_path.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"no image")
    assert load_real(tmp_path, skip_damaged=True).channels == 1


# --- Parquet of other programs ----------------------------------------------------------------------------------------


def write(path: Path, columns: Mapping[str, object]) -> Path:
    pq.write_table(pa.table(dict(columns)), path)
    return path


def cells(root: Path, count: int = 4) -> list[dict[str, object]]:
    images(root, [f"{i}.png" for i in range(count)])
    return [{"bytes": (root / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(count)]


def test_structs_without_a_schema_are_images_and_words_are_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"picture": cells(tmp_path / "i"), "label": list(WORDS.values())})
    assert by_value(load_real(path, test_fraction=0.5)).items() <= WORDS.items()


def test_plain_bytes_are_images_and_the_only_other_column_the_class(tmp_path: Path) -> None:
    content = [cell["bytes"] for cell in cells(tmp_path / "i")]
    path = write(tmp_path / "train.parquet", {"content": content, "species": list(WORDS.values())})
    assert by_value(load_real(path, test_fraction=0.5)).items() <= WORDS.items()


def test_tables_with_two_candidates_are_asked_about(tmp_path: Path) -> None:
    some = cells(tmp_path / "i")
    path = write(tmp_path / "train.parquet", {"a": some, "b": some, "label": [0, 1, 0, 1], "class": [1, 0, 1, 0]})
    with pytest.raises(DstillError, match="a and b may each be the column of images: pass --image-column a"):
        load_real(path, test_fraction=0.5)
    with pytest.raises(DstillError, match="label and class may each be the column of classes: pass --label-column label"):
        load_real(path, test_fraction=0.5, image_column="a")
    assert load_real(path, test_fraction=0.5, image_column="a", label_column="class").classes == 2


def test_lists_of_labels_are_refused_and_lists_of_one_are_read(tmp_path: Path) -> None:
    some = cells(tmp_path / "i")
    several = write(tmp_path / "several.parquet", {"image": some, "labels": [[0, 1], [1], [0], [1]]})
    with pytest.raises(DstillError, match=r"images of several \(column labels\) have several labels each"):
        load_real(several, test_fraction=0.5)
    one = write(tmp_path / "one.parquet", {"image": some, "labels": [[0], [1], [0], [1]]})
    assert load_real(one, test_fraction=0.5).train.labels.tolist() == [0, 1]


def test_a_damaged_image_in_a_table_is_left_out_on_request(tmp_path: Path) -> None:
    some = cells(tmp_path / "i")
    some[1] = {"bytes": b"no image", "path": None}
    some[2] = {"bytes": None, "path": None}
    path = write(tmp_path / "train.parquet", {"image": [*some, *cells(tmp_path / "j")], "label": [0, 1] * 4})
    with pytest.raises(
        DstillError, match=r"2 images of train cannot be read: row 1 \(not an image\), row 2 \(the cell is empty\)"
    ):
        load_real(path, test_fraction=0.5)
    real = load_real(path, test_fraction=0.5, skip_damaged=True)
    assert (len(real.train) + len(real.test), sorted(by_value(real).items())) == (6, [(30, "0"), (40, "1")])


def test_the_reading_of_files_is_told_as_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.data.pictures._TICK", 2)
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    told = Listener()
    real = load_real(tmp_path, progress=told)
    assert [one[0] for one in told.told] == ["reading"] * len(told.told)
    assert [one[1:] for one in told.told] == [(0, 1), (0, 8), (2, 8), (4, 8), (6, 8), (6, 8), (8, 8)]
    assert "tell" not in real.read_as
    nothing = Listener()
    load_real("digits", progress=nothing)
    assert nothing.told == [], "what is embedded is there at once"
