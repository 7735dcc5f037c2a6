"""dashboard.json, built with Grafana's own SDK, so that it has the form that Grafana reads."""

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

from deploy.monitoring.panels import PANELS, Panel

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 8, 8
"""Out of Grafana's 24 columns: three panels in a row."""


def dashboard() -> str:
    """The dashboard as JSON."""
    builder = (
        Dashboard("StrideViT")
        .uid("stridevit")
        .tags(["stridevit"])
        .description("Is it healthy, is it full, and what do answers cost? Written by `make monitoring`.")
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", "stridevit_model_info"))
        .with_variable(_variable("instance", 'stridevit_model_info{job=~"$job"}'))
    )
    for panel in PANELS:
        builder.with_panel(_time_series(panel))
    return str(JSONEncoder(sort_keys=True, indent=2).encode(builder.build())) + "\n"


def _variable(name: str, selector: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .label(name.capitalize())
        .datasource(_SOURCE)
        .query(f"label_values({selector}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _time_series(panel: Panel) -> TimeSeries:
    return (
        TimeSeries()
        .title(panel.title)
        .description(panel.meaning)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(_WIDTH)
        .height(_HEIGHT)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .with_target(Dataquery().ref_id("A").expr(panel.expression).legend_format(panel.legend))
    )
