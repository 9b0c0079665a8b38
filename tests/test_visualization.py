import sys

import numpy as np
import pytest
from PIL import Image

from synernet_hf import visualization
from synernet_hf.visualization import (
    colorize,
    confusion_chart,
    curves,
    figure_panels,
    heat_map,
    overlay,
    palette_image,
    score_bars,
    voc_palette,
    with_legend,
)


LABEL_MAP = np.array([[0, 1, 2], [15, 20, 255]])


def test_palette_is_that_of_pascal_voc():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    # colours of background, aeroplane, bicycle, bird, person, tvmonitor and the contour in the devkit's masks
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for class_id, color in expected.items():
        assert tuple(palette[class_id]) == color
    assert len({tuple(color) for color in palette}) == 256


def test_palette_image_keeps_ids_and_shows_colours(tmp_path):
    palette_image(LABEL_MAP).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), LABEL_MAP)
        assert np.array_equal(np.asarray(mask.convert("RGB")), np.asarray(colorize(LABEL_MAP)))


def test_overlay_leaves_background_and_blends_the_rest():
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    result = np.asarray(overlay(image, LABEL_MAP, alpha=0.5)).astype(int)
    assert (result[0, 0] == 100).all()
    assert result[0, 1].tolist() == [114, 50, 50]
    assert np.array_equal(np.asarray(overlay(image, LABEL_MAP, alpha=0.0)), image)
    opaque = np.asarray(overlay(Image.fromarray(image), LABEL_MAP, alpha=1.0))
    assert np.array_equal(opaque[1], np.asarray(colorize(LABEL_MAP))[1])


def colors_of(image) -> set[tuple[int, ...]]:
    return {tuple(color) for color in np.asarray(image).reshape(-1, 3).tolist()}


def test_an_overlay_names_the_classes_it_shows():
    image = np.full((60, 200, 3), 100, dtype=np.uint8)
    label_map = np.zeros((60, 200), dtype=int)
    label_map[:20, :20], label_map[20:30], label_map[40:] = 8, 12, 255
    names = {0: "background", 8: "cat", 12: "dog", 15: "person"}
    drawn = overlay(image, label_map, class_names=names)
    assert drawn.width == 200 and drawn.height > 60
    assert np.array_equal(np.asarray(drawn)[:60], np.asarray(overlay(image, label_map)))
    legend = colors_of(drawn.crop((0, 60, *drawn.size)))
    palette = voc_palette()
    # the undecided pixels are named too, classes that are not there are not, nor is the background, which has no colour
    assert {index for index in (0, 8, 12, 15, 255) if tuple(palette[index].tolist()) in legend} - {0} == {8, 12, 255}
    assert overlay(image, np.zeros((60, 200), dtype=int), class_names=names).size == (200, 60)
    # ids without a name are no reason to fail after the work is done
    assert overlay(image, label_map, class_names={8: "cat"}).height > 60


@pytest.mark.parametrize("width", [20, 120, 600])
def test_a_legend_has_room_for_every_name(width):
    names = {index: f"class number {index}" for index in range(21)}
    drawn = with_legend(Image.new("RGB", (width, 10), "white"), names)
    assert drawn.width >= width
    legend = np.asarray(drawn)[10:]
    palette = voc_palette()
    for index in names:
        assert (legend == palette[index]).all(axis=-1).sum() >= 12 * 12, index
    # nothing is cut off at the right
    assert (legend[:, -4:] == 255).all()


@pytest.mark.parametrize("fonts", [(), ("no such font.ttf",), visualization._FONTS])
def test_names_of_any_letters_are_drawn(monkeypatch, fonts):
    monkeypatch.setattr(visualization, "_FONTS", fonts)
    names = ["Hündin", "Hu\u0308ndin", "犬", "кошка", "cat"]
    font, drawn = visualization._drawable(names)
    box = bytes(font.getmask(visualization._NO_LETTER))
    assert drawn[0] == drawn[1] and drawn[0] in ("Hündin", "Hundin") and drawn[4] == "cat"
    for text in drawn:
        assert text and all(bytes(font.getmask(letter)) != box for letter in text)
    assert with_legend(Image.new("RGB", (40, 10)), dict(enumerate(names))).height > 10
    figure_panels([[(name, np.zeros((4, 4), np.uint8)) for name in names]])


def test_images_of_16_bits_are_drawn_in_their_shades():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    drawn = np.asarray(overlay(deep, np.zeros((1, 3), dtype=int)))
    assert drawn[0, :, 0].tolist() == [0, 128, 255]


def test_heat_map_grows_lighter_with_the_value_and_clips():
    heat = np.asarray(heat_map(np.array([[-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]]))).astype(int).sum(axis=-1)[0]
    assert (np.diff(heat[1:-1]) > 0).all()
    assert heat[0] == heat[1] and heat[-1] == heat[-2]


