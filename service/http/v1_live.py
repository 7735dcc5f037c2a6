"""What the service would do, and what it is doing: GET /v1/families/NAME/plan and GET /v1/status."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service import errors
from service.http import exchange, openapi
from service.pipeline import Pipeline
from service.planning import Plan, PlanOptions, plan
from service.status import Status, StatusReport

_OPTIONS = tuple(PlanOptions.model_fields)


def router(pipeline: Pipeline, report: StatusReport) -> APIRouter:
    """Both routes."""
    routes = APIRouter(prefix="/v1", tags=["v1"], dependencies=openapi.SECURITY)

    @routes.get(
        "/families/{name}/plan",
        name="plan",
        responses=openapi.responses(
            *(errors.Unauthorized, errors.UnknownModel, errors.InvalidParameter, errors.KeyLimited, errors.NotReady),
            example="plan_example",
        ),
        openapi_extra={"parameters": openapi.query_parameters(PlanOptions, headers={})},
    )
    async def plan_request(name: str, request: Request) -> Plan:
        """Which model of a family a request would get now, and how long each would take. Nothing is run or counted."""
        values = exchange.query_values(request.scope["query_string"], _OPTIONS)
        return plan(pipeline, name, exchange.validated(PlanOptions, values))

    described: dict[int | str, dict[str, Any]] = openapi.responses(
        errors.Unauthorized, errors.KeyLimited, errors.InvalidParameter, example="status_example"
    )
    described[200]["model"] = Status

    @routes.get("/status", dependencies=[Depends(exchange.known_query())], response_model=None, responses=described)
    async def status() -> Response:
        """What the service is doing: rates, percentiles, queue, refusals, choices and memory, in at most 5 kB."""
        return Response(report.json(), media_type="application/json")

    return routes
