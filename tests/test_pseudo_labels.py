"""Pseudo-labels of a data set: the same bytes however they were made, and a manifest that tells the truth."""

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.commands import main
from synernet_hf.data import build_split, class_names, load_shapes, write_parquet
from synernet_hf.files import hold_folder
from synernet_hf.pseudo_label_files import REVIEW_FILES
from synernet_hf.pseudo_labels import (
    PseudoLabeler,
    PseudoLabelOptions,
    with_pseudo_labels,
    write_pseudo_labels,
)
from synernet_hf.visualization import voc_palette


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "pseudo_labels.py"
NAMES = ["background", "class 1", "class 2", "class 3"]
OWN_FILES = {"masks", "manifest.parquet", "pseudo_labels.json"}
SHAPES = '{"num_train": 40, "num_validation": 2, "image_size": 32}'


def some_images(count: int = 5, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = [(40, 33), (32, 32), (50, 24), (24, 50), (31, 47)]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in (sizes[index % 5] for index in range(count))
    ]


def split_of(images, labels, ids=None):
    ids = ids or [f"image_{index}" for index in range(len(images))]
    return build_split(images, ids, labels, NAMES)


LABELS = [[0], [1, 2], [], [0, 1, 2], [2]]


@pytest.fixture(scope="module")
def model():
    return SynerNetModelTester().model()


