"""rules.yaml, for Prometheus and for the chart's PrometheusRule."""

from typing import Any

import yaml

from deploy.monitoring.alerts import ALERTS, RECORDED, Alert

_HEAD = "# Written by `make monitoring` from deploy/monitoring/alerts.py. Do not edit.\n"


def rules() -> str:
    """The groups of rules as YAML."""
    groups = [
        {"name": "stridevit-rates", "rules": [{"record": one.name, "expr": one.expression} for one in RECORDED]},
        {"name": "stridevit", "rules": [_rule(alert) for alert in ALERTS]},
    ]
    return _HEAD + str(yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000, allow_unicode=True))


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.action},
    }