def test_heat_map_over_a_image_lets_it_show_through():
    image = np.zeros((1, 1, 3), dtype=np.uint8)
    plain = np.asarray(heat_map(np.ones((1, 1)))).astype(int)
    over = np.asarray(heat_map(np.ones((1, 1)), image, alpha=0.5)).astype(int)
    assert np.abs(over - plain / 2).max() <= 1


def test_figure_has_room_for_every_panel_and_paints_all_of_them():
    red, blue = (Image.new("RGB", (40, 20), color) for color in ("red", "blue"))
    one = figure_panels([[("red", red)]], panel_size=(30, 30))
    figure = figure_panels([[("red", red), ("a very long title that cannot fit", blue)], [("blue", blue)]], (30, 30))
    assert figure.width > one.width and figure.height > one.height
    pixels = np.asarray(figure).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).sum() == 30 * 15
    assert (pixels == (0, 0, 255)).all(axis=1).sum() == 2 * 30 * 15


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: colorize(np.zeros((2, 2))), "integers"),
        (lambda: colorize(np.full((2, 2), 256)), "0 to 255"),
        (lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), int)), "equal sizes"),
        (lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), alpha=2), "between 0 and 1"),
        (lambda: overlay(np.zeros((2, 2, 3)), np.zeros((2, 2), int)), "uint8"),
        (lambda: heat_map(np.zeros((1, 2, 2))), "one map"),
        (lambda: heat_map(np.zeros((2, 2)), np.zeros((3, 3, 3), np.uint8)), "equal sizes"),
        (lambda: figure_panels([[]]), "no panel"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_overlay_of_many_rows_is_mixed_as_one_of_few(monkeypatch):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (23, 9, 3), dtype=np.uint8)
    label_map = generator.integers(0, 4, (23, 9))
    whole = np.asarray(overlay(image, label_map, alpha=0.3))
    mixed = image * np.float32(0.7) + voc_palette()[label_map] * np.float32(0.3)
    expected = np.where(label_map[..., None] == 0, image, mixed)
    assert np.abs(whole - expected).max() < 0.51
    monkeypatch.setattr("synernet_hf.visualization._ROWS", 5)
    assert np.array_equal(overlay(image, label_map, alpha=0.3), whole)


# matplotlib's first two colours, and the lightest one of its map "viridis"
BLUE, ORANGE, YELLOW = (31, 119, 180), (255, 127, 14), (253, 231, 36)


def area_of(image: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(image).astype(int) == color).all(axis=-1).sum())


def test_bars_are_as_high_as_scores():
    full = score_bars({"segmentation": {"cat": 1.0, "dog": 1.0}})
    half = score_bars({"segmentation": {"cat": 0.5, "dog": 0.5}})
    gap = score_bars({"segmentation": {"cat": 1.0, "dog": None}})
    assert full.mode == "RGB" and full.size == half.size == gap.size
    assert 0.4 < area_of(half, BLUE) / area_of(full, BLUE) < 0.65
    assert 0.4 < area_of(gap, BLUE) / area_of(full, BLUE) < 0.7
    two = score_bars({"segmentation": {"cat": 1.0, "dog": 1.0}, "fused_cam": {"cat": 1.0}})
    assert area_of(two, ORANGE) > 1000
    assert score_bars({"segmentation": dict.fromkeys("abcdefghij", 0.5)}).width > 2 * full.width
    with pytest.raises(ValueError, match="no score"):
        score_bars({})


def test_a_confusion_chart_shows_shares():
    right = confusion_chart({"cat": {"cat": 1.0}, "dog": {"dog": 1.0}})
    mixed = confusion_chart({"cat": {"cat": 0.5, "dog": 0.5}, "dog": {"dog": 1.0}})
    assert right.mode == "RGB"
    assert 0.45 < area_of(mixed, YELLOW) / area_of(right, YELLOW) < 0.55
    # pixels taken for a class without a row of its own
    assert confusion_chart({"cat": {"cat": 0.5, "others": 0.5}}).width > confusion_chart({"cat": {"cat": 1.0}}).width
    # only the classes asked for, all others in one column
    wide = {"cat": {"cat": 0.5, "dog": 0.3, "cow": 0.2}}
    assert confusion_chart(wide).size == confusion_chart(wide, ["cat", "dog"]).size
    assert confusion_chart(wide, ["cat"]).width < confusion_chart(wide).width
    with pytest.raises(ValueError, match="no confusion"):
        confusion_chart({})


def test_curves_show_every_series():
    image = curves({"loss": [(0, 2.0), (100, 1.0)], "mIoU": [(0, 0.0), (100, 0.5)], "empty": []})
    assert area_of(image, BLUE) > 100 and area_of(image, ORANGE) > 100
    assert area_of(curves({"loss": [(0, 2.0), (100, 1.0)]}), ORANGE) == 0
    with pytest.raises(ValueError, match="no point"):
        curves({"loss": []})


def test_charts_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="extra `train`"):
        curves({"loss": [(0, 1.0)]})
