"""Recipes and the command line: what wins, and what is refused."""

import dataclasses
import typing

import pytest

from synernet_hf.training import (
    DataArguments,
    InvalidArguments,
    SynerNetTrainingArguments,
    parse_arguments,
    read_recipe,
)
from synernet_hf.training.arguments import ARGUMENT_CLASSES, RANGES, value_problems


def write_recipe(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_the_papers_run():
    model_args, data_args, training_args = parse_arguments([])
    assert model_args.backbone is None
    assert data_args.dataset == "voc2012"
    assert (training_args.max_steps, training_args.crop_size, training_args.learning_rate) == (8000, 448, 6e-5)
    assert training_args.warmup_steps == 1500


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = write_recipe(tmp_path, "max_steps: 100\ncrop_size: 64\nflip: false\nlearning_rate: 6e-4\n")
    _, _, training_args = parse_arguments(["--config", recipe, "--max_steps", "8000", "--seed", "3"])
    # 8000 is also the default, and was asked for
    assert training_args.max_steps == 8000
    assert (training_args.crop_size, training_args.seed, training_args.save_steps) == (64, 3, 1000)
    assert training_args.flip is False
    assert training_args.learning_rate == 6e-4
    _, _, training_args = parse_arguments([f"--config={recipe}", "--flip", "true"])
    assert training_args.flip is True


def test_mappings_and_lists_come_from_recipe_and_command_line(tmp_path):
    recipe = write_recipe(
        tmp_path,
        "backbone_config: {model_type: vit, hidden_size: 16}\nmetric_classes: [background, cat]\n"
        "scale_range: [1, 2]\nmodel_config:\n  fusion: fixed\n",
    )
    model_args, data_args, training_args = parse_arguments(
        ["--config", recipe, "--dataset_options", '{"num_train": 8}', "--metric_classes", "dog", "cow"]
    )
    assert model_args.backbone_config == {"model_type": "vit", "hidden_size": 16}
    assert model_args.model_config == {"fusion": "fixed"}
    assert data_args.dataset_options == {"num_train": 8}
    assert data_args.metric_classes == ["dog", "cow"]
    assert training_args.scale_range == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_stepz: 10\n", "has the unknown setting max_stepz: did you mean max_steps\\?"),
        ("max_steps: 10\nwaffles: 3\n", "has the unknown setting waffles; --help lists all"),
        ("max_steps: [1, 2]\n", "`max_steps` in the recipe .* must be a whole number"),
        ("max_steps: 1.5\n", "`max_steps` in the recipe .* must be a whole number"),
        ("max_steps: null\n", "`max_steps` in the recipe .* must be a value"),
        ("learning_rate: fast\n", "`learning_rate` in the recipe .* must be a number"),
        ("flip: 2\n", "`flip` in the recipe .* must be true or false"),
        ("metric_classes: cat\n", "`metric_classes` in the recipe .* must be a list"),
        ("model_config: fixed\n", "`model_config` in the recipe .* must be a mapping"),
        ("dataset: 3\n", "`dataset` in the recipe .* must be text"),
        ("- max_steps\n", "must be a mapping of settings, got list"),
        ("max_steps: [1\n", "is not valid YAML"),
        ("scale_range: [a, b]\n", "`scale_range` in the recipe .* must be a list of numbers, got \\['a', 'b'\\]"),
        ("scale_range: [[1], null]\n", "`scale_range` in the recipe .* must be a list of numbers"),
        ("scale_range: [0.5, .inf]\n", "`scale_range` in the recipe .* must be a list of numbers"),
        ("metric_classes: [cat, [dog]]\n", "`metric_classes` in the recipe .* must be a list of texts"),
        ("learning_rate: .nan\n", "`learning_rate` in the recipe .* must be a number, got nan"),
        ("max_steps: 10\nseed: 1\nmax_steps: 20\n", "is not valid YAML: line 3, the key max_steps stands twice"),
        ("model_config:\n  fusion: a\n  fusion: b\n", "line 3, the key fusion stands twice"),
        ("model_config: {a: &a [x, x], b: [*a, *a]}\n", "line 1, aliases are not read"),
        ("model_config: &a {a: *a}\n", "line 1, aliases are not read"),
        ("data_dir: !!python/object/apply:os.getcwd []\n", "line 1, could not determine a constructor"),
        ("? [a, b]\n: 1\n", "line 1, found unhashable key"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(InvalidArguments, match=sentence) as caught:
        parse_arguments(["--config", write_recipe(tmp_path, text)])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"model_config: {'[' * 100_000}\n", "it is nested more than 32 levels deep"),
        (f"seed: {'9' * 5000}\n", "is not valid YAML: Exceeds the limit"),
        (f"dataset: [{'x' * 5000}]\n", "`dataset` in the recipe .* must be text, got \\['x{77}…\\.$"),
        (f"# {'x' * 1_000_000}\n", "has 1,000,003 bytes, too many for a recipe"),
    ],
    ids=["deep", "digits", "wide", "large"],
)
def test_a_bomb_of_a_recipe_is_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(InvalidArguments, match=sentence) as caught:
        parse_arguments(["--config", write_recipe(tmp_path, text)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_numbers_in_mappings_stay_numbers(tmp_path):
    recipe = write_recipe(tmp_path, "backbone_overrides: {layer_norm_eps: 1e-5}\nlearning_rate: 6E-5\n")
    model_args, _, training_args = parse_arguments(["--config", recipe, "--model_config", '{"low_threshold": 2e-1}'])
    assert model_args.backbone_overrides == {"layer_norm_eps": 1e-5}
    assert model_args.model_config == {"low_threshold": 0.2}
    assert training_args.learning_rate == 6e-5


def test_a_recipe_is_still_checked_after_a_parser_was_made(tmp_path):
    parse_arguments([])
    assert read_recipe(write_recipe(tmp_path, "model_config: {fusion: fixed}\n"))["model_config"] == {
        "fusion": "fixed"
    }


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InvalidArguments, match=r"nowhere\.yaml does not exist"):
        parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InvalidArguments, match=r"The recipe .*image\.yaml is not valid YAML: .*utf-8"):
        parse_arguments(["--config", str(path)])


