"""
Push a trained model to the Hub in one commit: weights, image processor, code, pipeline and model card.

With --space OWNER/NAME the page of examples/space goes to a Space of that name and shows the model. The token is that of
`hf auth login` or of HF_TOKEN. Settings of the run, checkpoints and logs stay where they are.
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from synernet_hf.cli import CommandParser


if TYPE_CHECKING:
    from synernet_hf import SynerNetForWeaklySupervisedSegmentation


CARD_FILE = "README.md"
IMAGES_FILE = "images.png"
EXAMPLE_FILE = "image.png"
SPACE = Path(__file__).resolve().parents[3] / "examples" / "space"


def make_parser() -> CommandParser:
    """It needs no extra."""
    parser = CommandParser(prog="synernet push", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that training left")
    parser.add_argument("repo_id", metavar="REPO_ID", help="repository on the Hub, as owner/name")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private; refuse one that is public"
    )
    parser.add_argument("--revision", help="branch to push to, made where it is missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="propose the commit as a pull request")
    parser.add_argument("--message", default="Upload SynerNet", help="message of the commit")
    parser.add_argument("--license", help="licence id of the weights for the card, such as apache-2.0")
    parser.add_argument(
        "--no_projection_head",
        action="store_true",
        help="push the inference-only form (with_projection_head=False); training cannot go on from it as it was",
    )
    parser.add_argument("--no_images", action="store_true", help="leave the image grid out of the card")
    parser.add_argument("--space", help="also push the page of examples/space to this Space, as owner/name")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    args = make_parser().parse_args(argv)
    if args.space is not None and not SPACE.is_dir():
        raise FileNotFoundError(f"There is no {SPACE}: --space needs a clone of the repository, with its examples.")
    return args


def without_projection_head(
    model: "SynerNetForWeaklySupervisedSegmentation",
) -> "SynerNetForWeaklySupervisedSegmentation":
    """
    The inference-only form of a model: projection heads and prototypes, which only training uses, are left out.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): A model with or without them; it stays as it is.

    Returns:
        [`SynerNetForWeaklySupervisedSegmentation`], in evaluation mode.

    Raises:
        ValueError: If anything else than the projection heads would be lost.
    """
    from synernet_hf import SynerNetConfig

    config = SynerNetConfig.from_dict(model.config.to_dict() | {"with_projection_head": False})
    smaller = type(model)(config).to(model.dtype)
    wrong = smaller.load_state_dict(model.state_dict(), strict=False)
    lost = [name for name in wrong.unexpected_keys if ".projection_head." not in name]
    if wrong.missing_keys or lost:
        raise ValueError(f"Only the projection heads may go, but {[*wrong.missing_keys, *lost]} do not fit.")
    return smaller.eval()


def write_folder(run: Path, folder: Path, args: argparse.Namespace) -> None:
    """
    Writes everything that is pushed.

    Args:
        run (`Path`): Folder with a model, its processor and a card.
        folder (`Path`): Folder to write to.
        args (`argparse.Namespace`): `repo_id`, `license`, `no_projection_head` and `no_images`.

    Raises:
        OSError: If the run lacks a file.
        ValueError: If a file cannot be used.
    """
    from synernet_hf import SynerNetSegmentationPipeline
    from synernet_hf.model_card import published_card
    from synernet_hf.model_folder import find_model_folder, load_model_folder

    run = find_model_folder(run, on_hub=False)
    if not (run / CARD_FILE).is_file():
        raise FileNotFoundError(f"{run / CARD_FILE} is missing; give a folder as training leaves it.")
    model, processor = load_model_folder(run)
    if args.no_projection_head:
        model = without_projection_head(model)
    segmenter = SynerNetSegmentationPipeline(
        model=model,
        image_processor=processor,
        task="weakly-supervised-segmentation",
    )
    segmenter.save_pretrained(folder)
    text = (run / CARD_FILE).read_text(encoding="utf-8")
    if args.no_images:
        text = "\n".join(line for line in text.split("\n") if f"]({IMAGES_FILE})" not in line)
    elif (run / IMAGES_FILE).is_file():
        (folder / IMAGES_FILE).write_bytes((run / IMAGES_FILE).read_bytes())
    published_card(text, args.repo_id, args.license).save(folder / CARD_FILE)


def push(folder: Path, args: argparse.Namespace) -> str:
    """
    Makes the repository where it is not there yet, and commits the folder.

    Args:
        folder (`Path`): What to push; it holds files only.
        args (`argparse.Namespace`): `repo_id`, `private`, `revision`, `create_pr` and `message`.

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        ValueError: If `private` is set and the repository is there already and public; nothing is pushed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    # where somebody else's repository is there already, a pull request needs no right to write
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    # the Hub leaves a repository that is there already as it is
    if args.private and not api.repo_info(args.repo_id).private:
        raise ValueError(
            f"{args.repo_id} is public already, and --private makes only a new repository private; make it private in "
            "its settings, or name another one. Nothing was pushed."
        )
    if args.revision is not None and not args.create_pr:
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    commit = api.create_commit(
        args.repo_id,
        [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())],
        commit_message=args.message,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    return commit.pr_url or commit.commit_url


def push_space(args: argparse.Namespace) -> str:
    """
    Pushes the page that shows the model, with the package beside it, so that the Space needs no release of it.

    Args:
        args (`argparse.Namespace`): `run`, `repo_id`, `space`, `private` and `message`.

    Returns:
        `str`: Address of the commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, RepoCard

    card = RepoCard.load(SPACE / CARD_FILE)
    card.data.models = [args.repo_id]
    files = {path.name: path for path in SPACE.iterdir() if path.is_file()}
    if (args.run / EXAMPLE_FILE).is_file():
        files[f"examples/{EXAMPLE_FILE}"] = args.run / EXAMPLE_FILE
    package = Path(__file__).resolve().parents[1]
    for path in package.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".html", ".yaml"):
            files[path.relative_to(package.parent).as_posix()] = path
    files[CARD_FILE] = str(card).encode()
    api = HfApi()
    api.create_repo(args.space, repo_type="space", space_sdk="gradio", private=args.private or None, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    return api.create_commit(args.space, operations, commit_message=args.message, repo_type="space").commit_url


def run(args: argparse.Namespace) -> None:
    """Collects the files of the repository in a temporary folder and pushes them."""
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(args.run, Path(temporary), args)
        size = sum(path.stat().st_size for path in Path(temporary).iterdir())
        address = push(Path(temporary), args)
    print(f"{size / 2**20:.1f} MiB are at {address}")
    if args.space is not None:
        print(f"The page that shows them is at {push_space(args)}")


__all__ = ["make_parser", "read", "run"]
