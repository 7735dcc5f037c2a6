"""The command line: every setting is a flag, and what the commands print."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from service import __main__ as command_line
from service import running
from service.errors import StartupError
from service.flags import markdown
from service.key_file import entries_of_settings, read_keys
from service.keys import KeyRing
from service.metrics import Metrics
from service.settings import ENV_PREFIX, Settings
from tests.processes import PATIENCE_SECONDS, ROOT

pytestmark = pytest.mark.usefixtures("_no_logging")

HASH = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


@pytest.fixture
def damaged(repository: Path, tmp_path: Path) -> Path:
    """A repository of a good model and a damaged one."""
    folder = tmp_path / "models"
    shutil.copytree(repository, folder)
    shutil.copytree(folder / "digits-csra-r2", folder / "digits-damaged")
    (folder / "digits-damaged" / "1" / "labels.txt").write_text("zero\n")
    return folder


def run(*arguments: str, columns: int = 200) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(command_line.app, arguments, env={"COLUMNS": str(columns)})


def row(result: Result, name: str) -> list[str]:
    """The other cells of the table's row that begins with `name`."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if line[:1] == "│"]
    return next(cells[1:] for cells in rows if cells[0] == name)


@pytest.mark.parametrize("path", [[], ["check"], ["settings"]])
def test_every_setting_is_a_flag_of_every_command_that_reads_settings(path: list[str]) -> None:
    command: Any = typer.main.get_command(command_line.app)
    for name in path:
        command = command.commands[name]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    for name, field in Settings.model_fields.items():
        option = options["--" + name.replace("_", "-")]
        assert " ".join((field.description or "").split()) in option.help, name
        assert bool(option.secondary_opts) == (field.annotation is bool), name


def test_help_shows_flags_in_their_groups_with_their_defaults() -> None:
    lines = run("--help").stdout.splitlines()
    network = next(number for number, line in enumerate(lines) if "─ Network ─" in line)
    port = next(number for number, line in enumerate(lines) if "│ --port " in line)
    security = next(number for number, line in enumerate(lines) if "─ Security ─" in line)
    assert network < port < security
    assert "[8000]" in lines[port]
    assert any("--tf32" in line and "--no-tf32" in line for line in lines)


def test_settings_show_the_value_in_effect_and_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "s.toml"
    config.write_text('max_batch = 2\nmax_images_per_request = 3\ndevice = "cpu"\ntf32 = true\n')
    monkeypatch.setenv("STRIDEVIT_MAX_BATCH", "4")
    monkeypatch.setenv("STRIDEVIT_MAX_IMAGES_PER_REQUEST", "5")
    result = run("settings", "--config", str(config), "--max-batch", "6", "--models", "a,b", "--no-tf32")
    assert result.exit_code == 0, result.output
    assert row(result, "max_batch") == ["6", "flag --max-batch"]
    assert row(result, "max_images_per_request") == ["5", "environment STRIDEVIT_MAX_IMAGES_PER_REQUEST"]
    assert row(result, "device") == ["cpu", f"file {config}"]
    assert row(result, "tf32") == ["false", "flag --tf32"]
    assert row(result, "models") == ["a,b", "flag --models"]
    assert row(result, "port") == ["8000", "default"]


def test_an_empty_flag_resets_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "s.toml"
    config.write_text("port = 1\n")
    monkeypatch.setenv("STRIDEVIT_CONFIG", str(config))
    monkeypatch.setenv("STRIDEVIT_MODELS", "a")
    result = run("settings", "--config", "", "--models", "", "--default-model", "")
    assert row(result, "port") == ["8000", "default"]
    assert row(result, "models")[0] == "–"
    assert row(result, "default_model")[0] == "–"


def test_flags_before_a_command_hold_for_it_and_its_own_override_them() -> None:
    result = run("--port", "1", "--host", "::1", "settings", "--port", "2")
    assert row(result, "port")[0] == "2"
    assert row(result, "host")[0] == "::1"


def test_an_invalid_value_ends_with_2_and_a_line_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_PORT", "tcp://10.0.0.1:80")
    result = run("settings", "--max-batch", "0")
    assert result.exit_code == 2
    assert "error: port (from environment STRIDEVIT_PORT): Input should be a valid integer" in result.stderr
    assert "error: max_batch (from flag --max-batch): Input should be greater than 0" in result.stderr


def test_an_unknown_key_of_the_file_ends_with_2_and_names_the_nearest_setting(tmp_path: Path) -> None:
    config = tmp_path / "s.toml"
    config.write_text("max_bacth = 2\n")
    result = run("settings", "--config", str(config))
    assert result.exit_code == 2
    assert "unknown setting 'max_bacth': did you mean 'max_batch'?" in result.stderr


def test_a_misspelt_variable_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_MAX_BACTH", "2")
    monkeypatch.setenv("STRIDEVIT_DATA", "somewhere")
    result = run("settings")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "warning: STRIDEVIT_MAX_BACTH is not a setting: did you mean STRIDEVIT_MAX_BATCH?"
    ]


