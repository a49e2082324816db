"""The named workloads are the published ones, and random ones are what their options say."""

import pytest

from benchmarks.workloads import NAMES, LengthRange, named_workload, random_requests


def test_nano_is_the_published_workload() -> None:
    workload = named_workload("nano", 151_936)
    assert len(workload.requests) == 256
    assert workload.output_tokens == 133_966
    assert max(max(request.prompt_token_ids) for request in workload.requests) <= 10_000
    lengths = {len(request.prompt_token_ids) for request in workload.requests}
    assert min(lengths) >= 100
    assert max(lengths) <= 1024


def test_a_smaller_vocabulary_changes_ids_and_not_lengths() -> None:
    large, small = named_workload("nano", 151_936), named_workload("nano", 2048)
    assert (small.input_tokens, small.output_tokens) == (large.input_tokens, large.output_tokens)
    assert max(max(request.prompt_token_ids) for request in small.requests) == 2047


@pytest.mark.parametrize(
    ("name", "requests", "input_tokens", "output_tokens"),
    [
        ("seed", 256, 256 * 20, 256 * 725),
        ("single", 1, 128, 1024),
        ("b8", 8, 8 * 128, 8 * 512),
        ("prefill", 64, 64 * 2048, 64),
        ("longctx", 32, 32 * 8192, 32 * 256),
    ],
)
def test_fixed_workloads_have_their_sizes(name: str, requests: int, input_tokens: int, output_tokens: int) -> None:
    workload = named_workload(name, 151_936)
    assert (len(workload.requests), workload.input_tokens, workload.output_tokens) == (
        requests,
        input_tokens,
        output_tokens,
    )


def test_every_workload_is_the_same_each_time() -> None:
    for name in NAMES:
        assert named_workload(name, 5000) == named_workload(name, 5000)


def test_a_shared_prefix_comes_on_top_of_the_length() -> None:
    requests = random_requests(10, LengthRange(5, 9), LengthRange(3, 3), 1000, shared_prefix=32, seed=1)
    assert len({tuple(request.prompt_token_ids[:32]) for request in requests}) == 1
    assert {len(request.prompt_token_ids) - 32 for request in requests} <= set(range(5, 10))
    assert {request.output_len for request in requests} == {3}


@pytest.mark.parametrize("text", ["0", "5-3", "-4", "x", "", "1-2-3"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - argparse wants a plain ValueError
        LengthRange.parse(text)
