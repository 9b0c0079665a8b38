import tarfile

import pytest
from testing_utils import load_script


@pytest.fixture
def script():
    return load_script("run_transformers_common_tests")


def archive(folder, files):
    """A source distribution as transformers makes it, with these files."""
    tree = folder / "transformers-5.0"
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    with tarfile.open(folder / "sdist.tar.gz", "w:gz") as packed:
        packed.add(tree, arcname=tree.name)
    return folder / "sdist.tar.gz"


def test_our_classes_stand_beside_the_unpacked_suites(script, tmp_path):
    sdist = archive(tmp_path, {"tests/test_modeling_common.py": "", "src/transformers/__init__.py": ""})
    (tmp_path / "run").mkdir()
    script.lay_out(sdist, tmp_path / "run")
    ours = tmp_path / "run" / "tests" / "models" / "synernet" / "test_synernet.py"
    assert "SynerNetModelTest" in ours.read_text(encoding="utf-8")
    for name in ("tests/test_modeling_common.py", "src/transformers/__init__.py", *script.STAND_INS):
        assert (tmp_path / "run" / name).is_file()


def test_an_archive_without_the_suites_is_refused(script, tmp_path, capsys):
    sdist = archive(tmp_path, {"src/transformers/__init__.py": ""})
    assert script.main(["--sdist", str(sdist)]) == 2
    assert "holds no tests/test_modeling_common.py" in capsys.readouterr().err
    assert script.main(["--sdist", str(tmp_path / "missing.tar.gz")]) == 2


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"test_can_init_all_missing_weights": "passed"}, 0),
        ({"test_a": "passed"}, 1),
        ({"test_can_init_all_missing_weights": "passed", "test_new_models_require_torchvision_backend": "failed"}, 0),
        ({"test_a": "failed"}, 1),
        ({"test_can_init_all_missing_weights": "skipped"}, 1),
    ],
)
def test_only_the_policy_test_may_fail(script, monkeypatch, capsys, tmp_path, outcomes, code):
    monkeypatch.setattr(script, "lay_out", lambda sdist, folder: None)
    monkeypatch.setattr(script, "run_suites", lambda *args: (script.Counter(outcomes.values()), outcomes))
    assert script.main(["--sdist", str(tmp_path)]) == code
    assert f"{list(outcomes.values()).count('passed')} passed" in capsys.readouterr().out
