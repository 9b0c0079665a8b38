"""Images, masks and tables as they come in bulk: each is handled as one would expect, or named in one sentence."""

import logging
import os
import socket
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from devkit_utils import save_images
from PIL import Image

from synernet_hf.data import (
    TrainDataset,
    TrainTransform,
    check_dataset,
    load_image_labels,
    load_voc2012,
)
from synernet_hf.data.files import ImageIndex
from synernet_hf.model import to_rgb


GREEN = (20, 180, 60)
ORIENTATION = 0x0112


def write_table(root, rows, header="file_name,labels"):
    root.mkdir(exist_ok=True)
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


def only_image(root, name):
    """The checked training crop of a folder with one image: `(S, S, 3)` uint8, and its box of real pixels."""
    write_table(root, [f"{name},cat"])
    loaded = load_image_labels(root)
    check_dataset(loaded)
    sample = TrainDataset(loaded["train"], TrainTransform(32, (1.0, 1.0), flip=False))[(0, 0)]
    assert sample["labels"] == [0]
    return sample["image"].permute(1, 2, 0).numpy(), sample["valid_box"].tolist()


def real_pixels(crop, box):
    top, bottom, left, right = box
    return crop[top:bottom, left:right].reshape(-1, 3)


def test_corrupt_jpeg(tmp_path, caplog):
    root = write_table(tmp_path / "data", ["good.jpg,cat", "cut.jpg,cat", "text.jpg,cat"])
    Image.effect_noise((60, 50), 80).convert("RGB").save(root / "good.jpg")
    content = (root / "good.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "text.jpg").write_text("<html>404</html>")
    loaded = load_image_labels(root)
    with pytest.raises(ValueError, match=r"2 of 3 records .*'train'.* cut .*cut.jpg\) does not decode .*text.jpg"):
        check_dataset(loaded)
    with caplog.at_level(logging.WARNING):
        skipped = {}
        kept = check_dataset(loaded, "skip", skipped=skipped)
    assert kept["train"]["image_id"][:] == ["good"]
    assert "2 records of the split 'train' are left out" in caplog.text and "cut.jpg" in caplog.text
    assert [("cut.jpg" in p, "text.jpg" in p) for p in skipped["train"]] == [
        (True, False),
        (False, True),
    ]
    check_dataset(kept)


def test_one_pixel(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "data" / "a.png")
    crop, box = only_image(tmp_path / "data", "a.png")
    assert real_pixels(crop, box).tolist() == [list(GREEN)]
    # also where a training scale would leave less than a pixel
    record = {"image": Image.new("RGB", (1, 1), GREEN), "image_id": "a", "labels": [0]}
    assert TrainTransform(32, (0.1, 0.2))(record, 0)["image"].shape == (3, 32, 32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_twelve_thousand_by_nine_thousand(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (12_000, 9_000), GREEN).save(tmp_path / "data" / "big.jpg", quality=50)
    write_table(tmp_path / "data", ["big.jpg,cat"])
    loaded = load_image_labels(tmp_path / "data")
    check_dataset(loaded)
    # a JPEG that is shrunk is decoded at an eighth of its size
    sample = TrainDataset(loaded["train"], TrainTransform(64, (0.01, 0.02)))[(0, 0)]
    top, bottom, left, right = sample["valid_box"].tolist()
    assert bottom - top == 64 and right - left == 64
    assert (sample["image"].float().mean(dim=(1, 2)) - torch.tensor(GREEN)).abs().max() < 4


def test_cmyk(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 20), GREEN).convert("CMYK").save(tmp_path / "data" / "a.jpg", quality=95)
    crop, box = only_image(tmp_path / "data", "a.jpg")
    assert np.abs(real_pixels(crop, box).astype(int) - GREEN).max() < 6


def test_sixteen_bit_png_keeps_its_shades(tmp_path):
    (tmp_path / "data").mkdir()
    values = np.repeat(np.array([[0, 20_000, 65_535]], dtype=np.uint16), 9, axis=0).repeat(3, axis=1)
    Image.fromarray(values).save(tmp_path / "data" / "a.png")
    with Image.open(tmp_path / "data" / "a.png") as image:
        assert image.mode == "I;16"
        assert sorted(set(np.asarray(to_rgb(image))[..., 0].ravel().tolist())) == [0, 20_000 // 256, 255]
    crop, box = only_image(tmp_path / "data", "a.png")
    shades = real_pixels(crop, box)
    assert {0, 78, 255} <= set(shades[:, 0].tolist()) and (shades == shades[:, :1]).all()


def test_pixels_of_an_unknown_range_are_found_by_the_check(tmp_path):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.full((9, 9), -3.5, dtype=np.float32)).save(tmp_path / "data" / "a.tif")
    loaded = load_image_labels(write_table(tmp_path / "data", ["a.tif,cat"]))
    with pytest.raises(ValueError, match=r"the image a \(.*a.tif\) does not decode \(Pixel values range from -3.5"):
        check_dataset(loaded)
    with pytest.raises(ValueError, match="The image a does not decode: Pixel values range from -3.5"):
        TrainDataset(loaded["train"], TrainTransform(32))[0, 0]


def test_palette_png(tmp_path):
    (tmp_path / "data").mkdir()
    image = Image.new("P", (9, 9), 3)
    image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, *GREEN])
    image.save(tmp_path / "data" / "a.png")
    crop, box = only_image(tmp_path / "data", "a.png")
    assert set(map(tuple, real_pixels(crop, box).tolist())) == {GREEN}


