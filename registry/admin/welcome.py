"""What the root path says to a person who looks."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

router = APIRouter()


@router.get("/", response_class=PlainTextResponse, include_in_schema=False)
async def welcome(request: Request) -> str:
    """Says what this is and what to try."""
    host = request.headers.get("host", "localhost:5000")
    return (
        "Entrepot, a Docker/OCI registry.\n\n"
        f"  docker tag app {host}/team/app\n"
        f"  docker push {host}/team/app\n\n"
        "API: /v2/ (OCI distribution spec), /api/v1 (accounts and rights, described at /api/docs).\n"
        "Health: /health/live, /health/ready\n"
    )
