"""The command `stridevit`: its help, what it imports, and its errors where something is missing."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stridevit.command import COMMANDS, app
from tests.processes import PATIENCE_SECONDS, ROOT

SCRIPT = Path(sys.executable).with_name("stridevit")
OURS = ["training", "export", "service", "loadtests"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd`, with this checkout on the path wherever that is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=cwd, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def stridevit(*arguments: str, cwd: Path, without: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process in which the modules `without` are missing."""
    code = f"import sys; sys.modules.update(dict.fromkeys({without or []!r})); import stridevit.command as c; c.main()"
    return run(sys.executable, "-P", "-c", code, *arguments, cwd=cwd)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The folder of another project, whose modules have the same names as our packages."""
    (tmp_path / "service.py").write_text("raise SystemExit('the wrong service')\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise SystemExit('the wrong training')\n")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_help_line_of_a_command_is_the_first_paragraph_of_its_own_help(name: str) -> None:
    loaded = COMMANDS[name].load()
    first = inspect.cleandoc(loaded.help).split("\n\n")[0]
    assert COMMANDS[name].get_short_help_str(1000) == " ".join(first.split())


def test_every_command_of_every_package_has_one_path() -> None:
    paths: list[tuple[str, str]] = []
    for name, command in COMMANDS.items():
        loaded = command.load()
        inner = getattr(loaded, "commands", None)
        paths += (
            [(command.package, command.command or name)] if inner is None else [(command.package, n) for n in inner]
        )
    assert len(paths) == len(set(paths))
    for package in OURS:
        module: Any = __import__(f"{package}.__main__", fromlist=["app"])
        declared = {(package, name) for name in typer.main.get_group(module.app).commands}
        assert declared <= set(paths)


@pytest.mark.parametrize("name", ["train", "serve", "compare", "export", "loadtest"])
def test_help_says_stridevit_and_never_python_m(name: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}, prog_name="stridevit").output
    assert f"Usage: stridevit {name} " in shown
    assert "python -m" not in shown


def test_help_imports_no_package(tmp_path: Path) -> None:
    shown = stridevit("--help", cwd=tmp_path, without=[*OURS, "torch", "onnxruntime", "fastapi", "locust", "numpy"])
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", ["serve", "check", "key"])
def test_service_imports_no_other_package(name: str, tmp_path: Path) -> None:
    others = ["torch", "torchvision", "timm", "onnx", "locust", "training", "export", "loadtests"]
    assert stridevit(name, "--help", cwd=tmp_path, without=others).returncode == 0


@pytest.mark.parametrize(
    ("command", "missing", "message"),
    [
        ("train --help", "torch", "error: stridevit train needs PyTorch: pip install 'stridevit[train]'"),
        ("train", "torch", "error: stridevit train needs PyTorch: pip install 'stridevit[train]'"),
        ("export --help", "onnx", "error: stridevit export needs ONNX: pip install 'stridevit[export]'"),
        ("compare --help", "psutil", "error: stridevit compare needs psutil: pip install 'stridevit[loadtest]'"),
        ("classify a.jpg", "httpx", "error: stridevit classify needs httpx: pip install 'stridevit[cpu]'"),
        ("study", "training", "error: stridevit study is not part of this installation: it has no package 'training'"),
    ],
)
def test_missing_extra_is_one_line_that_names_it(command: str, missing: str, message: str, tmp_path: Path) -> None:
    ended = stridevit(*command.split(), cwd=tmp_path, without=[missing])
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", message + "\n")


def test_misspelt_command_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["sevre"])
    assert result.exit_code == 2
    assert "Did you mean 'serve'?" in result.output


def test_script_in_another_projects_folder_runs_our_packages(elsewhere: Path) -> None:
    # Each command first compares where Python finds all four packages with where ours are.
    assert run(SCRIPT, "key", cwd=elsewhere).stdout.startswith("key ")


def test_processes_started_by_the_script_run_our_packages_too(elsewhere: Path) -> None:
    code = (
        "import subprocess, sys; from stridevit import command; command.app = lambda **_: None; command.main();"
        "subprocess.run([sys.executable, '-m', 'service', 'key'], check=True)"
    )
    ended = run(sys.executable, "-P", "-c", code, cwd=elsewhere)
    assert ended.stdout.startswith("key "), ended.stderr


def test_version_is_printed(tmp_path: Path) -> None:
    assert run(SCRIPT, "--version", cwd=tmp_path).stdout.startswith("stridevit ")