def test_exif_rotation(tmp_path):
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (24, 10), GREEN).save(tmp_path / "data" / "a.jpg", exif=exif)
    _, (top, bottom, left, right) = only_image(tmp_path / "data", "a.jpg")
    assert (bottom - top, right - left) == (24, 10)


def test_animated_gif_is_its_first_image(tmp_path):
    (tmp_path / "data").mkdir()
    frames = [Image.new("RGB", (9, 9), color) for color in (GREEN, (250, 0, 0), (0, 0, 250))]
    frames[0].save(tmp_path / "data" / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    crop, box = only_image(tmp_path / "data", "a.gif")
    assert set(map(tuple, real_pixels(crop, box).tolist())) == {GREEN}


def test_empty_label_is_a_image_without_classes(tmp_path, caplog):
    root = write_table(tmp_path / "data", ["a.png,cat", "b.png,", "c.png, "])
    for name in "abc":
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    loaded = load_image_labels(root)
    assert loaded["train"]["labels"][:] == [[0], [], []]
    assert "2 images of the split 'train' have no label (b, c)" in caplog.text
    check_dataset(loaded)
    write_table(root, ["a.png,", "b.png,"])
    with pytest.raises(ValueError, match="No image has a label"):
        load_image_labels(root)


def test_label_outside_the_class_list(tmp_path, caplog):
    root = write_table(tmp_path / "data", ["a.png,cat", "b.png,cat;dgo"])
    for name in "ab":
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    with pytest.raises(ValueError, match=r"labels.csv, row 3: Unknown class name 'dgo': did you mean dog"):
        load_image_labels(root, class_names=["background", "cat", "dog"])
    # the background is no class, and that is said
    write_table(root, ["a.png,cat", "b.png,background"])
    assert load_image_labels(root)["train"]["labels"][:] == [[0], []]
    assert caplog.text.count("'background' in the labels means no class") == 1


def test_mask_of_another_size(tmp_path):
    root = write_table(tmp_path / "data", ["a.png,cat,train", "b.png,cat,val"], "file_name,labels,split")
    for name in "ab":
        Image.new("RGB", (8, 6)).save(root / f"{name}.png")
    (root / "masks").mkdir()
    Image.new("L", (6, 8)).save(root / "masks" / "b.png")
    loaded = load_image_labels(root)
    with pytest.raises(ValueError, match=r"mask of b \(.*masks/b.png\) is 6 x 8 .* its image 8 x 6 pixels"):
        check_dataset(loaded)
    with pytest.raises(ValueError, match="The split 'validation' is empty"):
        check_dataset(loaded, "skip")


def test_two_files_with_one_stem(tmp_path, devkit):
    root = write_table(tmp_path / "data", ["a,cat", "b.png,cat"])
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    with pytest.raises(ValueError, match=r"labels.csv, row 2, names 'a', which may be a.jpg or a.png: write the path"):
        load_image_labels(root)
    # named with their suffixes they are two images with two ids
    write_table(root, ["a.png,cat", "a.jpg,dog"])
    assert load_image_labels(root)["train"]["image_id"][:] == ["a.png", "a.jpg"]
    Image.new("RGB", (8, 8)).save(devkit.voc / "JPEGImages" / f"{devkit.train_ids[0]}.png")
    with pytest.raises(ValueError, match=rf"line 1, names '{devkit.train_ids[0]}', which may be .*.jpg or .*.png"):
        load_voc2012(devkit.root)


def test_csv_that_is_not_utf8(tmp_path):
    root = write_table(tmp_path / "data", [])
    (root / "labels.csv").write_bytes("file_name,labels\na.png,cat\nb.png,bébé\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"labels.csv, line 3, is not UTF-8 text \(byte 0xe9\): save the file as UTF-8"
    ):
        load_image_labels(root)


def test_csv_with_a_missing_file(tmp_path, caplog):
    root = write_table(tmp_path / "data", ["a.png,cat", "lost.png,cat"])
    Image.new("RGB", (8, 8)).save(root / "a.png")
    with pytest.raises(FileNotFoundError, match=r"labels.csv, row 3: there is no image lost.png below"):
        load_image_labels(root)
    skipped = {}
    loaded = load_image_labels(root, on_bad_image="skip", skipped=skipped)
    assert loaded["train"]["image_id"][:] == ["a"]
    assert list(skipped) == ["train"] and "row 3: there is no image lost.png" in skipped["train"][0]
    assert "1 records of the split 'train' are left out" in caplog.text
    # the checks add to the list what does not decode
    write_table(root, ["a.png,cat", "lost.png,cat", "b.png,cat"])
    (root / "b.png").write_bytes(b"none")
    skipped = {}
    loaded = load_image_labels(root, on_bad_image="skip", skipped=skipped)
    assert check_dataset(loaded, "skip", skipped=skipped)["train"]["image_id"][:] == ["a"]
    assert len(skipped["train"]) == 2 and "does not decode" in skipped["train"][1]


def test_listed_voc_images_that_are_missing(devkit):
    (devkit.voc / "JPEGImages" / f"{devkit.train_ids[1]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="names 1 images that are not in"):
        load_voc2012(devkit.root)
    skipped = {}
    loaded = load_voc2012(devkit.root, on_bad_image="skip", skipped=skipped)
    assert loaded["train"]["image_id"][:] == [name for name in devkit.train_ids if name != devkit.train_ids[1]]
    assert devkit.train_ids[1] in skipped["train"][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,labels\na.png,cat,dog\n", "row 2, has 3 cells, but 2 are expected"),
        ("file_name,labels\n,cat\n", "row 2, names no image"),
        ("file_name,labels\n", "has no rows"),
        ('{"file_name": "a.png"\n', "row 1, is not JSON"),
        ("[1]\n", "row 1, is not a JSON object"),
        ("file_name,labels,split\na.png,cat,train\na.png,cat,val\n", "row 3, puts a.png into a second split"),
    ],
    ids=["cells", "nameless", "empty", "json", "object", "two_splits"],
)
def test_tables_with_a_mistake(tmp_path, text, sentence):
    (tmp_path / ("metadata.jsonl" if text[0] in "{[" else "labels.csv")).write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=sentence):
        load_image_labels(tmp_path)


