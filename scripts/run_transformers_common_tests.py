"""Runs the common test suites of transformers' source distribution against SynerNet, and prints the counts.

    python scripts/run_transformers_common_tests.py
    python scripts/run_transformers_common_tests.py --sdist transformers-5.23.0.tar.gz -- -x

The suites are not in the wheel: the source distribution of the installed version is fetched with pip (or given), its
test files are unpacked into a temporary folder beside `tests/hf_common/suites.py`, and pytest runs there. Empty
stand-ins take the place of the files that the source distribution lacks: the mixin of the exporters' tests, that of
text generation, and the one that fetches images from the Hub. Needs `pytest`, `accelerate` and `parameterized`.

Exit code: 0 if nothing failed but the tests of POLICY, 1 if something did, 2 if the suites cannot be had.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from synernet_hf.cli import CommandParser, run_command


ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / "tests" / "hf_common" / "suites.py"

# Wants a torchvision backend of every image processor added since September 2025: a rule of that repository.
POLICY = {"test_new_models_require_torchvision_backend"}

# A test that only counts if it ran: the suite leaves it out for models without a copyright line of 2023 or later.
MUST_RUN = {"test_can_init_all_missing_weights"}

EMPTY_CLASS = "class {name}:\n    pass\n"
STAND_INS = {
    "tests/exporters/test_export.py": EMPTY_CLASS.format(name="ExportTesterMixin"),
    "tests/generation/test_utils.py": EMPTY_CLASS.format(name="GenerationTesterMixin"),
    "tests/utils/test_configuration_utils.py": 'config_common_kwargs = {"output_attentions": True}\n',
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
PACKAGES = ("tests", "tests/exporters", "tests/generation", "tests/utils", "tests/models", "tests/models/synernet")


def fetch_sdist(folder: Path) -> Path:
    """Download the source distribution of the installed transformers into `folder`, without building it."""
    requirement = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", requirement]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if result.returncode or not found:
        last = (result.stderr.strip() or "pip found no source distribution").splitlines()[-1]
        raise OSError(f"The source distribution {requirement} could not be fetched ({last}); name one with --sdist.")
    return found[0]


def lay_out(sdist: Path, folder: Path) -> None:
    """Unpack the suites of `sdist` into `folder` and put the stand-ins and our classes beside them."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    tests = sorted((folder / "unpacked").glob("transformers-*/tests/test_*.py"))
    if not any(path.name == "test_modeling_common.py" for path in tests):
        raise OSError(f"{sdist} holds no tests/test_modeling_common.py; name the source distribution, not the wheel.")
    for package in PACKAGES:
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    for path in tests:
        shutil.copy(path, folder / "tests" / path.name)
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(importlib.util.find_spec("transformers").origin).parent)
    shutil.copy(SUITES, folder / "tests" / "models" / "synernet" / "test_synernet.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    generate\n", encoding="utf-8")


def run_suites(folder: Path, pytest_arguments: list[str]) -> tuple[Counter, dict[str, str]]:
    """
    Run pytest in the laid-out folder.

    Returns:
        `tuple[Counter, dict[str, str]]`: The number of tests per outcome (`passed`, `failed`, `skipped`), and the
        outcome of every test by name.
    """
    paths = [str(folder), str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    command += ["tests/models/synernet/test_synernet.py", *pytest_arguments]
    # pytest's own output goes to the error stream, so that the counts stand alone on the other
    result = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
    if not report.is_file() or result.returncode not in (0, 1):
        raise OSError(f"pytest ended with code {result.returncode} before the suites were through; see its output.")
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        name = case.get("name")
        # subtests report a case of their own under the same name: one failure fails the test, else the last counts
        if outcomes.get(name) != "failed":
            outcomes[name] = outcome
    return Counter(outcomes.values()), outcomes


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="transformers-VERSION.tar.gz; fetched with pip if left out")
    parser.add_argument("--list", action="store_true", help="also print the outcome of every test")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on to pytest, after --")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Runs the suites and prints what failed."""
    missing = [name for name in ("pytest", "accelerate", "parameterized") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"The suites need {', '.join(missing)}: pip install {' '.join(missing)}.")
    with tempfile.TemporaryDirectory(prefix="synernet_hf_common_") as name:
        folder = Path(name)
        try:
            lay_out(args.sdist or fetch_sdist(folder), folder)
        except tarfile.TarError as error:
            raise ValueError(f"{args.sdist} is not the source distribution of transformers: {error}") from error
        counts, outcomes = run_suites(folder, args.pytest_arguments)
    for test, outcome in sorted(outcomes.items()) if args.list else ():
        print(outcome, test)
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    # arguments for pytest may select other tests
    absent = "passed" if args.pytest_arguments else "skipped"
    left_out = {name for name in MUST_RUN if outcomes.get(name, absent) == "skipped"}
    print(
        f"transformers {version('transformers')}: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped"
    )
    for name in sorted(failed):
        print(f"failed: {name}" + (" (a rule of transformers' repository)" if name in POLICY else ""))
    for name in sorted(left_out):
        print(f"left out: {name}, which must run")
    return 1 if failed - POLICY or left_out else 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