def test_hashes_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_ADMIN_KEY_HASH", HASH)
    shown = run("settings", "--api-key-hashes", f"{HASH},{HASH}")
    assert row(shown, "api_key_hashes") == ["hidden", "flag --api-key-hashes"]
    assert row(shown, "admin_key_hash") == ["hidden", "environment STRIDEVIT_ADMIN_KEY_HASH"]
    failed = run("settings", "--api-key-hashes", f"{HASH},my-secret-key", "--port", "x")
    assert failed.exit_code == 2
    assert HASH not in shown.output + failed.output
    assert "my-secret-key" not in failed.output


def test_the_page_of_settings_is_current() -> None:
    renew = "renew it: stridevit settings --markdown > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == markdown(), renew
    assert run("settings", "--markdown").stdout == markdown()


def test_a_new_key_is_printed_with_the_hash_that_accepts_it() -> None:
    result = run("key")
    key, digest = (line.split()[-1] for line in result.stdout.splitlines())
    assert KeyRing(entries_of_settings(Settings(api_key_hashes=(digest,)).api_key_hashes, None)).find(key)


def test_an_entry_for_the_file_of_keys_is_printed_apart_from_its_key(tmp_path: Path) -> None:
    limits = ("--requests-per-second", "2.5", "--burst", "5", "--max-concurrent", "3", "--days", "30")
    result = run("key", "--name", "alice", "--scope", "classify", "--scope", "read", *limits)
    key = result.stderr.split()[-1]
    assert key not in result.stdout
    file = tmp_path / "keys.toml"
    file.write_text(result.stdout + run("key", "--name", "bob").stdout)
    alice, bob = read_keys(file)[0]
    assert KeyRing([alice]).find(key)
    assert (alice.name, alice.scopes, alice.max_concurrent) == ("alice", frozenset({"classify", "read"}), 3)
    assert (alice.requests_per_second, alice.burst) == (2.5, 5)
    assert alice.expires
    assert (bob.name, bob.scopes, bob.expires) == ("bob", frozenset({"classify"}), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scope", "read"], "a key with a --name"),
        (["--name", "a b"], "name: String should match"),
        (["--name", "a", "--scope", "all"], "Input should be 'classify', 'read' or 'admin'"),
        (["--name", "a", "--burst", "2"], "burst needs requests_per_second"),
    ],
)
def test_an_entry_that_the_service_would_refuse_is_not_printed(arguments: list[str], message: str) -> None:
    result = run("key", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "sha256" not in result.stdout


def test_check_of_a_good_repository_names_each_model_and_ends_with_0(repository: Path) -> None:
    result = run("check", "--repository", str(repository), "--threads", "1", "--max-batch", "2")
    assert result.exit_code == 0, result.output
    version, variant, precision, top1, state = row(result, "digits-csra-r2")
    assert (version, variant, precision, state) == ("1", "csra-r2", "fp32", "good")
    assert top1.endswith("%")


def test_check_of_a_damaged_repository_gives_the_reason_and_ends_with_1(damaged: Path) -> None:
    arguments = ["check", "--repository", str(damaged), "--threads", "1", "--max-batch", "2"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert row(result, "digits-csra-r2")[-1] == "good"
    assert "labels.txt: sha256 is" in row(result, "digits-damaged")[-1]
    assert row(run(*arguments, columns=72), "digits-damaged")[0] == "1", "names stay whole in a narrow terminal"
    # A damaged model that is not served does no harm.
    assert run(*arguments, "--models", "digits-csra-r2").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "no-such-model"], "no version of it"),
        (["--default-model", "no-such-model"], "default_model 'no-such-model' is not among the good models"),
        (["--repository", "no-such-folder"], "no model repository at no-such-folder"),
        (["--device", "toaster"], "unknown device 'toaster'"),
    ],
)
def test_check_of_a_model_or_device_that_is_missing_ends_with_1(
    arguments: list[str], message: str, repository: Path
) -> None:
    result = run("check", "--repository", str(repository), "--threads", "1", "--max-batch", "1", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_check_in_a_process_of_its_own_prints_the_table_alone(damaged: Path) -> None:
    command = [sys.executable, "-m", "service", "check", "--repository", str(damaged), "--max-batch", "1"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 1
    assert "digits-damaged" in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "trusted"), [([], []), (["--trusted-proxies", "10.0.0.0/8,::1"], ["10.0.0.0/8", "::1"])]
)
def test_only_named_proxies_are_trusted(
    arguments: list[str], trusted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Listening:
        started = True

        def __init__(self, *_: object, trusted_proxies: tuple[str, ...], **__: object) -> None:
            seen.append(trusted_proxies)

        def run(self, sockets: object) -> None:
            assert sockets is None

    class Application:
        class state:  # noqa: N801
            pipeline = SimpleNamespace(metrics=Metrics())
            key_file = None
            judge = SimpleNamespace(refusal=lambda _: None, pressed=lambda: False)

    monkeypatch.setattr(running, "Server", Listening)
    monkeypatch.setattr(running, "create_app", lambda _: Application)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run(*arguments).exit_code == 0
    assert list(seen[0]) == trusted


def test_sigterm_while_models_are_loaded_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def create_app(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise StartupError("it would load for minutes")

    monkeypatch.setattr(running, "leave_at_once", left.append)
    monkeypatch.setattr(running, "create_app", create_app)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        run()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert left == [128 + signal.SIGTERM]
