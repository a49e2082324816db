"""What docs/security.md claims of the running engine and of its source."""

from __future__ import annotations

import ast
import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from bundled import MODEL_DIR
from frontend import Client, SamplingParams
from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from protocol.config import make_options
from protocol.errors import ConfigError, EngineError, InvalidRequestError
from protocol.messages import Refused
from tests.e2e.conftest import ROOT, RunningEngine
from tests.frontend.ipc_client import Client as RawClient

KEY, WRONG_KEY = "sk-marker-of-the-key", "sk-marker-of-a-wrong-key"
MARKER = "marker of a prompt"

# --- source ---------------------------------------------------------------------------------------------------------

PRODUCT = [path for name in ("frontend", "core", "protocol", "worker") for path in (ROOT / name).rglob("*.py")]
PRODUCT.append(ROOT / "launch.py")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib", "code"}
# What runs text as a program, or a shell; `torch.load` reads pickles.
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "create_subprocess_shell", "getoutput"}
ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}
KEYWORDS = ("shell", "trust_remote_code", "allow_pickle")
OF_LIBRARIES = {("re", "compile"), ("triton", "compile"), ("torch", "compile"), ("self._grammars", "compile")}


def dangers(source: str) -> list[str]:
    """What in a program's text can run data as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS:
                found.append(function.id)
            if isinstance(function, ast.Attribute):
                owner = ast.unparse(function.value)
                if (owner, function.attr) in ATTRIBUTES or (
                    function.attr in CALLS and (owner, function.attr) not in OF_LIBRARIES
                ):
                    found.append(f"{owner}.{function.attr}")
            found += [keyword.arg for keyword in node.keywords if keyword.arg in KEYWORDS]
    return found


def test_the_product_has_no_pickle_no_eval_no_yaml_and_no_shell() -> None:
    assert len(PRODUCT) > 80
    assert {str(path): found for path in PRODUCT if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval('1')",
        "exec(a)",
        "torch.load(f)",
        "os.system(a)",
        "compile(a)",
        "subprocess.run(a, shell=True)",
        "AutoModel.from_pretrained(a, trust_remote_code=True)",
        "builtins.eval(a)",
    ],
)
def test_each_of_these_would_be_found(source: str) -> None:
    assert dangers(source)


# --- chat templates -------------------------------------------------------------------------------------------------

INJECTIONS = [
    "{{ 7*7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('x') }}",
    "{# comment #}",
    "{%- set messages = [] -%}",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_template_code_in_a_request_is_text(text: str) -> None:
    tokenizer = Tokenizer.load(MODEL_DIR, MODEL_DIR / "tokenizer.json", 2048)
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": {"a": text}}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": text},
        {"role": "user", "content": text},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    prompt = tokenizer.render_chat(messages, tools, {"enable_thinking": text})
    assert prompt.count(text) >= 5
    assert "49" not in prompt


TRICKS = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ kwarg.__class__.__base__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ kwarg.update(a=1) }}",
    "{{ range(10**9) | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", TRICKS)
def test_a_models_template_gets_at_nothing_but_its_variables(source: str) -> None:
    """The template is the model's, not a request's; one that tries more than to write text is refused all the same."""
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "a"}], None, {"kwarg": {}})
    except (InvalidRequestError, ConfigError):
        return
    # A forbidden attribute may also be an undefined one, which writes nothing.
    assert text.strip() == ""


def test_a_request_cannot_bring_a_template_or_take_a_name_of_the_engines(engine: RunningEngine) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for fields, param in (
        ({"chat_template": "{{ 7*7 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ):
        response = engine.http.post("/v1/chat/completions", json={**chat, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# --- keys, logs, files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """An engine that logs all it ever would."""
    directory = tmp_path_factory.mktemp("talkative")
    directory.chmod(0o700)
    flags = ("--port", "0", "--log-level", "debug", "--access-log", "--api-key", KEY)
    running = RunningEngine(directory, *flags).wait_until_ready()
    yield running
    running.stop_at_any_cost()


def _requests(http: httpx.Client) -> Iterator[httpx.Response]:
    for key in (KEY, WRONG_KEY):
        headers = {"Authorization": f"Bearer {key}"}
        chat = [{"role": "user", "content": MARKER}]
        for path, body in (
            ("/v1/completions", {"prompt": MARKER, "max_tokens": 2}),
            ("/v1/completions", {"prompt": MARKER, "max_tokens": 2, "echo": True, "stream": True}),
            ("/v1/completions", {"prompt": MARKER, "max_tokens": -2}),
            ("/v1/completions", {"prompt": MARKER, "stop": MARKER * 1000}),
            ("/v1/completions", {"prompt": MARKER * 20_000}),
            ("/v1/completions", {MARKER: 1}),
            ("/v1/chat/completions", {"messages": chat, "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": chat, "tools": [{"type": MARKER}]}),
            ("/v1/chat/completions", {"messages": [{"role": MARKER, "content": [MARKER]}]}),
            ("/v1/chat/completions", {"messages": chat, "structured_outputs": {"regex": f"({MARKER}"}}),
            ("/v1/responses", {"input": MARKER, "max_output_tokens": 2, "metadata": {"a": MARKER}}),
            ("/tokenize", {"prompt": MARKER}),
        ):
            yield http.post(path, json=body, headers=headers, params={"a": MARKER})
        yield http.post("/v1/completions", content=f'{{"prompt": "{MARKER}', headers=headers)
        yield http.get("/v1/models", headers={"Authorization": f"Basic {key}"})


def test_neither_keys_nor_prompts_are_ever_logged(talkative: RunningEngine) -> None:
    statuses = [response.status_code for response in _requests(talkative.http)]
    assert {200, 400, 401} == set(statuses)
    assert 500 not in statuses
    with Client(talkative.address) as client:
        client.generate([MARKER], SamplingParams(max_tokens=2))
        for wrong in (SamplingParams(stop=[MARKER], max_tokens=2), SamplingParams(bad_words=["x" * 1000])):
            with contextlib.suppress(EngineError):
                client.generate([MARKER * 20_000], wrong)
    raw = RawClient(talkative.address)
    try:
        for frame in (
            b"\xa5" + MARKER.encode(),
            msgspec.msgpack.encode(["Generate", 1, ["TextPrompt", MARKER], MARKER]),
        ):
            raw.channel.socket.send(frame)
            raw.receive(Refused)
        raw.generate(2, MARKER, SamplingParams(stop=MARKER, max_tokens=2))
        raw.gather(2)
    finally:
        raw.close()
    assert "access method=POST path=/v1/completions status=400" in talkative.output
    for secret in (KEY, WRONG_KEY, MARKER, "marker"):
        assert secret not in talkative.output


def test_a_key_in_an_error_of_the_configuration_is_not_shown() -> None:
    for key in ("sk-hush hush", "sk-hush,", 5, ["sk-hush", 7]):
        with pytest.raises(ConfigError) as error:
            make_options({"api_key": key})
        assert "hush" not in str(error.value)


def test_the_files_of_a_running_engine_are_its_users_alone(engine: RunningEngine) -> None:
    files = [path for path in Path(engine.directory).rglob("*") if not path.is_dir()]
    sockets = [path for path in files if stat.S_ISSOCK(path.stat().st_mode)]
    controls = {"to-frontend-0", "to-core-0", "to-worker-0"}
    assert {path.name for path in sockets} == {
        "engine.sock",
        "core-0",
        "worker-0",
        "launcher.sock",
    } | controls
    for path in files:
        if path in sockets or path.suffix in (".lock", ".json"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for directory in {path.parent for path in files}:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory


# --- tenants --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_found_in_the_cache_only_under_its_own_salt(engine: RunningEngine) -> None:
    def cached(salt: str | None, path: str = "/v1/completions") -> int:
        prompt = list(range(300, 365))
        body = {"prompt": prompt, "max_tokens": 1} | ({"cache_salt": salt} if salt is not None else {})
        return int(engine.http.post(path, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("of one tenant") == 0
    assert cached("of one tenant") == 64
    assert cached("of another") == 0
    assert cached(None) == 0
    assert cached(None) == 64
    assert cached("of one tenant") == 64
    with Client(engine.address) as client:
        for salt, expected in (("of one tenant", 64), ("of a third", 0), (None, 64)):
            (result,) = client.generate([list(range(300, 365))], SamplingParams(max_tokens=1), cache_salt=salt)
            assert result.num_cached_tokens == expected
