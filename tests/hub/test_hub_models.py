"""Models on a hub: pushed, tagged, private, proposed and fetched through the unmodified client."""

import os
import subprocess
import sys

import pytest
import torch
from hub_client import client_environment
from PIL import Image
from safetensors.torch import load_file

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


MODEL = "SynerNetForWeaklySupervisedSegmentation"
LOGITS = """
import torch
from PIL import Image
from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor

def logits(repo_id, **options):
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(repo_id, **options)
    processor = SynerNetImageProcessor.from_pretrained(repo_id, **options)
    with torch.no_grad():
        return model(**processor(Image.open({image!r}), return_tensors="pt")).logits
"""


@pytest.fixture(scope="module")
def logits_code(tiny_run_folder) -> str:
    """Defines `logits(repo_id)`, those of the image in the run's folder."""
    return LOGITS.format(image=str(tiny_run_folder / "image.png"))


@pytest.fixture(scope="module")
def expected(tiny_run_folder) -> torch.Tensor:
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tiny_run_folder)
    inputs = SynerNetImageProcessor.from_pretrained(tiny_run_folder)(
        Image.open(tiny_run_folder / "image.png"), return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits


def test_a_pushed_model_comes_back_with_its_code(client, pushed, logits_code, expected):
    found = client(logits_code + f"result = logits({pushed!r}).tolist()")
    assert torch.equal(torch.tensor(found), expected)
    files = client(f"from huggingface_hub import HfApi; result = HfApi().list_repo_files({pushed!r})")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_synernet.py"} <= set(files)


def test_tags_branches_and_commits_are_revisions(client, pushed, tiny_run_folder, logits_code, expected):
    first, second, now, on_branch, commits = client(
        logits_code
        + f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_tag({pushed!r}, tag="v1.0", tag_message="first release")
model = SynerNetForWeaklySupervisedSegmentation.from_pretrained({pushed!r})
for parameter in model.synernet.broad_branch.decode_head.parameters():
    parameter.data.zero_()
model.push_to_hub({pushed!r}, commit_message="Decoder emptied")
model.push_to_hub({pushed!r}, revision="experiment")
refs = api.list_repo_refs({pushed!r})
assert [tag.name for tag in refs.tags] == ["v1.0"]
assert {{branch.name for branch in refs.branches}} == {{"main", "experiment"}}
commits = api.list_repo_commits({pushed!r})
result = [
    logits({pushed!r}, revision="v1.0").tolist(),
    logits({pushed!r}, revision=refs.tags[0].target_commit).tolist(),
    logits({pushed!r}).tolist(),
    logits({pushed!r}, revision="experiment").tolist(),
    [commit.title for commit in commits],
]
"""
    )
    assert torch.equal(torch.tensor(first), expected)
    assert second == first
    assert not torch.equal(torch.tensor(now), expected)
    assert on_branch == now
    assert commits == ["Decoder emptied", "Upload processor", f"Upload {MODEL}", "initial commit"]


def test_missing_repositories_revisions_and_files_are_told_apart(client, pushed):
    load = "from synernet_hf import SynerNetForWeaklySupervisedSegmentation as Model; Model.from_pretrained({})"
    error = client.error(load.format("'owner/nowhere'"))
    assert error.startswith("OSError: owner/nowhere is not a local folder and is not a valid model identifier")
    error = client.error(load.format(f"{pushed!r}, revision='v9'"))
    assert error.startswith("OSError: v9 is not a valid git identifier")
    download = "from huggingface_hub import hf_hub_download; hf_hub_download({!r}, {!r})"
    assert client.error(download.format("owner/nowhere", "config.json")).startswith("RepositoryNotFoundError")
    assert client.error(download.format(pushed, "nothing.json")).startswith("RemoteEntryNotFoundError")


def test_private_repositories_open_to_their_owner_only(client, new_client, tiny_run_folder, logits_code, expected):
    client(
        f"""
        from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
        for kind in (SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor):
            kind.from_pretrained({str(tiny_run_folder)!r}).push_to_hub("owner/secret", private=True)
        """
    )
    found = client(logits_code + "result = logits('owner/secret').tolist()")
    assert torch.equal(torch.tensor(found), expected)
    stranger = new_client(token="hf_guest")
    load = "from synernet_hf import SynerNetForWeaklySupervisedSegmentation as Model; Model.from_pretrained({})"
    not_found = "OSError: owner/secret is not a local folder and is not a valid model identifier"
    assert stranger.error(load.format("'owner/secret', token=False")).startswith(not_found)
    assert stranger.error(load.format("'owner/secret'")).startswith(not_found)
    # an explicit token counts, whatever the environment says
    assert stranger(load.format("'owner/secret', token='hf_owner'") + "; result = 'loaded'") == "loaded"
    push = f"Model.from_pretrained({str(tiny_run_folder)!r}).push_to_hub('owner/secret')"
    error = stranger.error("from synernet_hf import SynerNetForWeaklySupervisedSegmentation as Model; " + push)
    assert "403" in error


def test_a_wrong_token_is_refused_in_words(new_client, tiny_run_folder):
    client = new_client(token="hf_expired")
    assert "Invalid user token" in client.error("from huggingface_hub import HfApi; HfApi().whoami()")
    error = client.error(
        f"""
        from synernet_hf import SynerNetForWeaklySupervisedSegmentation as Model
        Model.from_pretrained({str(tiny_run_folder)!r}).push_to_hub("owner/never_made")
        """
    )
    assert "401" in error
    assert "Invalid credentials" in error


def test_others_propose_changes_as_pull_requests(client, new_client, pushed, logits_code, expected):
    url, main, proposed = new_client(token="hf_guest")(
        logits_code
        + f"""
from huggingface_hub import HfApi
model = SynerNetForWeaklySupervisedSegmentation.from_pretrained({pushed!r})
for parameter in model.synernet.precise_branch.decode_head.parameters():
    parameter.data.zero_()
commit = model.push_to_hub({pushed!r}, create_pr=True)
result = [commit.pr_url, logits({pushed!r}).tolist(), logits({pushed!r}, revision="refs/pr/1").tolist()]
"""
    )
    assert url.endswith(f"/{pushed}/discussions/1")
    assert torch.equal(torch.tensor(main), expected)
    assert not torch.equal(torch.tensor(proposed), expected)
    refs = client(
        f"""
        from huggingface_hub import HfApi
        refs = HfApi().list_repo_refs({pushed!r}, include_pull_requests=True)
        result = [ref.ref for ref in refs.pull_requests]
        """
    )
    assert refs == ["refs/pr/1"]


def test_a_large_file_goes_over_lfs_and_is_sent_once(client, hub):
    size = 40 * 2**20
    start = len(hub.requests)
    files = client(
        f"""
        from pathlib import Path
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo("owner/large")
        Path("folder/sub").mkdir(parents=True)
        block = bytes(range(256)) * 4096
        with open("folder/sub/features.dat", "wb") as file:
            for number in range({size} // len(block)):
                file.write(block)
        Path("folder/notes.txt").write_text("small")
        api.upload_folder(repo_id="owner/large", folder_path="folder")
        api.upload_folder(repo_id="owner/large", folder_path="folder", path_in_repo="copy")
        files = api.list_repo_tree("owner/large", recursive=True)
        result = {{file.path: [file.size, bool(file.lfs)] for file in files if hasattr(file, "lfs")}}
        """
    )
    assert files["sub/features.dat"] == files["copy/sub/features.dat"] == [size, True]
    assert files["notes.txt"] == [5, False]
    uploads = [path for method, path, _ in hub.requests[start:] if method == "PUT"]
    assert len(uploads) == 1, "the second copy must not be sent again"


def test_an_interrupted_download_goes_on_where_it_stopped(client, hub):
    client(
        """
        from huggingface_hub import HfApi
        HfApi().create_repo("owner/long")
        content = bytes(range(256)) * 102400
        HfApi().upload_file(repo_id="owner/long", path_or_fileobj=content, path_in_repo="features.npz")
        """
    )
    start = len(hub.requests)
    hub.interrupt(15 * 2**20)
    is_whole = client(
        """
        from pathlib import Path
        from huggingface_hub import hf_hub_download
        result = Path(hf_hub_download("owner/long", "features.npz")).read_bytes() == bytes(range(256)) * 102400
        """
    )
    assert is_whole
    ranges = [asked for method, path, asked in hub.requests[start:] if method == "GET" and path.startswith("/lfs/")]
    # the client writes pieces of 10 MiB
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_a_download_that_was_given_up_leaves_nothing_that_passes_for_whole(client, hub, pushed, logits_code, expected):
    hub.interrupt(50_000, *[0] * 50)
    try:
        error = client.error(
            f"""
            from synernet_hf import SynerNetForWeaklySupervisedSegmentation as Model
            Model.from_pretrained({pushed!r}, cache_dir="given_up")
            """
        )
    finally:
        hub.interrupt()
    assert "Error" in error
    found = client(logits_code + f"result = logits({pushed!r}, cache_dir='given_up').tolist()")
    assert torch.equal(torch.tensor(found), expected)


def test_after_one_load_the_cache_serves_without_the_hub(new_client, hub, pushed, logits_code, expected, tmp_path):
    home = tmp_path / "home"
    online = new_client(home=home)
    load = logits_code + f"result = logits({pushed!r}).tolist()"
    online(load)
    start = len(hub.requests)
    offline = new_client(home=home, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert torch.equal(torch.tensor(offline(load)), expected)
    segment = f"""
        from transformers import pipeline
        import synernet_hf
        segmenter = pipeline("weakly-supervised-segmentation", model={pushed!r}, device="cpu")
        result = type(segmenter).__name__
    """
    assert offline(segment) == "SynerNetSegmentationPipeline"
    error = offline.error(load.replace(pushed, "owner/never_loaded"))
    assert error.startswith("OSError: We couldn't connect")
    assert "couldn't find them in the cached files" in error
    assert len(hub.requests) == start
    # with the hub in reach, a second load asks for the revision and fetches no file
    online(load)
    assert all("/revision/" in path for _, path, _ in hub.requests[start:])


def test_without_the_package_the_pushed_code_gives_the_same_logits(
    hub, client, pushed, expected, tiny_run_folder, tmp_path
):
    client(
        f"""
        from transformers import pipeline
        import synernet_hf
        segmenter = pipeline("weakly-supervised-segmentation", model={str(tiny_run_folder)!r}, device="cpu")
        segmenter.push_to_hub({pushed!r})
        """
    )
    code = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "synernet_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

repo_id = {pushed!r}
model = AutoModelForSemanticSegmentation.from_pretrained(repo_id, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=True)
base = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
assert type(base).__name__ == "SynerNetModel"
image = Image.open({str(tiny_run_folder / "image.png")!r})
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
segments = pipeline(model=repo_id, trust_remote_code=True)(image, scales=(1.0, 1.25))
assert segments[0]["mask"].size == image.size
save_file({{"logits": logits}}, "logits.safetensors")
"""
    environment = client_environment(hub, tmp_path / "home")
    environment.pop("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=0)
    assert os.listdir(tmp_path / "home" / "modules" / "transformers_modules")


def test_with_the_package_installed_a_hub_id_needs_no_flag(client, pushed, expected, tiny_run_folder):
    client(
        f"""
        from transformers import pipeline
        import synernet_hf
        segmenter = pipeline("weakly-supervised-segmentation", model={str(tiny_run_folder)!r}, device="cpu")
        segmenter.push_to_hub({pushed!r})
        """
    )
    logits, classes, sizes, files = client(
        f"""
        import builtins
        import torch
        from huggingface_hub import HfApi
        from PIL import Image
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
        import synernet_hf

        def ask(question=""):
            raise AssertionError("the user was asked: " + question)

        builtins.input = ask
        image = Image.open({str(tiny_run_folder / "image.png")!r})
        model = AutoModelForSemanticSegmentation.from_pretrained({pushed!r})
        processor = AutoImageProcessor.from_pretrained({pushed!r})
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits.tolist()
        segmenters = [
            pipeline("weakly-supervised-segmentation", model={pushed!r}),
            pipeline(model={pushed!r}),
            pipeline("image-segmentation", model={pushed!r}),
        ]
        result = [
            logits,
            [type(thing).__module__ for thing in (model, processor, *segmenters)],
            [segmenter(image)[0]["mask"].size for segmenter in segmenters],
            HfApi().list_repo_files({pushed!r}),
        ]
        """
    )
    assert "pipeline_synernet.py" in files
    assert torch.equal(torch.tensor(logits), expected)
    assert all(name.startswith("synernet_hf.model.") for name in classes)
    assert {tuple(size) for size in sizes} == {Image.open(tiny_run_folder / "image.png").size}
