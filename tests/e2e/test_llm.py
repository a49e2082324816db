"""An engine of a program's own: what it answers, what its options do, and that nothing outlives the program."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from bundled import MODEL_DIR
from frontend import LLM, ConfigError, EngineUnavailableError, InvalidRequestError, SamplingParams
from protocol.address import socket_path
from tests.e2e.conftest import ROOT

# One thread, so that engines side by side do not wait for each other's.
ONE_CPU: dict[str, Any] = {"device": "cpu", "num_threads": 1}
STORY = "Once upon a time"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """With options that can be seen from outside."""
    options: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 512, "num_gpu_blocks_override": 80, "block_size": 8}
    with LLM(**ONE_CPU, enable_prefix_caching=False, served_model_name="mine", **options) as llm:
        yield llm


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def own_processes() -> list[psutil.Process]:
    """Launchers and engine processes that this program has started."""
    return [child for child in psutil.Process().children(recursive=True) if "launch.py" in " ".join(child.cmdline())]


def temporary_directories() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("mini-vllm-llm-*"))


# --- answers and options --------------------------------------------------------------------------------------------


def test_generate_chat_and_stream_answer(llm: LLM) -> None:
    first, second = llm.generate([STORY, "The capital of Italy is"], GREEDY, use_tqdm=False)
    assert first.prompt == STORY
    assert len(first.outputs[0].token_ids) == 24
    assert second.outputs[0].text.startswith(" Rome")
    (answer,) = llm.chat(FRANCE, GREEDY, use_tqdm=False)
    assert "Paris" in answer.outputs[0].text
    assert "".join(chunk.text for chunk in llm.stream(STORY, GREEDY)) == first.outputs[0].text
    assert "".join(chunk.text for chunk in llm.stream(FRANCE, GREEDY)) == answer.outputs[0].text
    with pytest.raises(InvalidRequestError, match="512"):
        llm.generate([[1] * 512], GREEDY, use_tqdm=False)


def test_options_reach_the_engine(llm: LLM) -> None:
    engine = llm.client.engine
    assert (engine.model, engine.max_model_len, engine.block_size) == ("mine", 512, 8)
    assert llm.stats().num_blocks == engine.num_blocks
    assert 64 <= engine.num_blocks <= 80

    short = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with ThreadPoolExecutor() as threads:
        calling = threads.submit(llm.generate, [STORY] * 5, short, use_tqdm=False)
        seen = []
        while not calling.done():
            stats = llm.stats()
            seen.append((stats.num_running, stats.num_waiting))
    assert max(running for running, _ in seen) == 2
    assert (2, 3) in seen

    # Long enough for several blocks, and never looked up.
    (repeated, again) = (llm.generate("word " * 100, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert repeated.outputs == again.outputs
    assert again.num_cached_tokens == 0
    assert (llm.stats().prefix_cache_queries, llm.stats().prefix_cache_hits) == (0, 0)


def test_http_is_off_unless_asked_for(llm: LLM) -> None:
    launcher = psutil.Process(llm._process.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        assert not [link for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max.num.seqs"),
        ({"max_num_seqs": "many"}, "max.num.seqs"),
        ({"gpu_memory_utilization": 1.5}, "gpu.memory.utilization"),
        ({"device": "tpu"}, "device"),
        ({"tensor_parallel_size": 2}, "tensor.parallel.size"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_before_anything_starts(options: dict[str, Any], message: str) -> None:
    processes, directories = own_processes(), temporary_directories()
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        LLM(**options)
    assert time.monotonic() - start < 0.5
    assert own_processes() == processes
    assert temporary_directories() == directories


def test_what_the_launcher_cannot_start_is_raised_in_its_words(tmp_path: Path) -> None:
    processes, directories = own_processes(), temporary_directories()
    with pytest.raises(ConfigError, match="/no/such/model: no such directory"):
        LLM("/no/such/model", device="cpu")
    with pytest.raises(ConfigError, match=r"block.size.*power of two"):
        LLM(device="cpu", block_size=24)
    with pytest.raises(ConfigError, match="ipc:///"):
        LLM(device="cpu", ipc="tcp://127.0.0.1:5555")
    assert own_processes() == processes
    assert temporary_directories() == directories


# --- the end --------------------------------------------------------------------------------------------------------


def test_close_leaves_no_process_directory_or_thread_and_may_be_repeated() -> None:
    threads, before = set(threading.enumerate()), own_processes()
    llm = LLM(**ONE_CPU)
    directory = socket_path(llm.client.address).parent
    processes = [process for process in own_processes() if process not in before]
    processes += [child for process in processes for child in process.children(recursive=True)]
    assert len(processes) >= 4
    stream = llm.stream(STORY, ENDLESS)
    next(stream)
    llm.close()
    assert not [process for process in processes if process.is_running()]
    assert not directory.exists()
    assert set(threading.enumerate()) <= threads
    llm.close()
    with pytest.raises(EngineUnavailableError, match="this LLM was closed"):
        llm.generate(STORY)
    with pytest.raises(EngineUnavailableError, match="closed"):
        next(stream)


def test_an_engine_that_is_forgotten_is_stopped_even_if_the_collector_runs_in_its_clients_thread() -> None:
    llm = LLM(**ONE_CPU)
    process, loop, reference = llm._process, llm.client._loop, weakref.ref(llm)
    llm.itself = llm  # type: ignore[attr-defined]
    gc.disable()
    try:
        del llm
        assert reference() is not None
        loop.call_soon_threadsafe(gc.collect)
        assert process.wait(10) == 0
    finally:
        gc.enable()
    wait_until(lambda: not loop.is_running(), "its client's thread has ended")


def in_a_program(rest: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A program that has an engine and goes on with `rest` when it reads a line, and the engine's processes."""
    code = (
        "import sys; from frontend import LLM, SamplingParams\n"
        "llm = LLM(device='cpu', num_threads=1)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n" + rest
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    processes = psutil.Process(program.pid).children(recursive=True)
    assert len(processes) >= 4
    return program, processes


def test_an_engine_ends_with_a_program_that_does_not_close_it() -> None:
    program, processes = in_a_program("raise SystemExit(3)")
    program.communicate("go\n", timeout=20)
    assert program.returncode == 3
    assert not [process for process in processes if process.is_running()]


def test_an_engine_ends_with_a_program_that_is_killed_in_a_stream() -> None:
    endless = "llm.stream('Once', SamplingParams(max_tokens=None, ignore_eos=True))"
    program, processes = in_a_program(f"for chunk in {endless}: print('chunk', flush=True)")
    with program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("go\n")
        program.stdin.flush()
        assert program.stdout.readline() == "chunk\n"
        program.kill()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


# --- without a tokenizer --------------------------------------------------------------------------------------------


def test_without_tokenizer_files_token_ids_go_in_and_come_out(tmp_path: Path, llm: LLM) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    ids = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode(STORY, add_special_tokens=False).ids
    (expected,) = llm.generate(ids, GREEDY, use_tqdm=False)
    with LLM(model, **ONE_CPU, skip_tokenizer_init=True) as bare:
        assert not bare.client.engine.has_tokenizer
        (result,) = bare.generate(ids, GREEDY, use_tqdm=False)
        assert result.outputs[0].token_ids == expected.outputs[0].token_ids
        assert result.outputs[0].text == ""
        assert [token for chunk in bare.stream(ids, GREEDY) for token in chunk.token_ids] == result.outputs[0].token_ids
        stop = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[result.outputs[0].token_ids[4]])
        assert bare.generate(ids, stop, use_tqdm=False)[0].outputs[0].finish_reason == "stop"
        for call, param in [
            (lambda: bare.generate(STORY, GREEDY, use_tqdm=False), "prompt"),
            (lambda: bare.chat(FRANCE, GREEDY, use_tqdm=False), "messages"),
            (lambda: bare.generate(ids, SamplingParams(stop="x"), use_tqdm=False), "stop"),
        ]:
            with pytest.raises(InvalidRequestError, match="without a tokenizer") as caught:
                call()
            assert caught.value.param == param
        stats = bare.stats()
        assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)


def test_a_model_without_tokenizer_files_says_what_is_missing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match=r"(?i)tokenizer"):
        LLM(model, **ONE_CPU)


def test_a_cpu_serves_bfloat16_too() -> None:
    with LLM(**ONE_CPU, dtype="bfloat16") as llm:
        assert "Paris" in llm.chat(FRANCE, GREEDY, use_tqdm=False)[0].outputs[0].text
