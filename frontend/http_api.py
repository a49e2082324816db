"""The HTTP application: which path does what, and what is answered to everything else.

Completions have a module of their own; here are the routes, the list of models and the state of the engine.
"""

from __future__ import annotations

import time

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from frontend.http_auth import ApiKeyMiddleware
from frontend.http_completions import ChatEndpoint, CompletionEndpoint
from frontend.http_errors import error_response, internal_error_response, require_model
from frontend.http_exchange import REQUEST_ID_HEADER, ExchangeMiddleware
from frontend.http_responses import ResponsesEndpoint, StoredResponses
from frontend.http_tokenize import DetokenizeEndpoint, TokenizeEndpoint
from frontend.metrics import render_metrics
from frontend.openai_responses import ModelCard, ModelList
from frontend.openapi import openapi_document
from frontend.page import page_routes
from frontend.response_store import ResponseStore
from frontend.service import Service
from protocol import __version__
from protocol.config import EngineOptions
from protocol.errors import EngineError


def make_app(service: Service) -> ASGIApp:
    """The routes, and around them keys, origins, and outermost request ids and the access log."""
    options = service.config.options
    app: ASGIApp = _make_routes(service)
    if options.api_key:
        app = ApiKeyMiddleware(app, options.api_key)
    if options.allowed_origins:
        app = _allow_origins(app, options)
    return ExchangeMiddleware(app, access_log=options.access_log)


def _allow_origins(app: ASGIApp, options: EngineOptions) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=options.allowed_origins,
        allow_methods=options.allowed_methods,
        allow_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
        expose_headers=[REQUEST_ID_HEADER],
    )


def _make_routes(service: Service) -> Starlette:
    defaults = service.sampling_defaults
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
        require_model(name, model.id)
        return _json(model)

    async def health(request: Request) -> Response:
        body: dict[str, str] = {"status": service.state}
        if service.unavailable_reason is not None:
            body["reason"] = service.unavailable_reason
        return _json(body, 200 if service.state == "ready" else 503)

    async def version(request: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(request: Request) -> Response:
        stats = await service.engine_stats()
        accept = request.headers.get("accept", "")
        num_refused = service.admission.num_refused
        body, content_type = render_metrics(service.config.model_name, service.metrics, num_refused, stats, accept)
        return Response(body, headers={"content-type": content_type})

    document = msgspec.json.encode(openapi_document(with_keys=bool(service.config.options.api_key)))

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

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
            Route("/ping", health, methods=["GET", "POST"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/tokenize", TokenizeEndpoint(service), methods=["POST"]),
            Route("/detokenize", DetokenizeEndpoint(service), methods=["POST"]),
            *page_routes(),
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