@pytest.mark.parametrize("absolute", [False, True], ids=["dots", "absolute"])
@pytest.mark.parametrize("column", ["file_name", "mask"])
def test_paths_that_lead_out_of_a_tables_folder_are_refused_unless_they_are_allowed(tmp_path, column, absolute):
    root = write_table(tmp_path / "data", [])
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    for name in "ab":
        Image.new("L", (8, 8)).save(root / f"{name}.png")
    (root / "sub").mkdir()
    outside = str(tmp_path / "secret.png") if absolute else "sub/../../secret.png"
    row = f"{outside},cat,val,b.png" if column == "file_name" else f"a.png,cat,val,{outside}"
    write_table(root, ["b.png,cat,train,", row], "file_name,labels,split,mask")
    with pytest.raises(
        ValueError, match=r"labels.csv, row 3, names '.*secret.png', which lies outside of .*: move it"
    ):
        load_image_labels(root)
    loaded = load_image_labels(root, allow_outside=True)["validation"].with_format(None)
    cell = loaded.cast_column("image", datasets.Image(decode=False)).cast_column("mask", datasets.Image(decode=False))
    read = cell[0]["image" if column == "file_name" else "mask"]["path"]
    assert Path(read).resolve() == tmp_path / "secret.png"
    # a link to the folder itself leads nowhere else
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    write_table(root, [f"{root / 'a.png'},cat"])
    assert load_image_labels(tmp_path / "link")["train"]["image_id"][:] == ["a"]
    # a cell that is no path at all
    write_table(root, ["a.png,cat", f"{'x' * 5000},cat"])
    with pytest.raises(FileNotFoundError, match="row 3: there is no image x"):
        load_image_labels(root)


def test_class_folders_that_are_links_are_followed_and_named(tmp_path, caplog):
    root, pool = tmp_path / "pets", tmp_path / "pool"
    save_images(root, "cat/1.jpg")
    save_images(pool, "2.jpg")
    (root / "dog").symlink_to(pool, target_is_directory=True)
    loaded = load_image_labels(root)
    assert loaded["train"]["image_id"][:] == ["1", "2"] and loaded["train"]["labels"][:] == [[0], [1]]
    assert caplog.text.count(f"of the folders that are links, dog leads to {pool}.") == 1
    caplog.clear()
    # two classes of the same images, and a circle
    (root / "hound").symlink_to(root / "dog", target_is_directory=True)
    (root / "cat" / "all").symlink_to(root, target_is_directory=True)
    assert load_image_labels(root)["train"]["labels"][:] == [[0], [1]]
    assert "hound is left out, the same folder as dog" in caplog.text and "cat/all is left out" in caplog.text
    # inside of the folder there is nothing to tell
    for link in ("dog", "hound", "cat/all"):
        (root / link).unlink()
    save_images(root, ".pool/2.jpg")
    (root / "dog").symlink_to(root / ".pool", target_is_directory=True)
    caplog.clear()
    assert load_image_labels(root)["train"]["labels"][:] == [[0], [1]] and "links" not in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_unopened(tmp_path, kind):
    root = tmp_path / "data"
    save_images(root, "cat/1.jpg")
    path = root / "cat" / "2.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        # its address has a limit that paths of tests exceed
        path.symlink_to(Path(tempfile.mkdtemp()) / "s")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path.readlink()))
    for loading in (lambda: load_image_labels(root), lambda: ImageIndex(root)):
        with pytest.raises(ValueError, match=r"cat/2.jpg is a named pipe, a device, a socket or a folder, no image"):
            loading()
