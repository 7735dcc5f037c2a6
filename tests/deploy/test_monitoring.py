"""Dashboard and alerts against the service's metrics: by name, and in a real Prometheus that scrapes it."""

import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy.monitoring.alerts import ALERTS, RECORDED
from deploy.monitoring.page import page
from deploy.monitoring.panels import PANELS
from deploy.monitoring.rules import rules
from loadtests.faults.models import publish_numbered
from loadtests.faults.numbers import GUILTY, picture
from tests.deploy.prometheus import metric_names, needs_prometheus, scraping, selectors
from tests.processes import PATIENCE_SECONDS, PATIENT_SERVICE, ROOT, post, serving

MONITORING = ROOT / "deploy" / "monitoring"
RULES = MONITORING / "rules.yaml"
ON_TRIAL = {
    "STRIDEVIT_SHADOW": "cifar100-csra-r4:cifar100-csra-r2=100%",
    "STRIDEVIT_CANARY": "cifar100-csra-r2:cifar100-csra-r4=50%",
}
RENEW = "renew it: make monitoring"


def _dashboard_expressions() -> dict[str, str]:
    """The expressions of the committed dashboard, by the titles of its panels."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    return {panel["title"]: target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}


def _rule_expressions() -> dict[str, str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule.get("alert") or rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_what_is_committed_is_what_the_code_makes() -> None:
    """The dashboard's other parts need Grafana's SDK: `make deploy-check` compares the whole file."""
    assert _dashboard_expressions() == {panel.title: panel.expression for panel in PANELS}, RENEW
    chart = ROOT / "deploy" / "helm" / "stridevit" / "files" / "rules.yaml"
    assert RULES.read_text(encoding="utf-8") == chart.read_text(encoding="utf-8") == rules(), RENEW
    docs = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert page(docs) == docs, RENEW


def _scaling_queries() -> list[str]:
    """What KEDA asks, of the chart's Deployment and for KServe, with the labels that this Prometheus gives."""
    files = ("deploy/helm/stridevit/templates/autoscaling.yaml", "deploy/kserve/inferenceservice.yaml")
    found = [re.findall(r"query: (.*)", (ROOT / file).read_text(encoding="utf-8")) for file in files]
    return [re.sub(r"\{.*\}\[", '{job="stridevit"}[', query) for (query,) in found]


def _metrics_of_the_page() -> set[str]:
    """By docs/metrics.md, which another test holds equal to /metrics; a histogram has more series than its name."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^\| `([a-z_]+)`", text, re.MULTILINE))
    return there | {f"{metric}_{end}" for metric in there for end in ("bucket", "sum", "count")} | {"up"}


def test_every_metric_of_dashboard_rules_and_autoscalers_exists() -> None:
    there = _metrics_of_the_page()
    for query in _scaling_queries():
        assert metric_names(query) == {"stridevit_predicted_drain_seconds"}
    chart = (ROOT / "deploy/helm/stridevit/templates/autoscaling.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"stridevit_[a-z_]+", chart)) == {"stridevit_predicted_drain_seconds"} <= there
    for title, expression in {**_dashboard_expressions(), **_rule_expressions()}.items():
        assert selectors(expression), title
        assert metric_names(expression) - there == set(), title


def test_every_recorded_rate_is_used_and_every_used_one_is_recorded() -> None:
    used = {name for alert in ALERTS for name in re.findall(r"stridevit:[a-z0-9_:]+", alert.expression)}
    assert used == {one.name for one in RECORDED}


def _answered(url: str, photo: bytes) -> None:
    """Requests that make every series of a service whose models are the shipped ones and a faulty one."""
    asked: list[tuple[str, bytes, int]] = [
        ("/v1/classify?model=cifar100", photo, 200),
        ("/v2/models/cifar100-csra-r4/infer?deadline_ms=0.01", _v2_body(), 429),
        ("/v2/models/cifar100-csra-r4/infer", _v2_body(), 200),
        ("/hf/cifar100-csra-r4", photo, 200),
        ("/v1/classify?model=cifar100-csra-r2", photo, 200),
        ("/v1/classify?model=numbered-nan", picture(GUILTY), 500),
    ]
    for path, body, status in asked:
        answer = post(url + path, body)
        assert answer.status_code == status, answer.text


def _v2_body() -> bytes:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [128] * 32 * 32 * 3}
    return json.dumps({"inputs": [tensor]}).encode()


@needs_prometheus
@pytest.mark.slow
@pytest.mark.timeout(
    1200
)  # twice PATIENCE_SECONDS: a service that starts, then a Prometheus that has scraped all of it
def test_every_selector_matches_a_series_and_every_panel_has_data(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    for name in ("cifar100-csra-r2", "cifar100-csra-r4"):
        (repository / name).symlink_to(ROOT / "models" / name)
    publish_numbered(repository, "numbered-nan")
    photo = picture(1)
    panels = {
        title: expression.replace("$job", "stridevit").replace("$instance", ".*").replace("$__rate_interval", "1m")
        for title, expression in _dashboard_expressions().items()
    }
    wanted = {selector for one in (*panels.values(), *_rule_expressions().values()) for selector in selectors(one)}
    with (
        # A model of faults must go on serving, to fail again.
        serving(repository, environment={**PATIENT_SERVICE, "STRIDEVIT_MAX_CONSECUTIVE_FAULTS": "0", **ON_TRIAL}) as (
            url,
            _,
        ),
        scraping(url.removeprefix("http://"), RULES, tmp_path) as prometheus,
    ):

        def missing() -> list[str]:
            _answered(url, photo)
            without = [one for one in sorted(wanted) if not prometheus.matches(one)]
            return without or [title for title, one in panels.items() if not _data(prometheus.values(one))]

        _poll(missing)
        assert prometheus.rule_errors() == {}
        assert all(_data(prometheus.values(query)) for query in _scaling_queries())
        assert not prometheus.matches('stridevit_requests_renamed_total{job="stridevit"}')


def _data(values: list[float]) -> bool:
    """Whether an expression has at least one value, and a number."""
    return any(math.isfinite(value) for value in values)


def _poll(missing: Callable[[], list[str]]) -> None:
    """Ask until nothing is missing: rates need two scrapes, and a busy machine scrapes late."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while lacks := missing():
        assert time.monotonic() < deadline, lacks
        time.sleep(0.3)


def _promtool(rules_text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`promtool test rules` with these rules."""
    (folder / "rules.yaml").write_text(rules_text, encoding="utf-8")
    tests = (MONITORING / "rules-test.yaml").read_text(encoding="utf-8")
    (folder / "rules-test.yaml").write_text(tests, encoding="utf-8")
    command = ["promtool", "test", "rules", "rules-test.yaml"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


@needs_prometheus
@pytest.mark.slow
def test_each_alert_fires_in_its_world_and_not_in_another(tmp_path: Path) -> None:
    checked = subprocess.run(["promtool", "check", "rules", RULES], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = _promtool(rules(), tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize("always", [True, False], ids=["always fire", "never fire"])
def test_alerts_that_always_or_never_fire_fail_the_tests_of_each(tmp_path: Path, always: bool) -> None:
    document = yaml.safe_load(rules())
    for group in document["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule.update({"expr": f"vector(1) {'>' if always else '<'} 0", "for": "0s"})
    tested = _promtool(yaml.safe_dump(document), tmp_path)
    assert tested.returncode != 0
    noticed = set(re.findall(r"alertname: *(\w+)", tested.stdout + tested.stderr))
    assert noticed == {alert.name for alert in ALERTS}