def test_an_unreadable_mapping_is_named():
    with pytest.raises(InvalidArguments, match="`model_config` must be a mapping"):
        parse_arguments(["--model_config", "fixed"])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--max_stepz", "3"], "There is no option --max_stepz: did you mean --max_steps?"),
        (["--max_st", "3"], "There is no option --max_st: did you mean --max_steps?"),
        (["--max-step=3"], "There is no option --max-step: did you mean --max_steps?"),
        (["--waffles"], "There is no option --waffles; --help lists all."),
        (["runs/x"], "Nothing is expected at runs/x: quote words with spaces, or see --help."),
        (["--max_steps", "many"], "--max_steps must be a whole number, got 'many'."),
        (["--blur", "much"], "--blur must be a number, got 'much'."),
        (["--mixed_precision", "int8"], "argument --mixed_precision: invalid choice: 'int8'"),
    ],
)
def test_unknown_options_and_choices_are_refused_in_one_line(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(argv)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {sentence}") and errors.count("\n") == 1


def test_help_says_each_default_once_and_fits_what_turns_off(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "warm-up are fractions of it. (default: 8000)" in text
    assert "--no_flip Turn --flip off. --color_jitter" in text
    assert (
        "--config RECIPE YAML file with any of the settings below, or the name of a recipe, such as voc_animals."
        in text
    )
    assert "(default: all). (default" not in text and "(default: None)" not in text


def test_every_setting_has_a_help_text():
    for group in ARGUMENT_CLASSES:
        for item in dataclasses.fields(group):
            assert len(item.metadata["help"]) > 10, item.name
            assert f"{item.name} (`" in group.__doc__, item.name


def test_all_problems_of_the_values_are_found_together():
    args = SynerNetTrainingArguments(
        output_dir=None, max_steps=0, learning_rate=0.0, blur=2.0, scale_range=[2, 1], save_total_limit=0
    )
    text = "\n".join(args.problems())
    for name in ("output_dir", "max_steps", "learning_rate", "blur", "scale_range", "save_total_limit"):
        assert text.count(f"`{name}`") == 1
    assert SynerNetTrainingArguments(output_dir="run", report_to="none").problems() == []


@pytest.mark.parametrize("group", [DataArguments, SynerNetTrainingArguments])
def test_every_number_has_a_range_and_what_is_outside_is_refused(group):
    hints = typing.get_type_hints(group)
    numbers = [name for name, hint in hints.items() if {int, float, list[float]} & {hint, *typing.get_args(hint)}]
    ranges = {name: (low, high) for low, high, names in RANGES for name in names.split()}
    assert set(numbers) == set(ranges) & set(hints) and numbers
    good = {"output_dir": "run", "report_to": "none"} if group is SynerNetTrainingArguments else {}
    for name in numbers:
        low, high = ranges[name]
        is_list = isinstance(getattr(group(), name), list)
        for value in (low, high):
            assert value_problems(group(**good | {name: [value, value] if is_list else value})) == [], name
        below = -1e-9 if low == 0 and float in (hints[name], *typing.get_args(hints[name])) else low - 1
        for value in (below, high + 1, -(10**30), 10**30, float("inf"), float("nan"), "1", True, [[1]]):
            [problem] = value_problems(group(**good | {name: [value, value] if is_list else value}))
            assert problem.startswith(f"`{name}` must be ") and len(problem) < 150
    assert [
        name for name in numbers if f"`{name}`" not in str(value_problems(group(**dict.fromkeys(numbers, -2))))
    ] == []


@pytest.mark.parametrize("name", ["voc12", "voc12_authors", "voc_animals", "tiny_cpu", "own_images", "own_images_cpu"])
def test_recipes_of_the_repository_are_valid(root, name):
    from synernet_hf import SynerNetConfig

    recipe = root / "src" / "synernet_hf" / "recipes" / f"{name}.yaml"
    model_args, _, training_args = parse_arguments(["--config", str(recipe), "--output_dir", "run"])
    assert training_args.problems() == []
    assert (model_args.backbone is None) != (model_args.backbone_config is None)
    for name, value in read_recipe(recipe).items():
        if name in ("backbone_config", "backbone_overrides", "model_config"):
            assert getattr(model_args, name) == value
    config = SynerNetConfig(num_labels=3, **model_args.model_config)
    for field, value in model_args.model_config.items():
        assert field in SynerNetConfig.__annotations__
        assert getattr(config, field) == value


def test_the_authors_recipe_differs_where_method_and_code_do(root):
    recipes = root / "src" / "synernet_hf" / "recipes"
    ours, theirs = (read_recipe(recipes / f"{name}.yaml") for name in ("voc12", "voc12_authors"))
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing == {"backbone_overrides", "model_config"}
    assert theirs["backbone_overrides"] == {"qkv_bias": False, "layer_norm_eps": 1e-5}
    assert theirs["model_config"]["fusion"] == "fixed"
    assert theirs["model_config"]["spatial_bce_branches"] == ["broad"]
