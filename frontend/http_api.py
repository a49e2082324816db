"""The HTTP application: which path does what, and what is answered to everything else.

Completions have a module of their own; here are the routes, the list of models and the state of the engine.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from frontend.generation_config import load_sampling_defaults
from frontend.http_completions import ChatEndpoint, CompletionEndpoint
from frontend.http_errors import ModelNotFoundError, error_response, internal_error_response
from frontend.http_responses import ResponsesEndpoint, StoredResponses
from frontend.openai_responses import ModelCard, ModelList
from frontend.response_store import ResponseStore
from frontend.service import Service
from protocol.errors import EngineError


def make_app(service: Service) -> Starlette:
    """Raises ConfigError if the model's generation_config.json cannot be used."""
    defaults = load_sampling_defaults(Path(service.config.model_path))
    started = int(time.time())
    store = ResponseStore()
    stored = StoredResponses(store)

    def card() -> ModelCard:
        service.require_ready()
        return ModelCard(service.engine.model, started, service.engine.max_model_len)

    async def list_models(request: Request) -> Response:
        return _json(ModelList([card()]))

    async def show_model(request: Request) -> Response:
        model, name = card(), request.path_params["model"]
        if name != model.id:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist here; this engine serves {model.id!r}", "model"
            )
        return _json(model)

    async def health(request: Request) -> Response:
        body: dict[str, str] = {"status": service.state}
        if service.unavailable_reason is not None:
            body["reason"] = service.unavailable_reason
        return _json(body, 200 if service.state == "ready" else 503)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatEndpoint(service, defaults), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(service, defaults), methods=["POST"]),
            Route("/v1/responses", ResponsesEndpoint(service, defaults, store), methods=["POST"]),
            Route("/v1/responses/{id}", stored.show, methods=["GET"]),
            Route("/v1/responses/{id}", stored.delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/cancel", stored.cancel, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", show_model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: error_response,
            EngineError: error_response,
            Exception: internal_error_response,
        },
    )
    # A path with a slash too many is not served: API clients do not follow a redirect of a POST.
    app.router.redirect_slashes = False
    return app


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