@pytest.fixture(scope="module")
def processor():
    return SynerNetImageProcessor()


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory) -> Path:
    """A model for the generated shapes, with a record of its data as a run leaves it."""
    folder = tmp_path_factory.mktemp("shapes_run")
    names = class_names(load_shapes(1, 1, image_size=32))
    tester = SynerNetModelTester(num_classes=len(names) - 1, id2label=dict(enumerate(names)))
    tester.model().save_pretrained(folder)
    SynerNetImageProcessor().save_pretrained(folder)
    (folder / "training_args.json").write_text(
        json.dumps({"data_args": {"dataset": "shapes", "num_workers": 0, "dataset_options": json.loads(SHAPES)}})
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_script(*words: str, processes: int = 1) -> subprocess.Popen:
    """`examples/pseudo_labels.py` in processes of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(*words: str) -> int:
    """`synernet pseudo-labels` in this process."""
    return main(["pseudo-labels", *words])


def test_a_mask_is_the_refined_fused_map(model, processor):
    image = some_images(1)[0]
    label_map, content = PseudoLabeler(model, processor)(image, [0, 2])
    assert label_map.shape == (33, 40) and label_map.dtype == np.uint8
    assert set(np.unique(label_map)) <= {0, 1, 3, 255}
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    cams = model.generate_cams(pixel_values, torch.tensor([[1.0, 0.0, 1.0]]))
    assert content["confidence"] == pytest.approx(float(cams.confidence.mean()), abs=1e-6)
    assert content["coverage"] == pytest.approx((label_map != 255).mean(), abs=1e-6)
    assert content["foreground"] == pytest.approx(np.isin(label_map, (1, 3)).mean(), abs=1e-6)
    # a model sure of nothing but its first class everywhere would decide every pixel: this one leaves some open
    assert 0 < content["coverage"] < 1


def test_given_labels_need_no_prior(processor):
    model = SynerNetModelTester(with_class_token_head=True).model()
    with torch.no_grad():
        for branch in (model.synernet.broad_branch, model.synernet.precise_branch):
            # sure of the first class, whatever the image shows
            branch.class_token_head.bias.copy_(torch.tensor([5.0, -5.0, -5.0]))
            for parameter in branch.decode_head.parameters():
                parameter.normal_()
    image, options = some_images(1)[0], PseudoLabelOptions(map="segmentation", scales=(1.0,))
    seen = {}
    for weight in (0.0, 4.0):
        model.config.class_prior_weight = weight
        seen[weight], _ = PseudoLabeler(model, processor, options)(image, [1, 2])
    np.testing.assert_array_equal(seen[0.0], seen[4.0])
    assert set(np.unique(seen[4.0])) & {2, 3}


def test_the_segmentation_shows_no_class_but_the_images_own(model, processor):
    image = some_images(1)[0]
    options = PseudoLabelOptions(map="segmentation", scales=(1.0,))
    label_map, content = PseudoLabeler(model, processor, options)(image, [0, 1, 0])
    logits = model.multi_scale_logits(processor(images=image, return_tensors="pt")["pixel_values"], scales=(1.0,))[0]
    expected = np.where((logits[2] > logits[0]).numpy(), 2, 0)
    assert (label_map == expected).all() and content["coverage"] == 1
    free, _ = PseudoLabeler(model, processor, PseudoLabelOptions("segmentation", "predicted"))(image, [0, 1, 0])
    assert not (free == label_map).all()


def test_known_labels_or_those_of_the_classifier(model, processor):
    image = some_images(1)[0]
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = (model(pixel_values).classification_logits[0] > 0).nonzero()[:, 0] + 1
    wanted = {
        ("auto", ()): ("predicted", found.tolist()),
        ("auto", (1,)): ("known", [2]),
        ("known", ()): ("known", []),
        ("predicted", (1,)): ("predicted", found.tolist()),
    }
    for (source, ids), (expected_source, expected_labels) in wanted.items():
        label_map, content = PseudoLabeler(model, processor, PseudoLabelOptions(label_source=source))(image, ids)
        assert (content["label_source"], content["labels"]) == (expected_source, expected_labels)
        if not expected_labels:
            assert (label_map == 0).all()


def test_large_images_get_masks_of_their_size(model):
    bounded = SynerNetImageProcessor(max_pixels=400)
    seen = []
    encoder = model.synernet.broad_branch.backbone
    hook = encoder.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    for kind in ("pseudo_label", "segmentation"):
        options = PseudoLabelOptions(kind, scales=(1.0,), flip=False)
        label_map, content = PseudoLabeler(model, bounded, options)(some_images(1)[0], [0, 1, 2])
        assert label_map.shape == (33, 40) == (content["height"], content["width"])
        assert set(np.unique(label_map)) <= {0, 1, 2, 3, 255}
    hook.remove()
    # 18 x 22, padded
    assert seen and set(seen) == {(24, 24)}, "the model sees a bounded image"


def test_other_images_of_the_same_name_get_masks_of_their_own(model, processor, tmp_path):
    first, second = (split_of(some_images(2, seed), LABELS[:2]) for seed in (0, 1))
    write_pseudo_labels(model, processor, first, tmp_path / "out")
    write_pseudo_labels(model, processor, second, tmp_path / "out")
    write_pseudo_labels(model, processor, second, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_masks_are_not_joined_under_other_class_names(model, processor, tmp_path):
    split = split_of(some_images(2), LABELS[:2])
    write_pseudo_labels(model, processor, split, tmp_path, PseudoLabelOptions(label_source="predicted"))
    swapped = ["background", "class 2", "class 1", "class 3"]
    other = build_split(some_images(2), split["image_id"], LABELS[:2], swapped)
    with pytest.raises(ValueError, match="are not those of the masks"):
        with_pseudo_labels(other, tmp_path)
    # without labels of their own, records get those of the manifest
    joined = with_pseudo_labels(other.remove_columns("labels"), tmp_path)
    assert class_names({"train": joined}) == NAMES
    given = {row["image_id"]: row["classes"] for row in pq.read_table(tmp_path / "manifest.parquet").to_pylist()}
    for image_id, labels in zip(joined["image_id"], joined["labels"], strict=True):
        assert [NAMES[label + 1] for label in labels] == given[image_id]


def test_images_of_16_bits_are_not_white(model, processor, tmp_path, monkeypatch):
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    means = []
    original = PseudoLabeler.__call__
    monkeypatch.setattr(
        PseudoLabeler,
        "__call__",
        lambda self, image, labels: means.append(np.mean(image)) or original(self, image, labels),
    )
    write_pseudo_labels(model, processor, split_of([str(tmp_path / "deep.png")], [[1, 0, 0]]), tmp_path / "out")
    assert 120 < means[0] < 135


@pytest.mark.parametrize("kind", ["torch", "pandas"])
def test_a_split_in_any_format(model, processor, tmp_path, kind):
    split = split_of(some_images(), LABELS)
    table = write_pseudo_labels(model, processor, split, tmp_path / "plain")
    assert write_pseudo_labels(model, processor, split.with_format(kind), tmp_path / "formatted").equals(table)
    joined = with_pseudo_labels(split.with_format(kind), tmp_path / "plain")
    expected = with_pseudo_labels(split, tmp_path / "plain")
    assert joined["image_id"][:] == expected["image_id"][:] and joined["labels"][:] == expected["labels"][:]


def test_the_folder_and_its_manifest(model, processor, tmp_path, monkeypatch):
    # five rows in chunks of two
    monkeypatch.setattr("synernet_hf.pseudo_label_files.MANIFEST_CHUNK", 2)
    model.train()
    table = write_pseudo_labels(model, processor, split_of(some_images(), LABELS), tmp_path / "out")
    assert model.training
    model.eval()
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").equals(table)
    rows = table.to_pylist()
    # images that are in memory have no file
    assert all(row["file_name"] == f"{row['image_id']}.png" for row in rows)
    assert sorted(row["image_id"] for row in rows) == [f"image_{index}" for index in range(5)]
    assert [row["confidence"] for row in rows] == sorted(row["confidence"] for row in rows)
    for row in rows:
        index = int(row["image_id"][-1])
        with Image.open(tmp_path / "out" / row["mask"]) as mask:
            assert mask.mode == "P" and mask.size == (row["width"], row["height"]) == some_images()[index].size
            assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette())
            ids = np.array(mask)
        assert row["coverage"] == pytest.approx((ids != 255).mean(), abs=1e-6)
        if row["label_source"] == "known":
            assert row["classes"] == [NAMES[label + 1] for label in LABELS[index]]
        assert row["missing_classes"] == [name for name in row["classes"] if NAMES.index(name) not in ids]
    assert [row["image_id"] for row in rows if row["label_source"] == "predicted"] == ["image_2"]


def test_finished_images_are_kept_and_others_made(model, processor, tmp_path):
    split = split_of(some_images(), LABELS)
    write_pseudo_labels(model, processor, split, tmp_path / "whole")
    write_pseudo_labels(model, processor, split.select([0, 1, 2]), tmp_path / "parts")
    masks = tmp_path / "parts" / "masks"
    before = {path.name: path.stat().st_mtime_ns for path in masks.iterdir()}
    # what an interruption may leave: a half-written neighbour, no manifest
    (masks / ".image_3.png.123.tmp").write_bytes(b"half")
    (tmp_path / "parts" / "manifest.parquet").unlink()
    write_pseudo_labels(model, processor, split, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert {name: (masks / name).stat().st_mtime_ns for name in before} == before


def spoiled(path: Path, how: str) -> None:
    """Damages a mask: in its compressed pixels, in a pixel by an editor that keeps the texts, or by cutting it off."""
    content = path.read_bytes()
    if how == "damaged":
        position = content.index(b"IDAT") + 12
        path.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
    elif how == "edited":
        with Image.open(path) as mask:
            text = PngImagePlugin.PngInfo()
            text.add_text("synernet_hf", mask.info["synernet_hf"])
            edited = mask.copy()
        edited.putpixel((0, 0), 1 - min(edited.getpixel((0, 0)), 1))
        edited.save(path, pnginfo=text)
    else:
        path.write_bytes(content[: {"half": len(content) // 2, "empty": 0}[how]])


@pytest.mark.parametrize("how", ["damaged", "edited", "half", "empty"])
def test_masks_with_other_pixels_than_were_written_are_made_again(model, processor, tmp_path, how):
    split = split_of(some_images(2), LABELS[:2])
    table = write_pseudo_labels(model, processor, split, tmp_path)
    whole, mask = contents(tmp_path), tmp_path / "masks" / "image_0.png"
    for row in table.to_pylist():
        with Image.open(tmp_path / row["mask"]) as written:
            assert hashlib.sha256(np.asarray(written).tobytes()).hexdigest() == row["pixels"]
    other = (tmp_path / "masks" / "image_1.png").stat().st_mtime_ns
    spoiled(mask, how)
    assert contents(tmp_path) != whole
    write_pseudo_labels(model, processor, split, tmp_path)
    assert contents(tmp_path) == whole
    assert (tmp_path / "masks" / "image_1.png").stat().st_mtime_ns == other


@pytest.mark.parametrize("name", ["manifest.parquet", "pseudo_labels.json"])
def test_a_damaged_manifest_is_made_again(model, processor, tmp_path, name):
    split = split_of(some_images(2), LABELS[:2])
    write_pseudo_labels(model, processor, split, tmp_path)
    whole = contents(tmp_path)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "masks").iterdir())]
    (tmp_path / name).write_bytes(whole[name][: len(whole[name]) // 2])
    with pytest.raises(ValueError, match="cannot be read .* makes it anew|make them anew"):
        with_pseudo_labels(split, tmp_path)
    write_pseudo_labels(model, processor, split, tmp_path)
    assert contents(tmp_path) == whole
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "masks").iterdir())] == times
    # without the settings nobody can tell, so that those of another model are made again
    (tmp_path / "pseudo_labels.json").write_text("{")
    other = SynerNetModelTester().model(seed=1)
    write_pseudo_labels(other, processor, split, tmp_path)
    write_pseudo_labels(other, processor, split, tmp_path / "fresh")
    fresh = contents(tmp_path / "fresh")
    assert {key: value for key, value in contents(tmp_path).items() if not key.startswith("fresh")} == fresh


def test_a_folder_that_another_process_writes_into_is_refused(model, processor, tmp_path):
    split = split_of(some_images(1), LABELS[:1])
    with hold_folder(tmp_path / "out"):
        with pytest.raises(ValueError, match=f"Process {os.getpid()} on .* writing into"):
            write_pseudo_labels(model, processor, split, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    write_pseudo_labels(model, processor, split, tmp_path / "out")
    assert not (tmp_path / "out" / ".lock").exists()


def test_shards_know_nothing_of_each_other_and_give_the_same_bytes(model, processor, tmp_path):
    split, out = split_of(some_images(), LABELS), tmp_path / "out"
    write_pseudo_labels(model, processor, split, tmp_path / "whole")
    masks = out / "masks"
    masks.mkdir(parents=True)
    # what killed processes of shard 0 and, perhaps still living, of shard 1 left
    for name in (".image_2.png.123.tmp", ".image_3.png.124.tmp"):
        (masks / name).write_bytes(b"half")
    with hold_folder(out, part=(1, 2)):
        table = write_pseudo_labels(model, processor, split, out, PseudoLabelOptions(num_shards=2, shard=0))
        assert sorted(table["image_id"].to_pylist()) == ["image_0", "image_2", "image_4"]
        assert not (masks / ".image_2.png.123.tmp").exists() and (masks / ".image_3.png.124.tmp").exists()
        with pytest.raises(ValueError, match="writing into"):
            write_pseudo_labels(model, processor, split, out)
    assert not (out / "manifest.parquet").exists()
    with pytest.raises(FileNotFoundError, match="has finished"):
        with_pseudo_labels(split, out)
    # on a machine without a common disk
    write_pseudo_labels(model, processor, split, tmp_path / "far", PseudoLabelOptions(num_shards=2, shard=1))
    for path in (tmp_path / "far" / "masks").iterdir():
        (masks / path.name).write_bytes(path.read_bytes())
    assert len(list(masks.glob("[!.]*"))) == 5
    times = {path.name: path.stat().st_mtime_ns for path in masks.glob("[!.]*")}
    spoiled(masks / "image_1.png", "damaged")
    (masks / "image_4.png").unlink()
    write_pseudo_labels(model, processor, split, out)
    assert contents(out) == contents(tmp_path / "whole")
    same = [name for name in times if (masks / name).stat().st_mtime_ns == times[name]]
    assert sorted(same) == ["image_0.png", "image_2.png", "image_3.png"]
    empty = write_pseudo_labels(model, processor, split, out, PseudoLabelOptions(num_shards=9, shard=8))
    assert len(empty) == 0 and contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("num_shards", "shard"), [(0, None), (2, None), (2, 2), (2, -1), (1, 1), (0, 0)])
def test_shards_that_do_not_exist_are_refused(num_shards, shard):
    with pytest.raises(ValueError, match=f"`shard` is {shard} of {num_shards}; a number from 0"):
        PseudoLabelOptions(num_shards=num_shards, shard=shard)


def test_a_mask_is_made_again_for_other_image_labels(model, processor, tmp_path):
    write_pseudo_labels(model, processor, split_of(some_images(), LABELS), tmp_path / "out")
    changed = [[1], *LABELS[1:]]
    table = write_pseudo_labels(model, processor, split_of(some_images(), changed), tmp_path / "out")
    assert {row["image_id"]: row["classes"] for row in table.to_pylist()}["image_0"] == ["class 2"]
    write_pseudo_labels(model, processor, split_of(some_images(), changed), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_models_and_options_are_refused(model, processor, tmp_path):
    split = split_of(some_images(2), LABELS[:2])
    write_pseudo_labels(model, processor, split, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="made with another map, scales"):
        write_pseudo_labels(model, processor, split, tmp_path, PseudoLabelOptions("segmentation"))
    with pytest.raises(ValueError, match="made with another model"):
        write_pseudo_labels(SynerNetModelTester().model(seed=1), processor, split, tmp_path)
    resized = SynerNetImageProcessor(do_resize=True, size={"shortest_edge": 24})
    with pytest.raises(ValueError, match="made with another model"):
        write_pseudo_labels(model, resized, split, tmp_path)
    assert contents(tmp_path) == before


def test_bad_input_gets_a_sentence(model, processor, tmp_path):
    good = split_of(some_images(2), LABELS[:2])
    with pytest.raises(ValueError, match="'both'; one of pseudo_label, segmentation"):
        PseudoLabelOptions(map="both")
    with pytest.raises(ValueError, match="positive factors"):
        PseudoLabelOptions(scales=(1.0, 0.0))
    for ids, words in ((["a", "a"], "occurs twice"), (["../a", "b"], "cannot name a mask")):
        with pytest.raises(ValueError, match=words):
            write_pseudo_labels(model, processor, split_of(some_images(2), LABELS[:2], ids), tmp_path / "new")
    with pytest.raises(ValueError, match="is empty"):
        write_pseudo_labels(model, processor, good.select([]), tmp_path / "new")
    other = build_split(some_images(1), ["a"], [[0]], ["background", "cat", "dog", "cow"])
    with pytest.raises(ValueError, match="are not the model's"):
        write_pseudo_labels(model, processor, other, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds other things"):
        write_pseudo_labels(model, processor, good, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"keep"}


def test_images_that_do_not_decode(model, processor, tmp_path, capsys):
    images = [some_images(1)[0], {"bytes": b"no image", "path": None}]
    split = split_of(images, LABELS[:2], ["good", "broken"])
    with pytest.raises(ValueError, match="image broken does not decode"):
        write_pseudo_labels(model, processor, split, tmp_path)
    table = write_pseudo_labels(model, processor, split, tmp_path, on_bad_image="skip")
    assert table["image_id"].to_pylist() == ["good"]
    assert "broken" in capsys.readouterr().out
    with pytest.raises(ValueError, match="None of the 1 images decodes"):
        write_pseudo_labels(model, processor, split.select([1]), tmp_path, on_bad_image="skip")


def test_images_in_subfolders_and_their_masks(model, processor, tmp_path):
    split = split_of(some_images(2), LABELS[:2], ["cats/1", "dogs/1"])
    table = write_pseudo_labels(model, processor, split, tmp_path)
    joined = with_pseudo_labels(split, tmp_path)
    assert joined["image_id"][:] == ["cats/1", "dogs/1"]
    for record in joined:
        assert record["mask"].size == record["image"].size
        assert (tmp_path / "masks" / f"{record['image_id']}.png").is_file()
    confident = max(table["confidence"].to_pylist())
    assert len(with_pseudo_labels(split, tmp_path, min_confidence=confident)) == 1
    with pytest.raises(ValueError, match="None of the 2 images"):
        with_pseudo_labels(split, tmp_path, min_confidence=1.1)
    with pytest.raises(FileNotFoundError, match="manifest.parquet"):
        with_pseudo_labels(split, tmp_path / "masks")


def test_masks_of_any_identifiers_are_files_of_their_own(model, processor, tmp_path):
    ids = ["a", "./a", "A", "a.png/b", "con", "x:y", "sub\\a", "e\u0301", "é", "d" * 300]
    images, labels = some_images(len(ids)), [LABELS[index % 5] for index in range(len(ids))]
    split = split_of(images, labels, ids)
    table = write_pseudo_labels(model, processor, split, tmp_path / "out")
    masks = table["mask"].to_pylist()
    assert len({unicodedata.normalize("NFC", mask).casefold() for mask in masks}) == len(ids)
    assert not any(set(part) & set('<>:"\\|?*') or part.startswith(".") for mask in masks for part in mask.split("/"))
    # each belongs to its image, and is kept when the script is called again
    for record, image in zip(with_pseudo_labels(split, tmp_path / "out"), images, strict=True):
        alone, _ = PseudoLabeler(model, processor)(image, labels[ids.index(record["image_id"])])
        assert np.array_equal(np.asarray(record["mask"]), alone), record["image_id"]
    before = contents(tmp_path / "out")
    write_pseudo_labels(model, processor, split, tmp_path / "out")
    assert contents(tmp_path / "out") == before and len(before) == len(ids) + 2


@pytest.mark.distributed
@pytest.mark.resume
def test_one_process_two_processes_and_a_killed_one_give_the_same_bytes(shapes_run, tmp_path, capsys):
    words = [str(shapes_run), "--output"]
    two = start_script(*words, str(tmp_path / "two"), processes=2)
    killed = start_script(*words, str(tmp_path / "killed"))
    assert run_script(*words, str(tmp_path / "one")) == 0
    assert "40 of 40 images have a mask" in capsys.readouterr().out
    whole = contents(tmp_path / "one")
    assert len(whole) == 43 and "report.html" in whole
    masks = tmp_path / "killed" / "masks"
    deadline = time.monotonic() + 240
    while len(list(masks.glob("[!.]*.png"))) < 3 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 3 <= len(list(masks.glob("[!.]*.png"))) < 40
    assert run_script(*words, str(tmp_path / "killed")) == 0
    assert contents(tmp_path / "killed") == whole
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors[-3000:]
    assert contents(tmp_path / "two") == whole


def test_the_scripts_options(shapes_run, tmp_path, capsys):
    words = [str(shapes_run), "--split", "validation", "--map", "segmentation", "--label_source", "predicted"]
    formats = ["--format", "coco", "yolo", "labelstudio", "cvat"]
    assert run_script(*words, "--output", str(tmp_path / "out"), "--max_samples", "1", *formats) == 0
    assert set(REVIEW_FILES) == {path.name for path in (tmp_path / "out").iterdir()} - OWN_FILES
    output = capsys.readouterr().out
    assert "1 of 1 images have a mask" in output and "validation_000000: confidence" in output
    settings = json.loads((tmp_path / "out" / "pseudo_labels.json").read_text())
    assert (settings["map"], settings["label_source"]) == ("segmentation", "predicted")
    shard = ["--output", str(tmp_path / "shard"), "--num_shards", "2", "--shard", "1"]
    assert run_script(*words, *shard) == 0
    assert "shard 1 of 2: 1 masks are in" in capsys.readouterr().out
    assert run_script(*words, "--output", str(tmp_path / "shard"), "--json") == 0
    output = capsys.readouterr()
    assert "1 of 2 masks were missing or other: validation_000000." in output.err
    assert "2 of 2 images have a mask" in output.err
    answer = json.loads(output.out)
    assert (answer["images"], answer["masks"], len(answer["review_first"])) == (2, 2, 2)
    for more, expected in (
        (["--num_shards", "2"], "`shard` is None of 2"),
        (["--split", "test"], "--split can be train or validation"),
        (["--dataset", "voc2012"], "needs data_dir"),
        (["--max_samples", "0"], "--max_samples is 0"),
    ):
        assert run_script(str(shapes_run), "--output", str(tmp_path / "other"), *more) == 2
        assert expected in capsys.readouterr().err
    assert run_script(str(tmp_path / "nothing"), "--dataset", "shapes", "--output", str(tmp_path / "other")) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_loaded_model_is_the_same_model(shapes_run, tmp_path, processor):
    split = load_shapes(2, 1, image_size=32)["train"]
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(shapes_run).eval()
    write_pseudo_labels(model, processor, split, tmp_path)
    model.save_pretrained(tmp_path / "elsewhere")
    moved = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "elsewhere").eval()
    (tmp_path / "elsewhere").rename(tmp_path.parent / "elsewhere")
    write_pseudo_labels(moved, processor, split, tmp_path)


def test_the_stock_trainer_learns_from_the_masks(shapes_run, tmp_path, capsys):
    from transformers import AutoModelForSemanticSegmentation

    splits = load_shapes(6, 2, image_size=32)
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(shapes_run).eval()
    write_pseudo_labels(model, SynerNetImageProcessor(), splits["train"].select(range(4)), tmp_path / "masks")
    script = runpy.run_path(str(ROOT / "examples" / "train_on_pseudo_labels.py"))
    config = {"model_type": "segformer", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    config |= {"num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8}
    words = ["--dataset", "shapes", "--dataset_options", '{"num_train": 6, "num_validation": 2, "image_size": 32}']
    words += ["--size", "32", "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--report_to", "none"]
    words += ["--use_cpu", "True", "--save_strategy", "no", "--disable_tqdm", "True", "--pseudo_labels"]
    assert script["main"]([*words, str(tmp_path / "masks"), "--model_config", json.dumps(config)]) == 0
    output = capsys.readouterr().out
    assert "4 of 6 images have a pseudo-label" in output and "mean IoU at 32 px" in output
    trained = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert trained.config.id2label[0] == "background" and trained.config.num_labels == 6
    assert script["main"]([*words, str(tmp_path / "masks")]) == 2
    assert "either --model" in capsys.readouterr().err

    processor = script["build_processor"](script["SegmenterArguments"](str(tmp_path / "masks"), size=32))
    joined = with_pseudo_labels(splits["train"], tmp_path / "masks")
    plain = script["SegmentationDataset"](joined, processor)[0]
    assert np.array_equal(plain["labels"].numpy(), np.array(joined[0]["mask"]))
    mirrored = script["SegmentationDataset"](joined, processor, mirror=True)
    turned = 0
    for _ in range(20):
        item = mirrored[0]
        flips = [torch.equal(item[name], plain[name].flip(-1)) for name in ("pixel_values", "labels")]
        assert flips[0] == flips[1]
        turned += flips[0]
    assert 0 < turned < 20


def test_a_stream_is_refused_and_its_validation_images_are_labelled(shapes_run, tmp_path, capsys):
    write_parquet(load_shapes(2, 1, image_size=32), tmp_path / "data")
    words = [
        str(shapes_run),
        "--dataset",
        "hub",
        "--data_dir",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--dataset_options", '{"streaming": true}']
    assert run_script(*words) == 2
    assert "Streamed data cannot be shared" in capsys.readouterr().err
    assert run_script(*words, "--split", "validation") == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) >= 1
