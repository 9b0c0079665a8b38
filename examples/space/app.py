"""
A page to look into SynerNet models: drop images, tick classes, see CAMs, pseudo-labels and segmentations, take masks home.

    python examples/space/app.py runs/demo [another model …] [--port 7860]

On the Hub this folder is a Space; its models are those that README.md names in `models`.
"""

import argparse
import os
import sys
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command


HERE = Path(__file__).parent


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", help="folders or Hub ids; two or more can be compared (default: runs/demo)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

with needs_extra("demo"):
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
from analysis import MAPS, Settings, analyse, load, make_masks, open_upload, page, problem
from huggingface_hub import RepoCard

from synernet_hf.model_folder import find_model_folder


CSS = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 200px), 1fr)); gap: 12px; }
.panels figure { margin: 0; min-width: 0; }
.panels img { display: block; width: 100%; height: auto; border-radius: 4px; }
.panels figcaption { padding-top: 2px; font-size: .9rem; }
.layers { position: relative; }
.layers .base { opacity: var(--base, 1); }
.layers .map { position: absolute; inset: 0; height: 100%; opacity: var(--map, .6); }
section table { margin: 14px 0 6px; border-collapse: collapse; border: 0 !important; }
section :is(tr, th, td) { border: 0 !important; }
section :is(th, td) { padding: 3px 18px 3px 0 !important; text-align: left; }
section td { text-align: right !important; font-variant-numeric: tabular-nums; }
section i { display: inline-block; width: .85em; height: .85em; margin-right: 6px; border: 1px solid #8888; border-radius: 2px; }
.scale span { display: inline-block; width: 90px; height: .8em; vertical-align: baseline; border-radius: 2px;
  background: linear-gradient(90deg, #080820, #461478, #be325a, #fa8c28, #fff0aa); }
[role=alert] { padding: 10px 12px; border-left: 4px solid #b91c1c; background: #fee2e2; color: #450a0a; border-radius: 4px; }
:focus-visible { outline: 3px solid #2563eb !important; outline-offset: 2px; }
"""
SHOW = """(opacity, overlay) => {
  document.documentElement.style.setProperty("--map", overlay ? opacity / 100 : 1);
  document.documentElement.style.setProperty("--base", overlay ? 1 : 0);
}"""
START = '<p role="status">Drop one or more images on the left, or take an example, then press <b>Look into the image</b>.</p>'


def models_of_card() -> list[str]:
    """The models that the Space's README names, else what `make demo` writes."""
    card = HERE / "README.md"
    return (RepoCard.load(card).data.get("models") if card.is_file() else None) or ["runs/demo"]


def read_settings(scales, flip, low, high, prior, fusion) -> Settings:
    """The settings of the page."""
    return Settings(tuple(map(float, scales)), flip, low, high, prior, fusion)


def show(paths, chosen, model, other, ticked, *settings) -> str:
    """The chosen image as one or two models see it, as HTML; what goes wrong is a sentence."""
    try:
        if not paths:
            raise ValueError("There is no image: drop one, or take an example.")
        path = next((path for path in paths if Path(path).name == chosen), paths[0])
        image, wanted = open_upload(path), read_settings(*settings)
        names = [model] if other in (None, "", model) else [model, other]
        return page([analyse(name, image, ticked, wanted) for name in names])
    except ValueError as error:
        return problem(error)


def download(paths, model, kind, ticked, *settings):
    """The archive, the table and what to tell."""
    try:
        archive, table, text = make_masks(model, paths or [], ticked, read_settings(*settings), kind)
        return [archive, table], f'<p role="status">{text}</p>'
    except ValueError as error:
        return None, problem(error)


def choose_image(paths):
    """The images to choose from, where there are several."""
    names = [Path(path).name for path in paths or []]
    return gr.update(choices=names, value=names[0] if names else None, visible=len(names) > 1)


def choose_model(name):
    """The classes and the settings of a model."""
    try:
        config = load(name)[0].config
    except ValueError as error:
        return (gr.update(choices=[], value=[]), *[gr.update()] * 6, problem(error))
    classes = gr.update(choices=list(config.id2label.values())[1:], value=[])
    return (classes, *defaults(config), START)


def defaults(config) -> tuple:
    """The settings that a model was saved with; few scales, for the page is to be quick."""
    return ["1"], False, config.low_threshold, config.high_threshold, config.class_prior_weight, config.fusion


def examples(models: list[str]) -> list[list[list[str]]]:
    """Images beside the page and those that a run left in its folder."""
    found = sorted((HERE / "examples").glob("*.*")) or [Path(models[0]) / "image.png"]
    return [[[str(path)]] for path in found if path.is_file()]


def build(models: list[str]) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="SynerNet") as blocks:
        gr.Markdown(
            "# SynerNet\nSegmentation learnt from image labels alone. See what the two branches of a model look at, where "
            "they agree, and what becomes of it."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(file_count="multiple", label="Images", elem_id="images", height=140)
                if examples(models):
                    gr.Examples(examples(models), [files], label="Examples")
                image = gr.Dropdown([], label="Image to look into", visible=False)
                run = gr.Button("Look into the image", variant="primary", elem_id="run")
                model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
                nobody = ("no other model", "")
                other = gr.Dropdown(
                    [nobody, *models], value="", label="Compare with", visible=len(models) > 1, elem_id="other"
                )
                ticked = gr.CheckboxGroup(
                    [], label="Classes in the image", info="None ticked: the model finds them.", elem_id="classes"
                )
                with gr.Accordion("Settings", open=False):
                    scales = gr.CheckboxGroup(["0.5", "0.75", "1", "1.25", "1.5"], value=["1"], label="Scales")
                    flip = gr.Checkbox(False, label="Also see the mirror image")
                    low = gr.Slider(0, 1, 0.25, step=0.05, label="Background below", elem_id="low")
                    high = gr.Slider(0, 1, 0.7, step=0.05, label="Class above", elem_id="high")
                    prior = gr.Slider(0, 10, 4, step=0.5, label="Class prior", info="What unlikely classes lose.")
                    fusion = gr.Radio(["confidence", "fixed"], value="confidence", label="Fusion of the CAMs")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    overlay = gr.Checkbox(True, label="Maps over the image", elem_id="overlay")
                    opacity = gr.Slider(0, 100, 60, step=5, label="Opacity", elem_id="opacity")
                result = gr.HTML(START, elem_id="result")
                with gr.Accordion("Masks of all images", open=False):
                    kind = gr.Radio(list(MAPS), value=MAPS[0], label="Masks", elem_id="kind")
                    batch = gr.Button("Make the masks", elem_id="batch")
                    told = gr.HTML(elem_id="told")
                    masks = gr.File(label="Archive (PNG, COCO, YOLO) and table", interactive=False, elem_id="masks")
        settings = [scales, flip, low, high, prior, fusion]
        files.change(choose_image, files, image)
        gr.on([blocks.load, model.change], choose_model, model, [ticked, *settings, result])
        run.click(show, [files, image, model, other, ticked, *settings], result)
        batch.click(download, [files, model, kind, ticked, *settings], [masks, told])
        for control in (overlay, opacity):
            control.change(None, [opacity, overlay], None, js=SHOW)
    return blocks


def serve(args: argparse.Namespace) -> None:
    """Shows the page until it is interrupted."""
    models = args.models or models_of_card()
    for name in models:
        find_model_folder(name)
    # no font of another server is asked for
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    folders = [str(path[0][0]) for path in examples(models)]
    build(models).queue().launch(server_port=args.port, allowed_paths=folders, theme=theme, css=CSS, footer_links=[])


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(serve, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
