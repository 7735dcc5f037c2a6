"""Audit the supply chain: known vulnerabilities, suspicious code, the Dockerfile, and what the image holds.

python deploy/audit.py TOOLS PYTHON SBOM, where TOOLS is the `bin` of an environment of lock/audit.txt, PYTHON is the
service's own, and SBOM the file to write. Ends with 1 if an audit finds anything. Standard library only.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "stridevit", "training", "export", "loadtests", "deploy")

ACCEPTED = {
    ("B404", ""): "subprocess is imported to start our own commands and git",
    ("B603", ""): "each is started from a list of arguments, without a shell",
    ("B311", ""): "random numbers choose arrivals and samples, no secrets",
    ("B701", "loadtests/report/rendering.py"): "the templates are Markdown; those of HTML escape",
    ("B704", "loadtests/report/rendering.py"): "the text was escaped, or is a plot that matplotlib drew",
    ("B615", "training/readers.py"): "the user names the data set, and the run records its fingerprint",
}
"""What bandit may find, by test and file (empty: any file), and why it is not a fault."""

_UNREACHABLE = re.compile(r"requests\.exceptions\.|ConnectionError|Could not connect")
"""What pip-audit's errors contain if its database cannot be reached."""


def run(*command: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(  # noqa: S603 (the tools of this file)
        [str(part) for part in command], cwd=ROOT, check=False, capture_output=True, text=True, input=stdin
    )


def vulnerabilities(tools: Path) -> bool:
    """Ask PyPI about every version in lock/, and say so if it knows none of them."""
    service = pins_of(ROOT / "lock" / "service-cpu.txt")
    others = set().union(*map(pins_of, (ROOT / "lock").glob("*.txt"))) - service
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # pip-audit accepts each name once. Locks pin several versions, by Python version and for the clients.
        for number, batch in enumerate([*one_version_each(service), *one_version_each(others)]):
            file = Path(folder) / f"{number}.txt"
            file.write_text("\n".join(sorted(batch)) + "\n", encoding="utf-8")
            ended = run(
                *(tools / "pip-audit", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--timeout", "10"),
                *("--format", "json", "--requirement", file),
            )
            try:
                found += [one for one in json.loads(ended.stdout)["dependencies"] if "vulns" in one]
            except (ValueError, KeyError):
                reason = (ended.stderr.strip().splitlines() or ["no output"])[-1].partition(" (Caused")[0]
                unreachable = _UNREACHABLE.search(ended.stderr) is not None
                print(f"vulnerabilities: {'not audited' if unreachable else 'pip-audit failed'}: {reason}")
                return unreachable
            if not found:
                print("vulnerabilities: not audited: pip-audit's database knows none of the service's versions")
                return True
    for package in found:
        for fault in package["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no version"
            print(f"  {package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    bad = sum(bool(package["vulns"]) for package in found)
    unknown = len(service | others) - len(found)
    print(f"vulnerabilities: known in {bad} of {len(found)} locked versions; nothing is known of {unknown} others")
    return not bad


def pins_of(lock: Path) -> set[str]:
    """What a lock file pins, as name==version."""
    return set(re.findall(r"^([A-Za-z0-9_.-]+==[^\s;\\]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))


def one_version_each(pins: set[str]) -> list[set[str]]:
    """Split pins into sets in which each name occurs once."""
    batches: list[dict[str, str]] = []
    for pin in sorted(pins):
        name = pin.partition("==")[0]
        for batch in batches:
            if name not in batch:
                batch[name] = pin
                break
        else:
            batches.append({name: pin})
    return [set(batch.values()) for batch in batches]


def code(tools: Path) -> bool:
    """Look for suspicious code with bandit, beyond what is accepted above."""
    ended = run(tools / "bandit", "--quiet", "--format", "json", "--recursive", *PACKAGES)
    results = json.loads(ended.stdout)["results"]
    used: set[tuple[str, str]] = set()
    bad = 0
    for result in results:
        places = [(result["test_id"], result["filename"].removeprefix("./")), (result["test_id"], "")]
        accepted = [place for place in places if place in ACCEPTED]
        used.update(accepted)
        if not accepted:
            bad += 1
            print(f"  {result['filename']}:{result['line_number']}: {result['test_id']} {result['issue_text']}")
    for test, file in sorted(ACCEPTED.keys() - used):
        print(f"  {test} is accepted in {file or 'all files'} and occurs nowhere: remove it from deploy/audit.py")
        bad += 1
    print(f"code: {bad} findings of bandit beyond the {len(results) - bad} that are accepted with a reason")
    return not bad


def dockerfile(tools: Path) -> bool:
    """Lint the Dockerfile with hadolint."""
    ended = run(tools / "hadolint", "--no-color", "Dockerfile")
    sys.stdout.write(ended.stdout + ended.stderr)
    print(f"Dockerfile: {len(ended.stdout.splitlines())} findings of hadolint")
    return ended.returncode == 0


def bill_of_materials(tools: Path, python: Path, out: Path) -> bool:
    """Write the content of the image's environment as CycloneDX: the service's, less what the Dockerfile removes."""
    ended = run(
        *(tools / "cyclonedx-py", "environment", "--pyproject", "pyproject.toml", "--output-reproducible"),
        *("--output-format", "JSON", python),
    )
    if ended.returncode:
        print(f"bill of materials: cyclonedx-py failed:\n{ended.stderr}")
        return False
    bom = json.loads(ended.stdout)
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    removed = {name for line in re.findall(r"pip uninstall .*--yes (.*)", text) for name in line.split()}
    gone = {part["bom-ref"] for part in bom["components"] if part["name"].lower().replace("_", "-") in removed}
    bom["components"] = [part for part in bom["components"] if part["bom-ref"] not in gone]
    bom["dependencies"] = [
        {**node, "dependsOn": [ref for ref in node["dependsOn"] if ref not in gone]} if "dependsOn" in node else node
        for node in bom["dependencies"]
        if node["ref"] not in gone
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")
    print(f"bill of materials: {len(bom['components'])} Python packages of the image cpu, in {out}")
    return True


def main() -> None:
    """Run all audits, whatever any of them finds."""
    tools, python, out = map(Path, sys.argv[1:])
    good = [vulnerabilities(tools), code(tools), dockerfile(tools), bill_of_materials(tools, python, out)]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
